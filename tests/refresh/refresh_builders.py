"""What the tests of builders share: a hook into children, options, and looks at processes."""

import contextlib
import time
from pathlib import Path

import numpy as np
from refresh_tasks import DOCUMENTS, make_params, wait_for

from ragjax.index import ScannOptions
from ragjax.refresh import BuildOptions

# Runs in every child before anything else and meets it at a moment: when the interpreter has
# started, or when the index is written but not yet complete.
HOOK = """
import os, signal, sys, time

def act():
    action = os.environ["ACTION"]
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "abort":
        os.write(2, b"F0000 00:00:00 kmeans.cc:12] Check failed: norm > 0 (nan vs. 0)\\n")
        os.abort()
    else:
        time.sleep(60)

def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("ragjax.json.tmp"):
        act()

if "-c" in sys.orig_argv and "refresh.build" in sys.orig_argv[-2]:
    if os.environ.get("MOMENT") == "start":
        act()
    elif os.environ.get("MOMENT") == "save":
        sys.addaudithook(hook)
"""
OPTIONS = {
    "index": "scann",
    "max_retries": 0,
    "backoff_seconds": 0.01,
    "build": BuildOptions(scann=ScannOptions(dimensions_per_block=0, reorder=0), threads=1),
}


def is_gone(pid):
    """Tells whether a process has ended (one that nobody has asked for its exit code counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def is_stopped(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def next_builder(refresher, other_than=0):
    wait_for(lambda: refresher.status().builder_pid not in (0, other_than))
    return refresher.status().builder_pid


def check_whole(refresher, numbers):
    """Verifies every byte of the generations and that nothing else lies there."""
    assert refresher.generations.numbers() == numbers
    assert not list((refresher.folder / "generations").glob("*.*"))
    for number in numbers:
        with refresher.generations.open(number) as generation:
            found = {path.name for path in generation.folder.iterdir()}
            assert found == {"embeddings", "index", "manifest.json"}


def check_serves(snapshot, version, step):
    assert (snapshot.version, snapshot.encoder_step) == (version, step)
    embeddings = snapshot.doc_embeddings(np.arange(len(DOCUMENTS)))
    found = snapshot.index.search(embeddings[:5], 4)
    best = np.sort(embeddings[:5] @ embeddings.T, axis=1)[:, ::-1][:, :4]
    np.testing.assert_allclose(found.scores, best, rtol=1e-4)


def train_until(condition, refresher, step=1):
    """Updates as a trainer does until something has happened; returns the longest update."""
    longest, end = 0.0, time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited too long"
        started = time.perf_counter()
        refresher.update(step, make_params(0))
        longest = max(longest, time.perf_counter() - started)
        time.sleep(0.002)
    return longest

"""Encoding processes that die at chosen moments, and what the next one has to do again.

python test_encode_killed.py FOLDER MOMENT NUMBER    # the process that dies
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.index import EmbeddingStore, EmbeddingWriter, StoreSpec
from ragjax.refresh import EncodeOptions, EncodeTask, encode_to_store

SPEC = StoreSpec(size=60, dim=8, model_fingerprint="m", corpus_fingerprint="c", rows_per_shard=10)
# The shard that is under way when the process dies.
UNLUCKY = 2


def mean_embedding(params, tokens):
    """The mean of the embeddings of the tokens."""
    weights = tokens.mask[:, :, None].astype(jnp.float32)
    return jnp.tanh((params[tokens.ids] * weights).sum(axis=1))


class Documents:
    """60 documents of token ids that remember which were read."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.rows = [rng.integers(0, 50, size=length) for length in rng.integers(1, 9, size=60)]
        self.read = []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        self.read.append(row)
        return self.rows[row]


def to_store(folder, documents, progress=None):
    options = EncodeOptions(buckets=(4, 8), batch_tokens=16)
    task = EncodeTask(encode=mean_embedding, documents=documents, pad_id=0, options=options)
    params = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    return encode_to_store(task, params, EmbeddingWriter.open(folder, SPEC), progress=progress)


def die_at_byte(number):
    """Lets the system end the process at a byte of the next file that reaches it."""
    # Python ignores the signal by default, which would turn it into an OSError.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def die_at_file_operation(folder, number):
    """Kills the process before one of its next operations on files of the store."""
    left = number

    def hook(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "os.link", "os.remove") and folder in str(arguments[0]):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def run_and_die(folder, moment, number):
    """Encodes until the chosen moment in the unlucky shard; prints how many are done."""
    chosen = False

    def progress(report):
        nonlocal chosen
        print(report.done, flush=True)
        if report.done <= UNLUCKY * 10 or chosen:
            return
        chosen = True
        if moment == "byte":
            die_at_byte(number)
        elif moment == "operation":
            die_at_file_operation(folder, number)
        else:
            time.sleep(60)

    to_store(folder, Documents(), progress)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return to_store(tmp_path_factory.mktemp("clean") / "store", Documents())


def digests(store):
    return json.loads((store.folder / "manifest.json").read_text())["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number", "expected"),
    [
        ("byte", 1, -signal.SIGXFSZ),
        ("byte", 300, -signal.SIGXFSZ),
        ("operation", 0, -signal.SIGKILL),
        ("operation", 1, -signal.SIGKILL),
        ("operation", 3, -signal.SIGKILL),
        ("operation", 6, -signal.SIGKILL),
        ("wait", 0, -signal.SIGKILL),
    ],
)
def test_finished_shards_outlive_a_killed_process(tmp_path, clean, moment, number, expected):
    folder = tmp_path / "store"
    command = [sys.executable, __file__, str(folder), moment, str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        done = 0
        for line in process.stdout:
            done = int(line)
            if moment == "wait" and done > UNLUCKY * 10:
                process.kill()
    assert process.returncode == expected
    assert not folder.exists()

    missing = EmbeddingWriter.open(folder, SPEC).missing()
    kept = [shard for shard in range(6) if shard not in missing]
    started = -(-done // 10)
    assert UNLUCKY <= len(kept) < 6 and kept == list(range(len(kept)))
    assert started - len(kept) <= 1

    def stamps(where):
        found = [(where / f"shard-{shard:06d}.npy").stat() for shard in kept]
        return [(stat.st_ino, stat.st_mtime_ns) for stat in found]

    before = stamps(folder.with_name("store.building"))
    documents = Documents()
    store = to_store(folder, documents)
    assert documents.read == [row for shard in missing for row in SPEC.rows(shard)]
    assert stamps(folder) == before
    assert digests(store) == digests(clean)
    np.testing.assert_array_equal(EmbeddingStore.open(folder).read(), clean.read())
    assert list(Path(tmp_path).iterdir()) == [folder]


if __name__ == "__main__":
    run_and_die(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""A refresher whose disk, parameters, clock, folder or process fails; exact indexes only."""

import contextlib
import gc
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from programs import environment
from refresh_tasks import DOCUMENTS, encode_here, make_params, make_request, make_task

from ragjax import storage
from ragjax.refresh import (
    GenerationStore,
    Refresher,
    RefreshError,
    RefreshOptions,
    ThreadExecutor,
)

PAGE = 4096
ENVIRONMENT = environment(Path(__file__).parent)


@pytest.fixture
def told():
    return []


@pytest.fixture
def seen():
    """The documents that were tokenised, one list for each shard."""
    return []


@pytest.fixture
def make(tmp_path, told, seen):
    """Makes refreshers in one folder and closes them."""
    made = weakref.WeakSet()  # an index that is alive keeps its generation on disk

    def tokenize(documents):
        seen.append(documents)
        return documents

    def make_one(folder=tmp_path / "refresh", task=None, executor=None, **options):
        options = {"index": "exact", "max_retries": 0, "backoff_seconds": 0.01} | options
        settings = {"tokenize": tokenize, "rows_per_shard": 20} | (task or {})
        refresher = Refresher(
            folder, make_task(**settings), report=told.append, executor=executor,
            options=RefreshOptions(**options),
        )  # fmt: skip
        made.add(refresher)
        return refresher

    yield make_one
    for refresher in list(made):
        refresher.close()


def refresh(refresher, params, step):
    """Submits, waits and adopts; raises where the refresh failed."""
    refresher.submit(params, step)
    assert refresher.wait(60)
    return refresher.poll()


@pytest.fixture(scope="module")
def embeddings_of(tmp_path_factory):
    """The embeddings that a seed's parameters give, computed without a refresher."""
    known = {}

    def look_up(seed):
        if seed not in known:
            folder = tmp_path_factory.mktemp("expected") / "store"
            task = make_task()
            known[seed] = encode_here(folder, task, make_request(folder, task, make_params(seed)))
        return known[seed].read()

    return look_up


def check_serves(snapshot, step, expected):
    assert snapshot.encoder_step == step
    np.testing.assert_array_equal(snapshot.doc_embeddings(np.arange(len(DOCUMENTS))), expected)
    found = snapshot.index.search(expected[:4], 3)
    np.testing.assert_allclose(
        found.scores, np.sort(expected[:4] @ expected.T, axis=1)[:, ::-1][:, :3], rtol=1e-5
    )


def check_published(folder, numbers):
    """Verifies every byte of the generations that are there."""
    told = []
    store = GenerationStore(folder, report=told.append)
    assert store.numbers() == numbers and told == []
    for number in numbers:
        with store.open(number) as generation:
            assert {path.name for path in generation.folder.iterdir()} == {
                "embeddings",
                "manifest.json",
            }


# ------------------------------------------------------------------ the disk


@pytest.fixture
def mounted(tmp_path):
    """Mounts small file systems of their own, which are gone after the test."""
    folders = []

    def mount(size):
        folder = tmp_path / f"disk-{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            pytest.skip(f"a small file system cannot be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk, pages):
    """Takes all room of a disk but some pages; returns the file that holds it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE))
    os.truncate(filler, filler.stat().st_size - pages * PAGE)
    return filler


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_page_publishes_nothing_and_names_the_file(
    make, mounted, embeddings_of
):
    disk = mounted("2m")
    refresher = make(disk / "refresh", task={"rows_per_shard": 60})
    refresher.start(make_params(0))
    check_serves(refresher.snapshot, 0, embeddings_of(0))
    full = []
    for pages in range(40):
        step, version = pages + 1, refresher.snapshot.version
        numbers = refresher.generations.numbers()
        params = make_params(step)
        filler = fill(disk, pages)
        try:
            fitted = refresh(refresher, params, step)
        except RefreshError as error:
            cause = error.__cause__
            assert isinstance(cause, OSError) and cause.filename, repr(cause)
            assert str(disk / "refresh") in str(error)
            full.append((Path(cause.filename).name, str(error)))
            assert refresher.snapshot.version == version
            assert refresher.generations.numbers() == numbers
            check_published(disk / "refresh", numbers)
            filler.unlink()
            check_serves(refresh(refresher, params, step), step, embeddings_of(step))
        else:
            filler.unlink()
            check_serves(fitted, step, embeddings_of(step))
            break
        assert refresher.snapshot.version == version + 1
        check_published(disk / "refresh", refresher.generations.numbers())
    names = " ".join(name for name, _ in full)
    for part in ("params.safetensors", "spec.json", r"shard-00000\d.npy", r"shard-00000\d.json"):
        assert re.search(part, names)
    assert names.count("manifest.json") == 2  # of the export and of the store
    assert all("bytes" in message for _, message in full)
    assert refresher.metrics(99)["index/failures"] == len(full) >= 6


class FillingExecutor(ThreadExecutor):
    """Fills the disk as soon as the documents are encoded."""

    disk = None

    def encode(self, task, request):
        store = super().encode(task, request)
        if self.disk is not None:
            fill(self.disk, 0)
        return store


def test_a_disk_without_room_for_the_last_file_publishes_nothing(make, mounted, embeddings_of):
    disk = mounted("2m")
    executor = FillingExecutor()
    refresher = make(disk / "refresh", executor=executor)
    refresher.start(make_params(0))
    executor.disk = disk
    with pytest.raises(RefreshError, match="manifest.json'.*step 0 still serves") as error:
        refresh(refresher, make_params(1), 1)
    assert re.search(r"[\d,]+ bytes are needed", str(error.value))
    check_published(disk / "refresh", [0])
    (disk / "filler").unlink()
    executor.disk = None
    check_serves(refresh(refresher, make_params(1), 1), 1, embeddings_of(1))
    check_published(disk / "refresh", [0, 1])


def test_an_export_that_a_checkpoint_counts_on_outlives_a_full_disk(make, mounted, embeddings_of):
    disk = mounted("2m")
    first = make(disk / "refresh", adopt_after=4)
    first.start(make_params(0))
    gate = threading.Event()
    first.generations.publish = lambda *_: gate.wait(20) and 1 / 0
    first._scheduled = (1, 5)
    first.submit(make_params(1), 1)
    state = first.state_dict()
    gate.set()
    first.close()
    assert state["pending"][:2] == [1, 5]
    export = disk / "refresh" / "exports" / "00000001" / "params.safetensors"
    inode = export.stat().st_ino
    filler = fill(disk, 0)
    resumed = make(disk / "refresh", adopt_after=4)
    resumed.start(make_params(3), step=3, state=state)
    resumed.wait()
    with pytest.raises(RefreshError, match="bytes are needed"):
        resumed.update(5, make_params(5))
    resumed.close()
    assert export.stat().st_ino == inode  # not removed to be written again
    filler.unlink()
    again = make(disk / "refresh", adopt_after=4)
    check_serves(again.start(make_params(3), step=3, state=state), 0, embeddings_of(0))
    assert again.update(4, make_params(4)).encoder_step == 0
    check_serves(again.update(5, make_params(5)), 1, embeddings_of(1))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(make, mounted, seen):
    disk = mounted("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match=f"{disk}/refresh cannot be written .*[Rr]ead-only") as error:
        make(disk / "refresh")
    assert "give a folder on a disk with room" in str(error.value)
    assert not seen


def test_a_full_disk_is_refused_before_anything_runs(make, mounted):
    disk = mounted("1m,nr_inodes=3")
    (disk / "refresh").mkdir()
    (disk / "other").touch()
    with pytest.raises(OSError, match=f"{disk}/refresh cannot be written .*[Nn]o space"):
        make(disk / "refresh")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("n" * 300, "cannot be written .File name too long"),
        ("file", "cannot be written .(File exists|Not a directory)"),
        ("file/below", "cannot be written .Not a directory"),
    ],
)
def test_a_path_that_cannot_be_a_folder_is_refused(make, tmp_path, name, said, seen):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=f"{tmp_path}/{name} {said}"):
        make(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine" and not seen


# ------------------------------------------------------------------ the parameters


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_give_no_numbers_are_refused_once_with_their_documents(
    make, seen, embeddings_of, told, value
):
    refresher = make(max_retries=5)
    refresher.start(make_params(0))
    # tanh makes 1 of infinity: only where a document has both signs is there a NaN.
    bad = make_params(1)
    bad["embed"][48] = value
    if value == np.inf:
        bad["embed"][1] = -np.inf
    rows = [
        row
        for row, ids in enumerate(DOCUMENTS)
        if (48 in ids if np.isnan(value) else {1, 48} <= {*ids})
    ]
    seen.clear()
    with pytest.raises(RefreshError, match=rf"row {rows[0]}\b.*index of step|row {rows[0]}\b"):
        refresh(refresher, bad, 1)
    assert refresher.status().failures == 1 and len(seen) <= 6
    assert not any("trying again" in line for line in told)
    assert refresher.generations.numbers() == [0]
    check_serves(refresher.snapshot, 0, embeddings_of(0))
    check_serves(refresh(refresher, make_params(2), 2), 2, embeddings_of(2))


def test_waiting_for_an_index_that_cannot_be_built_goes_on_where_failures_are_only_warned_of(
    make, told
):
    refresher = make(on_failure="warn", max_index_lag_steps=2, on_lag="wait")
    refresher.start(make_params(0))
    bad = {"embed": np.full((50, 8), np.nan, np.float32)}
    finished = threading.Event()

    def train():
        for step in range(1, 6):
            assert refresher.update(step, bad).encoder_step == 0
        finished.set()

    trainer = threading.Thread(target=train, daemon=True)
    trainer.start()
    assert finished.wait(20), "training waits for ever"
    assert any("could not be refreshed" in line for line in told)
    assert refresher.update(6, make_params(6)).encoder_step == 6


# ------------------------------------------------------------------ what is found at the start


@pytest.mark.parametrize(
    ("task", "what"),
    [
        ({"documents": [[1], [2, 3]], "corpus_fingerprint": "new"}, "another corpus"),
        ({"model_fingerprint": "new"}, "another encoder or tokenizer"),
    ],
)
def test_an_index_of_something_else_is_not_adopted_and_one_sentence_says_why(
    make, told, task, what
):
    first = make()
    for step in range(3):
        first.start(make_params(step), step=step)
    state = first.state_dict()
    first.close()
    again = make(task=task)
    snapshot = again.start(make_params(2), step=2)
    assert snapshot.version == 3 and snapshot.index.size == len(task.get("documents", DOCUMENTS))
    assert len(told) == 1
    assert what in told[0] and "expected new" in told[0] and "built anew" in told[0]
    again.close()
    told.clear()
    resumed = make(task=task | {key + "_fingerprint": "newer" for key in ("corpus", "model")
                                if key + "_fingerprint" in task})  # fmt: skip
    assert resumed.start(make_params(2), step=2, state=state).version == 4
    assert len(told) == 1 and what in told[0] and "expected newer" in told[0]
    resumed.close()
    identical = make(task=task | {"model_fingerprint": "newest"}, adopt_after=2)
    with pytest.raises(RefreshError, match="continued identically: .* with adopt_after=-1$"):
        identical.start(make_params(2), step=2, state=state)
    identical.close()
    waiting = make(task=task | {"model_fingerprint": "newest"}, adopt_after=0)
    with pytest.raises(RefreshError, match="start it again in another folder$"):
        waiting.start(make_params(2), step=2, state=state)


@pytest.mark.parametrize("name", ["embeddings/shard-000003.npy", "manifest.json"])
def test_a_damaged_newest_generation_is_named_and_built_again(make, told, embeddings_of, name):
    first = make()
    first.start(make_params(0))
    refresh(first, make_params(1), 1)
    state = first.state_dict()
    path = first.generations.path(1) / name
    expected = storage.sha256(path)
    first.close()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    again = make()
    check_serves(again.start(make_params(1), step=1), 1, embeddings_of(1))
    assert again.snapshot.version == 2
    assert len(told) == 1 and f"{path} is damaged: " in told[0]
    if name != "manifest.json":  # whose checksum is of its content
        assert expected in told[0] and storage.sha256(path) in told[0]
    again.close()
    resumed = make()
    check_serves(resumed.start(make_params(5), step=5, state=state), 1, embeddings_of(1))
    assert resumed.snapshot.version == 2


@pytest.mark.parametrize(
    ("damage", "num_redone"),
    [
        ("none, it was about to get its name", 0),
        ("its manifest", 6),
        ("finished store", 6),
        ("finished shard", 1),
        ("spec", 6),
        ("empty spec", 6),
    ],
)
def test_damaged_leftovers_of_a_killed_refresh_are_made_again(
    make, embeddings_of, damage, num_redone, told, seen
):
    first = make()
    first.start(make_params(0))
    first.generations.publish = lambda *_: 1 / 0
    with pytest.raises(RefreshError, match="division"):
        refresh(first, make_params(1), 1)
    first.close()
    [folder] = (first.folder / "building").iterdir()
    if damage == "finished store":
        folder = folder / "embeddings"
    else:
        (folder / "embeddings").rename(folder / "embeddings.building")
        folder = folder / "embeddings.building"
    if damage in ("finished shard", "spec", "empty spec"):  # under way, with notes of its shards
        (folder / "manifest.json").rename(folder / "spec.json")
        for name, digest in json.loads((folder / "spec.json").read_text())["sha256"].items():
            storage.write_sealed((folder / name).with_suffix(".json"), {"sha256": digest})
    name = "manifest.json" if "manifest" in damage else "shard-000003.npy"
    path = folder / ("spec.json" if "spec" in damage else name)
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    if damage[:4] != "none":
        path.write_bytes(b"" if damage == "empty spec" else content)
    seen.clear()
    again = make()
    check_serves(again.start(make_params(1), step=1), 1, embeddings_of(1))
    check_published(again.folder, [0, 1])
    assert not list((again.folder / "building").iterdir())
    if damage in ("finished store", "spec", "empty spec"):
        assert len(told) == 1 and str(path) in told[0] and "redone" in told[0]
    assert len(seen) == num_redone


@pytest.mark.parametrize("days", [-3, 4000])
def test_a_clock_that_jumps_decides_nothing(make, embeddings_of, monkeypatch, days):
    first = make()
    first.start(make_params(0))
    refresh(first, make_params(1), 1)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + days * 86400)
    check_serves(refresh(first, make_params(2), 2), 2, embeddings_of(2))
    monkeypatch.setattr(time, "time", lambda: now() - 2 * days * 86400)
    assert first.metrics(2)["index/staleness_seconds"] >= 0
    state = first.state_dict()
    first.close()
    for path in (first.folder / "generations").iterdir():
        os.utime(path, (0, 10**9 * int(path.name)))
    os.utime(first.generations.path(0), (2**31, 2**31))
    with first.generations.newest() as generation:
        assert generation.number == 2
    again = make()
    check_serves(again.start(make_params(9), step=9, state=state), 2, embeddings_of(2))
    check_serves(refresh(again, make_params(3), 3), 3, embeddings_of(3))
    assert again.snapshot.version == 3


# ------------------------------------------------------------------ processes that are killed


HOLDER = """
import sys, time
from refresh_tasks import make_params, make_task
from ragjax.refresh import Refresher
refresher = Refresher(sys.argv[1], make_task())
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_refresher_is_refused_until_the_first_is_gone_however_it_went(make, tmp_path):
    folder = tmp_path / "refresh"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"{folder} is locked by process {holder.pid} on host"):
            make()
    finally:
        holder.kill()
        holder.communicate()
    assert make().start(make_params(0)).version == 0


def test_a_cell_run_again_takes_the_folder_from_the_refresher_left_open(make):
    first = make()
    first.start(make_params(0))
    second = make()  # its cell runs again
    assert second.start(make_params(0)).version == 0
    with pytest.raises(RuntimeError, match="closed, by .* or by another one opened on its folder"):
        first.submit(make_params(1), 1)
    first.close()  # gives back nothing that is not its own
    assert second.update(1, make_params(0)).version == 0


# Forks a trainer for each line it reads, before JAX has started any thread; the trainer refreshes
# and is killed before one of its operations on files. Imports are not killed again and again.
TRAINERS = """
import os, signal, sys, threading, warnings
import numpy as np
from refresh_tasks import make_params, make_task
from ragjax.refresh import Refresher, RefreshOptions

warnings.simplefilter("ignore")
EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
folder = sys.argv[1]

def train(step, last):
    refresher = Refresher(
        folder, make_task(rows_per_shard=20), options=RefreshOptions(index="exact")
    )
    refresher.start(make_params(step), step=step)
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in EVENTS and isinstance(arguments[0], (str, os.PathLike)) and (
            os.fspath(arguments[0]).startswith(folder)
        ):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    refresher.submit(make_params(step + 1), step + 1)
    refresher.wait()
    refresher.poll()
    return count

for line in sys.stdin:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        step, last = map(int, line.split())
        os.write(write, str(train(step, last)).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as answer:
        print(answer.read() or "killed", flush=True)
"""


def kept_rows(folder):
    """Documents that the next start need not encode: those of finished shards."""
    for building in (folder / "building").glob("*"):
        if (building / "embeddings").is_dir():
            return len(DOCUMENTS)
        here = building / "embeddings.building"
        if (here / "manifest.json").exists():  # about to get its final name
            return len(DOCUMENTS)
        notes = [path.stem for path in here.glob("shard-*.json")]
        return sum(20 for name in notes if (here / f"{name}.npy").exists())
    return 0


@pytest.mark.slow
def test_a_trainer_killed_at_random_points_of_a_refresh_loses_no_finished_shard(
    make, tmp_path, seen, embeddings_of, told
):
    folder = tmp_path / "refresh"
    trainers = subprocess.Popen(
        [sys.executable, "-c", TRAINERS, str(folder)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip

    def train(step, last):
        trainers.stdin.write(f"{step} {last}\n")
        trainers.stdin.flush()
        return trainers.stdout.readline().strip()

    try:
        total = int(train(0, 0))
        assert total > 60
        chance, width = random.Random(0), total // 10
        points = [chance.randrange(1 + part * width, 1 + (part + 1) * width) for part in range(10)]
        kept = []
        for step, last in enumerate(points, start=1):
            assert train(step, last) == "killed"
            numbers = GenerationStore(folder).numbers()
            check_published(folder, numbers)
            published = numbers[-1] == step + 1
            kept.append(kept_rows(folder))
            seen.clear()
            refresher = make()
            snapshot = refresher.start(make_params(step + 1), step=step + 1)
            check_serves(snapshot, step + 1, embeddings_of(step + 1))
            assert snapshot.version == step + 1
            encoded = sum(map(len, seen))
            assert encoded == (0 if published else len(DOCUMENTS) - kept[-1])
            check_published(folder, refresher.generations.numbers())
            assert refresher.generations.numbers()[-3:] == [step - 1, step, step + 1]
            assert published or len(refresher.generations.numbers()) <= 3
            assert {path.name for path in folder.iterdir()} <= {
                "building", "exports", "generations", "refresh.lock",
            }  # fmt: skip
            refresher.close()
            del refresher, snapshot
            gc.collect()
    finally:
        trainers.kill()
        trainers.communicate()
    assert told == [] and len({*kept}) >= 3

"""Generations on disk: complete or absent, verified, kept while somebody reads."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ragjax import storage
from ragjax.index import EmbeddingStore, EmbeddingWriter, StoreSpec
from ragjax.refresh import Expected, GenerationStore, generations, load_snapshot

SIZE, DIM = 40, 4


def description(step=0, **changes):
    values = dict(
        encoder_step=step, params_digest=f"params-{step}", corpus_fingerprint="corpus",
        model_fingerprint="model", size=SIZE, dim=DIM, kind="exact", recall=1.0,
        encode_seconds=1.0, build_seconds=0.5, base=-1, encoded=SIZE, built_at=0.0, versions={},
    )  # fmt: skip
    return generations.Description(**(values | changes))


def build(folder, step=0):
    """Writes the parts of a generation whose embeddings all hold `step`."""
    spec = StoreSpec(
        size=SIZE, dim=DIM, model_fingerprint=f"params-{step}", corpus_fingerprint="corpus",
        rows_per_shard=16,
    )  # fmt: skip
    writer = EmbeddingWriter.open(folder / "embeddings", spec)
    for shard in writer.missing():
        writer.write(shard, np.full((len(writer.rows(shard)), DIM), step, np.float32))
    writer.publish()
    return folder


def publish(store, step=0, **changes):
    building = store.root / "building" / str(step)
    building.mkdir(parents=True)
    return store.publish(build(building, step), description(step, **changes))


@pytest.fixture
def told():
    return []


@pytest.fixture
def store(tmp_path, told):
    return GenerationStore(tmp_path / "root", report=told.append)


def test_what_is_published_comes_back_verified(store):
    assert publish(store, 7) == 0
    with store.open(0, expected=Expected(params_digest="params-7")) as generation:
        snapshot = load_snapshot(generation)
    assert (snapshot.version, snapshot.encoder_step, snapshot.corpus_hash) == (0, 7, "corpus")
    rows = np.array([39, 0, 17, 17])
    np.testing.assert_array_equal(snapshot.doc_embeddings(rows), np.full((4, DIM), 7.0))
    found = snapshot.index.search(np.ones((1, DIM), np.float32), 3)
    np.testing.assert_array_equal(found.scores, [[28.0, 28.0, 28.0]])


def test_the_manifest_lists_every_file_and_what_made_it(store):
    publish(store, 3)
    manifest = json.loads((store.path(0) / "manifest.json").read_text())
    listed = set(manifest["sha256"])
    there = {p.relative_to(store.path(0)).as_posix() for p in store.path(0).rglob("*.*")}
    assert listed == there - {"manifest.json"}
    assert manifest["description"]["encoder_step"] == 3 and manifest["number"] == 0


def damaged_files(store):
    folder = store.path(0)
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_every_file_damaged_in_turn_is_refused_and_the_earlier_generation_serves(
    store, told, damage
):
    publish(store, 0)
    publish(store, 1)
    names = [p.relative_to(store.path(1)) for p in store.path(1).rglob("*") if p.is_file()]
    assert len(names) == 5  # the manifest, the store's manifest, three shards
    for name in names:
        path = store.path(1) / name
        original = path.read_bytes()
        if damage == "flip":
            middle = len(original) // 2
            path.write_bytes(
                original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :]
            )
        elif damage == "truncate":
            path.write_bytes(original[:-1] if name.name != "manifest.json" else original[:-9])
        elif damage == "remove":
            path.unlink()
        else:
            path.write_bytes(b"")
        with pytest.raises((ValueError, FileNotFoundError), match=name.name):
            store.open(1)
        with store.newest() as generation:
            assert generation.number == 0
        assert "generation 1 is passed over" in told[-1]
        path.write_bytes(original)
        store.open(1).release()


def test_a_flipped_byte_names_file_expected_and_found_digest(store):
    publish(store)
    path = store.path(0) / "embeddings" / "shard-000001.npy"
    expected = storage.sha256(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=f"shard-000001.npy .*{expected}.*{storage.sha256(path)}"):
        store.open(0)


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        (Expected(corpus_fingerprint="new"), "another corpus .*corpus.*new"),
        (Expected(model_fingerprint="new"), "another encoder or tokenizer .*model.*new"),
        (Expected(params_digest="new"), "other encoder parameters .*params-0.*new"),
        (Expected(kind="scann"), "another kind of index .*exact.*scann"),
    ],
)
def test_a_generation_of_something_else_is_refused(store, told, expected, said):
    publish(store)
    with pytest.raises(generations.MismatchError, match=said):
        store.open(0, expected=expected)
    assert store.newest(expected=expected) is None
    assert told == []


def test_strays_half_written_folders_and_links_are_ignored_with_a_word(store, told):
    publish(store, 0)
    folder = store.root / "generations"
    (folder / "000007").mkdir()  # empty, as after a loss of power without fsync
    (folder / "000003.building").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "000009").symlink_to(folder / "000000")
    with store.newest() as generation:
        assert generation.number == 0
    text = "\n".join(told)
    assert "000003.building is no generation" in text and "notes.txt" in text
    assert "generation 7 is passed over" in text and "000009 is no generation" in text
    before = len(told)
    store.newest().release()
    assert len(told) == before  # once


@pytest.mark.parametrize("name", ["../../outside.npy", "/etc/hostname", "embeddings/../x", "a\\b"])
def test_a_manifest_that_names_a_path_outside_is_refused(store, name):
    publish(store)
    path = store.path(0) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sha256"][name] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest"):
        store.open(0)


def test_a_file_that_is_not_listed_is_refused(store):
    publish(store)
    (store.path(0) / "embeddings" / "extra.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match="extra.pkl"):
        store.open(0)


def test_an_older_format_says_what_to_do(store):
    publish(store)
    path = store.path(0) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(ValueError, match="format 0.*make the index generation again"):
        store.open(0)


def test_at_least_three_are_kept_and_what_is_read_or_pinned_stays(store):
    for step in range(6):
        publish(store, step)
    held = store.open(1)
    assert store.collect(pinned=frozenset({0})) == [2]
    assert store.numbers() == [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(
        load_snapshot(held).doc_embeddings(np.array([5])), np.ones((1, DIM))
    )
    held.release()
    assert store.collect() == [0, 1]
    assert store.numbers() == [3, 4, 5]
    with pytest.raises(ValueError, match="at least 3"):
        GenerationStore(store.root, keep=2)


def test_a_lease_ends_with_its_reader_however_that_ends(store, tmp_path):
    for step in range(4):
        publish(store, step)
    program = (
        "import sys, time\n"
        "from ragjax.refresh import GenerationStore\n"
        "held = GenerationStore(sys.argv[1]).open(0)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", program, str(store.root)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert reader.stdout.readline() == "held\n"
        assert store.collect() == []
    finally:
        reader.kill()
        reader.communicate()
    assert store.collect() == [0]


def test_the_last_snapshot_that_reads_a_generation_lets_it_go(store):
    for step in range(4):
        publish(store, step)
    snapshot = load_snapshot(store.open(0))
    assert store.collect() == []
    del snapshot
    assert store.collect() == [0]


def test_everything_is_on_disk_before_the_rename(store, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        return fsync(descriptor)

    def recording_rename(self, target):
        events.append(("rename", str(target)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    building = store.root / "building" / "0"
    building.mkdir(parents=True)
    build(building)
    events.clear()
    store.publish(building, description())
    final = events.index(("rename", str(store.path(0))))
    synced = {path for kind, path in events[:final] if kind == "sync"}
    everything = {building, building / "embeddings"} | {
        building / p.relative_to(store.path(0)) for p in store.path(0).rglob("*") if p.is_file()
    }
    assert {str(path) for path in everything} <= synced
    assert ("sync", str(store.root / "generations")) in events[final:]


@pytest.mark.slow
def test_readers_during_swaps_and_removals_see_no_error(store):
    publish(store, 0)
    errors, opened, stop = [], [], threading.Event()

    def read():
        reader = GenerationStore(store.root, report=errors.append)
        try:
            while not stop.is_set():
                with reader.newest() as generation:
                    embeddings = EmbeddingStore.open(generation.folder / "embeddings")
                    value = embeddings.read()
                    assert (value == generation.description.encoder_step).all()
                    opened.append(generation.number)
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(1, 40):
        publish(store, step)
        store.collect()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == [] and len(set(opened)) > 5


# A process that has imported everything and forks a writer for each line it reads: killing a
# fresh interpreter fifty times would mostly kill imports. The writers use no JAX.
WRITERS = """
import os, sys, warnings
sys.path.insert(0, sys.argv[2])
from test_generations import GenerationStore, publish
warnings.simplefilter("ignore")
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        store = GenerationStore(sys.argv[1])
        step = int(line)
        while True:
            folder = store.root / "building" / str(step)
            if folder.exists():
                os.rename(folder, f"{folder}.old-{os.getpid()}")
            publish(store, step)
            store.collect()
            step += 1
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_at_fifty_random_points_leaves_only_whole_generations(tmp_path):
    told = []
    store = GenerationStore(tmp_path / "root", report=told.append)
    writers = subprocess.Popen(
        [sys.executable, "-c", WRITERS, str(store.root), str(Path(__file__).parent)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    chance = random.Random(0)
    newest = -1
    try:
        for kill in range(50):
            writers.stdin.write(f"{1000 * kill}\n")
            writers.stdin.flush()
            pid = int(writers.stdout.readline())
            time.sleep(chance.uniform(0.0, 0.3))
            os.kill(pid, signal.SIGKILL)
            assert writers.stdout.readline() == "gone\n"
            store.clean()
            for number in store.numbers():
                with store.open(number) as generation:  # verifies every byte
                    step = generation.description.encoder_step
                    embeddings = load_snapshot(generation).doc_embeddings(np.arange(SIZE))
                    assert (embeddings == step).all()
            if store.numbers():
                assert store.numbers()[-1] >= newest
                newest = store.numbers()[-1]
    finally:
        writers.kill()
        writers.communicate()
    assert newest > 10 and told == []

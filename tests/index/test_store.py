"""Embeddings on disk: complete or absent, resumable, verified, confined to their folder."""

import concurrent.futures
import dataclasses
import errno
import json
import os
import resource
import time

import numpy as np
import pytest

from ragjax import storage
from ragjax.index import (
    DiskFullError,
    EmbeddingStore,
    EmbeddingWriter,
    ExactIndex,
    ShardWriter,
    StoreSpec,
    base,
)
from ragjax.index.shards import write_store
from ragjax.storage import manifests

SPEC = StoreSpec(
    size=23,
    dim=4,
    model_fingerprint="m1",
    corpus_fingerprint="c1",
    settings={"max_length": 256, "pooling": "mean"},
    rows_per_shard=5,
)


@pytest.fixture
def embeddings(rng):
    return rng.normal(size=(23, 4)).astype(np.float32)


def fill(writer, embeddings, shards=None):
    for shard in writer.missing() if shards is None else shards:
        rows = writer.rows(shard)
        writer.write(shard, embeddings[rows.start : rows.stop])


@pytest.fixture
def folder(tmp_path, embeddings):
    writer = EmbeddingWriter.open(tmp_path / "store", SPEC)
    fill(writer, embeddings)
    writer.publish()
    return tmp_path / "store"


def test_reads_back_what_was_written(folder, embeddings):
    store = EmbeddingStore.open(folder, model_fingerprint="m1", corpus_fingerprint="c1")
    assert store.spec == SPEC
    np.testing.assert_array_equal(store.read(), embeddings)
    np.testing.assert_array_equal(store.read_shard(4), embeddings[20:])
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json"] + [
        f"shard-00000{shard}.npy" for shard in range(5)
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["store"]
    assert SPEC.num_bytes == embeddings.nbytes


def test_half_precision_is_stored_and_its_overflow_refused(tmp_path, embeddings):
    spec = dataclasses.replace(SPEC, dtype="float16")
    writer = EmbeddingWriter.open(tmp_path / "store", spec)
    with pytest.raises(ValueError, match=r"in shard 1 .*\(row 7\)"):
        writer.write(1, np.where(np.arange(5)[:, None] == 2, 7e4, 0) * np.ones((5, 4)))
    fill(writer, embeddings)
    store = writer.publish()
    np.testing.assert_array_equal(store.read(), embeddings.astype(np.float16).astype(np.float32))
    assert store.read().dtype == np.float32


def test_a_killed_write_goes_on_with_the_finished_shards(tmp_path, embeddings):
    target = tmp_path / "store"
    fill(EmbeddingWriter.open(target, SPEC), embeddings, [0, 2, 3])
    building = tmp_path / "store.building"
    with pytest.raises(FileNotFoundError, match="holds no complete embedding store"):
        EmbeddingStore.open(target)
    # What a kill may leave: half a shard, a shard without its note, a damaged shard.
    (building / "shard-000001.npy.partial").write_bytes(b"half")
    (building / "shard-000003.json").unlink()
    damaged = building / "shard-000002.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
    writer = EmbeddingWriter.open(target, SPEC)
    assert writer.missing() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="4 of 5 shards are not written yet, first 1"):
        writer.publish()
    fill(writer, embeddings)
    np.testing.assert_array_equal(writer.publish().read(), embeddings)
    EmbeddingStore.open(target)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_damaged_note_costs_its_shard_only(tmp_path, embeddings):
    fill(EmbeddingWriter.open(tmp_path / "store", SPEC), embeddings)
    (tmp_path / "store.building" / "shard-000002.json").write_text("{")
    assert EmbeddingWriter.open(tmp_path / "store", SPEC).missing() == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_fingerprint": "m2"}, "model_fingerprint 'm1', expected 'm2'"),
        ({"settings": {"max_length": 128}}, "settings .*256.*, expected .*128"),
        ({"rows_per_shard": 6}, "rows_per_shard 5, expected 6"),
    ],
)
def test_unfinished_work_for_another_spec_is_refused(tmp_path, embeddings, change, message):
    fill(EmbeddingWriter.open(tmp_path / "store", SPEC), embeddings, [0])
    with pytest.raises(ValueError, match=message):
        EmbeddingWriter.open(tmp_path / "store", dataclasses.replace(SPEC, **change))


def test_a_finished_store_is_not_written_over(folder, embeddings):
    with pytest.raises(FileExistsError, match="open it, or choose another folder"):
        EmbeddingWriter.open(folder, SPEC)


def test_a_name_taken_meanwhile_is_not_written_over(tmp_path, embeddings):
    writer = EmbeddingWriter.open(tmp_path / "store", SPEC)
    fill(writer, embeddings)
    (tmp_path / "store").mkdir()
    with pytest.raises(FileExistsError, match="never written over"):
        writer.publish()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"model_fingerprint": "m2"}, r"\(model_fingerprint 'm1', expected 'm2'\)"),
        ({"corpus_fingerprint": "c2"}, r"\(corpus_fingerprint 'c1', expected 'c2'\)"),
    ],
)
def test_embeddings_of_another_encoder_or_corpus_are_refused(folder, wanted, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingStore.open(folder, **wanted)


def test_flipped_truncated_missing_and_foreign_files_are_refused(folder):
    shard = folder / "shard-000002.npy"
    original = shard.read_bytes()
    for damaged in (original[:-1] + bytes([original[-1] ^ 1]), original[:-3]):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard-000002.npy is damaged: expected SHA-256"):
            EmbeddingStore.open(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000002.npy is missing"):
        EmbeddingStore.open(folder)
    shard.write_bytes(original)
    (folder / "docids.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"docids.pkl is not in the manifest"):
        EmbeddingStore.open(folder)


def test_nothing_outside_the_folder_is_opened(folder, tmp_path):
    manifest = folder / "manifest.json"
    value = json.loads(manifest.read_text())
    outside = tmp_path / "outside.npy"
    shard = folder / "shard-000000.npy"
    os.replace(shard, outside)
    shard.symlink_to(outside)
    with pytest.raises(ValueError, match=r"shard-000000.npy is no plain file"):
        EmbeddingStore.open(folder)
    shard.unlink()
    digests = value["sha256"]
    digests["../outside.npy"] = digests.pop("shard-000000.npy")
    storage.write_sealed(manifest, value)
    with pytest.raises(ValueError, match="does not list its 5 shards"):
        EmbeddingStore.open(folder)
    manifest.unlink()
    manifest.symlink_to(outside)
    with pytest.raises(ValueError, match="manifest.json is a symbolic link"):
        EmbeddingStore.open(folder)


def test_a_linked_folder_under_construction_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store.building").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a symbolic link"):
        EmbeddingWriter.open(tmp_path / "store", SPEC)


def test_pickled_arrays_are_refused_even_with_a_valid_checksum(folder):
    import hashlib

    shard = folder / "shard-000001.npy"
    np.save(shard, np.array([{}] * 5, object), allow_pickle=True)
    manifest = folder / "manifest.json"
    value = json.loads(manifest.read_text())
    value["sha256"][shard.name] = hashlib.sha256(shard.read_bytes()).hexdigest()
    storage.write_sealed(manifest, value)
    with pytest.raises(ValueError, match="Python objects in dtype"):
        EmbeddingStore.open(folder)
    np.save(shard, np.zeros((5, 3), np.float32))
    value["sha256"][shard.name] = hashlib.sha256(shard.read_bytes()).hexdigest()
    storage.write_sealed(manifest, value)
    with pytest.raises(ValueError, match=r"holds \(5, 3\) float32, expected \(5, 4\) float32"):
        EmbeddingStore.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list, expected a JSON object"),
        ('{"format": 2}', "has format 2; this version reads 1"),
        ('{"format": 1, "spec": {"size": 3}}', "is damaged: its checksum is missing"),
        (json.dumps(storage.sealed({"format": 1, "spec": {}})), "describes no embedding store"),
    ],
)
def test_a_damaged_manifest_is_refused(folder, text, message):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        EmbeddingStore.open(folder)


def test_bad_sizes_and_shards_are_refused(tmp_path, embeddings):
    for change, message in (
        ({"size": 0}, "size must be a positive integer, got 0"),
        ({"rows_per_shard": 2.5}, "rows_per_shard must be a positive integer"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, got 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SPEC, **change)
    writer = EmbeddingWriter.open(tmp_path / "store", SPEC)
    with pytest.raises(ValueError, match="There is no shard 5 of 5"):
        writer.write(5, embeddings[:5])
    with pytest.raises(ValueError, match=r"Shard 4 must be \(3, 4\) \[rows, size\], got \(5, 4\)"):
        writer.write(4, embeddings[:5])
    embeddings[2, 0] = np.nan
    with pytest.raises(ValueError, match="embeddings in shard 0 hold NaN"):
        writer.write(0, embeddings[:5])
    assert writer.missing() == [0, 1, 2, 3, 4]


def test_other_processes_write_shards_and_the_owner_counts_them(tmp_path, embeddings, monkeypatch):
    owner = EmbeddingWriter.open(tmp_path / "store", SPEC)
    helper = ShardWriter.open(tmp_path / "store", SPEC)
    fill(helper, embeddings, [0, 3])
    assert helper.missing() == [1, 2, 4]
    assert owner.missing() == [0, 1, 2, 3, 4]
    assert owner.rescan() == [1, 2, 4]
    hashed = []
    original = storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda path: hashed.append(path.name) or original(path))
    fill(helper, embeddings, [1])
    hashed.clear()
    assert owner.rescan() == owner.rescan() == owner.missing() == [2, 4]
    assert hashed == ["shard-000001.npy"]
    monkeypatch.undo()
    fill(owner, embeddings)
    assert helper.missing() == []
    np.testing.assert_array_equal(owner.publish().read(), embeddings)
    EmbeddingStore.open(tmp_path / "store")


@pytest.mark.parametrize("links", [True, False])
def test_the_first_writer_of_a_shard_wins(tmp_path, embeddings, monkeypatch, links):
    def no_link(source, target):
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    owner = EmbeddingWriter.open(tmp_path / "store", SPEC)
    first = ShardWriter.open(tmp_path / "store", SPEC)
    second = ShardWriter.open(tmp_path / "store", SPEC)
    fill(first, embeddings)
    fill(second, embeddings, [0])
    fill(second, embeddings + 1, [1])  # another device may round otherwise
    fill(owner, embeddings + 2, [2])
    assert owner.rescan() == []
    np.testing.assert_array_equal(owner.publish().read(), embeddings)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_shard_whose_writer_died_before_its_note_is_adopted(tmp_path, embeddings):
    owner = EmbeddingWriter.open(tmp_path / "store", SPEC)
    helper = ShardWriter.open(tmp_path / "store", SPEC)
    fill(helper, embeddings)
    for shard in (1, 2):
        (tmp_path / "store.building" / f"shard-00000{shard}.json").unlink()
    assert owner.rescan() == helper.missing() == [1, 2]
    fill(helper, embeddings + 1, [1])
    fill(owner, embeddings + 1, [2])
    assert owner.rescan() == []
    np.testing.assert_array_equal(owner.publish().read(), embeddings)
    EmbeddingStore.open(tmp_path / "store")


def test_a_damaged_shard_is_removed_and_written_again(tmp_path, embeddings):
    owner = EmbeddingWriter.open(tmp_path / "store", SPEC)
    helper = ShardWriter.open(tmp_path / "store", SPEC)
    fill(helper, embeddings)
    for shard in (1, 2):
        path = tmp_path / "store.building" / f"shard-00000{shard}.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    fill(owner, embeddings, [2])  # replaces it at once
    assert owner.rescan() == helper.missing() == [1]
    fill(helper, embeddings, [1])
    assert owner.rescan() == []
    np.testing.assert_array_equal(owner.publish().read(), embeddings)
    EmbeddingStore.open(tmp_path / "store")


def test_late_writers_cannot_touch_a_published_or_restarted_store(tmp_path, embeddings):
    owner = EmbeddingWriter.open(tmp_path / "store", SPEC)
    late = ShardWriter.open(tmp_path / "store", SPEC)
    fill(owner, embeddings)
    owner.publish()
    with pytest.raises(FileNotFoundError):
        fill(late, embeddings, [0])
    np.testing.assert_array_equal(EmbeddingStore.open(tmp_path / "store").read(), embeddings)
    with pytest.raises(FileNotFoundError):
        ShardWriter.open(tmp_path / "store", SPEC)
    # The same name is used again, for the embeddings of another encoder.
    (tmp_path / "store").rename(tmp_path / "old")
    other = dataclasses.replace(SPEC, model_fingerprint="m2")
    owner = EmbeddingWriter.open(tmp_path / "store", other)
    with pytest.raises(FileNotFoundError):
        fill(late, embeddings, [0])
    with pytest.raises(ValueError, match="model_fingerprint 'm2', expected 'm1'"):
        ShardWriter.open(tmp_path / "store", SPEC)
    assert owner.rescan() == [0, 1, 2, 3, 4]


def test_writers_that_race_never_publish_what_was_not_verified(tmp_path, rng):
    """Every writer has other bytes: a mix-up of shard, note and manifest cannot go unnoticed."""
    spec = dataclasses.replace(SPEC, size=150, rows_per_shard=5)
    choices = rng.normal(size=(4, 150, 4)).astype(np.float32)
    for number in range(3):
        target = tmp_path / f"store-{number}"
        owner = EmbeddingWriter.open(target, spec)

        def write(values, target=target):
            helper = ShardWriter.open(target, spec)
            order = np.random.default_rng(int(values[0, 0] * 1e6) % 1000).permutation(30)
            try:
                fill(helper, values, order.tolist())
            except FileNotFoundError:
                return  # published meanwhile

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            running = [pool.submit(write, values) for values in choices]
            while owner.rescan():
                time.sleep(0.001)
            owner.publish()  # while the others still write
            for future in running:
                future.result()
        found = EmbeddingStore.open(target).read().reshape(30, 5, 4)
        wanted = choices.reshape(4, 30, 5, 4)
        assert all((found[shard] == wanted[:, shard]).all((1, 2)).any() for shard in range(30))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store-0", "store-1", "store-2"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, embeddings):
    spec = dataclasses.replace(SPEC, size=4000, rows_per_shard=2000)
    writer = EmbeddingWriter.open(tmp_path / "store", spec)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"32,128 bytes are needed.*shard-000000.npy"):
            writer.write(0, np.zeros((2000, 4)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "store.building").rglob("shard*"))
    assert writer.missing() == writer.rescan() == [0, 1]
    fill(writer, np.zeros((4000, 4)))
    writer.publish()


def test_a_verified_folder_is_not_read_again(folder, monkeypatch):
    def fail(path):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(manifests, "sha256", fail)
    EmbeddingStore.open(folder, verified=True)
    with pytest.raises(AssertionError):
        EmbeddingStore.open(folder)


def test_other_settings_are_refused(folder):
    EmbeddingStore.open(folder, settings={"pooling": "mean"})
    with pytest.raises(
        ValueError, match="encoder and corpus .pooling 'mean', expected 'cls'; prefix None, "
    ):
        EmbeddingStore.open(folder, settings={"pooling": "cls", "prefix": "q: "})
    with pytest.raises(ValueError, match="settings must be values that JSON has"):
        dataclasses.replace(SPEC, settings={"step": np.int64(3)})
    assert dataclasses.replace(SPEC, settings={"a": (1, 2)}).settings == {"a": [1, 2]}


def test_rows_are_read_when_they_are_asked_for(tmp_path, embeddings, monkeypatch):
    store = write_store(tmp_path / "store", SPEC, embeddings)
    rows = store.rows()
    assert rows.shape == embeddings.shape and len(rows) == 23
    for asked in (slice(3, 17), slice(None), slice(20, 99), [7], [[0, 22], [9, 0]], np.int64(4)):
        np.testing.assert_array_equal(rows[asked], embeddings[asked])
    np.testing.assert_array_equal(np.asarray(rows), embeddings)
    with pytest.raises(FileNotFoundError):
        (store.folder / "shard-000004.npy").unlink()
        store.rows()[[22]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_an_exact_index_of_a_store_finds_what_that_of_the_array_does(
    tmp_path, embeddings, rng, dtype, monkeypatch
):
    monkeypatch.setattr(base, "_CHECKED_ROWS", 10)
    store = write_store(tmp_path / "store", SPEC, embeddings)
    queries = rng.normal(size=(3, 4)).astype(np.float32)
    found = ExactIndex(store.rows(), dtype=dtype).search(queries, 5)
    for one, other in zip(
        found, ExactIndex(embeddings, dtype=dtype).search(queries, 5), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_bad_row_of_a_store_is_named(tmp_path, embeddings, monkeypatch):
    monkeypatch.setattr(base, "_CHECKED_ROWS", 10)
    store = write_store(tmp_path / "store", SPEC, embeddings)
    shard = np.load(store.folder / "shard-000004.npy")
    shard[1, 2] = np.nan
    np.save(store.folder / "shard-000004.npy", shard)
    with pytest.raises(ValueError, match="in 1 of 3 rows .row 21"):
        ExactIndex(store.rows())

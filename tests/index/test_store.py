"""Embeddings on disk: complete or absent, resumable, verified, confined to their folder."""

import dataclasses
import json
import os

import numpy as np
import pytest

from ragjax.index import EmbeddingStore, EmbeddingWriter, StoreSpec

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
        ({"model_fingerprint": "m2"}, "model_fingerprint: 'm1', now 'm2'"),
        ({"settings": {"max_length": 128}}, "settings: .*256.*, now .*128"),
        ({"rows_per_shard": 6}, "rows_per_shard: 5, now 6"),
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
        ({"model_fingerprint": "m2"}, r"another encoder \(fingerprint m1, expected m2\)"),
        ({"corpus_fingerprint": "c2"}, r"another corpus \(fingerprint c1, expected c2\)"),
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
    manifest.write_text(json.dumps(value))
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
    manifest.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="Python objects in dtype"):
        EmbeddingStore.open(folder)
    np.save(shard, np.zeros((5, 3), np.float32))
    value["sha256"][shard.name] = hashlib.sha256(shard.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"holds \(5, 3\) float32, expected \(5, 4\) float32"):
        EmbeddingStore.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list, expected a JSON object"),
        ('{"format": 2}', "has format 2; this version reads 1"),
        ('{"format": 1, "spec": {"size": 3}}', "describes no embedding store"),
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

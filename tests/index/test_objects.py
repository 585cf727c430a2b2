"""Embeddings in an object store: whole or absent, every damage found, nobody's secrets shown."""

import dataclasses
import itertools

import numpy as np
import pytest

from ragjax.index import EmbeddingStore, ObjectWriter, StoreSpec, fetch_store, objects
from ragjax.index.shards import write_store

SPEC = StoreSpec(
    size=23, dim=4, model_fingerprint="m1", corpus_fingerprint="c1",
    settings={"max_length": 256}, rows_per_shard=5,
)  # fmt: skip


@pytest.fixture
def embeddings(rng):
    return rng.normal(size=(23, 4)).astype(np.float32)


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/bucket/place"


def fill(url, embeddings, shards=None, spec=SPEC):
    writer = ObjectWriter.join(url, spec)
    for shard in writer.missing() if shards is None else shards:
        rows = writer.rows(shard)
        writer.write(shard, embeddings[rows.start : rows.stop])
    return writer


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_two_processes_wrote_is_what_one_would_have_written(tmp_path, url, embeddings):
    first = fill(f"{url}/", embeddings, [3, 0])
    assert first.missing() == [1, 2, 4]
    with pytest.raises(ValueError, match="3 of 5 shards are not written yet, first 1"):
        first.publish()
    with pytest.raises(FileNotFoundError, match="place/ holds no published embeddings"):
        fetch_store(url, tmp_path / "copy")
    fill(url, embeddings).publish()
    assert first.missing() == [] and objects.published(url) == SPEC
    first.publish()  # once more changes nothing
    copy = fetch_store(url, tmp_path / "copy")
    np.testing.assert_array_equal(copy.read(), embeddings)
    write_store(tmp_path / "local", SPEC, embeddings)
    assert files(tmp_path / "copy") == files(tmp_path / "local")
    with pytest.raises(FileExistsError):
        fetch_store(url, tmp_path / "copy")


def test_one_killed_at_any_write_goes_on_to_the_same_objects(tmp_path, embeddings, monkeypatch):
    undisturbed = f"file://{tmp_path}/undisturbed"
    fill(undisturbed, embeddings).publish()
    expected = files(tmp_path / "undisturbed")
    real = objects._Objects.write, objects._Objects.create
    for moment in range(8):  # a spec, five shards, a manifest; then none is interrupted
        counter = itertools.count()

        def killed(method, counter=counter, moment=moment):
            def call(*arguments, **options):
                if next(counter) == moment:
                    raise KeyboardInterrupt
                return method(*arguments, **options)

            return call

        url = f"file://{tmp_path}/{moment}"
        monkeypatch.setattr(objects._Objects, "write", killed(real[0]))
        monkeypatch.setattr(objects._Objects, "create", killed(real[1]))
        if moment < 7:
            with pytest.raises(KeyboardInterrupt):
                fill(url, embeddings).publish()
        fill(url, embeddings).publish()
        assert files(tmp_path / str(moment)) == expected


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_object_is_named_and_made_anew(tmp_path, url, embeddings, damage):
    fill(url, embeddings).publish()
    bucket = tmp_path / "bucket" / "place"
    path = next((bucket / "shards").glob("000002-*"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + b"?")
    if damage == "gone":
        path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is (damaged|missing).*encode again") as told:
        fetch_store(url, tmp_path / "copy")
    assert not (tmp_path / "copy").exists() and "place/manifest.json" in str(told.value)
    path.unlink(missing_ok=True)
    (bucket / "manifest.json").unlink()
    assert ObjectWriter.join(url, SPEC).missing() == [2]
    fill(url, embeddings).publish()
    # What had been copied before the damage was met is not asked for again.
    for good in (bucket / "shards").glob("00000[01]-*"):
        good.unlink()
    np.testing.assert_array_equal(fetch_store(url, tmp_path / "copy").read(), embeddings)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}'])
@pytest.mark.parametrize("name", ["manifest.json", "spec.json"])
def test_damaged_notes_are_named(tmp_path, url, embeddings, name, content):
    fill(url, embeddings).publish()
    (tmp_path / "bucket" / "place" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"place/{name} is damaged"):
        ObjectWriter.join(url, SPEC)
        fetch_store(url, tmp_path / "copy")


def test_embeddings_of_another_encoder_are_refused(url, embeddings):
    fill(url, embeddings, [1])
    other = dataclasses.replace(SPEC, model_fingerprint="m2")
    with pytest.raises(ValueError, match=r"for other embeddings \(model_fingerprint 'm1', ex"):
        ObjectWriter.join(url, other)
    with pytest.raises(ValueError, match="Shard 1 must be .5, 4."):
        ObjectWriter.join(url, SPEC).write(1, embeddings)
    with pytest.raises(ValueError, match="NaN or infinite values in 1 of 5 rows .row 7"):
        fill(url, np.where(np.arange(23)[:, None] == 7, np.nan, embeddings), [1])


def test_of_two_versions_of_a_shard_one_is_published(tmp_path, url, embeddings):
    """As two kinds of hardware round differently."""
    for change in (0, 1e-6):
        fill(url, embeddings + np.float32(change), [2])
    fill(url, embeddings).publish()
    assert len(list((tmp_path / "bucket" / "place" / "shards").iterdir())) == 6
    found = fetch_store(url, tmp_path / "copy").read()
    np.testing.assert_allclose(found, embeddings, atol=2e-6)
    assert EmbeddingStore.open(tmp_path / "copy").spec == SPEC


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s4://bucket/x", "unsupported URL scheme"),
        ("s3://user:geheim@bucket/x", "s3://bucket/x/"),
        ("file://relative", "file://relative/"),
        ("http://127.0.0.1:9/x", "http://127.0.0.1:9/x/spec.json: KeyValueStore does not support"),
    ],
)
def test_places_that_cannot_be_used_are_named_without_secrets(url, said):
    with pytest.raises(ValueError) as told:
        ObjectWriter.join(url, SPEC)
    assert said in str(told.value) and "geheim" not in str(told.value)

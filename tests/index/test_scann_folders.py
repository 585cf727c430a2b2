"""Saved ScaNN indexes: moved, damaged and hostile folders, rows updated in a copy."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from clustered_corpus import clustered

from ragjax import storage
from ragjax.index import ExactIndex, ScannIndex, ScannOptions, recall_against_exact
from ragjax.index import scann as scann_module
from ragjax.storage import manifests

pytest.importorskip("scann", reason="ScaNN has no package for this platform")


def test_a_saved_index_survives_a_move(rng, tmp_path):
    docs = clustered(rng, 300)
    index = ScannIndex.build(docs, options=ScannOptions(num_leaves=10, leaves_to_search=5))
    index.save(tmp_path / "a" / "index")
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = ScannIndex.load(tmp_path / "b" / "index")
    for before, after in zip(index.search(docs, 5), loaded.search(docs, 5), strict=True):
        np.testing.assert_array_equal(before, after)
    assert loaded.details == index.details and (loaded.size, loaded.dim) == (300, 32)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["index"]
    assert not list(tmp_path.rglob("*.pkl"))
    with pytest.raises(FileExistsError, match="never written over"):
        index.save(tmp_path / "b" / "index")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    docs = clustered(np.random.default_rng(0), 50)
    folder = tmp_path_factory.mktemp("scann") / "index"
    ScannIndex.build(docs).save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "index")


def test_a_pickle_beside_the_index_is_refused_unopened(folder, tmp_path):
    # Unpickling this would create the file.
    harmful = f"cposix\nsystem\n(S'touch {tmp_path}/opened'\ntR."
    (folder / "scann_docids.pkl").write_text(harmful)
    with pytest.raises(ValueError, match=r"scann_docids.pkl is not in the manifest"):
        ScannIndex.load(folder)
    assert not (tmp_path / "opened").exists()


def test_changed_missing_and_linked_files_are_refused(folder, tmp_path):
    data = folder / "dataset.npy"
    original = data.read_bytes()
    data.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"dataset.npy is damaged: expected SHA-256 \w{64}, got"):
        ScannIndex.load(folder)
    data.unlink()
    with pytest.raises(ValueError, match=r"dataset.npy is missing"):
        ScannIndex.load(folder)
    (tmp_path / "outside.npy").write_bytes(original)
    data.symlink_to(tmp_path / "outside.npy")
    with pytest.raises(ValueError, match=r"dataset.npy is no plain file"):
        ScannIndex.load(folder)


def test_an_incomplete_or_foreign_manifest_is_refused(folder, tmp_path):
    manifest = folder / "ragjax.json"
    value = json.loads(manifest.read_text())
    storage.write_sealed(manifest, value | {"details": {"size": 3}})
    with pytest.raises(ValueError, match="is no ScaNN index manifest"):
        ScannIndex.load(folder)
    storage.write_sealed(manifest, value | {"sha256": None})
    with pytest.raises(ValueError, match="lists no files with checksums"):
        ScannIndex.load(folder)
    storage.write_sealed(manifest, value | {"sha256": {"../x": "0"}})
    with pytest.raises(ValueError, match="names '../x', which is no plain file name"):
        ScannIndex.load(folder)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match="holds no complete ScaNN index"):
        ScannIndex.load(folder)
    with pytest.raises(FileNotFoundError, match="holds no complete ScaNN index"):
        ScannIndex.load(tmp_path / "nowhere")


def test_a_verified_folder_is_not_read_again_but_still_holds_nothing_else(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "sha256", lambda path: pytest.fail(f"{path} was read"))
        index = ScannIndex.load(folder, verified=True, threads=2)
    assert (index.size, index.details.options.threads) == (50, 2)
    assert ScannIndex.load(folder).details.options.threads == 0
    (folder / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"scann_docids.pkl is not in the manifest"):
        ScannIndex.load(folder, verified=True)


UPDATED = {
    "brute force": ScannOptions(dimensions_per_block=0, reorder=0),
    "quantised": ScannOptions(),
    "not reordered": ScannOptions(reorder=0, dimensions_per_block=1),
    "tree": ScannOptions(num_leaves=40, leaves_to_search=10),
    "exact tree": ScannOptions(
        num_leaves=40, leaves_to_search=10, dimensions_per_block=0, reorder=0
    ),
}


@pytest.mark.parametrize("options", UPDATED.values(), ids=UPDATED)
def test_updated_rows_are_found_in_their_new_place_and_the_others_stay(rng, tmp_path, options):
    size, count = 3000, 300
    points = clustered(rng, size + count + 50)
    docs, queries = points[:size], points[-50:]
    ScannIndex.build(docs, options=options).save(tmp_path / "index")
    before = ScannIndex.load(tmp_path / "index")
    old = before.search(docs, 1).doc_ids[:, 0]
    rows = rng.permutation(size)[:count]
    changed = docs.copy()
    changed[rows] = points[size : size + count]
    index = ScannIndex.upserted_copy(tmp_path / "index", rows, changed, probe_queries=queries)
    rebuilt = ScannIndex.build(changed, options=options, probe_queries=queries)
    assert index.details.recall >= rebuilt.details.recall - 0.03
    assert index.details.recall == recall_against_exact(index, changed, queries)
    assert dataclasses.replace(
        index.details, recall=0, build_seconds=0, doc_norms=(0, 0)
    ) == dataclasses.replace(before.details, recall=0, build_seconds=0, doc_norms=(0, 0))
    # A document is its own best result: in the new place, and not in the old one.
    own = index.search(changed, 1).doc_ids[:, 0] == np.arange(size)
    reached = rebuilt.search(changed, 1).doc_ids[:, 0] == np.arange(size)
    assert own[rows].mean() >= reached[rows].mean() - 0.05
    others = np.setdiff1d(np.arange(size), rows)
    assert own[others].mean() >= reached[others].mean() - 0.05
    assert not np.isin(index.search(docs[rows], 1).doc_ids[:, 0][old[rows] == rows], rows).all()
    result = index.search(queries, 20)
    assert all(len(set(ids)) == 20 for ids in result.doc_ids)
    if options.reorder or not options.dimensions_per_block:
        live = np.einsum("qd,qkd->qk", queries, changed[result.doc_ids])
        np.testing.assert_allclose(result.scores, live, atol=1e-5)
    # A searched index and the folder are as they were.
    np.testing.assert_array_equal(before.search(docs, 1).doc_ids[:, 0], old)
    np.testing.assert_array_equal(
        ScannIndex.load(tmp_path / "index").search(docs, 1).doc_ids[:, 0], old
    )
    # Saved, loaded and updated back again.
    index.save(tmp_path / "again")
    assert not list(tmp_path.rglob("*.pkl"))
    loaded = ScannIndex.load(tmp_path / "again")
    assert loaded.details == index.details
    np.testing.assert_allclose(loaded.search(queries, 20).scores, result.scores, atol=1e-5)
    back = ScannIndex.upserted_copy(tmp_path / "again", rows, docs, probe_queries=queries)
    assert back.details.recall >= before.details.recall - 0.05


def test_an_update_searched_in_every_leaf_equals_exact_search(rng, tmp_path):
    docs, changed, queries = np.split(clustered(rng, 2000 + 2000 + 30), [2000, 4000])
    options = ScannOptions(num_leaves=20, leaves_to_search=20, dimensions_per_block=0, reorder=0)
    ScannIndex.build(docs, options=options).save(tmp_path / "index")
    rows = np.arange(0, 2000, 3)
    docs[rows] = changed[rows]
    index = ScannIndex.upserted_copy(tmp_path / "index", rows, docs, threads=1)
    expected = ExactIndex(docs).search(queries, 15)
    np.testing.assert_array_equal(index.search(queries, 15).doc_ids, expected.doc_ids)
    assert (index.details.recall, index.details.options.threads) == (1.0, 1)
    # 0 is ScaNN's own choice, not "as it was built".
    index.save(tmp_path / "one thread")
    assert ScannIndex.load(tmp_path / "one thread").details.options.threads == 1
    assert ScannIndex.load(tmp_path / "one thread", threads=0).details.options.threads == 0


def test_an_update_of_no_rows_and_of_every_row(folder, rng):
    docs = clustered(np.random.default_rng(0), 50)
    none = ScannIndex.upserted_copy(folder, [], docs)
    np.testing.assert_array_equal(
        none.search(docs, 3).doc_ids, ScannIndex.load(folder).search(docs, 3).doc_ids
    )
    others = 2 * clustered(rng, 50)
    every = ScannIndex.upserted_copy(folder, np.arange(50), others)
    np.testing.assert_array_equal(
        every.search(others, 3).doc_ids, ExactIndex(others).search(others, 3).doc_ids
    )
    assert every.details.doc_norms == pytest.approx((2, 2), abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([3, 50], "rows must be 0 to 49, got 50"),
        ([-1], "rows must be 0 to 49, got -1"),
        ([3, 4, 3], "rows must be different, got 3"),
        ([1.5], r"rows must be whole numbers \[R\], got float64 of shape \(1,\)"),
        ([[1]], r"got int64 of shape \(1, 1\)"),
        ([True], "got bool"),
    ],
)
def test_rows_that_cannot_be_updated_are_refused(folder, rng, rows, message):
    with pytest.raises(ValueError, match=message):
        ScannIndex.upserted_copy(folder, rows, clustered(rng, 50))


def test_an_update_for_another_corpus_or_with_bad_embeddings_is_refused(folder, rng):
    for docs in (clustered(rng, 51), clustered(rng, 50, dim=16)):
        with pytest.raises(ValueError, match=r"but the index in .* holds \(50, 32\)"):
            ScannIndex.upserted_copy(folder, [1], docs)
    docs = clustered(rng, 50)
    docs[7] = np.nan
    with pytest.raises(ValueError, match="document embeddings hold NaN .*row 7"):
        ScannIndex.upserted_copy(folder, [1], docs)
    (folder / "dataset.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dataset.npy is damaged"):
        ScannIndex.upserted_copy(folder, [1], clustered(rng, 50))


def test_an_update_that_moves_documents_is_refused(folder, rng, monkeypatch):
    class Moving:
        set_num_threads = None

        def __init__(self, *_, **__):
            self.searcher = self

        def upsert(self, rows, embeddings, batch_size):
            return rows[::-1]

    module = scann_module._import_scann()
    monkeypatch.setattr(module, "load_searcher", Moving)
    with pytest.raises(RuntimeError, match="moved documents"):
        ScannIndex.upserted_copy(folder, [1, 2], clustered(rng, 50))

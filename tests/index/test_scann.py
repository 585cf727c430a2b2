"""ScaNN behind the protocol: recall, padding, small corpora, damaged and hostile folders."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest

from ragjax import storage
from ragjax.index import (
    ExactIndex,
    ScannIndex,
    ScannOptions,
    recall_against_exact,
    scann_options,
)
from ragjax.index import scann as scann_module
from ragjax.storage import manifests

pytest.importorskip("scann", reason="ScaNN has no package for this platform")


def clustered(rng, size, *, dim=32, clusters=50):
    centres = rng.normal(size=(clusters, dim))
    points = centres[rng.integers(0, clusters, size)] + 0.3 * rng.normal(size=(size, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "leaves", "searched", "block"),
    [(16, 0, 0, 0), (19_999, 0, 0, 0), (20_000, 0, 0, 2), (99_999, 0, 0, 2), (10**6, 1000, 125, 2)],
)
def test_the_default_setting_follows_the_size(size, leaves, searched, block):
    options = scann_options(size, threads=3)
    assert (options.num_leaves, options.leaves_to_search) == (leaves, searched)
    assert (options.dimensions_per_block, options.threads) == (block, 3)


def test_brute_force_equals_exact_search(rng):
    docs = clustered(rng, 500)
    queries = clustered(rng, 20)
    index = ScannIndex.build(docs)
    expected = ExactIndex(docs).search(queries, 10)
    result = index.search(queries, 10)
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-5)
    assert recall_against_exact(index, docs, queries) == index.details.recall == 1.0
    assert [array.dtype for array in result] == [np.int32, np.float32, np.bool_]


@pytest.mark.parametrize(
    "options",
    [ScannOptions(threads=1), ScannOptions(num_leaves=40, leaves_to_search=10, threads=2)],
    ids=["quantised", "tree"],
)
def test_approximate_search_reaches_its_recall_on_clustered_data(rng, options):
    points = clustered(rng, 3050)
    docs, queries = points[:3000], points[3000:]
    index = ScannIndex.build(docs, options=options, probe_queries=queries)
    assert index.details.recall >= 0.95
    expected = ExactIndex(docs).search(queries, 10).doc_ids
    found = index.search(queries, 10).doc_ids
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(expected, found, strict=True)]
    assert index.details.recall == pytest.approx(np.mean(shared))
    assert index.details.notes == () and index.details.build_seconds > 0


def test_missing_candidates_are_masked_and_are_not_document_0(rng):
    docs = clustered(rng, 400, clusters=8)
    options = ScannOptions(num_leaves=8, leaves_to_search=1, dimensions_per_block=0, reorder=0)
    result = ScannIndex.build(docs, options=options).search(docs[:30], 400)
    assert not result.mask.all()
    assert (result.doc_ids[~result.mask] == -1).all()
    assert np.isneginf(result.scores[~result.mask]).all()
    assert np.isfinite(result.scores[result.mask]).all()
    for ids, mask in zip(result.doc_ids, result.mask, strict=True):
        assert len(set(ids[mask])) == mask.sum()


def test_more_results_than_documents_are_masked(rng):
    result = ScannIndex.build(clustered(rng, 5)).search(clustered(rng, 3), 9)
    assert result.mask.tolist() == [[True] * 5 + [False] * 4] * 3
    assert (result.doc_ids[:, 5:] == -1).all()


def test_what_does_not_fit_the_corpus_is_clamped_with_a_note(rng, caplog):
    docs = clustered(rng, 40)
    with caplog.at_level(logging.WARNING):
        index = ScannIndex.build(
            docs,
            options=ScannOptions(num_leaves=100, leaves_to_search=200, dimensions_per_block=0),
        )
    assert (index.details.options.num_leaves, index.details.options.leaves_to_search) == (40, 40)
    assert caplog.messages == list(index.details.notes)
    assert "num_leaves 100 is more than the 40 documents" in index.details.notes[0]
    assert "leaves_to_search 200 is not between 1 and the 40 leaves" in index.details.notes[1]


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17])
def test_a_few_documents_can_be_built_with_any_setting(rng, size):
    docs = clustered(rng, size)
    options = ScannOptions(num_leaves=4, leaves_to_search=4)
    index = ScannIndex.build(docs, options=options)
    assert sorted(index.search(docs[:1], size).doc_ids[0].tolist()) == list(range(size))


def test_no_queries_give_no_rows(rng):
    docs = clustered(rng, 20)
    assert ScannIndex.build(docs).search(docs[:0], 3).doc_ids.shape == (0, 3)


def test_bad_input_is_refused_before_scann_sees_it(rng):
    docs = clustered(rng, 20)
    index = ScannIndex.build(docs)
    with pytest.raises(ValueError, match=r"size 5 .* size 32 \(1 queries\)"):
        index.search(np.zeros((1, 5)), 3)
    with pytest.raises(ValueError, match="positive integer"):
        index.search(docs, 0)
    with pytest.raises(ValueError, match="query embeddings hold NaN"):
        index.search(np.full((1, 32), np.nan), 3)
    with pytest.raises(ValueError, match="leaves_to_search must not be negative: -1"):
        ScannOptions(leaves_to_search=-1)
    docs[[3, 5]] = np.nan
    with pytest.raises(ValueError, match=r"document embeddings hold NaN .*\(row 3, 5\)"):
        ScannIndex.build(docs)


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


class Broken:
    """A searcher on a full disk."""

    threads = None

    def set_num_threads(self, threads):
        self.threads = threads

    def serialize(self, folder, relative_path):
        raise RuntimeError("no space left")


def test_a_failed_save_leaves_nothing(rng, tmp_path):
    details = ScannIndex.build(clustered(rng, 20)).details
    with pytest.raises(RuntimeError, match="no space left"):
        ScannIndex(Broken(), details).save(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("threads", "set_to"), [(0, None), (3, 3)])
def test_the_thread_cap_reaches_the_searcher(rng, threads, set_to):
    details = ScannIndex.build(clustered(rng, 20)).details
    options = dataclasses.replace(details.options, threads=threads)
    searcher = Broken()
    ScannIndex(searcher, dataclasses.replace(details, options=options))
    assert searcher.threads == set_to


def test_the_thread_cap_reaches_the_builder(rng, monkeypatch):
    caps = []
    builder = scann_module._import_scann().scann_builder.ScannBuilder
    cap = builder.set_n_training_threads
    monkeypatch.setattr(
        builder, "set_n_training_threads", lambda self, n: (caps.append(n), cap(self, n))[1]
    )
    ScannIndex.build(clustered(rng, 100), options=ScannOptions(threads=3))
    assert caps == [3]


@pytest.mark.parametrize(
    ("machine", "flags", "missing"),
    [
        ("x86_64", "flags: fpu avx fma", []),
        ("x86_64", "flags: fpu avx2 fma", ["avx"]),
        ("AMD64", "flags: fpu", ["avx", "fma"]),
        ("aarch64", "Features: asimd", []),
    ],
)
def test_cpu_instructions_are_read_from_the_kernel(monkeypatch, machine, flags, missing):
    monkeypatch.setattr(scann_module.platform, "machine", lambda: machine)
    monkeypatch.setattr(scann_module.Path, "read_text", lambda path, encoding: flags)
    assert scann_module._missing_cpu_flags() == missing


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sys.platform", "darwin", "no package for"),
        ("sys.version_info", (3, 14, 0), "no package for Python"),
        ("_missing_cpu_flags", lambda: ["avx"], "needs the CPU instructions avx"),
        ("importlib.util.find_spec", lambda name: None, "not installed"),
    ],
)
def test_says_why_scann_cannot_be_had(rng, monkeypatch, name, value, message):
    assert scann_module.scann_problem() is None
    with monkeypatch.context() as patch:
        patch.setattr(f"ragjax.index.scann.{name}", value)
        with pytest.raises(ImportError, match=f"{message}.*exact index instead|until then"):
            ScannIndex.build(clustered(rng, 20))

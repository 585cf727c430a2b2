"""ScaNN behind the protocol: recall, padding, small corpora, threads, why it is missing."""

import dataclasses
import logging

import numpy as np
import pytest
from clustered_corpus import clustered

from ragjax.index import (
    ExactIndex,
    ScannIndex,
    ScannOptions,
    recall_against_exact,
    scann_options,
)
from ragjax.index import scann as scann_module

pytest.importorskip("scann", reason="ScaNN has no package for this platform")


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

"""Drift: overlap of results, drift of embeddings, and scoring candidates again."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.index import ExactIndex, IndexSnapshot, SearchResult
from ragjax.refresh import (
    EmbeddingDrift,
    EncodeOptions,
    TopKDrift,
    live_embeddings,
    rerank,
    top_k_overlap,
)
from ragjax.refresh.task import EncodeTask

NUM_DOCS, DIM, VOCABULARY, PAD = 60, 4, 20, 0


def tiny_encode(params, tokens):
    """The mean of the embeddings of the tokens."""
    weights = tokens.mask[..., None].astype(jnp.float32)
    total = (params[tokens.ids] * weights).sum(axis=1)
    return total / jnp.maximum(weights.sum(axis=1), 1.0)


def embed(params, documents):
    """What `tiny_encode` computes, one document at a time in float64."""
    return np.stack(
        [params[ids].mean(axis=0, dtype=np.float64) if ids else np.zeros(DIM) for ids in documents]
    )


@pytest.fixture
def task(rng):
    documents = [
        rng.integers(1, VOCABULARY, size=length).tolist()
        for length in rng.integers(1, 9, size=NUM_DOCS)
    ]
    options = EncodeOptions(buckets=(8,), batch_tokens=64, max_rows=8)
    return EncodeTask(encode=tiny_encode, documents=documents, pad_id=PAD, options=options)


@pytest.fixture
def params(rng):
    return rng.normal(size=(VOCABULARY, DIM)).astype(np.float32)


def snapshot_of(embeddings, version=0) -> IndexSnapshot:
    return IndexSnapshot(
        index=ExactIndex(embeddings), version=version, encoder_step=0, corpus_hash="", built_at=0.0
    )


def result_of(rows, k) -> SearchResult:
    """A result with these documents; -1 and missing ones are masked."""
    doc_ids = np.full((len(rows), k), -1, np.int32)
    for row, ids in enumerate(rows):
        doc_ids[row, : len(ids)] = ids
    mask = doc_ids >= 0
    return SearchResult(doc_ids, np.where(mask, 1.0, -np.inf).astype(np.float32), mask)


# ------------------------------------------------------------------ overlap


def test_overlap_is_the_fraction_in_common_averaged_over_queries():
    before = result_of([[1, 2, 3, 4], [5, 6], [], [7]], 4)
    after = result_of([[4, 9, 1, 8], [6, 5], [], []], 4)
    assert top_k_overlap(before, after) == pytest.approx((2 / 4 + 2 / 2 + 0 / 1) / 3)


def test_overlap_without_anything_to_compare_is_one():
    nothing = result_of([[], []], 3)
    assert top_k_overlap(nothing, nothing) == 1.0
    assert top_k_overlap(result_of([], 3), result_of([], 3)) == 1.0


def test_overlap_ignores_what_masked_slots_hold():
    before = result_of([[1, 2]], 3)
    before.doc_ids[0, 2] = 7
    after = result_of([[1, 7]], 3)
    assert top_k_overlap(before, after) == 0.5
    assert top_k_overlap(after, before) == 0.5


def test_results_of_other_queries_or_k_are_not_compared():
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(1, 4\)"):
        top_k_overlap(result_of([[1]], 3), result_of([[1]], 4))


LISTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 8), unique=True, max_size=5),
        st.lists(st.integers(0, 8), unique=True, max_size=5),
    ),
    max_size=4,
)


@settings(derandomize=True, deadline=None)
@given(LISTS)
def test_overlap_equals_sets(pairs):
    before, after = (result_of([pair[side] for pair in pairs], 5) for side in (0, 1))
    fractions = [
        len(set(left) & set(right)) / max(len(left), len(right))
        for left, right in pairs
        if left or right
    ]
    expected = np.mean(fractions) if fractions else 1.0
    assert top_k_overlap(before, after) == pytest.approx(expected)
    assert top_k_overlap(after, before) == top_k_overlap(before, after)


# ------------------------------------------------------------------ rerank


def brute_force(candidates, query, documents, k):
    """Ids and scores of the best k candidates of one query, by sorting in float64."""
    scored = sorted((-float(documents[doc].astype(np.float64) @ query), doc) for doc in candidates)
    return [doc for _, doc in scored[:k]], [-score for score, _ in scored[:k]]


@pytest.mark.parametrize("k", [1, 3, 6, 10])
def test_rerank_equals_sorting_the_candidates(rng, k):
    documents = rng.normal(size=(NUM_DOCS, DIM)).astype(np.float32)
    queries = rng.normal(size=(5, DIM)).astype(np.float32)
    candidates = [rng.permutation(NUM_DOCS)[:count].tolist() for count in (6, 6, 4, 0, 1)]
    found = rerank(result_of(candidates, 6), queries, lambda rows: documents[rows], k)
    assert found.doc_ids.shape == found.scores.shape == found.mask.shape == (5, k)
    assert found.scores.dtype == np.float32
    for row, ids in enumerate(candidates):
        expected_ids, expected_scores = brute_force(ids, queries[row], documents, k)
        real = len(expected_ids)
        assert found.doc_ids[row].tolist() == expected_ids + [-1] * (k - real)
        np.testing.assert_allclose(found.scores[row, :real], expected_scores, rtol=1e-4, atol=1e-6)
        assert found.mask[row].tolist() == [True] * real + [False] * (k - real)
        assert np.all(found.scores[row, real:] == -np.inf)


def test_rerank_of_every_document_is_exact_search(rng):
    documents = rng.normal(size=(NUM_DOCS, DIM)).astype(np.float32)
    queries = rng.normal(size=(7, DIM)).astype(np.float32)
    stale = ExactIndex(rng.normal(size=(NUM_DOCS, DIM)))
    found = rerank(stale.search(queries, NUM_DOCS), queries, lambda rows: documents[rows], 9)
    expected = ExactIndex(documents).search(queries, 9)
    np.testing.assert_array_equal(found.doc_ids, expected.doc_ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


def test_equal_documents_are_ordered_by_the_lower_id(rng):
    # 384 dimensions in 83 rows: wherever a sum is split, equal rows must give equal scores.
    documents = np.tile(rng.normal(size=384).astype(np.float32), (83, 1))
    queries = rng.normal(size=(3, 384)).astype(np.float32)
    candidates = [rng.permutation(83).tolist() for _ in range(3)]
    found = rerank(result_of(candidates, 83), queries, lambda rows: documents[rows], 20)
    np.testing.assert_array_equal(found.doc_ids, np.tile(np.arange(20), (3, 1)))


def test_each_distinct_candidate_is_encoded_once(rng):
    documents = rng.normal(size=(NUM_DOCS, DIM)).astype(np.float32)
    asked = []

    def encode(rows):
        asked.append(rows)
        return documents[rows]

    result = result_of([[9, 3, 5], [5, 9], [3]], 4)
    rerank(result, np.ones((3, DIM)), encode, 2)
    assert [rows.tolist() for rows in asked] == [[3, 5, 9]]
    assert asked[0].dtype == np.int64


def test_nothing_is_encoded_where_nothing_was_found():
    def encode(rows):
        raise AssertionError(f"asked for {rows}")

    found = rerank(result_of([[], []], 4), np.ones((2, DIM)), encode, 3)
    assert found.doc_ids.shape == (2, 3) and not found.mask.any()
    assert rerank(result_of([], 4), np.ones((0, DIM)), encode, 3).doc_ids.shape == (0, 3)


def test_rerank_refuses_what_does_not_fit():
    result = result_of([[1, 2]], 2)
    ones = np.ones((1, DIM), np.float32)

    def encode(rows):
        return np.ones((len(rows), DIM), np.float32)

    with pytest.raises(ValueError, match="k must be a positive integer, got 0"):
        rerank(result, ones, encode, 0)
    with pytest.raises(ValueError, match="2 query embeddings for 1 results"):
        rerank(result, np.ones((2, DIM)), encode, 1)
    with pytest.raises(ValueError, match="1 live embeddings for 2 documents"):
        rerank(result, ones, lambda rows: encode(rows)[:1], 1)
    with pytest.raises(ValueError, match="live document embeddings hold NaN"):
        rerank(result, ones, lambda rows: encode(rows) * np.nan, 1)
    with pytest.raises(ValueError, match="Query embeddings have size 5"):
        rerank(result, np.ones((1, 5)), encode, 1)


def test_live_embeddings_are_those_of_the_rows_asked_for(task, params):
    rows = np.array([40, 3, 3, 59])
    found = live_embeddings(task, params)(rows)
    expected = embed(params, [task.documents[row] for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-6)


# ------------------------------------------------------------------ drift of embeddings


def indexed_from(*generations):
    """Reads embeddings by the version of the snapshot and notes the calls."""
    calls = []

    def indexed(snapshot, rows):
        calls.append(snapshot.version)
        return generations[snapshot.version][rows]

    return indexed, calls


def test_embedding_drift_is_the_mean_distance_of_cosines(task, params, rng):
    stale = embed(params, task.documents).astype(np.float32)
    indexed, _ = indexed_from(stale)
    drift = EmbeddingDrift(task, indexed, num_probes=25, seed=3)
    assert len(drift.rows) == 25 and len(set(drift.rows.tolist())) == 25
    assert drift(params, snapshot_of(stale)) == pytest.approx(0.0, abs=1e-6)

    moved = params + rng.normal(size=params.shape).astype(np.float32)
    live = embed(moved, task.documents)[drift.rows]
    old = stale[drift.rows].astype(np.float64)
    cosines = [
        left @ right / np.linalg.norm(left) / np.linalg.norm(right)
        for left, right in zip(live, old, strict=True)
    ]
    assert drift(moved, snapshot_of(stale)) == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    assert drift(moved, snapshot_of(stale)) > 0.05
    assert drift(-params, snapshot_of(stale)) == pytest.approx(2.0, abs=1e-6)
    # Only the direction counts.
    assert drift(3 * params, snapshot_of(stale)) == pytest.approx(0.0, abs=1e-6)


def test_probes_are_drawn_from_the_seed_and_never_more_than_there_are(task):
    indexed, _ = indexed_from()
    first, again, other = (
        EmbeddingDrift(task, indexed, num_probes=20, seed=seed).rows for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()
    assert first.dtype == np.int64 and np.all(np.diff(first) > 0)
    np.testing.assert_array_equal(EmbeddingDrift(task, indexed).rows, np.arange(NUM_DOCS))
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        EmbeddingDrift(task, indexed, num_probes=0)


def test_embeddings_in_the_index_are_read_once_for_each_version(task, params, rng):
    old = embed(params, task.documents).astype(np.float32)
    moved = params + rng.normal(size=params.shape).astype(np.float32)
    new = embed(moved, task.documents).astype(np.float32)
    indexed, calls = indexed_from(old, new)
    drift = EmbeddingDrift(task, indexed)
    assert drift(moved, snapshot_of(old, version=0)) > 0.05
    assert drift(moved, snapshot_of(old, version=0)) > 0.05
    assert drift(moved, snapshot_of(new, version=1)) == pytest.approx(0.0, abs=1e-6)
    assert calls == [0, 1]


def test_a_document_of_length_zero_is_equal_to_itself_only(task, params):
    empty = dataclasses.replace(task, documents=[[], [1]])
    stale = embed(params, empty.documents).astype(np.float32)
    indexed, _ = indexed_from(stale, np.ones_like(stale) * stale[1])
    drift = EmbeddingDrift(empty, indexed)
    assert drift(params, snapshot_of(stale, version=0)) == pytest.approx(0.0, abs=1e-6)
    assert drift(params, snapshot_of(stale, version=1)) == pytest.approx(0.5, abs=1e-6)


def test_embeddings_are_read_from_the_snapshot_itself(task, params):
    stale = embed(params, task.documents).astype(np.float32)
    snapshot = snapshot_of(stale)
    readable = dataclasses.replace(snapshot, doc_embeddings=lambda rows: -stale[rows])
    drift = EmbeddingDrift(task, num_probes=10)
    with pytest.raises(ValueError, match="version 0 has no doc_embeddings"):
        drift(params, snapshot)
    assert drift(params, readable) == pytest.approx(2.0, abs=1e-6)


def test_embeddings_of_another_size_are_refused(task, params):
    indexed, _ = indexed_from(np.ones((NUM_DOCS, DIM + 1), np.float32))
    with pytest.raises(ValueError, match=r"\(60, 5\).*\(60, 4\)"):
        EmbeddingDrift(task, indexed)(params, snapshot_of(np.ones((NUM_DOCS, DIM + 1))))


# ------------------------------------------------------------------ drift of the top k


def expected_top_k_drift(queries, stale, live, k, candidates):
    """By sorting all documents with the stale, then the candidates with the live embeddings."""
    kept = []
    for query in queries.astype(np.float64):
        order, _ = brute_force(range(len(stale)), query, stale, candidates)
        best, _ = brute_force(order, query, live, k)
        kept.append(len(set(order[:k]) & set(best)) / k)
    return 1 - np.mean(kept)


def test_top_k_drift_is_what_live_embeddings_would_replace(task, params, rng):
    stale = embed(params, task.documents).astype(np.float32)
    queries = rng.normal(size=(8, DIM)).astype(np.float32)
    drift = TopKDrift(task, lambda: queries, k=5, factor=3)
    assert drift(params, snapshot_of(stale)) == 0.0
    moved = params + rng.normal(size=params.shape).astype(np.float32)
    live = embed(moved, task.documents)
    expected = expected_top_k_drift(queries, stale, live, 5, 15)
    assert expected > 0.1
    assert drift(moved, snapshot_of(stale)) == pytest.approx(expected)


def test_top_k_drift_of_a_corpus_smaller_than_the_candidates(task, params, rng, caplog):
    small = dataclasses.replace(task, documents=task.documents[:12])
    stale = embed(params, small.documents).astype(np.float32)
    queries = rng.normal(size=(4, DIM)).astype(np.float32)
    moved = params + rng.normal(size=params.shape).astype(np.float32)
    live = embed(moved, small.documents)
    drift = TopKDrift(small, lambda: queries, k=10, factor=4)(moved, snapshot_of(stale))
    assert drift == pytest.approx(expected_top_k_drift(queries, stale, live, 10, 12))
    # With as many as there are, nothing can be replaced.
    assert TopKDrift(small, lambda: queries, k=20)(moved, snapshot_of(stale)) == 0.0
    assert caplog.records == []


def test_query_embeddings_are_asked_for_at_each_measurement(task, params, rng):
    stale = embed(params, task.documents).astype(np.float32)
    asked = []

    def encode_queries():
        asked.append(len(asked))
        return rng.normal(size=(2, DIM))

    drift = TopKDrift(task, encode_queries, k=2)
    drift(params, snapshot_of(stale))
    drift(params, snapshot_of(stale))
    assert asked == [0, 1]


@pytest.mark.parametrize(("k", "factor"), [(0, 4), (5, 1)])
def test_probes_that_cannot_show_a_drift_are_refused(task, k, factor):
    with pytest.raises(ValueError, match="k must be at least 1 and factor at least 2"):
        TopKDrift(task, lambda: np.ones((1, DIM)), k=k, factor=factor)

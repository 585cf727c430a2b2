"""Exact search against a sort of the whole score matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.index import ExactIndex, exact


def reference(queries, docs, k):
    scores = queries.astype(np.float64) @ docs.astype(np.float64).T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(scores, ids, axis=1)


@pytest.mark.parametrize("doc_rows", [1, 37, 128, 10_000])
@pytest.mark.parametrize("num_queries", [1, 9, 300])
def test_equals_a_full_sort_for_any_block_size(rng, doc_rows, num_queries):
    docs = rng.normal(size=(211, 16)).astype(np.float32)
    queries = rng.normal(size=(num_queries, 16)).astype(np.float32)
    result = ExactIndex(docs, doc_rows=doc_rows).search(queries, 7)
    ids, scores = reference(queries, docs, 7)
    np.testing.assert_array_equal(result.doc_ids, ids)
    np.testing.assert_allclose(result.scores, scores, rtol=1e-5, atol=1e-5)
    assert result.mask.all()
    assert [array.dtype for array in result] == [np.int32, np.float32, np.bool_]


@pytest.mark.parametrize("doc_rows", [16, 1000])
def test_equal_scores_are_ordered_by_the_lower_id(rng, doc_rows):
    docs = np.tile(rng.normal(size=(3, 8)).astype(np.float32), (40, 1))  # each three 40 times
    queries = docs[:3]
    result = ExactIndex(docs, doc_rows=doc_rows).search(queries, 50)
    ids, _ = reference(queries, docs, 50)
    np.testing.assert_array_equal(result.doc_ids, ids)


def test_more_results_than_documents_are_masked(rng):
    docs = -np.abs(rng.normal(size=(3, 4)).astype(np.float32))
    result = ExactIndex(docs).search(np.ones((2, 4), np.float32), 5)
    # Negative scores must lose to no padding row, whose score would be 0.
    assert result.mask.tolist() == [[True] * 3 + [False] * 2] * 2
    assert (result.doc_ids[:, 3:] == -1).all() and np.isneginf(result.scores[:, 3:]).all()
    assert sorted(result.doc_ids[0, :3].tolist()) == [0, 1, 2]


def test_one_document_no_queries_and_jax_arrays(rng):
    index = ExactIndex(jnp.ones((1, 4)))
    assert (index.size, index.dim) == (1, 4)
    assert index.search(jnp.ones((1, 4)), 1).doc_ids.tolist() == [[0]]
    assert index.search(np.zeros((0, 4), np.float32), 3).doc_ids.shape == (0, 3)


def test_neither_batch_size_nor_a_rebuild_compiles_again(rng):
    docs = rng.normal(size=(300, 12)).astype(np.float32)
    index = ExactIndex(docs)
    for num_queries in (1, 8, 9, 64, 65, 256):
        index.search(docs[:num_queries], 5)
    compiled = exact._top_k._cache_size()
    for num_queries, k in ((2, 5), (7, 6), (33, 8), (200, 7), (600, 5)):
        index.search(np.tile(docs, (2, 1))[:num_queries], k)
    ExactIndex(2 * docs).search(docs[:3], 5)
    assert exact._top_k._cache_size() == compiled


def test_can_live_on_another_device(rng):
    docs = rng.normal(size=(20, 4)).astype(np.float32)
    device = jax.devices()[-1]
    index = ExactIndex(docs, device=device)
    assert index._blocks.devices() == {device}
    np.testing.assert_array_equal(index.search(docs, 3).doc_ids, reference(docs, docs, 3)[0])


def test_bad_input_is_refused(rng):
    docs = rng.normal(size=(20, 4)).astype(np.float32)
    with pytest.raises(ValueError, match="size 5 .* size 4"):
        ExactIndex(docs).search(np.zeros((1, 5)), 3)
    with pytest.raises(ValueError, match="query embeddings hold NaN .*row 0"):
        ExactIndex(docs).search(np.full((1, 4), np.nan), 3)
    with pytest.raises(ValueError, match="positive integer"):
        ExactIndex(docs).search(docs, 0)
    with pytest.raises(ValueError, match="doc_rows must be at least 1, got 0"):
        ExactIndex(docs, doc_rows=0)
    docs[4, 2] = np.inf
    with pytest.raises(ValueError, match="document embeddings hold NaN .*row 4"):
        ExactIndex(docs)

"""Exact search against a sort of the whole score matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.index import ExactIndex, exact, exact_search


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


@pytest.mark.slow
@pytest.mark.parametrize("doc_rows", [16, 10_000])
@pytest.mark.parametrize(("size", "num_devices"), [(5, 8), (300, 1), (1500, 3), (1500, 8)])
def test_a_sharded_search_equals_one_device(rng, doc_rows, size, num_devices):
    # Whole numbers: sums are exact in any order, and many scores are equal.
    docs = rng.integers(-3, 4, size=(size, 8)).astype(np.float32)
    queries = rng.integers(-3, 4, size=(9, 8)).astype(np.float32)
    devices = jax.devices()[:num_devices]
    index = ExactIndex(docs, doc_rows=doc_rows, devices=devices)
    assert index.blocks.devices() == set(devices)
    for k in (1, 20, 200):
        one = ExactIndex(docs, doc_rows=doc_rows).search(queries, k)
        np.testing.assert_array_equal(one.doc_ids[:, :size], reference(queries, docs, k)[0])
        for found in (index.search(queries, k), index.search_on_host(queries, k)):
            for left, right in zip(one, found, strict=True):
                np.testing.assert_array_equal(left, right)


def test_every_device_holds_its_part_of_the_documents(rng):
    index = ExactIndex(rng.normal(size=(8 * 128, 4)), devices=jax.devices())
    assert [shard.data.shape for shard in index.blocks.addressable_shards] == [(1, 128, 4)] * 8


def test_a_rebuilt_sharded_index_compiles_nothing(rng):
    docs = rng.normal(size=(300, 12)).astype(np.float32)
    ExactIndex(docs, devices=jax.devices()).search(docs[:8], 5)
    compiled = exact._sharded_top_k._cache_size()
    ExactIndex(2 * docs, devices=jax.devices()).search(docs[:3], 6)
    assert exact._sharded_top_k._cache_size() == compiled


@pytest.mark.parametrize("doc_rows", [1, 128, 10_000])
@pytest.mark.parametrize("num_queries", [0, 1, 300])
def test_the_host_search_equals_a_full_sort(rng, doc_rows, num_queries):
    docs = rng.normal(size=(211, 16)).astype(np.float32)
    queries = rng.normal(size=(num_queries, 16)).astype(np.float32)
    result = ExactIndex(docs, doc_rows=doc_rows).search_on_host(queries, 7)
    ids, scores = reference(queries, docs, 7)
    np.testing.assert_array_equal(result.doc_ids, ids)
    np.testing.assert_allclose(result.scores, scores, rtol=1e-5, atol=1e-5)
    assert result.mask.all()
    assert [array.dtype for array in result] == [np.int32, np.float32, np.bool_]


@pytest.mark.parametrize("devices", [None, 8])
def test_on_a_cpu_the_host_reads_the_memory_of_the_device(rng, devices):
    docs = rng.normal(size=(3000, 16)).astype(np.float32)
    index = ExactIndex(docs, devices=devices and jax.devices())
    shards = [shard.data for shard in index.blocks.addressable_shards]
    found = [view.ctypes.data for view in index._host_shards]
    assert found == [shard.unsafe_buffer_pointer() for shard in shards]


def test_the_host_copy_of_an_accelerator_is_made_at_the_first_search(rng, monkeypatch):
    docs = rng.normal(size=(30, 4)).astype(np.float32)
    index = ExactIndex(docs)
    index._host_shards = None
    copies = []
    copy = exact._to_host
    monkeypatch.setattr(exact, "_to_host", lambda blocks: copies.append(1) or copy(blocks))
    for _ in range(2):
        ids = index.search_on_host(docs, 3).doc_ids
        np.testing.assert_array_equal(ids, reference(docs, docs, 3)[0])
    assert copies == [1]


@pytest.mark.parametrize("doc_rows", [64, 10_000])
def test_the_pure_function_inside_a_jit_equals_the_search_and_compiles_once(rng, doc_rows):
    docs = rng.normal(size=(200, 8)).astype(np.float32)
    queries = rng.normal(size=(5, 8)).astype(np.float32)

    @jax.jit
    def step(queries, blocks, size):
        return exact_search(2 * queries, blocks, size, 6)

    for scale, size in ((1, 200), (-1, 200), (1, 199)):
        index = ExactIndex(scale * docs[:size], doc_rows=doc_rows)
        scores, ids = step(queries, index.blocks, index.size)
        expected = index.search(2 * queries, 6)
        np.testing.assert_array_equal(ids, expected.doc_ids)
        np.testing.assert_allclose(scores, expected.scores, rtol=1e-6)
    assert step._cache_size() == 1


@pytest.mark.parametrize("doc_rows", [128, 10_000])
def test_the_pure_function_leaves_slots_beyond_the_documents_empty(rng, doc_rows):
    docs = -np.abs(rng.normal(size=(3, 4))).astype(np.float32)
    queries = jnp.ones((2, 4))
    index = ExactIndex(docs, doc_rows=doc_rows)
    for k in (5, 130):  # fewer and more than the rows of the block
        scores, ids = exact_search(queries, index.blocks, index.size, k)
        assert ids.shape == scores.shape == (2, k)
        assert sorted(ids[0, :3].tolist()) == [0, 1, 2]
        assert (ids[:, 3:] == -1).all() and jnp.isneginf(scores[:, 3:]).all()


def test_the_pure_function_finds_the_same_in_sharded_blocks(rng):
    docs = rng.integers(-3, 4, size=(1500, 8)).astype(np.float32)
    index = ExactIndex(docs, devices=jax.devices())
    _, ids = jax.jit(exact_search, static_argnums=3)(docs[:9], index.blocks, index.size, 20)
    np.testing.assert_array_equal(ids, reference(docs[:9], docs, 20)[0])


def test_bad_input_is_refused(rng):
    docs = rng.normal(size=(20, 4)).astype(np.float32)
    for search in (ExactIndex(docs).search_on_host, ExactIndex(docs, devices=jax.devices()).search):
        with pytest.raises(ValueError, match="query embeddings hold NaN .*row 0"):
            search(np.full((1, 4), np.nan), 3)
    for options in ({"devices": []}, {"device": jax.devices()[0], "devices": jax.devices()}):
        with pytest.raises(ValueError, match="one device, or at least one in devices, got device="):
            ExactIndex(docs, **options)
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


@pytest.mark.parametrize("devices", [None, 4])
@pytest.mark.parametrize(("dtype", "nbytes"), [("bfloat16", 2), ("int8", 1)])
def test_rounded_documents_are_found_and_scored_in_float32(rng, dtype, nbytes, devices):
    docs = rng.normal(size=(700, 24)).astype(np.float32)
    docs[5] = docs[650] = docs[40]
    docs[9] = 0
    queries = np.concatenate([rng.normal(size=(20, 24)), docs[40:41]]).astype(np.float32)
    placed = None if devices is None else jax.devices()[:devices]
    index = ExactIndex(docs, doc_rows=128, devices=placed, dtype=dtype)
    assert index.blocks.dtype == dtype and index.blocks.nbytes == index.blocks.size * nbytes
    found, expected = index.search(queries, 10), ExactIndex(docs).search(queries, 10)
    same = [
        len(set(one) & set(two)) for one, two in zip(found.doc_ids, expected.doc_ids, strict=True)
    ]
    assert np.mean(same) >= 9.9
    assert found.doc_ids[-1, :3].tolist() == [5, 40, 650]
    np.testing.assert_allclose(
        found.scores,
        np.take_along_axis(queries @ docs.T, found.doc_ids, axis=1),
        rtol=1e-5,
        atol=1e-5,
    )
    assert (np.diff(found.scores) <= 0).all()
    host = index.search_on_host(queries, 10)
    np.testing.assert_array_equal(host.doc_ids, expected.doc_ids)
    assert index.search(queries, 800).mask.sum(axis=1).tolist() == [700] * 21


def test_documents_of_int8_are_read_from_where_they_lie(rng, tmp_path):
    docs = rng.normal(size=(300, 8)).astype(np.float32)
    np.save(tmp_path / "docs.npy", docs)
    mapped = np.load(tmp_path / "docs.npy", mmap_mode="r")
    index = ExactIndex(mapped, dtype="int8")
    assert np.shares_memory(index._embeddings, mapped)
    restored = np.asarray(index.blocks, np.float32) * np.asarray(index.scales)[..., None]
    np.testing.assert_allclose(restored.reshape(-1, 8)[:300], docs, atol=np.abs(docs).max() / 250)

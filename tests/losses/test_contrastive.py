"""Contrastive losses: in-batch, hard and cross-device negatives, gradient caching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from losses_reference import f32, make_batch, softmax

from ragjax import losses


def test_gradient_is_softmax_minus_one_hot(rng):
    batch = make_batch(rng, masked=False)
    gradient = jax.jit(jax.grad(lambda s: losses.info_nce_loss(s, batch.positives).sum()))(
        batch.doc_scores
    )
    for row, scores in enumerate(np.asarray(batch.doc_scores, np.float64)):
        expected = softmax(scores) - np.eye(len(scores))[batch.positives[row]]
        np.testing.assert_allclose(gradient[row], expected, atol=1e-6)


def test_copy_of_the_gold_document_is_no_negative(rng):
    # Columns 0 and 2 hold the same document: for query 0 (gold 0) column 2 must not count.
    scores = f32(rng.normal(size=(2, 4)))
    doc_ids, gold_ids = np.array([7, 8, 7, 9]), np.array([7, 8])
    loss = losses.info_nce_loss(
        scores, np.array([0, 1]), mask=doc_ids[None, :] != gold_ids[:, None]
    )
    exact = np.asarray(scores, np.float64)
    expected = [-np.log(softmax(exact[0, [0, 1, 3]])[0]), -np.log(softmax(exact[1])[1])]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("outside", [-1, 4])
def test_positive_outside_the_columns_is_nan_under_jit_and_ignored_in_a_masked_row(outside, rng):
    scores, positives = f32(rng.normal(size=(2, 4))), np.array([1, outside])
    mask = np.array([[True] * 4, [False] * 4])
    expected = losses.info_nce_loss(scores[:1], positives[:1])[0]
    np.testing.assert_allclose(
        losses.info_nce_loss(scores, positives, mask=mask), [expected, 0.0], rtol=1e-6
    )
    np.testing.assert_allclose(
        jax.jit(losses.info_nce_loss)(scores, positives), [expected, np.nan], rtol=1e-6
    )


def test_in_batch_negatives_of_two_towers_equal_the_loop(rng):
    queries, docs = rng.normal(size=(3, 5)), rng.normal(size=(6, 5))
    loss = losses.info_nce_loss(f32(queries @ docs.T), np.array([0, 2, 4]))
    expected = [-np.log(softmax(queries[i] @ docs.T)[2 * i]) for i in range(3)]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def contrastive_batch(rng, queries=16, per_query=3, width=5):
    ids = rng.integers(0, 20, (queries, per_query))
    keep = rng.random((queries, per_query)) < 0.8
    keep[2, 0] = False
    vectors = (
        f32(rng.normal(size=(queries, width))),
        f32(rng.normal(size=(queries, per_query, width))),
    )
    return *vectors, ids.astype(np.int32), keep


def reference_dpr(queries, docs, ids, keep, temperature):
    result = []
    for i, query in enumerate(np.float64(queries)):
        total, gold = 0.0, np.exp(query @ np.float64(docs[i, 0]) / temperature)
        for j, h in np.ndindex(ids.shape):
            if (j, h) == (i, 0) or (keep[j, h] and ids[j, h] != ids[i, 0]):
                total += np.exp(query @ np.float64(docs[j, h]) / temperature)
        others = any(keep[j, h] and ids[j, h] != ids[i, 0] for j, h in np.ndindex(ids.shape))
        result.append(-np.log(gold / total) if keep[i, 0] and others else 0.0)
    return np.array(result)


def test_dpr_equals_the_loop_with_hard_negatives_copies_and_masks(rng):
    queries, docs, ids, keep = contrastive_batch(rng)
    got = losses.dpr_loss(queries, docs, temperature=0.7, doc_ids=ids, doc_mask=keep)
    np.testing.assert_allclose(got, reference_dpr(queries, docs, ids, keep, 0.7), rtol=1e-4)
    plain = losses.dpr_loss(queries, docs)
    no_copies = np.arange(ids.size).reshape(ids.shape)
    expected = reference_dpr(queries, docs, no_copies, np.ones_like(keep), 1.0)
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-5)


def test_symmetric_loss_is_the_mean_of_both_directions(rng):
    queries, docs, *_ = contrastive_batch(rng)
    scores = np.float64(queries) @ np.float64(docs[:, 0]).T / 0.5
    rows = [
        (-np.log(softmax(scores[i])[i]) - np.log(softmax(scores[:, i])[i])) / 2 for i in range(16)
    ]
    got = losses.symmetric_contrastive_loss(queries, docs[:, 0], temperature=0.5)
    np.testing.assert_allclose(got, rows, rtol=1e-4, atol=1e-5)


# What the caller does for the exact gradient, row by row of the documentation's table.
def two_towers(weights, queries, docs, ids, keep, axis_name):
    # axis_name=None: the whole batch in one place.
    return losses.dpr_loss(
        queries @ weights, docs @ weights, doc_ids=ids, doc_mask=keep, axis_name=axis_name
    ).mean()


def sharded_inputs(rng):
    batch = contrastive_batch(rng)
    weights = f32(rng.normal(size=(5, 5)))
    exact = jax.value_and_grad(two_towers)(weights, *batch, None)
    parts = tuple(a.reshape(8, 2, *a.shape[1:]) for a in batch)
    return weights, batch, parts, exact


def assert_same(got, exact):
    np.testing.assert_allclose(got[0], exact[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], exact[1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mapped", ["vmap", "pmap"])
def test_gradient_inside_vmap_axis_and_pmap_needs_a_pmean(mapped, rng):
    weights, _, parts, exact = sharded_inputs(rng)

    def step(weights, *part):
        value, slope = jax.value_and_grad(two_towers)(weights, *part, "x")
        return jax.lax.pmean(value, "x"), jax.lax.pmean(slope, "x"), slope

    transform = jax.vmap if mapped == "vmap" else jax.pmap
    in_axes = (None, 0, 0, 0, 0)
    value, slope, raw = transform(step, axis_name="x", in_axes=in_axes)(weights, *parts)
    assert_same((value[0], slope[0]), exact)
    assert np.abs(raw[0] - exact[1]).max() > 1e-3  # the pmean is no formality


def test_leading_axes_of_embeddings_are_batches_of_their_own_also_across_devices(rng):
    pair = [contrastive_batch(rng), contrastive_batch(rng)]
    stacked = [np.stack(arrays) for arrays in zip(*pair, strict=True)]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spec = P(None, "x")

    def loss(queries, docs, ids, keep):
        return losses.dpr_loss(queries, docs, doc_ids=ids, doc_mask=keep, axis_name="x")

    got = jax.jit(jax.shard_map(loss, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec))(*stacked)
    for ours, (queries, docs, ids, keep) in zip(got, pair, strict=True):
        np.testing.assert_allclose(
            ours, losses.dpr_loss(queries, docs, doc_ids=ids, doc_mask=keep), rtol=1e-5
        )


def test_nan_in_masked_embeddings_reaches_neither_value_nor_gradient(rng):
    queries, docs, ids, keep = contrastive_batch(rng)

    @jax.jit
    def both(fill):
        def loss(queries, docs):
            return losses.dpr_loss(queries, docs, doc_ids=ids, doc_mask=keep).sum()

        def symmetric(queries, docs):
            return losses.symmetric_contrastive_loss(
                queries, docs[:, 0], doc_ids=ids[:, 0], doc_mask=keep[:, 0]
            ).sum()

        spoiled = (
            jnp.where(keep[:, :1], queries, fill),  # no gold document: no query
            jnp.where(keep[..., None], docs, fill),
        )
        return [jax.value_and_grad(f, (0, 1))(*spoiled) for f in (loss, symmetric)]

    jax.tree.map(np.testing.assert_array_equal, both(np.nan), both(0.0))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_gradient_of_shard_map(check_vma, where, rng):
    weights, batch, _, exact = sharded_inputs(rng)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    options = {"mesh": mesh, "in_specs": (P(), *(P("x"),) * 4), "check_vma": check_vma}

    def mean_loss(weights, *part):
        return jax.lax.pmean(two_towers(weights, *part, "x"), "x")

    def step(weights, *part):
        value, slope = jax.value_and_grad(mean_loss)(weights, *part)
        return value, slope if check_vma else jax.lax.pmean(slope, "x")

    if where == "inside":
        got = jax.jit(jax.shard_map(step, out_specs=(P(), P()), **options))(weights, *batch)
    else:
        outer = jax.shard_map(mean_loss, out_specs=P(), **options)
        got = jax.jit(jax.value_and_grad(outer))(weights, *batch)
    assert_same(got, exact)


def dropout_encoder(params, rows):
    inputs, keys = rows
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, inputs.shape[1:]))(keys)
    return jnp.tanh(jnp.where(kept, inputs / 0.9, 0.0) @ params)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 16, 99])
def test_gradient_cache_equals_the_whole_batch_with_dropout(chunk_size, rng):
    rows = f32(rng.normal(size=(16, 5))), jax.random.split(jax.random.key(1), 16)
    docs = f32(rng.normal(size=(16, 1, 4)))
    params = f32(rng.normal(size=(5, 4)))

    def loss(params, encode_all):
        return losses.dpr_loss(encode_all(params), docs).mean()

    whole = jax.value_and_grad(loss)(params, lambda p: dropout_encoder(p, rows))
    cached = jax.jit(
        jax.value_and_grad(
            lambda p: loss(
                p,
                lambda q: losses.encode_in_chunks(dropout_encoder, q, rows, chunk_size=chunk_size),
            )
        )
    )(params)
    for ours, theirs in zip(cached, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_gradient_cache_bounds_the_memory_of_a_32_times_larger_batch():
    def deep(params, rows):
        for _ in range(20):
            rows = jnp.tanh(rows @ params)
        return rows

    def temporary_bytes(size, chunk_size):
        def loss(params, rows):
            queries = losses.encode_in_chunks(deep, params, rows, chunk_size=chunk_size)
            return losses.dpr_loss(queries, rows[:, None]).mean()

        shapes = (
            jax.ShapeDtypeStruct((64, 64), jnp.float32),
            jax.ShapeDtypeStruct((size, 64), jnp.float32),
        )
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    scores = 3 * 4 * 1024**2  # the [B, B] scores and what the softmax keeps of them
    assert temporary_bytes(1024, 32) < temporary_bytes(1024, 1024) - 18 * 4 * 1024 * 64 + 2**20
    assert temporary_bytes(1024, 32) < scores + 4 * 2**20


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunked_encoding_refuses_a_bad_chunk_and_ragged_inputs(chunk_size):
    with pytest.raises(ValueError, match="^chunk_size: expected at least 1"):
        losses.encode_in_chunks(dropout_encoder, 0, jnp.ones((2, 3)), chunk_size=chunk_size)
    with pytest.raises(ValueError, match="^inputs: expected arrays with one common first axis"):
        losses.encode_in_chunks(dropout_encoder, 0, (jnp.ones((2, 3)), jnp.ones(3)), chunk_size=1)


@pytest.mark.parametrize("inputs", [(), jnp.float32(1.0)])
def test_chunked_encoding_refuses_inputs_without_rows(inputs):
    with pytest.raises(ValueError, match="^inputs: expected arrays with one common first axis"):
        losses.encode_in_chunks(dropout_encoder, 0, inputs, chunk_size=1)


def test_sharded_jit_of_embeddings_needs_no_axis_name(rng):
    weights, batch, _, exact = sharded_inputs(rng)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, P("x")))
    step = jax.jit(jax.value_and_grad(lambda w, *b: two_towers(w, *b, None)))
    assert_same(step(weights, *sharded), exact)


def test_symmetric_loss_leaves_copies_and_missing_pairs_out(rng):
    queries, docs, *_ = contrastive_batch(rng)
    ids, keep = np.arange(16) % 12, np.arange(16) != 3
    got = losses.symmetric_contrastive_loss(queries, docs[:, 0], doc_ids=ids, doc_mask=keep)
    one = reference_dpr(queries, docs[:, :1], ids[:, None], keep[:, None], 1.0)
    other = reference_dpr(docs[:, 0], queries[:, None], ids[:, None], keep[:, None], 1.0)
    np.testing.assert_allclose(got, (one + other) / 2, rtol=1e-4, atol=1e-5)

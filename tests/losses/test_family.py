"""EMDR², LOOP, ADist, contrastive over embeddings, gradient caching, estimators, the combinator."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from losses_reference import f32, make_batch, softmax

from ragjax import losses


def test_emdr2_is_the_marginal_likelihood_with_the_language_model_held_constant(rng):
    b = make_batch(rng)
    masks = {"doc_mask": b.doc_mask, "token_mask": b.token_mask}

    def both(loss):
        return jax.grad(lambda s, ell: loss(s, ell, **masks).sum(), (0, 1))(
            b.doc_scores, b.token_log_probs
        )

    ours, marginal = both(losses.emdr2_loss), both(losses.rag_token_loss)
    np.testing.assert_allclose(ours[0], marginal[0], atol=1e-6)
    assert np.abs(marginal[1]).max() > 0.1
    np.testing.assert_array_equal(ours[1], 0)


def test_summed_answers_equal_tokens_and_refuse_a_token_mask(rng):
    b = make_batch(rng)
    summed = losses.sequence_log_probs(b.token_log_probs, token_mask=b.token_mask)
    masks = {"doc_mask": b.doc_mask, "token_mask": b.token_mask}
    for function in (losses.rag_sequence_loss, losses.document_posterior):
        np.testing.assert_allclose(
            function(b.doc_scores, summed, doc_mask=b.doc_mask),
            function(b.doc_scores, b.token_log_probs, **masks),
            rtol=1e-5,
        )
    with pytest.raises(ValueError, match="^token_mask: expected None"):
        losses.rag_sequence_loss(b.doc_scores, summed, token_mask=b.token_mask)


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_label_smoothing_equals_the_formula(form, rng):
    b = make_batch(rng)
    logits = rng.normal(size=(*b.token_log_probs.shape, 7))
    vocab = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = getattr(losses, f"rag_{form}_loss")
    garbage = np.where(b.doc_mask[..., None, None] & b.token_mask[:, None, :, None], vocab, np.nan)
    got = loss(
        b.doc_scores,
        f32(vocab[..., 3]),
        doc_mask=b.doc_mask,
        token_mask=b.token_mask,
        label_smoothing=0.1,
        vocab_log_probs=f32(garbage),
    )
    for row, (docs, tokens) in enumerate(zip(b.doc_mask, b.token_mask, strict=True)):
        if not docs.any():
            assert got[row] == 0
            continue
        prior = softmax(np.float64(b.doc_scores[row][docs]))
        v = vocab[row][docs][:, tokens]  # [k, t, V]
        if form == "sequence":
            nll = -np.log(prior @ np.exp(v[..., 3].sum(1)))
            smooth = -np.log(prior @ np.exp(v.mean(-1).sum(1)))
        else:
            mixture = np.log(np.einsum("k,ktv->tv", prior, np.exp(v)))
            nll, smooth = -mixture[:, 3].sum(), -mixture.mean(-1).sum()
        np.testing.assert_allclose(got[row], 0.9 * nll + 0.1 * smooth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, np.nan, np.ones(2)])
def test_label_smoothing_out_of_range_or_without_its_log_probs_is_refused(smoothing):
    scores, ell = np.zeros((2, 3)), np.zeros((2, 3, 4))
    with pytest.raises(ValueError, match="^label_smoothing: expected a scalar"):
        losses.rag_token_loss(scores, ell, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="^vocab_log_probs: expected .*got None"):
        losses.rag_sequence_loss(scores, ell, label_smoothing=0.1)
    with pytest.raises(ValueError, match="^vocab_log_probs: expected .*got None"):
        jax.jit(lambda e: losses.rag_token_loss(scores, ell, label_smoothing=e))(0.1)


def test_leave_one_out_and_loop_equal_removing_the_document(rng):
    b = make_batch(rng)
    got = losses.leave_one_out_log_probs(
        np.where(b.doc_mask, b.doc_scores, np.nan),
        b.token_log_probs,
        doc_mask=b.doc_mask,
        token_mask=b.token_mask,
    )
    for row, column in np.ndindex(b.doc_mask.shape):
        docs = b.doc_mask[row] & (np.arange(6) != column)
        expected = 0.0
        if b.doc_mask[row, column] and docs.any():
            ell = np.float64(b.token_log_probs[row][docs][:, b.token_mask[row]]).sum(1)
            expected = np.log(softmax(np.float64(b.doc_scores[row][docs])) @ np.exp(ell))
        np.testing.assert_allclose(got[row, column], expected, rtol=1e-5, atol=1e-5)
    target = losses.loop_target(got, temperature=0.5, doc_mask=b.doc_mask)
    expected = softmax(-np.float64(got[0]) / 0.5)
    np.testing.assert_allclose(np.exp(target[0]), expected, rtol=1e-5)
    slope = jax.grad(lambda x: jnp.exp(losses.loop_target(x, temperature=1.0)).sum())(got)
    np.testing.assert_array_equal(slope, 0)


def test_attention_mass_equals_the_loop_and_ignores_padding(rng):
    attention, norms = rng.random((2, 3, 4, 2, 5)), rng.random((2, 3, 2, 5))
    context, tokens = rng.random((2, 2, 5)) < 0.6, rng.random((2, 4)) < 0.6
    tokens[1] = False
    spoiled = np.where(context[:, None, None] & tokens[:, None, :, None, None], attention, np.nan)
    got = losses.attention_mass(
        f32(spoiled),
        f32(np.where(context[:, None], norms, np.nan)),
        context_mask=context,
        token_mask=tokens,
    )
    for b, c in np.ndindex(2, 2):
        total = sum(
            attention[b, a, t, c, i] * norms[b, a, c, i]
            for a, t, i in np.ndindex(3, 4, 5)
            if tokens[b, t] and context[b, c, i]
        )
        np.testing.assert_allclose(got[b, c], total / (3 * max(tokens[b].sum(), 1)), rtol=1e-5)


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


def test_gumbel_top_k_draws_as_successive_softmax_draws(rng):
    scores = f32([[0.5, -0.3, 1.0, 9.0]])
    keep = np.array([[True, True, True, False]])
    keys = jax.random.split(jax.random.key(0), 20000)
    draws = jax.vmap(
        lambda key: losses.gumbel_top_k(scores, key, num_samples=2, doc_mask=keep).indices[0]
    )(keys)
    p = softmax(np.float64(scores[0, :3]))
    for first, second in itertools.permutations(range(3), 2):
        share = np.mean((draws[:, 0] == first) & (draws[:, 1] == second))
        assert abs(share - p[first] * p[second] / (1 - p[first])) < 0.015


def test_gumbel_top_k_is_one_hot_forward_and_softmax_backward(rng):
    scores = f32(rng.normal(size=(2, 4)))
    keep = np.array([[True] * 4, [True, False, False, False]])
    key, values = jax.random.key(3), f32(rng.normal(size=(2, 4)))
    docs = losses.gumbel_top_k(scores, key, num_samples=2, temperature=0.5, doc_mask=keep)
    np.testing.assert_array_equal(docs.mask, [[True, True], [True, False]])
    hard = np.eye(4)[np.asarray(docs.indices)] * np.asarray(docs.mask)[..., None]
    np.testing.assert_allclose(docs.weights, hard, atol=1e-6)

    def loss(s):
        return losses.stochastic_rag_loss(
            s, values, key, num_samples=1, temperature=0.5, doc_mask=keep
        ).sum()

    noisy = (np.float64(scores[0]) + np.asarray(jax.random.gumbel(key, (2, 4)))[0]) / 0.5
    p = softmax(noisy)
    expected = -p * (values[0] - p @ values[0]) / 0.5
    slope = jax.grad(loss)(scores)
    np.testing.assert_allclose(slope[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(slope[1], 0, atol=1e-6)
    empty = losses.stochastic_rag_loss(
        scores, values * np.nan, key, num_samples=2, doc_mask=np.zeros((2, 4), bool)
    )
    np.testing.assert_array_equal(empty, 0)


def test_reinforce_is_unbiased_over_all_draws(rng):
    scores, utilities = f32(rng.normal(size=(1, 3))), rng.normal(size=3)
    p = softmax(np.float64(scores[0]))
    expected_slope = -p * (utilities - p @ utilities)
    slope = jax.jit(jax.grad(lambda s, c, u: losses.reinforce_loss(s, c, u).sum()))
    total = np.zeros(3)
    for draw in itertools.product(range(3), repeat=3):
        weight = np.prod(p[list(draw)])
        total += (
            weight * np.asarray(slope(scores, np.array([draw]), f32([utilities[list(draw)]])))[0]
        )
    np.testing.assert_allclose(total, expected_slope, atol=1e-6)
    none = jax.value_and_grad(
        lambda s: losses.reinforce_loss(
            s, np.array([[0, 1]]), np.ones((1, 2)), doc_mask=np.zeros((1, 3), bool)
        ).sum()
    )(scores)
    assert none[0] == 0 and not np.any(none[1])
    to_utilities = jax.grad(lambda u: losses.reinforce_loss(scores, np.array([[0, 1]]), u).sum())
    np.testing.assert_array_equal(to_utilities(np.ones((1, 2))), 0)


def test_combined_losses_are_weighed_reported_and_switched_off():
    parts = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([jnp.nan, 3.0])}
    got = losses.combine_losses(parts, {"a": 2.0, "b": 0.0})
    np.testing.assert_array_equal(got.total, [2.0, 4.0])
    assert np.isnan(got.parts["b"][0])
    slope = jax.grad(lambda b: losses.combine_losses({"b": b}, {"b": 0.0}).total.sum())(parts["b"])
    np.testing.assert_array_equal(slope, 0)
    np.testing.assert_allclose(
        losses.combine_losses({"a": parts["a"]}, {"a": 0.5}).total, [0.5, 1.0]
    )


def test_degenerate_targets_are_named():
    target = np.log(np.array([[0.5, 0.5], [0.9, 0.1], [0.9999, 0.0001], [1.0, 1.0]]))
    keep = np.array([[True, True]] * 3 + [[True, False]])
    uniform, one_hot = losses.target_degeneracy(target, doc_mask=keep)
    np.testing.assert_array_equal(uniform, [True, False, False, False])
    np.testing.assert_array_equal(one_hot, [False, False, True, False])


@pytest.mark.parametrize("inputs", [(), jnp.float32(1.0)])
def test_chunked_encoding_refuses_inputs_without_rows(inputs):
    with pytest.raises(ValueError, match="^inputs: expected arrays with one common first axis"):
        losses.encode_in_chunks(dropout_encoder, 0, inputs, chunk_size=1)


@pytest.mark.parametrize("outside", [-1, 3])
def test_reinforce_is_nan_under_jit_for_a_column_that_does_not_exist(outside):
    samples = np.array([[0, outside], [0, 1], [0, outside]])
    mask = np.array([[True] * 3, [True] * 3, [False] * 3])
    got = jax.jit(losses.reinforce_loss)(
        np.zeros((3, 3)), samples, np.array([[1.0, 0.0]] * 3), doc_mask=mask
    )
    np.testing.assert_array_equal(np.isnan(got), [True, False, False])


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


def _marginals(scores, log_probs, keep, tokens):
    masks = {"doc_mask": keep, "token_mask": tokens}
    without = losses.leave_one_out_log_probs(scores, log_probs, **masks)
    target = losses.loop_target(without, temperature=0.1, doc_mask=keep)
    values = {
        "emdr2": losses.emdr2_loss(scores, log_probs, **masks),
        "sequence": losses.rag_sequence_loss(scores, log_probs, **masks),
        "token": losses.rag_token_loss(scores, log_probs, **masks),
        "loop": losses.pdist_loss(scores, target, doc_mask=keep),
        "without": jnp.sort(jnp.where(keep, without, 0.0), axis=1).sum(1),
    }
    return sum(value.sum() for value in values.values()), values


MARGINALS = jax.jit(jax.value_and_grad(_marginals, (0, 1), has_aux=True))


# Few shapes: each is compiled.
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1), (1, 5), (4, 1), (3, 2), (4, 5)]),
    spread=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_any_shape_mask_and_scale_is_finite_and_in_any_order(seed, shape, spread):
    queries, docs = shape
    rng = np.random.default_rng(seed)
    scores = f32(rng.normal(size=(queries, docs)) * spread)
    log_probs = f32(-rng.exponential(size=(queries, docs, 3)) * spread)
    keep, order = rng.random((queries, docs)) < 0.7, rng.permutation(docs)
    tokens = rng.random((queries, 3)) < 0.7
    vectors = f32(rng.normal(size=(queries, docs, 4)) * min(spread, 100))

    (_, values), slopes = MARGINALS(scores, log_probs, keep, tokens)
    (_, again), _ = MARGINALS(scores[:, order], log_probs[:, order], keep[:, order], tokens)
    for name, value in values.items():
        assert np.isfinite(value).all(), name
        assert name == "without" or (np.asarray(value) > -1e-4).all(), name
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    contrastive = jax.jit(losses.dpr_loss)(vectors[:, 0], vectors, doc_mask=keep)
    assert np.isfinite(contrastive).all() and (np.asarray(contrastive) > -1e-4).all()
    for slope in slopes:
        assert np.isfinite(slope).all()


Q, D3, KEY = np.zeros((2, 5)), np.zeros((2, 3, 5)), jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.dpr_loss(Q, Q), r"doc_embeddings: .*, B=2.*H, D=5.*\].*\[2, 5\]"),
        (
            lambda: losses.dpr_loss(Q, D3[None]),
            r"doc_embeddings: .*\[\.\.\.=\[\] \(as query_embeddings\), B=2 .*\[1, 2, 3, 5\]",
        ),
        (lambda: losses.dpr_loss(Q, D3, temperature=0.0), "temperature: .*above 0, got 0"),
        (lambda: losses.dpr_loss(Q, D3, doc_ids=np.zeros((2, 3))), "doc_ids: .*integer.*float"),
        (lambda: losses.dpr_loss(Q, D3, doc_mask=np.ones((2, 3))), "doc_mask: .*bool.*float"),
        (lambda: losses.symmetric_contrastive_loss(Q, D3), r"doc_embeddings: .*\[2, 3, 5\]"),
        (
            lambda: losses.gumbel_top_k(Q, KEY, num_samples=6),
            "num_samples: expected 1 … K=5, got 6",
        ),
        (lambda: losses.gumbel_top_k(Q, KEY, num_samples=0), "num_samples: .*got 0"),
        (
            lambda: losses.gumbel_top_k(Q, KEY, num_samples=1, temperature=-1.0),
            "temperature: .*got -1",
        ),
        (
            lambda: losses.stochastic_rag_loss(Q, Q[:1], KEY, num_samples=1),
            r"utilities: .*\.\.\.=\[2\]",
        ),
        (
            lambda: losses.reinforce_loss(Q, np.zeros((2, 1), int), np.zeros((2, 1))),
            "samples: expected at least 2 draws",
        ),
        (lambda: losses.reinforce_loss(Q, Q, Q), "samples: .*integer"),
        (
            lambda: losses.reinforce_loss(Q, np.array([[0, 5], [0, 1]]), np.zeros((2, 2))),
            r"samples: expected columns in 0 … 4 \(doc_scores has K=5\), got \[\[0, 5\]",
        ),
        (
            lambda: losses.reinforce_loss(Q, np.array([[0, -1], [0, 1]]), np.zeros((2, 2))),
            "samples: expected columns",
        ),
        (lambda: losses.combine_losses({}, {}), "weights: expected one for each of"),
        (lambda: losses.combine_losses({"a": Q[:, 0]}, {"b": 1.0}), r"weights: .*\['a'\].*\['b'\]"),
        (
            lambda: losses.combine_losses({"a": Q, "b": Q[0]}, {"a": 1.0, "b": 1.0}),
            r"b: .*\[\.\.\.=\[2, 5\] \(as a\)\].*\[5\]",
        ),
        (lambda: losses.combine_losses({"a": Q[:, 0]}, {"a": Q}), r"weights\['a'\]: .*scalar"),
        (lambda: losses.loop_target(1.0, temperature=1.0), "leave_one_out_log_probs: "),
        (lambda: losses.loop_target(Q, temperature=np.inf), "temperature: .*got inf"),
        (
            lambda: losses.attention_mass(D3, D3),
            r"attention: .*\[\.\.\., A, T, K, L\].*\[2, 3, 5\]",
        ),
        (lambda: losses.emdr2_loss(Q, D3), "log_probs: .*K=5"),
        (lambda: losses.leave_one_out_log_probs(Q, D3), "log_probs: .*K=5"),
    ],
)
def test_bad_input_of_the_family_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()

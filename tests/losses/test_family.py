"""EMDR², LOOP, ADist, estimators, the combinator."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("outside", [-1, 3])
def test_reinforce_is_nan_under_jit_for_a_column_that_does_not_exist(outside):
    samples = np.array([[0, outside], [0, 1], [0, outside]])
    mask = np.array([[True] * 3, [True] * 3, [False] * 3])
    got = jax.jit(losses.reinforce_loss)(
        np.zeros((3, 3)), samples, np.array([[1.0, 0.0]] * 3), doc_mask=mask
    )
    np.testing.assert_array_equal(np.isnan(got), [True, False, False])


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
@pytest.mark.slow
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


def test_documents_without_which_an_answer_is_impossible_share_the_loop_target():
    without = f32([[-np.inf, -1.0, -np.inf, -2.0], [-np.inf, -np.inf, np.nan, np.nan], [-1.0] * 4])
    keep = np.array([[True] * 4, [True, True, False, False], [True, True, False, False]])
    got = losses.loop_target(without, temperature=0.5, doc_mask=keep)
    np.testing.assert_allclose(np.exp(got[0]), [0.5, 0, 0.5, 0], rtol=1e-6)
    np.testing.assert_array_equal(got[1], -np.inf)  # impossible with them as well
    np.testing.assert_allclose(np.exp(got[2]), [0.5, 0.5, 0, 0], rtol=1e-6)


@pytest.mark.slow
def test_a_utility_of_minus_infinity_is_an_infinite_loss_without_gradient():
    scores, key = f32(np.zeros((3, 2))), jax.random.key(0)
    utilities = f32([[-np.inf, 1.0], [0.5, 1.0], [-np.inf, 1.0]])
    keep = np.array([[True, True], [True, True], [False, True]])
    samples = np.array([[0, 1]] * 3)

    def stochastic(s, u):
        return losses.stochastic_rag_loss(s, u, key, num_samples=2, doc_mask=keep)

    def reinforce(s, u):
        return losses.reinforce_loss(s, samples, u, doc_mask=keep)

    for loss in (stochastic, reinforce):
        value = loss(scores, utilities)
        np.testing.assert_array_equal(np.isposinf(value), [True, False, False])
        slope, _ = jax.grad(lambda s, u, loss=loss: loss(s, u).sum(), (0, 1))(scores, utilities)
        assert np.isfinite(slope).all() and not slope[0].any()


def test_what_is_impossible_with_and_without_documents_gains_nothing():
    scores, never, maybe = np.zeros((1, 2)), np.full((1, 2, 1), -np.inf), np.full((1, 1), -1.0)
    gains = losses.retrieval_utility
    with jax.debug_nans(True):
        assert gains(scores, never, f32(never[:, 0])) == 0
    assert gains(scores, never, maybe) == -np.inf
    assert gains(scores, np.full((1, 2, 1), -1.0), f32(never[:, 0])) == np.inf
    slope = jax.grad(lambda s: gains(s, never, f32(never[:, 0])).sum())(f32(scores))
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.slow
def test_factors_of_any_dtype_are_taken_under_strict_promotion(rng):
    b = make_batch(rng)
    scores = b.doc_scores.astype(np.float64)
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        for factor in (np.float32(0.5), np.float64(0.5), jnp.float32(0.5), jnp.float64(0.5)):
            for given in (b.doc_scores, scores):
                known = losses.lsr_target(given, temperature=factor)
                traced = jax.jit(lambda g, t: losses.lsr_target(g, temperature=t))(given, factor)
                np.testing.assert_allclose(known, traced, rtol=1e-6)
                assert known.dtype == traced.dtype == given.dtype
                total = losses.combine_losses({"a": given, "b": scores}, {"a": factor, "b": 1})
                assert total.total.dtype == np.float64


def test_small_integers_are_ids_of_any_vocabulary():
    hidden, table = f32(np.ones((3, 2))), f32(np.sin(np.arange(600)).reshape(300, 2))
    ids = np.array([0, 5, 100])
    expected = losses.chunked_token_log_probs(hidden, table, ids, chunk_size=128)
    got = losses.chunked_token_log_probs(hidden, table, ids.astype(np.int8), chunk_size=128)
    np.testing.assert_array_equal(got, expected)


def test_a_divergence_from_what_is_impossible_is_infinite_without_gradient():
    p, q = f32(np.log([[0.5, 0.5]] * 2)), f32(np.log([[0.25, 0.75]] * 2))
    q[0] = [-np.inf, 0.0]
    value = losses.kl_divergence(p, q)
    np.testing.assert_array_equal(np.isposinf(value), [True, False])
    slopes = jax.grad(lambda p, q: losses.kl_divergence(p, q).sum(), (0, 1))(p, q)
    assert not any(slope[0].any() for slope in slopes) and slopes[0][1].any()

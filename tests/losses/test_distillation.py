"""LM-supervised retrieval: targets, both directions of the KL, and where gradients may not go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_reference import Batch, as_float64, f32, make_batch, softmax, with_value

from ragjax import losses

LENGTHS = np.array([2, 5, 128, 0])
SUMS = f32([[-0.5, -2, -4, -6], [-8, -10, -12, -14], [-300, -310, -320, -330], [0, 0, 0, 0]])
BOTH_DIRECTIONS = pytest.mark.parametrize("loss", [losses.lsr_loss, losses.pdist_loss])


@pytest.fixture
def batch(rng) -> Batch:
    return make_batch(rng, masked=False)


def test_score_functions_equal_their_formulas():
    sums, lengths = np.asarray(SUMS, np.float64), np.array([2, 5, 128, 1])[:, None]
    for score, expected in (
        (losses.prob, np.exp(sums)),
        (losses.prob_per_token, np.exp(sums / lengths)),
        (losses.log_prob, sums),
        (losses.log_prob_per_token, sums / lengths),
    ):
        got = score(SUMS, LENGTHS)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-38, err_msg=score.__name__)


@pytest.mark.parametrize(
    "score", [losses.prob, losses.prob_per_token, losses.log_prob, losses.log_prob_per_token]
)
def test_score_functions_of_bfloat16_are_computed_in_float32(score):
    low = SUMS.astype(jnp.bfloat16)
    got = score(low, LENGTHS)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, score(low.astype(jnp.float32), LENGTHS))


def test_lsr_target_is_the_softmax_of_scores_over_temperature(rng):
    batch = make_batch(rng)
    target = losses.lsr_target(batch.doc_scores, temperature=0.3, doc_mask=batch.doc_mask)
    for row, docs in enumerate(np.asarray(batch.doc_mask)):
        expected = np.zeros(len(docs))
        if docs.any():
            expected[docs] = softmax(np.asarray(batch.doc_scores, np.float64)[row][docs] / 0.3)
        np.testing.assert_allclose(np.exp(target[row]), expected, atol=1e-6)


@pytest.mark.parametrize("garbage", [7.0, -np.inf, np.nan])
def test_lsr_target_ignores_masked_documents(garbage, rng):
    batch = make_batch(rng)
    spoiled = np.where(batch.doc_mask, batch.doc_scores, garbage)
    np.testing.assert_array_equal(
        losses.lsr_target(spoiled, temperature=0.3, doc_mask=batch.doc_mask),
        losses.lsr_target(batch.doc_scores, temperature=0.3, doc_mask=batch.doc_mask),
    )


def test_lsr_target_of_tiny_probabilities_stays_finite():
    # log(softmax(...)) would give -inf: exp(-3000) underflows.
    target = losses.lsr_target(SUMS, temperature=0.01)
    np.testing.assert_allclose(target[2], [0, -1000, -2000, -3000])


def test_lsr_target_in_bfloat16_is_computed_in_float32(batch):
    low = batch.doc_scores.astype(jnp.bfloat16)
    target = losses.lsr_target(low, temperature=0.3)
    assert target.dtype == jnp.float32
    np.testing.assert_array_equal(
        target, losses.lsr_target(low.astype(jnp.float32), temperature=0.3)
    )


@pytest.mark.parametrize("temperature", [0.3, np.float32(0.3), jnp.float32(0.3)])
def test_temperature_may_be_a_constant_or_an_argument_of_a_jitted_function(temperature, batch):
    expected = losses.lsr_target(batch.doc_scores, temperature=0.3)
    constant = jax.jit(lambda s: losses.lsr_target(s, temperature=temperature))
    argument = jax.jit(lambda s, t: losses.lsr_target(s, temperature=t))
    np.testing.assert_allclose(constant(batch.doc_scores), expected, atol=1e-5)
    np.testing.assert_allclose(argument(batch.doc_scores, temperature), expected, atol=1e-5)


def test_target_of_128_tokens_is_not_uniform_per_token_but_is_as_printed():
    def target(score):
        return np.exp(losses.lsr_target(score(SUMS, LENGTHS), temperature=0.1)[2])

    expected = softmax(np.array([-300.0, -310, -320, -330]) / 128 / 0.1)
    np.testing.assert_allclose(target(losses.log_prob_per_token), expected, atol=1e-6)
    assert target(losses.log_prob_per_token).max() > 0.5
    np.testing.assert_array_equal(target(losses.prob), 0.25)


def test_lsr_gradient_is_prior_times_log_ratio_minus_divergence(batch):
    gradient = jax.jit(jax.grad(lambda s: losses.lsr_loss(s, batch.target).sum()))(batch.doc_scores)
    exact = as_float64(batch)
    for row in range(len(exact.target)):
        prior = softmax(exact.doc_scores[row])
        log_ratio = np.log(prior) - exact.target[row]
        expected = prior * (log_ratio - (prior * log_ratio).sum())
        np.testing.assert_allclose(gradient[row], expected, atol=1e-5)


def test_pdist_gradient_is_prior_minus_target(batch):
    gradient = jax.jit(jax.grad(lambda s: losses.pdist_loss(s, batch.target).sum()))(
        batch.doc_scores
    )
    exact = as_float64(batch)
    for row in range(len(exact.target)):
        expected = softmax(exact.doc_scores[row]) - np.exp(exact.target[row])
        np.testing.assert_allclose(gradient[row], expected, atol=1e-6)


def test_useful_document_at_the_bottom_is_pulled_by_pdist_and_hardly_by_lsr():
    scores, target = f32([[16.0, 0, 0, 0]]), losses.lsr_target(f32([[0, 5.0, 0, 0]]), temperature=1)
    pulls = [
        abs(jax.jit(jax.grad(lambda s, loss=loss: loss(s, target).sum()))(scores)[0, 1])
        for loss in (losses.pdist_loss, losses.lsr_loss)
    ]
    assert pulls[0] > 0.9
    assert pulls[1] < 1e-5


@BOTH_DIRECTIONS
def test_divergence_is_positive_and_zero_only_if_equal(loss, batch):
    assert (loss(batch.doc_scores, batch.target) > 1e-3).all()
    equal = loss(batch.target + 5.0, batch.target)
    np.testing.assert_allclose(equal, 0, atol=1e-6)


def test_target_of_minus_infinity_contributes_nothing_to_pdist(batch):
    # The batch's other documents join the softmax as negatives.
    negatives = np.full((5, 3), -np.inf)
    scores = np.concatenate([batch.doc_scores, batch.doc_scores[:, :3] + 1], axis=1)
    extended = np.concatenate([batch.target, negatives], axis=1)
    value, gradient = jax.vmap(
        jax.value_and_grad(lambda s, t: losses.pdist_loss(s[None], t[None])[0])
    )(scores, extended)
    for row in range(5):
        prior = softmax(np.asarray(scores[row], np.float64))
        q = np.exp(np.asarray(batch.target[row], np.float64))
        np.testing.assert_allclose(value[row], (q * np.log(q / prior[:6])).sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient[row], prior - np.append(q, [0, 0, 0]), atol=1e-6)


def test_target_of_minus_infinity_in_lsr_is_an_error_that_names_the_remedy(batch):
    target = with_value(batch.target, (1, 2), -np.inf)
    message = "target_log_probs: expected finite .* got 1 of -inf.* use pdist_loss or mask"
    with pytest.raises(ValueError, match=message):
        losses.lsr_loss(batch.doc_scores, target)
    with pytest.raises(ValueError, match=message):
        jax.grad(lambda s: losses.lsr_loss(s, target).sum())(batch.doc_scores)


def test_target_of_minus_infinity_in_jitted_lsr_is_an_infinite_loss_of_that_row_only(batch):
    target = with_value(batch.target, (1, 2), -np.inf)
    expected = np.arange(5) == 1
    np.testing.assert_array_equal(
        np.isposinf(jax.jit(losses.lsr_loss)(batch.doc_scores, target)), expected
    )
    constant = jax.jit(lambda s: losses.lsr_loss(s, target))
    np.testing.assert_array_equal(np.isposinf(constant(batch.doc_scores)), expected)


@BOTH_DIRECTIONS
@pytest.mark.parametrize("garbage", [0.0, np.nan])
def test_no_gradient_reaches_the_language_model(loss, garbage, rng):
    # From logits to the loss, with garbage in padded tokens and documents on the way.
    batch = make_batch(rng)
    logits = f32(rng.normal(size=(5, 6, 4, 7)))
    kept = (batch.doc_mask[:, :, None] & batch.token_mask[:, None, :])[..., None]
    targets = rng.integers(0, 7, (5, 6, 4))

    def total(scores, logits):
        log_probs = losses.token_log_probs(logits, targets)
        sums = losses.sequence_log_probs(log_probs, token_mask=batch.token_mask)
        g = losses.prob(sums, batch.token_mask.sum(-1))
        target = losses.lsr_target(g, temperature=0.1, doc_mask=batch.doc_mask)
        return loss(scores, target, doc_mask=batch.doc_mask).sum()

    to_scores, to_logits = jax.jit(jax.grad(total, argnums=(0, 1)))(
        batch.doc_scores, np.where(kept, logits, garbage)
    )
    np.testing.assert_array_equal(to_logits, 0)
    assert np.isfinite(to_scores).all()
    assert np.abs(to_scores).max() > 1e-2


def test_lsr_target_has_no_derivative(batch):
    jacobian = jax.jacobian(lambda s: losses.lsr_target(s, temperature=0.5))(batch.doc_scores)
    np.testing.assert_array_equal(jacobian, 0)


@BOTH_DIRECTIONS
def test_a_target_from_elsewhere_is_a_constant_too(loss, batch):
    gradient = jax.jit(jax.grad(lambda t: loss(batch.doc_scores, t).sum()))(batch.target)
    np.testing.assert_array_equal(gradient, 0)


def test_a_masked_document_may_have_an_impossible_target():
    scores, target = jnp.array([0.3, -0.2, 5.0]), jnp.log(jnp.array([0.4, 0.6, 0.0]))
    got = losses.lsr_loss(scores, target, doc_mask=jnp.array([True, True, False]))
    np.testing.assert_allclose(got, losses.lsr_loss(scores[:2], target[:2]), rtol=1e-6)

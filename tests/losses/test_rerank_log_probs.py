"""Re-ranking by the likelihood of the question: Bayes' rule with an exponent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_reference import as_float64, make_batch, softmax

from ragjax import losses

SCORES = np.float32([[0.5, 0.2, -1.0], [0.0, 0.0, 0.0]])
LOG_PROBS = np.float32([[-3.0, -1.0, -2.0], [-2.0, -2.0, -5.0]])


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 6.0])
def test_it_is_the_product_of_both_normalised_over_the_kept(weight, rng):
    batch = make_batch(rng)
    got = losses.rerank_log_probs(
        batch.doc_scores,
        batch.token_log_probs,
        weight=weight,
        doc_mask=batch.doc_mask,
        token_mask=batch.token_mask,
    )
    exact = as_float64(batch)
    for row, (docs, tokens) in enumerate(zip(batch.doc_mask, batch.token_mask, strict=True)):
        likely = exact.token_log_probs[row][docs][:, tokens].sum(1)
        joint = softmax(exact.doc_scores[row][docs]) * np.exp(weight * likely)
        np.testing.assert_allclose(np.exp(got[row][docs]), joint / joint.sum(), atol=1e-5)
        assert (np.asarray(got[row])[~docs] == -np.inf).all()


def test_a_weight_of_zero_is_the_identity_whatever_the_language_model_says():
    impossible = np.where([[True, False, True]] * 2, -np.inf, LOG_PROBS)
    for log_probs in (LOG_PROBS, impossible):
        for weight in (0.0, jnp.float32(0)):
            ranked = losses.rerank_log_probs(SCORES, log_probs, weight=weight)
            np.testing.assert_allclose(ranked, jax.nn.log_softmax(SCORES), atol=1e-6)
            traced = jax.jit(losses.rerank_log_probs)(SCORES, log_probs, weight=weight)
            np.testing.assert_allclose(traced, ranked, atol=1e-6)


def test_equal_documents_stay_equal_and_only_differences_count():
    ranked = losses.rerank_log_probs(SCORES, LOG_PROBS, weight=0.7)
    assert ranked[1, 0] == ranked[1, 1] > ranked[1, 2]
    moved = losses.rerank_log_probs(SCORES + 5, LOG_PROBS - 9, weight=0.7)
    np.testing.assert_allclose(moved, ranked, atol=1e-5)


def test_the_weight_can_be_learned_and_garbage_in_masked_slots_is_not_seen():
    mask = np.array([[True, True, False]] * 2)
    spoiled = np.where(mask, LOG_PROBS, np.nan)

    def nats(weight):
        ranked = losses.rerank_log_probs(SCORES, spoiled, weight=weight, doc_mask=mask)
        return -ranked[0, 1]

    for at in (0.0, 0.4):
        step = 1e-2
        slope = float(nats(at + step) - nats(max(at - step, 0.0))) / (step + min(at, step))
        assert float(jax.grad(nats)(at)) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("weight", [-0.1, np.inf, np.nan, np.ones(2)])
def test_a_weight_that_means_nothing_is_refused(weight):
    with pytest.raises(ValueError, match="weight: expected a finite scalar of at least 0, got"):
        losses.rerank_log_probs(SCORES, LOG_PROBS, weight=weight)

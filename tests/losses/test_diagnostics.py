"""What the step logs: entropies, agreement, utility."""

import jax.numpy as jnp
import numpy as np
from losses_reference import f32

from ragjax import losses

NAN = np.nan


def test_entropy_is_one_for_uniform_and_zero_for_one_document():
    scores = f32([[2.0, 2.0, 2.0, NAN], [500.0, 0.0, 0.0, NAN], [1.0, NAN, NAN, NAN], [NAN] * 4])
    entropy = losses.retriever_entropy(scores, doc_mask=~np.isnan(scores))
    np.testing.assert_allclose(entropy.nats, [np.log(3), 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(entropy.normalized, [1, 0, 0, 0], atol=1e-6)


def test_target_entropy_sees_the_uniform_target_of_a_long_answer():
    sums, lengths = f32([[-300, -310, -320, -330]]), np.array([128])
    printed = losses.lsr_target(losses.prob(sums, lengths), temperature=0.1)
    per_token = losses.lsr_target(losses.log_prob_per_token(sums, lengths), temperature=0.1)
    assert losses.target_entropy(printed).normalized[0] >= 0.98
    assert 0.02 < losses.target_entropy(per_token).normalized[0] < 0.98


def test_agreement_compares_the_best_kept_documents():
    scores = f32([[1, 5, 9], [1, 5, 9], [1, 5, NAN], [1, 5, 9], [NAN, NAN, NAN]])
    target = np.log(
        f32([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1], [0.1, 0.2, 1], [0.5, 0.4, 1], [1, 1, 1]])
    )
    mask = np.asarray([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
    got = losses.agreement(scores, target, doc_mask=mask)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [1, 0, 1, 0, 0])


def test_utility_is_the_gain_over_no_document():
    # One document that halves the surprise of both tokens.
    log_probs, without = f32([[[-1.0, -1.0, NAN]]]), f32([[-2.0, -2.0, NAN]])
    mask = np.asarray([[True, True, False]])
    utility = losses.retrieval_utility(f32([[3.0]]), log_probs, without, token_mask=mask)
    np.testing.assert_allclose(utility, [2.0], rtol=1e-6)
    assert losses.retrieval_utility(f32([[3.0]]), log_probs * 3, without, token_mask=mask)[0] < 0


def test_divergence_from_an_impossible_document_is_infinite():
    p, q = np.log(f32([[0.5, 0.5]])), np.array([[0.0, -np.inf]], np.float32)
    np.testing.assert_array_equal(losses.kl_divergence(p, q), np.inf)
    np.testing.assert_allclose(losses.kl_divergence(q, p), np.log(2), rtol=1e-6)

"""Identities of the marginal likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_reference import Batch, as_float64, f32, make_batch, posterior, softmax

from ragjax import losses

BOTH_FORMS = pytest.mark.parametrize(
    "loss", [jax.jit(losses.rag_sequence_loss), jax.jit(losses.rag_token_loss)]
)


@pytest.fixture
def batch(rng) -> Batch:
    return make_batch(rng, masked=False)


def test_sequence_and_token_form_are_equal_for_one_token_only(batch):
    one_token = batch.token_log_probs[:, :, :1]
    np.testing.assert_allclose(
        losses.rag_sequence_loss(batch.doc_scores, one_token),
        losses.rag_token_loss(batch.doc_scores, one_token),
        rtol=1e-6,
    )
    difference = losses.rag_sequence_loss(*batch[:2]) - losses.rag_token_loss(*batch[:2])
    assert (np.abs(difference) > 1e-3).all()


@BOTH_FORMS
def test_one_document_gives_the_plain_negative_log_likelihood(loss, batch):
    value = loss(batch.doc_scores[:, :1], batch.token_log_probs[:, :1])
    np.testing.assert_allclose(value, -batch.token_log_probs[:, 0].sum(-1), rtol=1e-6)


@BOTH_FORMS
def test_uniform_prior_and_identical_documents_give_minus_log_prob(loss, batch):
    same = np.broadcast_to(batch.token_log_probs[:, :1], batch.token_log_probs.shape)
    value = loss(np.full_like(batch.doc_scores, 3.0), same)
    np.testing.assert_allclose(value, -same[:, 0].sum(-1), rtol=1e-6)


def test_sequence_gradient_is_prior_minus_posterior_and_minus_posterior(batch):
    to_scores, to_log_probs = jax.jit(
        jax.grad(lambda s, ell: losses.rag_sequence_loss(s, ell).sum(), argnums=(0, 1))
    )(*batch[:2])
    exact = as_float64(batch)
    for row in range(len(exact.doc_scores)):
        scores, log_probs = exact.doc_scores[row], exact.token_log_probs[row]
        expected = posterior(scores, log_probs)
        np.testing.assert_allclose(to_scores[row], softmax(scores) - expected, atol=1e-6)
        for token in range(log_probs.shape[1]):
            np.testing.assert_allclose(to_log_probs[row, :, token], -expected, atol=1e-6)


def test_document_posterior_equals_bayes_rule_and_masks_to_zero(rng):
    batch = make_batch(rng)
    log_probs = losses.document_posterior(
        *batch[:2], doc_mask=batch.doc_mask, token_mask=batch.token_mask
    )
    exact = as_float64(batch)
    for row, (docs, tokens) in enumerate(zip(exact.doc_mask, exact.token_mask, strict=True)):
        expected = np.zeros(len(docs))
        if docs.any():
            kept = exact.token_log_probs[row][docs][:, tokens]
            expected[docs] = posterior(exact.doc_scores[row][docs], kept)
        np.testing.assert_allclose(np.exp(log_probs[row]), expected, atol=1e-6)


def test_document_posterior_has_finite_gradients_under_masks(rng):
    batch = make_batch(rng)
    spoiled = np.where(batch.doc_mask, batch.doc_scores, np.nan)

    def chosen(scores):
        log_probs = losses.document_posterior(scores, batch[1], doc_mask=batch.doc_mask)
        return jnp.where(batch.doc_mask, log_probs, 0.0)[:, 1].sum()

    gradient = np.asarray(jax.jit(jax.grad(chosen))(spoiled))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~batch.doc_mask], 0)


def test_short_targets_still_give_the_retriever_a_gradient(batch):
    # A widely used implementation attaches the document score to the second target token, so a
    # target of one token trains the LM alone.
    one_token = batch.token_log_probs[:, :, :1]
    for loss in (losses.rag_sequence_loss, losses.rag_token_loss):
        gradient = jax.jit(jax.grad(lambda s, loss=loss: loss(s, one_token).sum()))(
            batch.doc_scores
        )
        assert (np.abs(gradient).max(axis=1) > 1e-3).all()


def test_bottom_ranked_useful_document_gets_a_gradient_of_its_prior():
    # Why the marginal starts slowly: the gold document's pull is bounded by what it explains.
    scores, log_probs = f32([[8.0, 8.0, -8.0]]), f32([[[-9.0], [-9.0], [-1.0]]])
    gradient = jax.jit(jax.grad(lambda s: losses.rag_sequence_loss(s, log_probs).sum()))(scores)
    prior = softmax(np.array([8.0, 8.0, -8.0]))
    expected = prior - posterior(np.array([8.0, 8.0, -8.0]), np.array([[-9.0], [-9.0], [-1.0]]))
    np.testing.assert_allclose(gradient[0, 2], expected[2], rtol=1e-4)
    assert abs(gradient[0, 2]) < 1e-3

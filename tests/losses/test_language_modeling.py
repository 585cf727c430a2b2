"""Target log-probs and the language model's loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_reference import f32, make_batch, with_value

from ragjax import losses


@pytest.fixture
def logits(rng) -> np.ndarray:
    return f32(rng.normal(size=(2, 3, 5, 11)) * 4)


@pytest.fixture
def targets(rng) -> np.ndarray:
    return rng.integers(0, 11, (2, 3, 5))


def test_token_log_probs_equal_log_of_softmax_in_float64(logits, targets):
    exact = np.exp(np.asarray(logits, np.float64))
    probs = exact / exact.sum(-1, keepdims=True)
    expected = np.log(np.take_along_axis(probs, np.asarray(targets)[..., None], -1))[..., 0]
    got = losses.token_log_probs(logits, targets)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_token_log_probs_gradient_is_one_hot_minus_softmax(logits, targets):
    gradient = jax.grad(lambda values: losses.token_log_probs(values, targets).sum())(logits)
    expected = np.eye(11)[np.asarray(targets)] - np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_token_log_probs_of_bfloat16_logits_are_computed_in_float32(logits, targets):
    low = logits.astype(jnp.bfloat16)
    got = losses.token_log_probs(low, targets)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, losses.token_log_probs(low.astype(jnp.float32), targets))


@pytest.mark.parametrize("outside", [-100, -1, 11, 1000])
def test_target_outside_the_vocabulary_is_nan_and_can_be_masked(outside, logits, targets):
    spoiled = with_value(targets, (..., -1), outside)
    mask = np.arange(5) < np.array([[4], [4]])

    def total(values, ids):
        log_probs = losses.token_log_probs(values, ids)
        return losses.lm_loss(log_probs, token_mask=mask).sum()

    evaluate = jax.jit(jax.value_and_grad(total))

    np.testing.assert_array_equal(
        np.isnan(losses.token_log_probs(logits, spoiled)),
        ~np.broadcast_to(mask[:, None], (2, 3, 5)),
    )
    value, gradient = evaluate(logits, spoiled)
    expected, expected_gradient = evaluate(logits, targets)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)


def test_changing_the_labels_of_prompt_tokens_does_not_change_an_answer_only_loss(logits, targets):
    answer = np.array([[False, False, True, True, False], [False, False, False, True, True]])
    relabelled = np.where(answer[:, None, :], targets, (targets + 1) % 11)

    def total(values, ids):
        log_probs = losses.token_log_probs(values, ids)
        return losses.lm_loss(log_probs, token_mask=answer).sum()

    evaluate = jax.jit(jax.value_and_grad(total))

    value, gradient = evaluate(logits, targets)
    changed, changed_gradient = evaluate(logits, relabelled)
    np.testing.assert_array_equal(changed, value)
    np.testing.assert_array_equal(changed_gradient, gradient)
    assert evaluate(logits, (targets + 1) % 11)[0] != value


def test_padding_is_the_mask_alone_so_pad_may_equal_eos(logits):
    # Id 2 is both pad and eos: the first is a target, the others are padding.
    targets = np.full((2, 3, 5), 2)
    mask = np.arange(5)[None, :] < np.array([[1], [3]])
    log_probs = losses.token_log_probs(logits, targets)
    sums = losses.sequence_log_probs(log_probs, token_mask=mask)
    np.testing.assert_allclose(sums[0], log_probs[0, :, 0], rtol=1e-6)
    np.testing.assert_allclose(sums[1], log_probs[1, :, :3].sum(-1), rtol=1e-6)


def test_sequence_log_probs_of_128_bfloat16_tokens_keep_float32_precision(rng):
    log_probs = jnp.asarray(-rng.exponential(2, (1, 2, 128)), jnp.bfloat16)
    expected = np.asarray(log_probs, np.float64).sum(-1)
    np.testing.assert_allclose(losses.sequence_log_probs(log_probs), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.lm_loss(log_probs), -expected.sum(1), rtol=1e-6)


@pytest.mark.parametrize("garbage", [7.0, -np.inf, np.nan])
def test_sequence_log_probs_ignore_masked_tokens_with_and_without_documents(garbage, rng):
    batch = make_batch(rng)
    for log_probs, mask in (
        (batch.token_log_probs, batch.token_mask[:, None, :]),
        (batch.no_doc_log_probs, batch.token_mask),
    ):
        spoiled = np.where(mask, log_probs, garbage)
        sums = losses.sequence_log_probs(spoiled, token_mask=batch.token_mask)
        np.testing.assert_allclose(sums, np.where(mask, log_probs, 0).sum(-1), rtol=1e-5)
        gradient = jax.grad(
            lambda values, m=batch.token_mask: losses.sequence_log_probs(values, token_mask=m).sum()
        )(spoiled)
        np.testing.assert_array_equal(gradient, np.broadcast_to(mask, log_probs.shape) * 1.0)


def test_lm_loss_weighs_every_document_alike_whatever_the_retriever_thinks(rng):
    batch = make_batch(rng)
    gradient = jax.grad(
        lambda values: losses.lm_loss(
            values, doc_mask=batch.doc_mask, token_mask=batch.token_mask
        ).sum()
    )(batch.token_log_probs)
    expected = -1.0 * (batch.doc_mask[:, :, None] & batch.token_mask[:, None, :])
    np.testing.assert_array_equal(gradient, expected)

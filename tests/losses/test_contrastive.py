"""InfoNCE: in-batch and hard negatives."""

import jax
import numpy as np
import pytest
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

"""Multiple choice: log-probabilities against full forwards, and the four ways to compare."""

import generation_reference as reference
import numpy as np
import pytest

from ragjax.generation import over_unconditional, per_byte, per_token, score_choices, total

SIZES = np.array([[3, 1, 2], [2, 0, 3]])


@pytest.fixture
def choices(rng):
    ids = rng.integers(0, 256, (2, 3, 3)).astype(np.int32)
    return ids, np.arange(3) < SIZES[..., None]


def score(setting, choices, **options):
    model, prompts = setting.model, setting.by_doc._replace(**{"doc_scores": None, **options})
    return score_choices(model.decoder, model.params, prompts, *choices)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["causal", "seq2seq"])
def test_choices_are_scored_as_by_full_forwards(setting, choices, request):
    setting = request.getfixturevalue(setting)
    found = score(setting, choices, doc_scores=setting.scores)
    for b, c in np.ndindex(2, 3):
        answer = choices[0][b, c, : SIZES[b, c]].tolist()
        expected = [
            reference.log_prob_of(
                lambda past, prompt=setting.prompts[2 * b + k]: setting.next_token(prompt, past),
                answer,
            )
            for k in range(2)
        ]
        np.testing.assert_allclose(found.doc_log_probs[b, c], expected, rtol=1e-4)
        marginal = np.log(np.dot(setting.weights[b], np.exp(expected)))
        np.testing.assert_allclose(found.log_probs[b, c], marginal, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_masked_documents_do_not_count(causal, choices):
    mask = np.array([[True, False], [False, False]])
    scores = np.array([[0.0, 40.0], [3.0, 60.0]], np.float32)
    found = score(causal, choices, doc_scores=scores, doc_mask=mask)
    each = np.array(score(causal, choices).doc_log_probs, np.float64)
    np.testing.assert_allclose(found.log_probs[0], each[0, :, 0], rtol=1e-5)
    assert np.isneginf(found.doc_log_probs[0, :, 1]).all()
    halves = np.log(np.exp(each[1]).mean(axis=-1))
    np.testing.assert_allclose(found.log_probs[1], halves, rtol=1e-5, atol=1e-6)


def test_the_four_normalisations():
    log_probs = np.log([[0.5, 0.1, 0.02]]).astype(np.float32)
    counts, sizes = np.array([[1, 2, 0]]), np.array([[2, 8, 0]])
    prior = np.log([[0.9, 0.05, 0.02]]).astype(np.float32)
    np.testing.assert_allclose(total(log_probs), log_probs)
    expected = [[np.log(0.5), np.log(0.1) / 2, -np.inf]]
    np.testing.assert_allclose(per_token(log_probs, counts), expected, rtol=1e-6)
    expected = [[np.log(0.5) / 2, np.log(0.1) / 8, -np.inf]]
    np.testing.assert_allclose(per_byte(log_probs, sizes), expected, rtol=1e-6)
    expected = np.log([[0.5 / 0.9, 2.0, 1.0]])
    np.testing.assert_allclose(over_unconditional(log_probs, prior), expected, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused(causal, choices):
    with pytest.raises(ValueError, match=r"choice_ids \[B, C, T\].*\(2, 2, 10\) and \(1, 3, 3\)"):
        score(causal, tuple(array[:1] for array in choices))

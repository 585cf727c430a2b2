"""Greedy and ensemble generation against a plain loop over full forwards, without a cache."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.generation import (
    Limits,
    Prompts,
    doc_log_weights,
    generate_ensemble,
    generate_greedy,
    score_and_generate,
)
from ragjax.models.inputs import LMBatch
from ragjax.models.testing.language_model import tiny_language_model

ROWS, SLOTS, NEW = 4, 10, 7
FREE = Limits(max_new_tokens=NEW, stop_ids=())
LENGTHS = (10, 6, 3, 1)


@pytest.fixture(scope="module")
def model():
    return tiny_language_model()


@pytest.fixture(scope="module")
def next_token_log_probs(model):
    """`(prompts as id lists) -> [R, V]`: a full forward over the whole text, nothing cached."""
    width = SLOTS + NEW
    score = jax.jit(
        lambda ids, mask: jax.nn.log_softmax(
            model.decoder.prefill(model.params, ids, mask, cache_length=width).logits
        )
    )

    def compute(prompts):
        ids, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, True
        return np.array(score(ids, mask), np.float64)

    return compute


@pytest.fixture
def prompts(rng):
    return [rng.integers(0, 258, length).tolist() for length in LENGTHS]


def pad(prompts, rng, slots=SLOTS):
    """Left-pads with arbitrary tokens, which must not matter; returns `Prompts`."""
    ids = rng.integers(0, 258, (len(prompts), slots)).astype(np.int32)
    mask = np.zeros((len(prompts), slots), bool)
    for row, prompt in enumerate(prompts):
        ids[row, slots - len(prompt) :], mask[row, slots - len(prompt) :] = prompt, True
    return Prompts(ids, mask)


def with_documents(prompts, scores):
    """`Prompts` [R, L] as those of as many documents as there are scores [B, K]."""
    scores = np.asarray(scores, np.float32)
    ids, mask = (array.reshape(*scores.shape, -1) for array in prompts[:2])
    return Prompts(ids, mask, scores)


def plain_greedy(prompts, next_token_log_probs, stop_ids=(), min_new_tokens=0):
    """One forward per token over prompt and answer so far, row by row of a Python loop."""
    answers, ended = [[] for _ in prompts], [False] * len(prompts)
    for step in range(NEW):
        log_probs = next_token_log_probs(
            [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        )
        if step < min_new_tokens:
            log_probs[:, list(stop_ids)] = -np.inf
        for row, best in enumerate(log_probs.argmax(axis=1).tolist()):
            ended[row] = ended[row] or best in stop_ids
            if not ended[row]:
                answers[row].append(best)
    return answers


def answers_of(result):
    rows = list(zip(result.ids, result.lengths, strict=True))
    assert all(not row[length:].any() for row, length in rows)
    return [row[:length].tolist() for row, length in rows]


def to_numpy(result):
    return jax.tree.map(np.asarray, result)


def log_prob_of(prompts, answer, weights, next_token_log_probs):
    """log p of one answer, token by token, under a mixture over prompts."""
    total = 0.0
    for step, token in enumerate(answer):
        probs = np.exp(next_token_log_probs([[*prompt, *answer[:step]] for prompt in prompts]))
        total += np.log(np.dot(weights, probs[:, token]))
    return total


@pytest.fixture
def free_answers(prompts, next_token_log_probs):
    return plain_greedy(prompts, next_token_log_probs)


def test_cached_greedy_equals_full_forwards(model, prompts, free_answers, rng):
    found = generate_greedy(model.decoder, model.params, pad(prompts, rng), FREE)
    assert found.ids.dtype == found.lengths.dtype == jnp.int32
    assert answers_of(to_numpy(found)) == free_answers


def test_stop_tokens_end_each_row_by_itself(
    model, prompts, free_answers, next_token_log_probs, rng
):
    # Row 0 stops at once, row 1 in the middle, the others wherever these tokens happen to come.
    stop_ids = (free_answers[0][0], free_answers[1][3])
    expected = plain_greedy(prompts, next_token_log_probs, stop_ids)
    assert expected[0] == [] and 0 < len(expected[1]) < NEW and max(map(len, expected)) == NEW
    limits = Limits(max_new_tokens=NEW, stop_ids=stop_ids)
    found = generate_greedy(model.decoder, model.params, pad(prompts, rng), limits)
    assert answers_of(to_numpy(found)) == expected
    for row, (prompt, answer) in enumerate(zip(prompts, expected, strict=True)):
        # The token that ended the answer counts; an answer that was cut off has none.
        whole = answer if len(answer) == NEW else [*answer, free_answers[row][len(answer)]]
        log_prob = log_prob_of([prompt], whole, [1.0], next_token_log_probs)
        np.testing.assert_allclose(found.log_probs[row], log_prob, rtol=1e-4)


@pytest.mark.parametrize("least", [1, 3])
def test_an_answer_does_not_end_before_its_least_length(
    model, prompts, free_answers, next_token_log_probs, rng, least
):
    stop_ids = (free_answers[0][0], free_answers[1][1], free_answers[2][3])
    expected = plain_greedy(prompts, next_token_log_probs, stop_ids, least)
    assert min(map(len, expected)) >= least
    padded = pad(prompts, rng)
    limits = Limits(max_new_tokens=NEW, stop_ids=stop_ids, min_new_tokens=least)
    alone = generate_greedy(model.decoder, model.params, padded, limits)
    single = with_documents(padded, np.zeros((ROWS, 1)))
    mixed = generate_ensemble(model.decoder, model.params, single, limits)
    assert answers_of(to_numpy(alone)) == expected
    assert answers_of(to_numpy(mixed)) == expected
    np.testing.assert_allclose(alone.log_probs, mixed.log_probs, rtol=1e-5)
    # The model's own probability of what was chosen, not one that stop tokens were taken out of.
    row = next(row for row in range(ROWS) if len(expected[row]) == NEW)
    log_prob = log_prob_of([prompts[row]], expected[row], [1.0], next_token_log_probs)
    np.testing.assert_allclose(alone.log_probs[row], log_prob, rtol=1e-4)


def test_decoding_stops_when_every_row_has_ended(model, prompts, free_answers, rng):
    calls = []

    class Counting:
        prefill = staticmethod(model.decoder.prefill)
        score = staticmethod(model.decoder.score)

        @staticmethod
        def decode_step(params, cache, token_ids):
            jax.debug.callback(lambda: calls.append(1))
            return model.decoder.decode_step(params, cache, token_ids)

    for stop_ids, steps in (((), NEW - 1), (tuple(row[0] for row in free_answers), 0)):
        calls.clear()
        limits = Limits(max_new_tokens=NEW, stop_ids=stop_ids)
        found = generate_greedy(Counting(), model.params, pad(prompts, rng), limits)
        jax.block_until_ready(found)
        jax.effects_barrier()
        assert len(calls) == steps


def test_padding_and_neighbours_change_nothing(model, prompts, free_answers, rng):
    wide = generate_greedy(model.decoder, model.params, pad(prompts, rng, slots=SLOTS + 6), FREE)
    assert answers_of(to_numpy(wide)) == free_answers
    alone = generate_greedy(model.decoder, model.params, pad(prompts[1:2], rng), FREE)
    assert answers_of(to_numpy(alone)) == free_answers[1:2]


def test_one_token_needs_no_step(model, prompts, free_answers, rng):
    limits = Limits(max_new_tokens=1, stop_ids=())
    found = generate_greedy(model.decoder, model.params, pad(prompts, rng), limits)
    assert answers_of(to_numpy(found)) == [answer[:1] for answer in free_answers]


def test_one_reading_scores_and_generates(model, prompts, free_answers, rng):
    ids, mask = pad(prompts, rng)[:2]
    targets = rng.integers(0, 258, (ROWS, 3)).astype(np.int32)
    target_mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    batch = LMBatch(ids, mask, targets, target_mask)
    found = score_and_generate(model.decoder, model.params, batch, FREE)
    expected = jax.jit(model.token_log_probs)(model.params, batch)
    np.testing.assert_allclose(found.token_log_probs, expected, atol=2e-5)
    assert answers_of(to_numpy(found.generated)) == free_answers


# --- ensemble -----------------------------------------------------------------------------------


def test_an_ensemble_of_one_is_greedy(model, prompts, free_answers, rng):
    single = with_documents(pad(prompts, rng), np.full((ROWS, 1), -3.0))
    found = generate_ensemble(model.decoder, model.params, single, FREE)
    assert answers_of(to_numpy(found)) == free_answers


def test_an_ensemble_follows_the_mixture_of_full_forwards(
    model, prompts, next_token_log_probs, rng
):
    scores = np.array([[0.3, -0.4], [1.0, 2.0]], np.float32)
    by_doc = with_documents(pad(prompts, rng), scores)
    found = generate_ensemble(model.decoder, model.params, by_doc, FREE)
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    answers = [[], []]
    for _ in range(NEW):
        texts = [[*prompt, *answers[row // 2]] for row, prompt in enumerate(prompts)]
        probs = np.exp(next_token_log_probs(texts)).reshape(2, 2, -1)
        mixture = (weights[:, :, None] * probs).sum(axis=1)
        for row in range(2):
            answers[row].append(int(mixture[row].argmax()))
    assert answers_of(to_numpy(found)) == answers
    for row in range(2):
        log_prob = log_prob_of(
            prompts[2 * row : 2 * row + 2], answers[row], weights[row], next_token_log_probs
        )
        np.testing.assert_allclose(found.log_probs[row], log_prob, rtol=1e-4)


def test_masked_documents_do_not_vote(model, prompts, free_answers, rng):
    by_doc = with_documents(pad(prompts, rng), [[0.0, 9.0], [0.0, 0.0]])
    masked = by_doc._replace(doc_mask=np.array([[True, False], [False, True]]))
    found = generate_ensemble(model.decoder, model.params, masked, FREE)
    assert answers_of(to_numpy(found)) == [free_answers[0], free_answers[3]]


def test_mixture_weights():
    scores = jnp.array([[1.0, 2.0, 7.0], [4.0, 4.0, 4.0]])
    mask = jnp.array([[True, True, False], [False, False, False]])
    weights = np.exp(doc_log_weights(scores, doc_mask=mask))
    e = np.e
    np.testing.assert_allclose(
        weights, [[1 / (1 + e), e / (1 + e), 0], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6
    )


def test_bad_arguments_are_refused(model, prompts, rng):
    padded = pad(prompts, rng)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        Limits(max_new_tokens=0, stop_ids=())
    one_document = with_documents(padded, np.zeros((ROWS, 1)))
    for name, wrong in {
        "ids": padded.ids,
        "mask": padded.mask,
        "doc_scores": np.zeros((4, 2), np.float32),
        "doc_mask": np.ones((2, 1), bool),
    }.items():
        shape = re.escape(f"{name} {wrong.shape}")
        with pytest.raises(ValueError, match=rf"ids and mask \[B, K, L\].* got .*{shape}"):
            given = one_document._replace(**{name: wrong})
            generate_ensemble(model.decoder, model.params, given, FREE)
    with pytest.raises(ValueError, match=r"must be None for one prompt .* ids \(4, 1, 10\)"):
        generate_greedy(model.decoder, model.params, one_document, FREE)

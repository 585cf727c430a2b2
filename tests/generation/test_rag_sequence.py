"""RAG-Sequence decoding against brute force in numpy, its own limits, and transformers."""

import functools

import generation_reference as reference
import numpy as np
import pytest
from rag_reference import make_rag

from ragjax.generation import (
    Limits,
    Prompts,
    generate_beam,
    generate_rag_sequence_fast,
    generate_rag_sequence_thorough,
)

BEAMS = 2


def search(setting, function, **changes):
    prompts = setting.by_doc._replace(**changes)
    return function(
        setting.model.decoder, setting.model.params, prompts, setting.limits(), beams=BEAMS
    )


def brute_force(setting, prompts, weights):
    """Returns (thorough, fast): dicts from each sequence to its log-probabilities `[K]`."""
    next_tokens = [functools.partial(setting.next_token, prompt) for prompt in prompts]
    beams = [
        {
            tuple(sequence): log_prob
            for _, log_prob, sequence in reference.beam_reference(
                next_token, beams=BEAMS, stop_ids=setting.stop_ids
            )
        }
        for next_token, weight in zip(next_tokens, weights, strict=True)
        if weight > 0
    ]
    thorough, fast = {}, {}
    for sequence in {key for beam in beams for key in beam}:
        each = [reference.log_prob_of(next_token, list(sequence)) for next_token in next_tokens]
        thorough[sequence] = np.array(each)
        fast[sequence] = np.array([beam.get(sequence, -np.inf) for beam in beams])
    return thorough, fast


def check(found, question, expected, weights, stop_ids):
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.asarray(weights))
    marginal = {
        key: np.log(np.exp(log_weights + log_probs).sum()) for key, log_probs in expected.items()
    }
    ranked = sorted(marginal, key=lambda key: -marginal[key])
    count = int(found.counts[question])
    assert count == len(ranked)
    answers = reference.answers_of(found.ids[question], found.lengths[question])
    assert answers[:count] == [reference.without_stop(list(key), stop_ids) for key in ranked]
    assert not any(answers[count:])
    log_probs = np.array(found.log_probs[question])
    np.testing.assert_allclose(log_probs[:count], [marginal[key] for key in ranked], rtol=1e-4)
    assert np.isneginf(log_probs[count:]).all()
    np.testing.assert_allclose(found.doc_log_weights[question], log_weights, rtol=1e-5)
    counted = np.asarray(weights) > 0
    each = np.array(found.doc_log_probs[question, :count])
    assert np.isneginf(each[:, ~counted]).all()
    expected_each = np.array([expected[key] for key in ranked])
    np.testing.assert_allclose(each[:, counted], expected_each[:, counted], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["causal", "seq2seq"])
def test_both_ways_equal_brute_force(setting, request):
    setting = request.getfixturevalue(setting)
    thorough = search(setting, generate_rag_sequence_thorough)
    fast = search(setting, generate_rag_sequence_fast)
    for question in range(2):
        weights = setting.weights[question]
        expected = brute_force(setting, setting.prompts[2 * question : 2 * question + 2], weights)
        check(thorough, question, expected[0], weights, setting.stop_ids)
        check(fast, question, expected[1], weights, setting.stop_ids)


def alike(setting):
    """Questions whose documents agree: each sequence is found twice."""
    prompts = setting.by_doc
    return {name: getattr(prompts, name)[:, :1].repeat(2, axis=1) for name in ("ids", "mask")}


@pytest.mark.slow
def test_a_sequence_that_both_documents_propose_is_there_once(causal):
    for function in (generate_rag_sequence_thorough, generate_rag_sequence_fast):
        found = search(causal, function, **alike(causal))
        assert found.counts.tolist() == [BEAMS, BEAMS]
        # Both documents say the same, so the mixture does, too.
        np.testing.assert_allclose(
            found.doc_log_probs[:, :BEAMS, 0], found.log_probs[:, :BEAMS], rtol=1e-4
        )


@pytest.mark.slow
def test_fast_is_never_above_thorough(causal, seq2seq):
    for setting in (causal, seq2seq):
        thorough = search(setting, generate_rag_sequence_thorough)
        fast = search(setting, generate_rag_sequence_fast)
        for question in range(2):
            best = {
                tuple(np.asarray(thorough.ids[question, h]).tolist()): thorough.log_probs[
                    question, h
                ]
                for h in range(int(thorough.counts[question]))
            }
            for h in range(int(fast.counts[question])):
                above = best[tuple(np.asarray(fast.ids[question, h]).tolist())]
                assert fast.log_probs[question, h] <= above + 1e-4


@pytest.mark.slow
def test_with_one_document_it_is_the_plain_search(causal):
    args, limits = (causal.model.decoder, causal.model.params), causal.limits()
    scores = np.full((4, 1), 3.0, np.float32)
    single = Prompts(causal.ids[:, None], causal.mask[:, None], scores)
    found = generate_rag_sequence_thorough(*args, single, limits, beams=BEAMS)
    # Without a penalty both order by log-probability.
    plain = generate_beam(*args, causal.rows, limits, beams=BEAMS, length_penalty=1.0)
    order = np.argsort(-np.asarray(plain.log_probs), axis=1)
    np.testing.assert_allclose(
        found.log_probs, np.take_along_axis(np.asarray(plain.log_probs), order, 1), rtol=1e-4
    )
    expected = np.take_along_axis(np.asarray(plain.ids), order[:, :, None], 1)
    np.testing.assert_array_equal(found.ids, expected)


@pytest.mark.slow
def test_masked_documents_neither_propose_nor_score(causal):
    scores = np.array([[0.0, 40.0], [5.0, -5.0]], np.float32)
    options = {"doc_scores": scores, "doc_mask": np.array([[True, False], [False, False]])}
    for place, function in enumerate((generate_rag_sequence_thorough, generate_rag_sequence_fast)):
        found = search(causal, function, **options)
        expected = brute_force(causal, causal.prompts[:1], [1.0])[place]
        padded = {key: np.append(value, -np.inf) for key, value in expected.items()}
        check(found, 0, padded, [1.0, 0.0], causal.stop_ids)
        # No document at all: both prompts count the same.
        expected = brute_force(causal, causal.prompts[2:], [0.5, 0.5])[place]
        check(found, 1, expected, [0.5, 0.5], causal.stop_ids)


@pytest.mark.slow
@pytest.mark.parametrize("forced_start", [None, 0])
def test_the_answers_are_those_of_transformers(tmp_path, forced_start):
    import torch

    rag = make_rag(tmp_path, "Sequence", forced_start=forced_start)
    returned, beams = 4, 3
    with torch.no_grad():
        expected = rag.reference.generate(
            context_input_ids=torch.tensor(rag.right_ids).long(),
            context_attention_mask=torch.tensor(rag.right_mask).long(),
            doc_scores=torch.tensor(rag.scores),
            num_beams=beams,
            num_return_sequences=returned,
            min_new_tokens=2,
            do_sample=False,
            early_stopping=False,
        )
    lm = rag.language_model
    found = generate_rag_sequence_thorough(
        lm.decoder,
        lm.params,
        Prompts(rag.ids, rag.mask, rag.scores),
        Limits(max_new_tokens=rag.new_tokens, stop_ids=lm.eos_ids, min_new_tokens=2),
        beams=beams,
    )
    answers = reference.answers_of(found.ids[:, :returned], found.lengths[:, :returned])
    assert answers == [rag.answer(row) for row in expected.tolist()]

"""RAG-Token: beam search over the mixture, against full forwards and against transformers."""

import generation_reference as reference
import numpy as np
import pytest
from rag_reference import make_rag

from ragjax.generation import Limits, Prompts, generate_ensemble, generate_rag_token

BEAMS = 3


def search(setting, *, beams=BEAMS, **changes):
    prompts = setting.by_doc._replace(**changes)
    return generate_rag_token(
        setting.model.decoder, setting.model.params, prompts, setting.limits(), beams=beams
    )


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["causal", "seq2seq"])
def test_the_search_follows_the_mixture_of_full_forwards(setting, request):
    setting = request.getfixturevalue(setting)
    found = search(setting)
    for question in range(2):
        prompts = setting.prompts[2 * question : 2 * question + 2]
        expected = reference.beam_reference(
            reference.mixture(setting.next_token, prompts, setting.weights[question]),
            beams=BEAMS,
            stop_ids=setting.stop_ids,
        )
        answers = [reference.without_stop(each[2], setting.stop_ids) for each in expected]
        assert reference.answers_of(found.ids[question], found.lengths[question]) == answers
        np.testing.assert_allclose(found.log_probs[question], [e[1] for e in expected], rtol=1e-4)
        np.testing.assert_allclose(found.scores[question], [e[0] for e in expected], rtol=1e-4)


@pytest.mark.slow
def test_one_beam_is_the_ensemble(causal):
    found = search(causal, beams=1)
    expected = generate_ensemble(
        causal.model.decoder,
        causal.model.params,
        causal.by_doc,
        causal.limits(),
    )
    np.testing.assert_array_equal(found.ids[:, 0], expected.ids)
    np.testing.assert_array_equal(found.lengths[:, 0], expected.lengths)
    np.testing.assert_allclose(found.log_probs[:, 0], expected.log_probs, rtol=1e-6)


@pytest.mark.slow
def test_masked_documents_do_not_vote_and_none_at_all_count_the_same(causal):
    huge = np.array([[0.0, 50.0], [-30.0, 60.0]], np.float32)
    found = search(causal, doc_scores=huge, doc_mask=np.array([[True, False], [False, False]]))
    cases = [(causal.prompts[:1], [1.0]), (causal.prompts[2:], [0.5, 0.5])]
    for question, (prompts, weights) in enumerate(cases):
        expected = reference.beam_reference(
            reference.mixture(causal.next_token, prompts, weights),
            beams=BEAMS,
            stop_ids=causal.stop_ids,
        )
        np.testing.assert_allclose(found.log_probs[question], [e[1] for e in expected], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (3, 1.0), (3, 0.0)])
def test_the_answers_are_those_of_transformers(tmp_path, beams, penalty):
    import torch

    rag = make_rag(tmp_path, "Token")
    with torch.no_grad():
        expected = rag.reference.generate(
            context_input_ids=torch.tensor(rag.right_ids).long(),
            context_attention_mask=torch.tensor(rag.right_mask).long(),
            doc_scores=torch.tensor(rag.scores),
            num_beams=beams,
            num_return_sequences=beams,
            **({} if beams == 1 else {"length_penalty": penalty}),
            do_sample=False,
            early_stopping=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    lm = rag.language_model
    found = generate_rag_token(
        lm.decoder,
        lm.params,
        Prompts(rag.ids, rag.mask, rag.scores),
        Limits(max_new_tokens=rag.new_tokens, stop_ids=lm.eos_ids),
        beams=beams,
        length_penalty=penalty,
    )
    answers = reference.answers_of(found.ids, found.lengths)
    assert answers == [rag.answer(row) for row in expected.sequences.tolist()]
    assert len(set(map(len, answers))) > 1  # some ended, some were cut off
    if beams > 1:
        scores = expected.sequences_scores.reshape(-1, beams)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-5)

"""Streams: the tokens of the batched decoders one by one, without compiling again, as text."""

import generation_reference as reference
import jax
import numpy as np
import pytest

from ragjax.generation import (
    Prompts,
    Sampling,
    TextStream,
    decode_stream,
    generate_ensemble,
    generate_ensemble_sampled,
    stream_greedy,
    stream_sampled,
)
from ragjax.generation.greedy import choose_best
from ragjax.generation.streaming import decode_steps, prefill
from ragjax.models.testing.language_model import tiny_tokenizer


def arguments(setting, question, **changes):
    prompts = Prompts(*(array[question] for array in setting.by_doc[:3]), **changes)
    return setting.model.decoder, setting.model.params, prompts


def batched(setting, function, **options):
    model = setting.model
    found = function(model.decoder, model.params, setting.by_doc, setting.limits(), **options)
    return reference.answers_of(found.ids, found.lengths)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["causal", "seq2seq"])
def test_a_stream_is_the_ensembles_answer(setting, request):
    setting = request.getfixturevalue(setting)
    expected = batched(setting, generate_ensemble)
    streams = [stream_greedy(*arguments(setting, q), setting.limits()) for q in range(2)]
    assert [list(stream) for stream in streams] == expected


def test_steps_and_questions_share_one_program(causal, compilations):
    limits = causal.limits(stop_ids=())
    lengths = [len(list(stream_greedy(*arguments(causal, 0), limits)))]
    with compilations() as compiled:
        for question in (1, 0):
            lengths.append(len(list(stream_greedy(*arguments(causal, question), limits))))
    assert lengths == [reference.NEW] * 3
    assert compiled == []


def test_each_step_takes_the_cache_of_the_one_before(causal):
    limits, model = causal.limits(stop_ids=()), causal.model
    length = limits.cache_length(reference.SLOTS)
    ids, mask = causal.ids[:2], causal.mask[:2]
    prefilled = prefill(model.decoder, model.params, ids, mask, cache_length=length)
    weights, best = np.full(2, -np.log(2), np.float32), jax.tree_util.Partial(choose_best)
    steps = decode_steps(model.decoder, model.params, prefilled, weights, best, limits)
    caches = [step.prefilled.cache for step in steps]
    assert all(leaf.is_deleted() for cache in caches[:-1] for leaf in cache.keys_values)
    assert len(caches) == reference.NEW and not caches[-1].keys_values[0].is_deleted()


@pytest.mark.slow
def test_a_sampled_stream_is_the_ensembles_draw(causal):
    keys = jax.random.split(jax.random.key(2), 2)
    sampling = Sampling(temperature=1.3, top_k=20, top_p=0.9)
    expected = batched(causal, generate_ensemble_sampled, key=keys, sampling=sampling)
    for question in range(2):
        options = {"key": keys[question], "sampling": sampling}
        stream = stream_sampled(*arguments(causal, question), causal.limits(), **options)
        assert list(stream) == expected[question]


def test_masked_documents_and_stop_tokens_are_left_out(causal):
    given = arguments(causal, 0, doc_mask=np.array([True, False]))
    # Question 0 from its first document alone: the greedy answer to prompt 0.
    best = reference.beam_reference(
        lambda answer: causal.next_token(causal.prompts[0], answer), beams=1
    )[0][2]
    third = causal.limits(stop_ids=(best[2],))
    assert list(stream_greedy(*given, third)) == best[: best.index(best[2])]
    assert list(stream_greedy(*given, causal.limits(stop_ids=(best[0],)))) == []
    later = stream_greedy(*given, causal.limits(stop_ids=(best[0],), min_new_tokens=1))
    assert next(later) != best[0]


def test_bad_arguments_are_refused_before_the_first_token(causal):
    decoder, params, prompts = arguments(causal, 0)
    few = prompts._replace(doc_scores=prompts.doc_scores[:1])
    with pytest.raises(ValueError, match=r"\[K, L\].* \[K\] are needed, got .*doc_scores \(1,\)"):
        stream_greedy(decoder, params, few, causal.limits())


TEXTS = [
    "plain words",
    "naïve café",
    "狐狸 хитрая",
    "שלום عربي",
    "🦊👩‍🚀 go",
    "\ufffd kept \ufffd",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_in_whole_characters(text):
    tokenizer = tiny_tokenizer()  # one token a byte
    pieces = list(decode_stream(tokenizer, tokenizer.encode(text).ids))
    assert "".join(pieces) == text
    assert all(pieces)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) == len(text)  # each as soon as its last byte is there


def test_an_answer_cut_within_a_character_still_ends():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("a🦊").ids[:-1]
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in ids] == ["a", "", "", ""]
    assert stream.end() == tokenizer.decode(ids)[1:] != ""

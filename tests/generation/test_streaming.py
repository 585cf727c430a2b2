"""Streams: the tokens of the batched decoders one by one, without compiling again, as text."""

import generation_reference as reference
import jax
import numpy as np
import pytest

from ragjax.generation import (
    TextStream,
    decode_stream,
    generate_ensemble,
    generate_ensemble_sampled,
    stream_greedy,
    stream_sampled,
    streaming,
)
from ragjax.models.testing.language_model import tiny_tokenizer


def arguments(setting, question):
    ids, mask = reference.by_document((setting.ids, setting.mask))
    model = setting.model
    return model.decoder, model.params, ids[question], mask[question], setting.scores[question]


def options_of(setting, **changes):
    return {"max_new_tokens": reference.NEW, "stop_ids": setting.stop_ids, **changes}


def batched(setting, function, *keys, **options):
    found = function(
        setting.model.decoder,
        setting.model.params,
        *reference.by_document((setting.ids, setting.mask)),
        setting.scores,
        *keys,
        **options,
    )
    return reference.answers_of(found.ids, found.lengths)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["causal", "seq2seq"])
def test_a_stream_is_the_ensembles_answer(setting, request):
    setting = request.getfixturevalue(setting)
    expected = batched(setting, generate_ensemble, **options_of(setting))
    streams = [stream_greedy(*arguments(setting, q), **options_of(setting)) for q in range(2)]
    assert [list(stream) for stream in streams] == expected


def test_steps_and_questions_share_one_program(causal):
    compiled = []

    def hear(name, seconds, **rest):
        if "backend_compile" in name:
            compiled.append(name)

    options = options_of(causal, stop_ids=())
    lengths = [len(list(stream_greedy(*arguments(causal, 0), **options)))]
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        jax.jit(lambda x: x * 3 + 1)(np.ones(5))  # the listener hears
        heard = len(compiled)
        for question in (1, 0):
            lengths.append(len(list(stream_greedy(*arguments(causal, question), **options))))
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert lengths == [reference.NEW] * 3
    assert len(compiled) == heard > 0


def test_each_step_takes_the_cache_of_the_one_before(causal):
    options = streaming._Options(causal.model.decoder, streaming._take_best, (), 0)
    decoder, params, ids, mask, _ = arguments(causal, 0)
    weights = np.full((1, 2), -np.log(2), np.float32)
    begun = streaming._begin(options, params, ids, mask, weights, None, reference.NEW)
    streaming._append(options, params, begun, weights, None)
    assert all(leaf.is_deleted() for leaf in begun.cache.keys_values)


@pytest.mark.slow
def test_a_sampled_stream_is_the_ensembles_draw(causal):
    keys = jax.random.split(jax.random.key(2), 2)
    options = options_of(causal, temperature=1.3, top_k=20, top_p=0.9)
    expected = batched(causal, generate_ensemble_sampled, keys, **options)
    for question in range(2):
        stream = stream_sampled(*arguments(causal, question), keys[question], **options)
        assert list(stream) == expected[question]


def test_masked_documents_and_stop_tokens_are_left_out(causal):
    decoder, params, ids, mask, scores = arguments(causal, 0)
    # Question 0 from its first document alone: the greedy answer to prompt 0.
    best = reference.beam_reference(
        lambda answer: causal.next_token(causal.prompts[0], answer), beams=1
    )[0][2]
    shown = options_of(causal, stop_ids=(best[2],), doc_mask=np.array([True, False]))
    assert (
        list(stream_greedy(decoder, params, ids, mask, scores, **shown))
        == best[: best.index(best[2])]
    )
    at_once = {**shown, "stop_ids": (best[0],)}
    assert list(stream_greedy(decoder, params, ids, mask, scores, **at_once)) == []
    later = stream_greedy(decoder, params, ids, mask, scores, **at_once, min_new_tokens=1)
    assert next(later) != best[0]


def test_bad_arguments_are_refused_before_the_first_token(causal):
    decoder, params, ids, mask, scores = arguments(causal, 0)
    with pytest.raises(ValueError, match=r"of one question are needed, got \(2, 10\) and \(1,\)"):
        stream_greedy(decoder, params, ids, mask, scores[:1], **options_of(causal))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        stream_greedy(decoder, params, ids, mask, scores, max_new_tokens=0, stop_ids=())
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        key = jax.random.key(0)
        options = options_of(causal, temperature=0)
        stream_sampled(decoder, params, ids, mask, scores, key, **options)


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

"""Beam search against a plain search over full forwards, and against greedy decoding."""

import functools

import generation_reference as reference
import jax
import numpy as np
import pytest

from ragjax.generation import Limits, Prompts, generate_beam, generate_greedy
from ragjax.models.layers.stacks import cast_floats

BEAMS = 3


def search(setting, prompts, *, beams=BEAMS, length_penalty=1.0, **limits):
    model = setting.model
    return generate_beam(
        model.decoder,
        model.params,
        prompts,
        setting.limits(**limits),
        beams=beams,
        length_penalty=length_penalty,
    )


def check_against_full_forwards(setting, **options):
    """Compares every hypothesis of every row; returns the lengths, stop tokens included."""
    found = search(setting, setting.rows, **options)
    penalty, least = options.get("length_penalty", 1.0), options.get("min_new_tokens", 0)
    sizes = []
    for row, prompt in enumerate(setting.prompts):
        expected = reference.beam_reference(
            functools.partial(setting.next_token, prompt),
            beams=BEAMS,
            stop_ids=setting.stop_ids,
            penalty=penalty,
            least=least,
        )
        answers = [reference.without_stop(each[2], setting.stop_ids) for each in expected]
        assert reference.answers_of(found.ids[row], found.lengths[row]) == answers
        np.testing.assert_allclose(found.scores[row], [e[0] for e in expected], rtol=1e-4)
        np.testing.assert_allclose(found.log_probs[row], [e[1] for e in expected], rtol=1e-4)
        sizes += [len(each[2]) for each in expected]
    return sizes


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5])
def test_cached_search_equals_full_forwards(causal, penalty):
    sizes = check_against_full_forwards(causal, length_penalty=penalty)
    # Some ended and some were cut off, but for a penalty that favours the longest.
    assert (min(sizes) < reference.NEW) == (penalty < 2) and max(sizes) == reference.NEW


@pytest.mark.slow
def test_a_search_with_an_encoder_equals_full_forwards(seq2seq):
    check_against_full_forwards(seq2seq, length_penalty=1.0)


@pytest.mark.slow
def test_stop_tokens_may_be_forbidden_at_first(causal):
    sizes = check_against_full_forwards(causal, min_new_tokens=2)
    assert min(sizes) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["causal", "seq2seq"])
def test_one_beam_is_greedy(setting, request):
    setting = request.getfixturevalue(setting)
    beam = search(setting, setting.rows, beams=1)
    model = setting.model
    greedy = generate_greedy(model.decoder, model.params, setting.rows, setting.limits())
    np.testing.assert_array_equal(beam.ids[:, 0], greedy.ids)
    np.testing.assert_array_equal(beam.lengths[:, 0], greedy.lengths)
    np.testing.assert_allclose(beam.log_probs[:, 0], greedy.log_probs, rtol=1e-6)


def test_neighbours_and_padding_change_nothing(causal, rng):
    whole = search(causal, causal.rows)
    order = np.array([2, 0, 0, 3])
    moved = search(causal, Prompts(*reference.pad([causal.prompts[row] for row in order], rng)))
    for name, expected in whole._asdict().items():
        np.testing.assert_allclose(getattr(moved, name), expected[order], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_parameters_in_bfloat16(causal):
    narrow = cast_floats(causal.model.params, "bfloat16")
    found = generate_beam(
        causal.model.decoder,
        narrow,
        causal.rows,
        causal.limits(max_new_tokens=2),
        beams=2,
    )
    for row, prompt in enumerate(causal.prompts):
        expected = reference.beam_reference(
            functools.partial(causal.next_token, prompt),
            beams=2,
            stop_ids=causal.stop_ids,
            new=2,
        )
        np.testing.assert_allclose(found.log_probs[row], [e[1] for e in expected], rtol=0.1)
    assert found.log_probs.dtype == np.float32


def test_more_beams_than_there_are_first_tokens(causal):
    """A model that allows two tokens only: what is missing is marked, not made up."""

    class TwoTokens(type(causal.model.decoder)):
        def prefill(self, params, ids, mask, *, cache_length):
            read = super().prefill(params, ids, mask, cache_length=cache_length)
            allowed = np.arange(read.logits.shape[1])[None] < 2
            return read._replace(logits=jax.numpy.where(allowed, read.logits, -np.inf))

    decoder = TwoTokens(causal.model.config)
    limits = Limits(max_new_tokens=1, stop_ids=())
    found = generate_beam(decoder, causal.model.params, causal.rows, limits, beams=BEAMS)
    assert np.isfinite(found.log_probs).tolist() == [[True, True, False]] * reference.ROWS
    assert found.lengths.tolist() == [[1, 1, 0]] * reference.ROWS


def test_bad_options_are_refused(causal):
    with pytest.raises(ValueError, match="beams must be at least 1, got 0"):
        search(causal, causal.rows, beams=0)
    with pytest.raises(ValueError, match=r"doc_scores and doc_mask must be None .*\(2, 2, 10\)"):
        search(causal, causal.by_doc)

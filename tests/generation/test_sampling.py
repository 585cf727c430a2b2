"""Sampling: what is drawn, how often, and on what it does not depend."""

import generation_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.generation import (
    Limits,
    Prompts,
    Sampling,
    generate_ensemble_sampled,
    generate_sampled,
)
from ragjax.generation.sampling import sampler

DRAWS = 4000


def draw(log_probs, **options):
    """Draws many times from one distribution `[V]`; returns the frequencies."""
    keys = jax.random.split(jax.random.key(1), DRAWS)
    choose = jax.jit(sampler(keys, Sampling(**options)))
    drawn = choose(np.tile(np.float32(log_probs), (DRAWS, 1)), np.int32(0))
    return np.bincount(drawn, minlength=len(log_probs)) / DRAWS


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0, "top_k": 2}, [1, 3]),
        ({"temperature": 1.0, "top_p": 0.6}, [1, 3]),  # 0.4 is not enough, 0.4 + 0.3 is
        ({"temperature": 1.0, "top_p": 0.39}, [1]),  # the most likely one always stays
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.75}, [1, 3, 0]),  # 0.7 / 0.95 of the four
        ({"temperature": 1.0, "top_k": 99}, [0, 1, 2, 3, 4]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(options, kept):
    probs = np.array([0.15, 0.4, 0.05, 0.3, 0.1])
    expected = np.zeros(5)
    expected[kept] = probs[kept] ** (1 / options["temperature"])
    expected /= expected.sum()
    # Four standard deviations of a frequency are 0.03 at most.
    np.testing.assert_allclose(draw(np.log(probs), **options), expected, atol=0.03)


def test_what_is_not_allowed_is_not_drawn():
    found = draw([-np.inf, 0.0, -np.inf, 0.0], temperature=5.0, top_p=0.999)
    assert found[[0, 2]].sum() == 0 and found[[1, 3]].min() > 0.4


def sample(setting, prompts, key, *, temperature=1.0, **options):
    model, sampling = setting.model, Sampling(temperature=temperature)
    limits = setting.limits()
    return generate_sampled(
        model.decoder, model.params, prompts, limits, key=key, sampling=sampling, **options
    )


def test_rows_draw_by_their_own_numbers(causal, rng):
    key = jax.random.key(3)
    whole = sample(causal, causal.rows, key)
    others = [*causal.prompts[:2], [7], [8, 9]]
    changed = sample(causal, Prompts(*reference.pad(others, rng)), key)
    for name in ("ids", "lengths"):
        np.testing.assert_array_equal(getattr(whole, name)[:2], getattr(changed, name)[:2])
    again = sample(causal, causal.rows, jax.random.key(4))
    assert not np.array_equal(whole.ids, again.ids)
    same = sample(causal, Prompts(causal.ids[[0] * 4], causal.mask[[0] * 4]), key)
    assert len({tuple(row) for row in np.asarray(same.ids).tolist()}) > 1


def test_several_answers_to_a_prompt_are_those_to_its_copies(causal):
    keys = jax.random.split(jax.random.key(5), 8)
    copies = Prompts(*(jnp.repeat(array, 2, axis=0) for array in causal.rows[:2]))
    apart, together = sample(causal, copies, keys), sample(causal, causal.rows, keys, samples=2)
    for name in ("ids", "lengths"):
        np.testing.assert_array_equal(getattr(apart, name), getattr(together, name))
    np.testing.assert_allclose(apart.log_probs, together.log_probs, rtol=1e-4)


@pytest.mark.slow
def test_with_a_key_for_each_row_the_place_in_the_batch_does_not_matter(causal):
    keys = jax.random.split(jax.random.key(3), 4)
    order = np.array([3, 1, 0, 2])
    whole = sample(causal, causal.rows, keys)
    moved = sample(causal, Prompts(causal.ids[order], causal.mask[order]), keys[order])
    np.testing.assert_array_equal(moved.ids, np.asarray(whole.ids)[order])
    with pytest.raises(ValueError, match=r"one for each of 4 rows, got shape \(3,\)"):
        sample(causal, causal.rows, keys[:3])


def test_log_probabilities_are_the_models_own(causal):
    found = sample(causal, causal.rows, jax.random.key(5), temperature=0.7)
    for row, answer in enumerate(reference.answers_of(found.ids, found.lengths)):
        if len(answer) == reference.NEW:
            log_prob = reference.log_prob_of(
                lambda past, row=row: causal.next_token(causal.prompts[row], past), answer
            )
            np.testing.assert_allclose(found.log_probs[row], log_prob, rtol=1e-4)


@pytest.mark.slow
def test_the_mixture_is_drawn_from(causal):
    questions = 1000
    rows = (np.repeat(array[:1], questions, axis=0) for array in causal.by_doc[:3])
    found = generate_ensemble_sampled(
        causal.model.decoder,
        causal.model.params,
        Prompts(*rows),
        Limits(max_new_tokens=1, stop_ids=()),
        key=jax.random.key(0),
        sampling=Sampling(temperature=1.0),
    )
    next_token = reference.mixture(causal.next_token, causal.prompts[:2], causal.weights[0])
    probs = np.exp(next_token([]))
    drawn = np.bincount(np.asarray(found.ids)[:, 0], minlength=len(probs)) / questions
    np.testing.assert_allclose(drawn, probs, atol=0.065)
    np.testing.assert_allclose(
        found.log_probs, np.log(probs)[np.asarray(found.ids)[:, 0]], rtol=1e-3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0; generate_greedy takes"),
        ({"temperature": 1.0, "top_k": -1}, "top_k must be at least 1, or 0 .*got -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)

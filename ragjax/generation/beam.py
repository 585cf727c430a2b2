"""Beam search in batches, over one prompt a row.

Hypotheses are kept as in transformers with `early_stopping=False`: of the `beams` best
continuations of a step, those that end are finished, with the score log p / length ** penalty,
where the length counts the stop token; the `beams` best that do not end go on. A row is done once
it has `beams` finished hypotheses none of which the best unfinished one would beat if it ended
now. At the limit of tokens, the best continuations count as finished.

Shapes: R rows, L prompt slots, T new tokens, V vocabulary; `beams` hypotheses a row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder, Prefilled
from ragjax.generation.greedy import read_prompts, without_stops


class BeamResult(NamedTuple):
    """The best answers to each prompt, best first."""

    ids: Array  # [R, beams, T] int32; 0 after the end
    lengths: Array  # [R, beams] int32, tokens before the stop token
    log_probs: Array  # [R, beams] float32 nats, of all tokens, a generated stop token included
    scores: Array  # [R, beams] float32, what they are ordered by; -inf: there is no such answer


class Hypotheses(NamedTuple):
    """Finished sequences, best first, with the tokens that ended them."""

    ids: Array  # [R, beams, T] int32, stop token included; 0 after it
    sizes: Array  # [R, beams] int32, stop token included; 0: there is no such sequence
    log_probs: Array  # [R, beams] float32 nats; -inf: there is no such sequence
    scores: Array  # [R, beams] float32


class BeamSteps(NamedTuple):
    """What beam search needs of a model."""

    mix: Callable[[Array], Array]  # the decoder's logits -> log-probabilities [R, beams, V]
    advance: Callable[[Any, Array], Prefilled]  # (cache, token ids [R, beams]) -> the next state
    reorder: Callable[[Any, Array], Any]  # (cache, beams [R, beams] to go on from) -> cache


@functools.partial(
    jit_decoding,
    static_argnames=("decoder", "beams", "max_new_tokens", "stop_ids", "min_new_tokens"),
)
def generate_beam(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    *,
    beams: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    length_penalty: float = 1.0,
    min_new_tokens: int = 0,
) -> BeamResult:
    """Searches for the most likely answers to each prompt.

    With one beam it gives what `generate_greedy` gives. Rows do not influence each other. The
    prompts are kept once a beam, but only the answers are copied when beams change places.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[R, L]` int32, left-padded.
        context_mask: `[R, L]` bool, True = real token.
        beams: Hypotheses a row, at least 1.
        max_new_tokens: T, at least 1.
        stop_ids: Tokens that end an answer.
        length_penalty: Power of the length by which log-probabilities are divided: 0 orders by
            probability, above 0 favours long answers.
        min_new_tokens: Stop tokens are not chosen before this many tokens.

    Returns:
        The best `beams` answers to each prompt.

    Raises:
        ValueError: `beams` or `max_new_tokens` is below 1.

    References:
        Wu et al., 2016, "Google's Neural Machine Translation System", section 7 (with the length
        alone as penalty).
    """
    prefilled = read_prompts(
        decoder, params, context_ids, context_mask, max_new_tokens=max_new_tokens
    )
    rows, slots = context_ids.shape[:2]
    found = search_prompts(
        decoder,
        params,
        prefilled,
        prompt_slots=slots,
        rows=rows,
        beams=beams,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        length_penalty=length_penalty,
        min_new_tokens=min_new_tokens,
    )
    return strip_stops(found, stop_ids)


def search_prompts(
    decoder: Decoder,
    params: Any,
    prefilled: Prefilled,
    *,
    prompt_slots: int,
    rows: int,
    beams: int,
    **options: Any,
) -> Hypotheses:
    """Searches with one prompt a row that has been read; options as `beam_search` takes them."""

    def mix(logits: Array) -> Array:
        return jax.nn.log_softmax(logits).reshape(rows, beams, -1)

    return beam_search(
        beam_steps(decoder, params, mix, docs=1, prompt_slots=prompt_slots),
        repeat_prompts(decoder, prefilled, beams),
        rows=rows,
        beams=beams,
        **options,
    )


def beam_steps(
    decoder: Decoder,
    params: Any,
    mix: Callable[[Array], Array],
    *,
    docs: int,
    prompt_slots: int,
) -> BeamSteps:
    """Binds a decoder whose rows are (question, document, beam), the beam fastest.

    Args:
        decoder: The language model's functions.
        params: Its parameters.
        mix: Maps logits `[R * docs * beams, V]` to log-probabilities `[R, beams, V]`.
        docs: Documents a question, whose rows all get the same tokens.
        prompt_slots: L.
    """

    def advance(cache: Any, token_ids: Array) -> Prefilled:
        return decoder.decode_step(params, cache, jnp.repeat(token_ids, docs, axis=0).reshape(-1))

    def reorder(cache: Any, parents: Array) -> Any:
        questions, beams = parents.shape
        first = jnp.arange(questions * docs, dtype=jnp.int32)[:, None] * beams
        rows = first + jnp.repeat(parents, docs, axis=0)
        return decoder.reorder(cache, rows.reshape(-1), prompt_slots=prompt_slots)

    return BeamSteps(mix, advance, reorder)


def repeat_prompts(decoder: Decoder, prefilled: Prefilled, beams: int) -> Prefilled:
    """Returns logits and cache with each row of the prompts `beams` times."""
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    return _Repeated(
        jnp.repeat(prefilled.logits, beams, axis=0), decoder.repeat(prefilled.cache, beams)
    )


def beam_search(
    steps: BeamSteps,
    prefilled: Prefilled,
    *,
    rows: int,
    beams: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    length_penalty: float | Array = 1.0,
    min_new_tokens: int = 0,
) -> Hypotheses:
    """Alternates between choosing continuations and appending them, until no row can improve.

    Args:
        steps: The model.
        prefilled: State after the prompts, each row as often as there are beams.
        rows: R.
        beams: Hypotheses a row.
        max_new_tokens: T.
        stop_ids: Tokens that end an answer.
        length_penalty: See `generate_beam`.
        min_new_tokens: Stop tokens are not chosen before this many tokens.

    Returns:
        Finished sequences `[R, beams, T]`, best first.
    """
    is_stop = _is_stop(stop_ids)

    def unfinished(state: _SearchState) -> Array:
        return (state.step < max_new_tokens) & jnp.any(state.open)

    def extend(state: _SearchState, logits: Array, cache: Any) -> _SearchState:
        log_probs = steps.mix(logits)
        log_probs = without_stops(log_probs, stop_ids, where=state.step < min_new_tokens)
        totals = state.log_probs[:, :, None] + log_probs  # [R, beams, V]
        at_limit = state.step + 1 == max_new_tokens
        divisor = (state.step + 1).astype(jnp.float32) ** length_penalty
        best = _continue(state, totals)
        ends = (is_stop(best.last) | at_limit) & state.open[:, None]
        finished = _merge(state.finished, best, ends, divisor, state.step + 1)
        live = _continue(state, without_stops(totals, stop_ids, where=True))
        improvable = live.log_probs[:, 0] / divisor > jnp.min(finished.scores, axis=1)
        return _SearchState(
            step=state.step + 1,
            open=state.open & improvable,
            ids=live.ids,
            log_probs=live.log_probs,
            parents=live.parents,
            last=live.last,
            finished=finished,
            cache=cache,
        )

    def advance_and_extend(state: _SearchState) -> _SearchState:
        following = steps.advance(steps.reorder(state.cache, state.parents), state.last)
        return extend(state, following.logits, following.cache)

    state = extend(_first_state(rows, beams, max_new_tokens), prefilled.logits, prefilled.cache)
    return lax.while_loop(unfinished, advance_and_extend, state).finished


def strip_stops(found: Hypotheses, stop_ids: tuple[int, ...]) -> BeamResult:
    """Takes the stop tokens out of sequences `[R, beams, T]`."""
    slots = jnp.arange(found.ids.shape[-1], dtype=jnp.int32)[None, None]
    last = jnp.sum(jnp.where(slots == found.sizes[..., None] - 1, found.ids, 0), axis=-1)
    lengths = found.sizes - ((found.sizes > 0) & _is_stop(stop_ids)(last))
    ids = jnp.where(slots < lengths[..., None], found.ids, 0)
    return BeamResult(ids, lengths, found.log_probs, found.scores)


class _Repeated(NamedTuple):
    logits: Array
    cache: Any


class _SearchState(NamedTuple):
    step: Array  # [] int32
    open: Array  # [R] bool, True = an unfinished hypothesis may still be among the best
    ids: Array  # [R, beams, T] int32, of the unfinished hypotheses
    log_probs: Array  # [R, beams] float32; -inf: no such hypothesis
    parents: Array  # [R, beams] int32, whose answer in the cache they go on from
    last: Array  # [R, beams] int32, the token chosen last
    finished: Hypotheses
    cache: Any


class _Continued(NamedTuple):
    ids: Array  # [R, beams, T]
    log_probs: Array  # [R, beams], in falling order
    parents: Array  # [R, beams]
    last: Array  # [R, beams]


def _is_stop(stop_ids: tuple[int, ...]) -> Callable[[Array], Array]:
    stops = jnp.asarray(stop_ids, jnp.int32)
    return lambda token_ids: jnp.isin(token_ids, stops)


def _first_state(rows: int, beams: int, max_new_tokens: int) -> _SearchState:
    none = jnp.full((rows, beams), -jnp.inf, jnp.float32)
    whole = jnp.zeros((rows, beams), jnp.int32)
    ids = jnp.zeros((rows, beams, max_new_tokens), jnp.int32)
    return _SearchState(
        step=jnp.zeros((), jnp.int32),
        open=jnp.ones(rows, bool),
        ids=ids,
        # All beams begin with the same prompt: the first one alone may be continued.
        log_probs=none.at[:, 0].set(0.0),
        parents=whole,
        last=whole,
        finished=Hypotheses(ids, whole, none, none),
        cache=None,
    )


def _continue(state: _SearchState, totals: Array) -> _Continued:
    """Appends the best tokens by their totals `[R, beams, V]`."""
    rows, beams, vocabulary = totals.shape
    log_probs, flat = lax.top_k(totals.reshape(rows, -1), beams)
    parents, last = jnp.divmod(flat.astype(jnp.int32), vocabulary)
    ids = jnp.take_along_axis(state.ids, parents[:, :, None], axis=1)
    ids = lax.dynamic_update_slice(ids, last[:, :, None], (0, 0, state.step))
    return _Continued(ids, log_probs, parents, last)


def _merge(
    finished: Hypotheses, new: _Continued, ends: Array, divisor: Array, size: Array
) -> Hypotheses:
    """Keeps the best of the finished sequences and those of the new ones that end."""
    log_probs = jnp.where(ends, new.log_probs, -jnp.inf)
    added = Hypotheses(
        jnp.where(ends[:, :, None], new.ids, 0),
        jnp.where(ends & (log_probs > -jnp.inf), size, 0),
        log_probs,
        log_probs / divisor,
    )
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), finished, added)
    _, index = lax.top_k(both.scores, ends.shape[1])
    return Hypotheses(
        jnp.take_along_axis(both.ids, index[:, :, None], axis=1),
        *(jnp.take_along_axis(leaf, index, axis=1) for leaf in both[1:]),
    )

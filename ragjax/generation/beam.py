"""Beam search in batches, over one prompt an answer or over the documents of a question.

Hypotheses are kept as in transformers with `early_stopping=False`: of the `beams` best
continuations of a step, those that end are finished, with the score log p / length ** penalty,
where the length counts the stop token; the `beams` best that do not end go on. A row is done once
it has `beams` finished hypotheses none of which the best unfinished one would beat if it ended
now. At the limit of tokens, the best continuations count as finished.

Shapes: B answers, K documents each, L prompt slots, T new tokens, V vocabulary; `beams`
hypotheses an answer.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder
from ragjax.generation.prompts import (
    Limits,
    PrefilledPrompts,
    Prompts,
    prefill_documents,
    prefill_rows,
)


class BeamResult(NamedTuple):
    """The best answers to each prompt, best first."""

    ids: Array  # [B, beams, T] int32; 0 after the end
    lengths: Array  # [B, beams] int32, tokens before the stop token
    log_probs: Array  # [B, beams] float32 nats, of all tokens, a generated stop token included
    scores: Array  # [B, beams] float32, what they are ordered by; -inf: there is no such answer


class Hypotheses(NamedTuple):
    """Finished sequences, best first, with the tokens that ended them."""

    ids: Array  # [B, beams, T] int32, stop token included; 0 after it
    sizes: Array  # [B, beams] int32, stop token included; 0: there is no such sequence
    log_probs: Array  # [B, beams] float32 nats; -inf: there is no such sequence
    scores: Array  # [B, beams] float32


@functools.partial(jit_decoding, static_argnames=("decoder", "limits", "beams"))
def generate_beam(
    decoder: Decoder,
    params: Any,
    prompts: Prompts,
    limits: Limits,
    *,
    beams: int,
    length_penalty: float | Array = 1.0,
) -> BeamResult:
    """Searches for the most likely answers to each prompt.

    With one beam it gives what `generate_greedy` gives. Rows do not influence each other. The
    prompts are kept once a beam, but only the answers are copied when beams change places.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: One an answer, `[B, L]`.
        limits: Where answers end.
        beams: Hypotheses an answer, at least 1.
        length_penalty: Power of the length by which log-probabilities are divided: 0 orders by
            probability, above 0 favours long answers.

    Returns:
        The best `beams` answers to each prompt.

    Raises:
        ValueError: The prompts are those of documents, or `beams` is below 1.

    References:
        Wu et al., 2016, "Google's Neural Machine Translation System", section 7 (with the length
        alone as penalty).
    """
    prefilled = prefill_rows(decoder, params, prompts, limits)
    found = beam_search(prefilled, limits, beams=beams, length_penalty=length_penalty)
    return strip_stops(found, limits)


@functools.partial(jit_decoding, static_argnames=("decoder", "limits", "beams"))
def generate_rag_token(
    decoder: Decoder,
    params: Any,
    prompts: Prompts,
    limits: Limits,
    *,
    beams: int,
    length_penalty: float | Array = 1.0,
) -> BeamResult:
    """Searches for the most likely answers under the mixture over documents (RAG-Token).

    The mixture is p(y_t) = sum_k p_R(k) p_LM(y_t | c_k, x, y_<t). With one beam it gives what
    `generate_ensemble` gives.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: One per document, `[B, K, L]`.
        limits: Where answers end.
        beams: Hypotheses a question, at least 1.
        length_penalty: As in `generate_beam`.

    Returns:
        The best `beams` answers to each question; log-probabilities are those of the mixture.

    Raises:
        ValueError: The shapes do not fit together, or `beams` is below 1.

    References:
        Lewis et al., 2020, "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks",
        section 2.5 (RAG-Token).
    """
    prefilled = prefill_documents(decoder, params, prompts, limits)
    found = beam_search(prefilled, limits, beams=beams, length_penalty=length_penalty)
    return strip_stops(found, limits)


def beam_search(
    prompts: PrefilledPrompts, limits: Limits, *, beams: int, length_penalty: float | Array
) -> Hypotheses:
    """Alternates between choosing continuations and appending them, until no row can improve.

    The decoder's rows are (answer, document, beam), the beam fastest.

    Args:
        prompts: State after the prompts.
        limits: Where answers end.
        beams: Hypotheses an answer.
        length_penalty: See `generate_beam`.

    Returns:
        Finished sequences `[B, beams, T]`, best first.

    Raises:
        ValueError: `beams` is below 1.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")

    def unfinished(state: _SearchState) -> Array:
        return (state.step < limits.max_new_tokens) & jnp.any(state.open)

    def extend(state: _SearchState, logits: Array, cache: Any) -> _SearchState:
        return _extend(state, prompts.mix(logits, beams), cache, limits, length_penalty)

    def advance_and_extend(state: _SearchState) -> _SearchState:
        first = jnp.arange(prompts.answers * prompts.docs, dtype=jnp.int32)[:, None] * beams
        rows = first + jnp.repeat(state.parents, prompts.docs, axis=0)
        cache = prompts.decoder.reorder(state.cache, rows.reshape(-1), prompt_slots=prompts.slots)
        following = prompts.advance(cache, state.last)
        return extend(state, following.logits, following.cache)

    start = _first_state(prompts.answers, beams, limits.max_new_tokens)
    logits = jnp.repeat(prompts.state.logits, beams, axis=0)
    state = extend(start, logits, prompts.decoder.repeat(prompts.state.cache, beams))
    return lax.while_loop(unfinished, advance_and_extend, state).finished


def strip_stops(found: Hypotheses, limits: Limits) -> BeamResult:
    """Takes the stop tokens out of sequences `[B, beams, T]`."""
    slots = jnp.arange(found.ids.shape[-1], dtype=jnp.int32)[None, None]
    last = jnp.sum(jnp.where(slots == found.sizes[..., None] - 1, found.ids, 0), axis=-1)
    stopped = (found.sizes > 0) & limits.is_stop(last)
    lengths = found.sizes - stopped.astype(found.sizes.dtype)
    ids = jnp.where(slots < lengths[..., None], found.ids, 0)
    return BeamResult(ids, lengths, found.log_probs, found.scores)


class _SearchState(NamedTuple):
    step: Array  # [] int32
    open: Array  # [B] bool, True = an unfinished hypothesis may still be among the best
    ids: Array  # [B, beams, T] int32, of the unfinished hypotheses
    log_probs: Array  # [B, beams] float32; -inf: no such hypothesis
    parents: Array  # [B, beams] int32, whose answer in the cache they go on from
    last: Array  # [B, beams] int32, the token chosen last
    finished: Hypotheses
    cache: Any


class _Continued(NamedTuple):
    ids: Array  # [B, beams, T]
    log_probs: Array  # [B, beams], in falling order
    parents: Array  # [B, beams]
    last: Array  # [B, beams]


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


def _extend(
    state: _SearchState,
    log_probs: Array,
    cache: Any,
    limits: Limits,
    length_penalty: float | Array,
) -> _SearchState:
    """Continues the hypotheses by tokens of log-probabilities `[B, beams, V]`."""
    log_probs = limits.without_stops(log_probs, where=state.step < limits.min_new_tokens)
    totals = state.log_probs[:, :, None] + log_probs  # [B, beams, V]
    step = state.step + 1
    divisor = step.astype(jnp.float32) ** length_penalty
    best = _continue(state, totals)
    ends = limits.is_stop(best.last) | (step == limits.max_new_tokens)
    finished = _merge(state.finished, best, ends & state.open[:, None], divisor, step)
    live = _continue(state, limits.without_stops(totals, where=True))
    improvable = live.log_probs[:, 0] / divisor > jnp.min(finished.scores, axis=1)
    return _SearchState(step, state.open & improvable, *live, finished, cache)


def _continue(state: _SearchState, totals: Array) -> _Continued:
    """Appends the best tokens by their totals `[B, beams, V]`."""
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

"""Greedy decoding in batches: jitted, cached, of fixed shapes, stopping once every row has ended.

Shapes: R rows, L prompt slots, T new tokens, Y target slots, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ragjax.generation.decoder import Decoder, Prefilled


class GreedyResult(NamedTuple):
    """The most likely next token, again and again."""

    ids: Array  # [R, T] int32; 0 after the end
    lengths: Array  # [R] int32, tokens before the stop token (which is not part of the answer)


class ScoredGeneration(NamedTuple):
    """The score of given targets and the model's own answer, from one reading of the prompts."""

    token_log_probs: Array  # [R, Y] float32 nats, 0 where masked
    generated: GreedyResult


@functools.partial(
    jax.jit, static_argnames=("decoder", "max_new_tokens", "stop_ids", "min_new_tokens")
)
def generate_greedy(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    min_new_tokens: int = 0,
) -> GreedyResult:
    """Appends the most likely token to each prompt until a stop token or the limit.

    Compiled once per shape, decoder and option. Rows do not influence each other.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[R, L]` int32, left-padded.
        context_mask: `[R, L]` bool, True = real token.
        max_new_tokens: T, at least 1.
        stop_ids: Tokens that end an answer: end of text, and any token with a line break where
            answers are one line.
        min_new_tokens: Stop tokens are not chosen before this many tokens. 1 keeps a model that
            begins its answer on a new line from saying nothing.

    Returns:
        Ids `[R, T]` and lengths `[R]`.

    Raises:
        ValueError: `max_new_tokens` is below 1.
    """
    prefilled = _prefill(decoder, params, context_ids, context_mask, max_new_tokens)
    return _decode(decoder, params, prefilled, max_new_tokens, stop_ids, min_new_tokens)


@functools.partial(
    jax.jit, static_argnames=("decoder", "max_new_tokens", "stop_ids", "min_new_tokens")
)
def score_and_generate(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    target_ids: Array,
    target_mask: Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    min_new_tokens: int = 0,
) -> ScoredGeneration:
    """Reads each prompt once, then scores a given answer and generates one.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[R, L]` int32, left-padded.
        context_mask: `[R, L]` bool, True = real token.
        target_ids: `[R, Y]` int32, right-padded.
        target_mask: `[R, Y]` bool, True = token counts.
        max_new_tokens: T, at least 1.
        stop_ids: Tokens that end an answer.
        min_new_tokens: As in `generate_greedy`.

    Returns:
        The log-probabilities of the given answers, and the generated ones.

    Raises:
        ValueError: `max_new_tokens` is below 1.
    """
    prefilled = _prefill(decoder, params, context_ids, context_mask, max_new_tokens)
    return ScoredGeneration(
        decoder.score(params, prefilled, target_ids, target_mask),
        _decode(decoder, params, prefilled, max_new_tokens, stop_ids, min_new_tokens),
    )


def decode_loop(
    choose: Callable[[Array], Array],
    advance: Callable[[Any, Array], Prefilled],
    prefilled: Prefilled,
    *,
    rows: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    min_new_tokens: int = 0,
) -> GreedyResult:
    """Alternates between choosing one token per answer and appending it.

    Args:
        choose: Maps logits to one token id per answer, `[rows]` int32.
        advance: `(cache, token ids [rows]) -> Prefilled`.
        prefilled: State after the prompts.
        rows: Number of answers.
        max_new_tokens: T.
        stop_ids: Tokens that end an answer.
        min_new_tokens: Stop tokens are not chosen before this many tokens.

    Returns:
        Ids `[rows, T]` and lengths `[rows]`.
    """
    stops = jnp.asarray(stop_ids, jnp.int32)

    def unfinished(state: _LoopState) -> Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.ended)

    def append(state: _LoopState, logits: Array, cache: Any) -> _LoopState:
        too_early = (state.step < min_new_tokens) & jnp.isin(jnp.arange(logits.shape[-1]), stops)
        token_ids = choose(jnp.where(too_early[None, :], -jnp.inf, logits))
        ended = state.ended | jnp.any(token_ids[:, None] == stops[None, :], axis=1)
        token_ids = jnp.where(ended, 0, token_ids)
        return _LoopState(
            step=state.step + 1,
            ended=ended,
            ids=lax.dynamic_update_slice(state.ids, token_ids[:, None], (0, state.step)),
            lengths=state.lengths + ~ended,
            last=token_ids,
            cache=cache,
        )

    def advance_and_append(state: _LoopState) -> _LoopState:
        prefilled = advance(state.cache, state.last)
        return append(state, prefilled.logits, prefilled.cache)

    start = _LoopState(
        step=jnp.zeros((), jnp.int32),
        ended=jnp.zeros(rows, bool),
        ids=jnp.zeros((rows, max_new_tokens), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        last=jnp.zeros(rows, jnp.int32),
        cache=None,
    )
    # The prompts already give the first token; the one chosen last is never read back.
    state = append(start, prefilled.logits, prefilled.cache)
    state = lax.while_loop(unfinished, advance_and_append, state)
    return GreedyResult(state.ids, state.lengths)


class _LoopState(NamedTuple):
    step: Array  # [] int32
    ended: Array  # [R] bool
    ids: Array  # [R, T] int32
    lengths: Array  # [R] int32
    last: Array  # [R] int32, the token chosen last
    cache: Any


def _prefill(
    decoder: Decoder, params: Any, ids: Array, mask: Array, max_new_tokens: int
) -> Prefilled:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    return decoder.prefill(params, ids, mask, cache_length=ids.shape[1] + max_new_tokens - 1)


def _decode(
    decoder: Decoder,
    params: Any,
    prefilled: Prefilled,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    min_new_tokens: int = 0,
) -> GreedyResult:
    return decode_loop(
        lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        functools.partial(decoder.decode_step, params),
        prefilled,
        rows=prefilled.logits.shape[0],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        min_new_tokens=min_new_tokens,
    )

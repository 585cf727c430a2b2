"""Greedy decoding in batches: jitted, cached, of fixed shapes, stopping once every row has ended.

Shapes: R rows, L prompt slots, T new tokens, Y target slots, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder, Prefilled

# (log-probabilities [rows, V], -inf where not allowed; step []) -> token ids [rows] int32.
Choose = Callable[[Array, Array], Array]


class GreedyResult(NamedTuple):
    """The most likely next token, again and again."""

    ids: Array  # [R, T] int32; 0 after the end
    lengths: Array  # [R] int32, tokens before the stop token (which is not part of the answer)
    log_probs: Array  # [R] float32 nats, of the generated tokens, a generated stop token included


class ScoredGeneration(NamedTuple):
    """The score of given targets and the model's own answer, from one reading of the prompts."""

    token_log_probs: Array  # [R, Y] float32 nats, 0 where masked
    generated: GreedyResult


@functools.partial(
    jit_decoding, static_argnames=("decoder", "max_new_tokens", "stop_ids", "min_new_tokens")
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
        Ids `[R, T]`, lengths `[R]` and log-probabilities `[R]`. The latter are the model's own,
        as `Decoder.score` returns them: they do not see that stop tokens were not allowed.

    Raises:
        ValueError: `max_new_tokens` is below 1.
    """
    prefilled = read_prompts(
        decoder, params, context_ids, context_mask, max_new_tokens=max_new_tokens
    )
    return _decode(decoder, params, prefilled, max_new_tokens, stop_ids, min_new_tokens)


@functools.partial(
    jit_decoding, static_argnames=("decoder", "max_new_tokens", "stop_ids", "min_new_tokens")
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
    prefilled = read_prompts(
        decoder, params, context_ids, context_mask, max_new_tokens=max_new_tokens
    )
    return ScoredGeneration(
        decoder.score(params, prefilled, target_ids, target_mask),
        _decode(decoder, params, prefilled, max_new_tokens, stop_ids, min_new_tokens),
    )


def decode_loop(
    mix: Callable[[Array], Array],
    choose: Choose,
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
        mix: Maps the decoder's logits to log-probabilities per answer, `[rows, V]`.
        choose: Which of the tokens come next.
        advance: `(cache, token ids [rows]) -> Prefilled`.
        prefilled: State after the prompts.
        rows: Number of answers.
        max_new_tokens: T.
        stop_ids: Tokens that end an answer.
        min_new_tokens: Stop tokens are not chosen before this many tokens.

    Returns:
        Ids `[rows, T]`, lengths `[rows]` and log-probabilities `[rows]`.
    """
    stops = jnp.asarray(stop_ids, jnp.int32)

    def unfinished(state: _LoopState) -> Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.ended)

    def append(state: _LoopState, logits: Array, cache: Any) -> _LoopState:
        log_probs = mix(logits)
        allowed = without_stops(log_probs, stop_ids, where=state.step < min_new_tokens)
        token_ids = choose(allowed, state.step)
        chosen = jnp.take_along_axis(log_probs, token_ids[:, None], axis=1)[:, 0]
        ended = state.ended | jnp.any(token_ids[:, None] == stops[None, :], axis=1)
        token_ids = jnp.where(ended, 0, token_ids)
        return _LoopState(
            step=state.step + 1,
            ended=ended,
            ids=lax.dynamic_update_slice(state.ids, token_ids[:, None], (0, state.step)),
            lengths=state.lengths + ~ended,
            log_probs=state.log_probs + jnp.where(state.ended, 0.0, chosen),
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
        log_probs=jnp.zeros(rows, jnp.float32),
        last=jnp.zeros(rows, jnp.int32),
        cache=None,
    )
    # The prompts already give the first token; the one chosen last is never read back.
    state = append(start, prefilled.logits, prefilled.cache)
    state = lax.while_loop(unfinished, advance_and_append, state)
    return GreedyResult(state.ids, state.lengths, state.log_probs)


def choose_best(log_probs: Array, step: Array) -> Array:
    """Returns the most likely token of each row `[rows, V]`, whatever the step."""
    del step
    return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)


def without_stops(log_probs: Array, stop_ids: tuple[int, ...], *, where: Array | bool) -> Array:
    """Sets the stop tokens of `[..., V]` to -inf if `where`, a scalar, is True.

    The others stay as they are: what is left does not sum to one.
    """
    banned = np.isin(np.arange(log_probs.shape[-1]), stop_ids)
    banned = banned.reshape((1,) * (log_probs.ndim - 1) + (-1,)) & jnp.asarray(where)
    return jnp.where(banned, -jnp.inf, log_probs)


def read_prompts(
    decoder: Decoder, params: Any, ids: Array, mask: Array, *, max_new_tokens: int
) -> Prefilled:
    """Reads prompts `[R, L]`, leaving room for an answer.

    Raises:
        ValueError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    # The last token is chosen, and never read.
    return decoder.prefill(params, ids, mask, cache_length=ids.shape[1] + max_new_tokens - 1)


class _LoopState(NamedTuple):
    step: Array  # [] int32
    ended: Array  # [R] bool
    ids: Array  # [R, T] int32
    lengths: Array  # [R] int32
    log_probs: Array  # [R] float32
    last: Array  # [R] int32, the token chosen last
    cache: Any


def _decode(
    decoder: Decoder,
    params: Any,
    prefilled: Prefilled,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    min_new_tokens: int,
) -> GreedyResult:
    return decode_loop(
        jax.nn.log_softmax,
        choose_best,
        functools.partial(decoder.decode_step, params),
        prefilled,
        rows=prefilled.logits.shape[0],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        min_new_tokens=min_new_tokens,
    )

"""Greedy decoding in batches: jitted, cached, of fixed shapes, stopping once every row has ended.

Shapes: B answers, K documents each, L prompt slots, T new tokens, Y target slots, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
from ragjax.models.inputs import LMBatch

# (log-probabilities [B, V], -inf where not allowed; step []) -> token ids [B] int32.
Choose = Callable[[Array, Array], Array]


class GreedyResult(NamedTuple):
    """One answer to each prompt, decoded greedily or sampled."""

    ids: Array  # [B, T] int32; 0 after the end
    lengths: Array  # [B] int32, tokens before the stop token (which is not part of the answer)
    log_probs: Array  # [B] float32 nats, of the generated tokens, a generated stop token included


class ScoredGeneration(NamedTuple):
    """The score of given targets and the generated answer, from one pass over the prompts."""

    token_log_probs: Array  # [B, Y] float32 nats, 0 where masked
    generated: GreedyResult


@functools.partial(jit_decoding, static_argnames=("decoder", "limits"))
def generate_greedy(
    decoder: Decoder, params: Any, prompts: Prompts, limits: Limits
) -> GreedyResult:
    """Appends the most likely token to each prompt until a stop token or the limit.

    Compiled once per shape, decoder and limits. Rows do not influence each other.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: One an answer, `[B, L]`.
        limits: Where answers end.

    Returns:
        Ids `[B, T]`, lengths `[B]` and log-probabilities `[B]`. The latter are the model's own,
        as `Decoder.score` returns them: they do not see that stop tokens were not allowed.

    Raises:
        ValueError: The prompts are those of documents.
    """
    return decode_loop(prefill_rows(decoder, params, prompts, limits), choose_best, limits)


@functools.partial(jit_decoding, static_argnames=("decoder", "limits"))
def generate_ensemble(
    decoder: Decoder, params: Any, prompts: Prompts, limits: Limits
) -> GreedyResult:
    """Generates one answer per question; each document's prompt votes on every token.

    Greedy decoding from the mixture p(y_t) = sum_k p_R(k) p_LM(y_t | c_k, x, y_<t). The weights
    p_R = softmax(doc_scores) stay as they are during the answer.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: One per document, `[B, K, L]`.
        limits: Where answers end.

    Returns:
        Ids `[B, T]`, lengths `[B]` and log-probabilities `[B]` under the mixture, which do not see
        that stop tokens were not allowed.

    Raises:
        ValueError: The shapes do not fit together.

    References:
        Shi et al., 2023, "REPLUG: Retrieval-Augmented Black-Box Language Models", section 3.2.
    """
    return decode_loop(prefill_documents(decoder, params, prompts, limits), choose_best, limits)


@functools.partial(jit_decoding, static_argnames=("decoder", "limits"))
def score_and_generate(
    decoder: Decoder, params: Any, batch: LMBatch, limits: Limits
) -> ScoredGeneration:
    """Reads each prompt once, then scores a given answer and generates one.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        batch: Prompts `[B, L]` (of a Fusion-in-Decoder `[B, K, L]`) and the given answers `[B, Y]`.
        limits: Where generated answers end.

    Returns:
        The log-probabilities of the given answers, and the generated ones.
    """
    prompts = Prompts(batch.context_ids, batch.context_mask)
    prefilled = prefill_rows(decoder, params, prompts, limits)
    return ScoredGeneration(
        decoder.score(params, prefilled.state, batch.target_ids, batch.target_mask),
        decode_loop(prefilled, choose_best, limits),
    )


def decode_loop(prompts: PrefilledPrompts, choose: Choose, limits: Limits) -> GreedyResult:
    """Alternates between choosing one token per answer and appending it.

    Args:
        prompts: State after the prompts.
        choose: Which of the tokens come next.
        limits: Where answers end.

    Returns:
        Ids `[B, T]`, lengths `[B]` and log-probabilities `[B]`.
    """

    def unfinished(state: _LoopState) -> Array:
        return (state.step < limits.max_new_tokens) & ~jnp.all(state.ended)

    def append(state: _LoopState, logits: Array, cache: Any) -> _LoopState:
        log_probs = prompts.mix(logits)
        allowed = limits.without_stops(log_probs, where=state.step < limits.min_new_tokens)
        token_ids = choose(allowed, state.step)
        chosen = jnp.take_along_axis(log_probs, token_ids[:, None], axis=1)[:, 0]
        ended = state.ended | limits.is_stop(token_ids)
        token_ids = jnp.where(ended, 0, token_ids)
        return _LoopState(
            step=state.step + 1,
            ended=ended,
            ids=lax.dynamic_update_slice(state.ids, token_ids[:, None], (0, state.step)),
            lengths=state.lengths + (~ended).astype(jnp.int32),
            log_probs=state.log_probs + jnp.where(state.ended, 0.0, chosen),
            last=token_ids,
            cache=cache,
        )

    def advance_and_append(state: _LoopState) -> _LoopState:
        following = prompts.advance(state.cache, state.last)
        return append(state, following.logits, following.cache)

    rows = prompts.answers
    start = _LoopState(
        step=jnp.zeros((), jnp.int32),
        ended=jnp.zeros(rows, bool),
        ids=jnp.zeros((rows, limits.max_new_tokens), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        log_probs=jnp.zeros(rows, jnp.float32),
        last=jnp.zeros(rows, jnp.int32),
        cache=None,
    )
    # The prompts already give the first token; the one chosen last is never read back.
    state = append(start, prompts.state.logits, prompts.state.cache)
    state = lax.while_loop(unfinished, advance_and_append, state)
    return GreedyResult(state.ids, state.lengths, state.log_probs)


def choose_best(log_probs: Array, step: Array) -> Array:
    """Returns the most likely token of each row `[B, V]`, whatever the step."""
    del step
    return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)


class _LoopState(NamedTuple):
    step: Array  # [] int32
    ended: Array  # [B] bool
    ids: Array  # [B, T] int32
    lengths: Array  # [B] int32
    log_probs: Array  # [B] float32
    last: Array  # [B] int32, the token chosen last
    cache: Any

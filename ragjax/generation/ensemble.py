"""Greedy decoding from a mixture over documents: p(y_t) = sum_k p_R(k) p_LM(y_t | c_k, x, y_<t).

Shapes: B questions, K documents each, L prompt slots, T new tokens, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder, Prefilled
from ragjax.generation.greedy import GreedyResult, choose_best, decode_loop, read_prompts


@functools.partial(
    jit_decoding, static_argnames=("decoder", "max_new_tokens", "stop_ids", "min_new_tokens")
)
def generate_ensemble(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    doc_scores: Array,
    *,
    doc_mask: Array | None = None,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    min_new_tokens: int = 0,
) -> GreedyResult:
    """Generates one answer per question; each document's prompt votes on every token.

    The weights p_R = softmax(doc_scores) stay as they are during the answer.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[B, K, L]` int32, left-padded prompts, one per document.
        context_mask: `[B, K, L]` bool, True = real token.
        doc_scores: `[B, K]` float, logits of p_R.
        doc_mask: `[B, K]` bool, True = there is a document; None: all there. Without any
            document, all K prompts count the same.
        max_new_tokens: T, at least 1.
        stop_ids: Tokens that end an answer.
        min_new_tokens: Stop tokens are not chosen before this many tokens.

    Returns:
        Ids `[B, T]`, lengths `[B]` and log-probabilities `[B]` under the mixture, which do not see
        that stop tokens were not allowed.

    Raises:
        ValueError: The shapes do not fit together, or `max_new_tokens` is below 1.

    References:
        Shi et al., 2023, "REPLUG: Retrieval-Augmented Black-Box Language Models", section 3.2.
    """
    mixture = read_mixture(
        decoder,
        params,
        context_ids,
        context_mask,
        doc_scores,
        doc_mask=doc_mask,
        max_new_tokens=max_new_tokens,
    )
    return decode_loop(
        mixture.mix,
        choose_best,
        mixture.advance,
        mixture.prefilled,
        rows=context_ids.shape[0],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        min_new_tokens=min_new_tokens,
    )


class Mixture(NamedTuple):
    """Prompts that have been read, and how the documents of a question vote."""

    prefilled: Prefilled  # of B * K rows
    mix: Callable[[Array], Array]  # logits [B * K, V] -> log-probabilities [B, V]
    advance: Callable[[Any, Array], Prefilled]  # (cache, token ids [B]) -> the next state


def read_mixture(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    doc_scores: Array,
    *,
    doc_mask: Array | None,
    max_new_tokens: int,
) -> Mixture:
    """Reads the prompts of all documents; the arguments are those of `generate_ensemble`.

    Returns:
        What `ragjax.generation.greedy.decode_loop` needs.

    Raises:
        ValueError: The shapes do not fit together, or `max_new_tokens` is below 1.
    """
    if context_ids.ndim != 3 or context_ids.shape[:2] != doc_scores.shape:
        raise ValueError(
            "context_ids [B, K, L] and doc_scores [B, K] are needed, got "
            f"{context_ids.shape} and {doc_scores.shape}"
        )
    questions, docs, length = context_ids.shape
    log_weights = doc_log_weights(doc_scores, doc_mask=doc_mask)
    prefilled = read_prompts(
        decoder,
        params,
        context_ids.reshape(-1, length),
        context_mask.reshape(-1, length),
        max_new_tokens=max_new_tokens,
    )

    def mix(logits: Array) -> Array:
        return mix_log_probs(logits.reshape(questions, docs, -1), log_weights)

    def advance(cache: Any, token_ids: Array) -> Prefilled:
        return decoder.decode_step(params, cache, jnp.repeat(token_ids, docs))

    return Mixture(prefilled, mix, advance)


def doc_log_weights(doc_scores: Array, *, doc_mask: Array | None = None) -> Array:
    """Returns log p_R, the log-softmax of the scores over the documents that are there.

    Args:
        doc_scores: `[B, K]` float.
        doc_mask: `[B, K]` bool, True = there is a document; None: all there.

    Returns:
        `[B, K]` float32 in nats, -inf where masked; uniform in a row without any document.
    """
    scores = doc_scores.astype(jnp.float32)
    if doc_mask is not None:
        none = ~jnp.any(doc_mask, axis=1, keepdims=True)
        scores = jnp.where(none, 0.0, jnp.where(doc_mask, scores, -jnp.inf))
    return jax.nn.log_softmax(scores, axis=1)


def mix_log_probs(logits: Array, log_weights: Array) -> Array:
    """Averages next-token distributions over documents: log sum_k p_R(k) p_LM(v | k).

    Args:
        logits: `[B, K, V]` float32.
        log_weights: `[B, K]` float32, log p_R.

    Returns:
        `[B, V]` float32 log-probabilities.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return jax.nn.logsumexp(log_probs + log_weights[:, :, None], axis=1)

"""Greedy decoding from a mixture over documents: p(y_t) = sum_k p_R(k) p_LM(y_t | c_k, x, y_<t).

Shapes: B questions, K documents each, L prompt slots, T new tokens, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ragjax.generation.decoder import Decoder, Prefilled
from ragjax.generation.greedy import GreedyResult, decode_loop


@functools.partial(
    jax.jit, static_argnames=("decoder", "max_new_tokens", "stop_ids", "min_new_tokens")
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
        Ids `[B, T]` and lengths `[B]`.

    Raises:
        ValueError: The shapes do not fit together, or `max_new_tokens` is below 1.

    References:
        Shi et al., 2023, "REPLUG: Retrieval-Augmented Black-Box Language Models", section 3.2.
    """
    if context_ids.ndim != 3 or context_ids.shape[:2] != doc_scores.shape:
        raise ValueError(
            "context_ids [B, K, L] and doc_scores [B, K] are needed, got "
            f"{context_ids.shape} and {doc_scores.shape}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    questions, docs, length = context_ids.shape
    log_weights = doc_log_weights(doc_scores, doc_mask=doc_mask)
    prefilled = decoder.prefill(
        params,
        context_ids.reshape(-1, length),
        context_mask.reshape(-1, length),
        cache_length=length + max_new_tokens - 1,
    )

    def choose(logits: Array) -> Array:
        mixed = mix_log_probs(logits.reshape(questions, docs, -1), log_weights)
        return jnp.argmax(mixed, axis=-1).astype(jnp.int32)

    def advance(cache: Any, token_ids: Array) -> Prefilled:
        return decoder.decode_step(params, cache, jnp.repeat(token_ids, docs))

    return decode_loop(
        choose,
        advance,
        prefilled,
        rows=questions,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        min_new_tokens=min_new_tokens,
    )


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

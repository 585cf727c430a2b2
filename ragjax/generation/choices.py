"""Multiple choice: how likely each given answer is, and four ways to compare answers.

    scored = score_choices(decoder, params, context_ids, context_mask, choice_ids, choice_mask, ...)
    best = per_byte(scored.log_probs, num_bytes).argmax(axis=1)

Shapes: B questions, K documents each, L prompt slots, C choices, T choice slots.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ragjax.generation.decoder import Decoder
from ragjax.generation.ensemble import doc_log_weights
from ragjax.generation.rescore import score_answers


class ChoiceScores(NamedTuple):
    """Log-probabilities of the choices, with and without the documents summed out."""

    log_probs: Array  # [B, C] float32 nats, log sum_k p_R(k) p_LM(y|c_k,x); 0 for an empty choice
    doc_log_probs: Array  # [B, C, K] float32 nats, log p_LM(y|c_k,x); -inf for a masked document
    doc_log_weights: Array  # [B, K] float32 nats, log p_R; -inf for a masked document


@functools.partial(jax.jit, static_argnames=("decoder",))
def score_choices(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    choice_ids: Array,
    choice_mask: Array,
    *,
    doc_scores: Array | None = None,
    doc_mask: Array | None = None,
) -> ChoiceScores:
    """Scores every choice after every document's prompt; each prompt is read once.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[B, K, L]` int32, left-padded prompts; K = 1 for one prompt a question.
        context_mask: `[B, K, L]` bool, True = real token.
        choice_ids: `[B, C, T]` int32, right-padded, with the special tokens of the model's text
            format.
        choice_mask: `[B, C, T]` bool, True = token counts.
        doc_scores: `[B, K]` float, logits of p_R; None: all documents count the same.
        doc_mask: `[B, K]` bool, True = there is a document; None: all there. Without any
            document, all K prompts count the same.

    Returns:
        Log-probabilities of the choices.

    Raises:
        ValueError: The shapes do not fit together.
    """
    if context_ids.ndim != 3 or choice_ids.ndim != 3 or choice_ids.shape[0] != context_ids.shape[0]:
        raise ValueError(
            "context_ids [B, K, L] and choice_ids [B, C, T] are needed, got "
            f"{context_ids.shape} and {choice_ids.shape}"
        )
    questions, docs, length = context_ids.shape
    if doc_scores is None:
        doc_scores = jnp.zeros((questions, docs), jnp.float32)
    log_weights = doc_log_weights(doc_scores, doc_mask=doc_mask)
    flat = (array.reshape(-1, length) for array in (context_ids, context_mask))
    prefilled = decoder.prefill(params, *flat, cache_length=length)
    repeated = (jnp.repeat(array, docs, axis=0) for array in (choice_ids, choice_mask))
    scores = score_answers(decoder, params, prefilled, *repeated).sum(axis=-1)
    scores = scores.reshape(questions, docs, -1).swapaxes(1, 2)
    scores = jnp.where(log_weights[:, None, :] > -jnp.inf, scores, -jnp.inf)
    marginal = jax.nn.logsumexp(log_weights[:, None, :] + scores, axis=-1)
    return ChoiceScores(marginal, scores, log_weights)


def total(log_probs: Array) -> Array:
    """Compares choices by their log-probability: right where each would be the whole answer.

    Args:
        log_probs: `[..., C]` float, nats.

    Returns:
        `[..., C]` float, nats.
    """
    return log_probs


def per_token(log_probs: Array, num_tokens: Array) -> Array:
    """Divides by the number of tokens: long choices are not at a disadvantage.

    Args:
        log_probs: `[..., C]` float, nats.
        num_tokens: `[..., C]` int; a choice without tokens scores -inf.

    Returns:
        `[..., C]` float, nats per token.

    References:
        Brown et al., 2020, "Language Models are Few-Shot Learners", section 2.4.
    """
    return jnp.where(num_tokens > 0, log_probs / jnp.maximum(num_tokens, 1), -jnp.inf)


def per_byte(log_probs: Array, num_bytes: Array) -> Array:
    """Divides by the length of the text, which no tokenizer decides.

    Args:
        log_probs: `[..., C]` float, nats.
        num_bytes: `[..., C]` int, UTF-8 bytes (or characters) of each choice; a choice without
            any scores -inf.

    Returns:
        `[..., C]` float, nats per byte.

    References:
        Gao et al., 2021, "A framework for few-shot language model evaluation" (acc_norm).
    """
    return per_token(log_probs, num_bytes)


def over_unconditional(log_probs: Array, unconditional_log_probs: Array) -> Array:
    """Takes off how likely a choice is anyway: log p(y|x) - log p(y|"Answer:").

    Args:
        log_probs: `[..., C]` float, nats.
        unconditional_log_probs: `[..., C]` float, nats, after a prompt that asks nothing:
            `score_choices` with it in place of the contexts.

    Returns:
        `[..., C]` float, nats: the pointwise mutual information of choice and question.

    References:
        Holtzman et al., 2021, "Surface Form Competition: Why the Highest Probability Answer Isn't
        Always Right", section 3.
    """
    return log_probs - unconditional_log_probs

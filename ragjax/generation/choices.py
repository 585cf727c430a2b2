"""Scoring given answers: many under prompts read once, and multiple choice with its comparisons.

    scored = score_choices(decoder, params, prompts, choice_ids, choice_mask)
    best = per_byte(scored.log_probs, num_bytes).argmax(axis=1)

Shapes: B questions, K documents each, L prompt slots, C choices, R rows, H answers each, T slots of
an answer or choice.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ragjax.generation.decoder import Decoder, Prefilled
from ragjax.generation.prompts import Limits, Prompts, prefill_rows, split_documents


class ChoiceScores(NamedTuple):
    """Log-probabilities of the choices, with and without the documents summed out."""

    log_probs: Array  # [B, C] float32 nats, log sum_k p_R(k) p_LM(y|c_k,x); 0 for an empty choice
    doc_log_probs: Array  # [B, C, K] float32 nats, log p_LM(y|c_k,x); -inf for a masked document
    doc_log_weights: Array  # [B, K] float32 nats, log p_R; -inf for a masked document


@functools.partial(jax.jit, static_argnames=("decoder",))
def score_choices(
    decoder: Decoder, params: Any, prompts: Prompts, choice_ids: Array, choice_mask: Array
) -> ChoiceScores:
    """Scores every choice after every document's prompt; each prompt is read once.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: One per document, `[B, K, L]`; K = 1 for one prompt a question.
        choice_ids: `[B, C, T]` int32, right-padded, with the special tokens of the model's text
            format.
        choice_mask: `[B, C, T]` bool, True = token counts.

    Returns:
        Log-probabilities of the choices.

    Raises:
        ValueError: The shapes do not fit together.
    """
    if choice_ids.ndim != 3 or choice_ids.shape[0] != prompts.ids.shape[0]:
        raise ValueError(
            "prompts [B, K, L] and choice_ids [B, C, T] are needed, got "
            f"{prompts.ids.shape} and {choice_ids.shape}"
        )
    nothing_new = Limits(max_new_tokens=1, stop_ids=())
    rows, log_weights = split_documents(prompts)
    prefilled = prefill_rows(decoder, params, rows, nothing_new)
    docs = log_weights.shape[1]
    repeated = (jnp.repeat(array, docs, axis=0) for array in (choice_ids, choice_mask))
    scores = score_answers(decoder, params, prefilled.state, *repeated).sum(axis=-1)
    scores = scores.reshape(-1, docs, scores.shape[-1]).swapaxes(1, 2)
    scores = jnp.where(log_weights[:, None, :] > -jnp.inf, scores, -jnp.inf)
    marginal = jax.nn.logsumexp(log_weights[:, None, :] + scores, axis=-1)
    return ChoiceScores(marginal, scores, log_weights)


def score_answers(
    decoder: Decoder,
    params: Any,
    prefilled: Prefilled,
    target_ids: Array,
    target_mask: Array,
    *,
    count: int | Array | None = None,
) -> Array:
    """Scores several answers to each prompt, one at a time: no prompt is copied.

    Args:
        decoder: The language model's functions.
        params: Its parameters.
        prefilled: R prompts that have been read; not changed.
        target_ids: `[R, H, T]` int32, right-padded.
        target_mask: `[R, H, T]` bool, True = token counts.
        count: Only the first this many of the H answers are scored; None: all.

    Returns:
        `[R, H, T]` float32 log-probabilities in nats, 0 where masked or not scored.
    """
    rows, answers, slots = target_ids.shape

    def score(index: Array | int, scores: Array) -> Array:
        ids, mask = (
            lax.dynamic_index_in_dim(array, index, axis=1, keepdims=False)
            for array in (target_ids, target_mask)
        )
        new = decoder.score(params, prefilled, ids, mask)
        return lax.dynamic_update_index_in_dim(scores, new, index, axis=1)

    start = jnp.zeros((rows, answers, slots), jnp.float32)
    return lax.fori_loop(0, answers if count is None else count, score, start)


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
    log_probs, count = jnp.asarray(log_probs), jnp.asarray(num_tokens)
    divisor = jnp.maximum(count, 1).astype(log_probs.dtype)
    return jnp.where(count > 0, log_probs / divisor, -jnp.inf)


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

"""RAG-Sequence decoding: answers found under each document, ordered by their marginal likelihood.

The prompts that generate are the ones that score, read once. Shapes: B questions, K documents
each, L prompt slots, T new tokens; H = K * beams hypotheses a question.

References:
    Lewis et al., 2020, "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks", section
    2.5 (RAG-Sequence: thorough and fast decoding).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ragjax.generation.beam import Hypotheses, beam_search, strip_stops
from ragjax.generation.choices import score_answers
from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder
from ragjax.generation.prompts import (
    Limits,
    PrefilledPrompts,
    Prompts,
    prefill_rows,
    split_documents,
)


class RagSequenceResult(NamedTuple):
    """The distinct answers to each question, best first.

    Those of rank `counts` and above are fillers: length 0 and -inf. The posterior of the documents
    given an answer is softmax_k(doc_log_weights + doc_log_probs).
    """

    ids: Array  # [B, H, T] int32; 0 after the end
    lengths: Array  # [B, H] int32, tokens before the stop token
    log_probs: Array  # [B, H] float32 nats, log sum_k p_R(k) p_LM(y|c_k,x), stop token included
    doc_log_probs: Array  # [B, H, K] float32 nats, log p_LM(y|c_k,x); -inf where not counted
    doc_log_weights: Array  # [B, K] float32 nats, log p_R; -inf for a masked document
    counts: Array  # [B] int32, distinct answers


@functools.partial(jit_decoding, static_argnames=("decoder", "limits", "beams"))
def generate_rag_sequence_thorough(
    decoder: Decoder,
    params: Any,
    prompts: Prompts,
    limits: Limits,
    *,
    beams: int,
    length_penalty: float | Array = 1.0,
) -> RagSequenceResult:
    """Searches under each document, then scores every answer under every document.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: One per document, `[B, K, L]`. A masked document neither proposes nor scores.
        limits: Where answers end. Sequences that end by different stop tokens are different.
        beams: Hypotheses a document, at least 1.
        length_penalty: Of the search, as in `generate_beam`; marginal likelihoods have none.

    Returns:
        At most H answers a question by marginal log-likelihood.

    Raises:
        ValueError: The shapes do not fit together, or `beams` is below 1.
    """
    rows, log_weights = split_documents(prompts)
    prefilled = prefill_rows(decoder, params, rows, limits)
    found = beam_search(prefilled, limits, beams=beams, length_penalty=length_penalty)
    proposed = _by_question(found, log_weights)
    return _rank(proposed, _score_thoroughly(prefilled, proposed), limits)


@functools.partial(jit_decoding, static_argnames=("decoder", "limits", "beams"))
def generate_rag_sequence_fast(
    decoder: Decoder,
    params: Any,
    prompts: Prompts,
    limits: Limits,
    *,
    beams: int,
    length_penalty: float | Array = 1.0,
) -> RagSequenceResult:
    """Searches under each document; an answer counts only for documents that proposed it.

    Nothing is scored again: p_LM(y|c_k,x) is taken as 0 where the search under c_k did not end
    with y, so no log-likelihood is above that of `generate_rag_sequence_thorough`.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: As in `generate_rag_sequence_thorough`, like the other arguments.
        limits: Where answers end.
        beams: Hypotheses a document.
        length_penalty: Of the search.

    Returns:
        At most H answers a question by that lower bound of their marginal log-likelihood.

    Raises:
        ValueError: The shapes do not fit together, or `beams` is below 1.
    """
    rows, log_weights = split_documents(prompts)
    prefilled = prefill_rows(decoder, params, rows, limits)
    found = beam_search(prefilled, limits, beams=beams, length_penalty=length_penalty)
    proposed = _by_question(found, log_weights)
    # [B, H, K, beams]: the same sequence, found under document k.
    docs = log_weights.shape[1]
    same = proposed.same.reshape(*proposed.same.shape[:2], docs, beams)
    under = proposed.found.log_probs.reshape(-1, 1, docs, beams)
    return _rank(proposed, jnp.max(jnp.where(same, under, -jnp.inf), axis=-1), limits)


class _Proposed(NamedTuple):
    found: Hypotheses  # leaves [B, H, ...], document by document
    same: Array  # [B, H, H] bool, True = the same sequence, and the second one counts
    distinct: Array  # [B, H] bool, True = the first of its kind
    log_weights: Array  # [B, K] float32


def _by_question(found: Hypotheses, log_weights: Array) -> _Proposed:
    """Gathers what the search found under the documents of each question."""
    questions, docs = log_weights.shape
    found = jax.tree.map(lambda leaf: leaf.reshape(questions, -1, *leaf.shape[2:]), found)
    beams = found.sizes.shape[1] // docs
    counts = (found.sizes > 0) & jnp.repeat(log_weights > -jnp.inf, beams, axis=1)
    same = jnp.all(found.ids[:, :, None] == found.ids[:, None], axis=-1)
    same &= (found.sizes[:, :, None] == found.sizes[:, None]) & counts[:, None, :]
    first = jnp.argmax(same, axis=-1) == jnp.arange(same.shape[1])[None]
    return _Proposed(found, same, counts & first, log_weights)


def _score_thoroughly(prompts: PrefilledPrompts, proposed: _Proposed) -> Array:
    """Returns log p_LM(y_h|c_k,x) `[B, H, K]` of the distinct sequences."""
    found, distinct = proposed.found, proposed.distinct
    docs, logits = proposed.log_weights.shape[1], prompts.state.logits
    # The distinct ones come first, so that the others cost nothing.
    order = jnp.argsort(~distinct, axis=1, stable=True)
    ids = jnp.take_along_axis(found.ids, order[:, :, None], axis=1)
    sizes = jnp.take_along_axis(found.sizes, order, axis=1)
    mask = jnp.arange(ids.shape[-1])[None, None] < sizes[:, :, None]
    ids, mask = (jnp.repeat(array, docs, axis=0) for array in (ids, mask))  # [B * K, H, T]
    count = jnp.max(jnp.sum(distinct, axis=1))
    scores = score_answers(prompts.decoder, prompts.params, prompts.state, ids, mask, count=count)
    # The prompt's own logits know of a forced first token, which is certain.
    first = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., 0], axis=1)
    scored = jnp.where(mask[..., 0], first, 0.0) + jnp.sum(scores[..., 1:], axis=-1)
    scored = scored.reshape(-1, docs, scored.shape[-1]).swapaxes(1, 2)
    return jnp.take_along_axis(scored, jnp.argsort(order, axis=1)[:, :, None], axis=1)


def _rank(proposed: _Proposed, doc_log_probs: Array, limits: Limits) -> RagSequenceResult:
    """Sums out the documents and sorts the distinct sequences."""
    log_weights, distinct = proposed.log_weights, proposed.distinct
    counted = distinct[:, :, None] & (log_weights > -jnp.inf)[:, None, :]
    doc_log_probs = jnp.where(counted, doc_log_probs, -jnp.inf)
    log_probs = jax.nn.logsumexp(log_weights[:, None, :] + doc_log_probs, axis=-1)
    order = jnp.argsort(-log_probs, axis=1, stable=True)
    kept = proposed.found._replace(
        ids=jnp.where(distinct[:, :, None], proposed.found.ids, 0),
        sizes=jnp.where(distinct, proposed.found.sizes, 0),
        log_probs=log_probs,
    )
    ranked = strip_stops(
        jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, _like(order, leaf), axis=1), kept),
        limits,
    )
    return RagSequenceResult(
        ranked.ids,
        ranked.lengths,
        ranked.log_probs,
        jnp.take_along_axis(doc_log_probs, order[:, :, None], axis=1),
        log_weights,
        jnp.sum(distinct, axis=1, dtype=jnp.int32),
    )


def _like(order: Array, leaf: Array) -> Array:
    return order.reshape(*order.shape, *(1,) * (leaf.ndim - 2))

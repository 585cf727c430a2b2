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

from ragjax.generation.beam import Hypotheses, search_prompts, strip_stops
from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder, Prefilled
from ragjax.generation.ensemble import doc_log_weights
from ragjax.generation.greedy import read_prompts
from ragjax.generation.rescore import score_answers


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


@functools.partial(
    jit_decoding,
    static_argnames=("decoder", "beams", "max_new_tokens", "stop_ids", "min_new_tokens"),
)
def generate_rag_sequence_thorough(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    doc_scores: Array,
    *,
    doc_mask: Array | None = None,
    beams: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    length_penalty: float = 1.0,
    min_new_tokens: int = 0,
) -> RagSequenceResult:
    """Searches under each document, then scores every answer under every document.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[B, K, L]` int32, left-padded prompts, one per document.
        context_mask: `[B, K, L]` bool, True = real token.
        doc_scores: `[B, K]` float, logits of p_R.
        doc_mask: `[B, K]` bool, True = there is a document; None: all there. A masked document
            neither proposes nor scores. Without any document, all K prompts count the same.
        beams: Hypotheses a document, at least 1.
        max_new_tokens: T, at least 1.
        stop_ids: Tokens that end an answer. Sequences that end by different ones are different.
        length_penalty: Of the search, as in `generate_beam`; marginal likelihoods have none.
        min_new_tokens: Stop tokens are not chosen before this many tokens.

    Returns:
        At most H answers a question by marginal log-likelihood.

    Raises:
        ValueError: The shapes do not fit together, or `beams` or `max_new_tokens` is below 1.
    """
    proposed = _propose(
        decoder, params, context_ids, context_mask, doc_scores, doc_mask, beams=beams,
        max_new_tokens=max_new_tokens, stop_ids=stop_ids, length_penalty=length_penalty,
        min_new_tokens=min_new_tokens,
    )  # fmt: skip
    return _rank(proposed, _score_thoroughly(decoder, params, proposed), stop_ids)


@functools.partial(
    jit_decoding,
    static_argnames=("decoder", "beams", "max_new_tokens", "stop_ids", "min_new_tokens"),
)
def generate_rag_sequence_fast(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    doc_scores: Array,
    *,
    doc_mask: Array | None = None,
    beams: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    length_penalty: float = 1.0,
    min_new_tokens: int = 0,
) -> RagSequenceResult:
    """Searches under each document; an answer counts only for documents that proposed it.

    Nothing is scored again: p_LM(y|c_k,x) is taken as 0 where the search under c_k did not end
    with y, so no log-likelihood is above that of `generate_rag_sequence_thorough`.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[B, K, L]` int32, left-padded prompts, one per document.
        context_mask: `[B, K, L]` bool, True = real token.
        doc_scores: `[B, K]` float, logits of p_R.
        doc_mask: As in `generate_rag_sequence_thorough`, like all other options.
        beams: Hypotheses a document.
        max_new_tokens: T.
        stop_ids: Tokens that end an answer.
        length_penalty: Of the search.
        min_new_tokens: Stop tokens are not chosen before this many tokens.

    Returns:
        At most H answers a question by that lower bound of their marginal log-likelihood.

    Raises:
        ValueError: The shapes do not fit together, or `beams` or `max_new_tokens` is below 1.
    """
    proposed = _propose(
        decoder, params, context_ids, context_mask, doc_scores, doc_mask, beams=beams,
        max_new_tokens=max_new_tokens, stop_ids=stop_ids, length_penalty=length_penalty,
        min_new_tokens=min_new_tokens,
    )  # fmt: skip
    docs = context_ids.shape[1]
    found = proposed.found
    # [B, H, K, beams]: the same sequence, found under document k.
    same = proposed.same.reshape(*proposed.same.shape[:2], docs, beams)
    under = found.log_probs.reshape(-1, 1, docs, beams)
    return _rank(proposed, jnp.max(jnp.where(same, under, -jnp.inf), axis=-1), stop_ids)


class _Proposed(NamedTuple):
    prefilled: Prefilled  # B * K rows
    found: Hypotheses  # leaves [B, H, ...], document by document
    same: Array  # [B, H, H] bool, True = the same sequence, and the second one counts
    distinct: Array  # [B, H] bool, True = the first of its kind
    log_weights: Array  # [B, K] float32


def _propose(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    doc_scores: Array,
    doc_mask: Array | None,
    *,
    max_new_tokens: int,
    **options: Any,
) -> _Proposed:
    if context_ids.ndim != 3 or context_ids.shape[:2] != doc_scores.shape:
        raise ValueError(
            "context_ids [B, K, L] and doc_scores [B, K] are needed, got "
            f"{context_ids.shape} and {doc_scores.shape}"
        )
    questions, docs, length = context_ids.shape
    log_weights = doc_log_weights(doc_scores, doc_mask=doc_mask)
    flat = (array.reshape(-1, length) for array in (context_ids, context_mask))
    prefilled = read_prompts(decoder, params, *flat, max_new_tokens=max_new_tokens)
    found = search_prompts(
        decoder,
        params,
        prefilled,
        prompt_slots=length,
        rows=questions * docs,
        max_new_tokens=max_new_tokens,
        **options,
    )
    found = jax.tree.map(lambda leaf: leaf.reshape(questions, -1, *leaf.shape[2:]), found)
    beams = found.sizes.shape[1] // docs
    counts = (found.sizes > 0) & jnp.repeat(log_weights > -jnp.inf, beams, axis=1)
    same = jnp.all(found.ids[:, :, None] == found.ids[:, None], axis=-1)
    same &= (found.sizes[:, :, None] == found.sizes[:, None]) & counts[:, None, :]
    first = jnp.argmax(same, axis=-1) == jnp.arange(same.shape[1])[None]
    return _Proposed(prefilled, found, same, counts & first, log_weights)


def _score_thoroughly(decoder: Decoder, params: Any, proposed: _Proposed) -> Array:
    """Returns log p_LM(y_h|c_k,x) `[B, H, K]` of the distinct sequences."""
    found, distinct = proposed.found, proposed.distinct
    docs = proposed.log_weights.shape[1]
    # The distinct ones come first, so that the others cost nothing.
    order = jnp.argsort(~distinct, axis=1, stable=True)
    ids = jnp.take_along_axis(found.ids, order[:, :, None], axis=1)
    sizes = jnp.take_along_axis(found.sizes, order, axis=1)
    mask = jnp.arange(ids.shape[-1])[None, None] < sizes[:, :, None]
    ids, mask = (jnp.repeat(array, docs, axis=0) for array in (ids, mask))  # [B * K, H, T]
    count = jnp.max(jnp.sum(distinct, axis=1))
    scores = score_answers(decoder, params, proposed.prefilled, ids, mask, count=count)
    # The prompt's own logits know of a forced first token, which is certain.
    first = jnp.take_along_axis(jax.nn.log_softmax(proposed.prefilled.logits), ids[..., 0], axis=1)
    scored = jnp.where(mask[..., 0], first, 0.0) + jnp.sum(scores[..., 1:], axis=-1)
    scored = scored.reshape(-1, docs, scored.shape[-1]).swapaxes(1, 2)
    return jnp.take_along_axis(scored, jnp.argsort(order, axis=1)[:, :, None], axis=1)


def _rank(
    proposed: _Proposed, doc_log_probs: Array, stop_ids: tuple[int, ...]
) -> RagSequenceResult:
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
        stop_ids,
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

"""Beam search over the mixture p(y_t) = sum_k p_R(k) p_LM(y_t | c_k, x, y_<t) (RAG-Token).

Shapes: B questions, K documents each, L prompt slots, T new tokens, V vocabulary.
"""

import functools
from typing import Any

import jax
from jax import Array

from ragjax.generation.beam import (
    BeamResult,
    beam_search,
    beam_steps,
    repeat_prompts,
    strip_stops,
)
from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder
from ragjax.generation.ensemble import doc_log_weights, mix_log_probs, read_mixture


@functools.partial(
    jit_decoding,
    static_argnames=("decoder", "beams", "max_new_tokens", "stop_ids", "min_new_tokens"),
)
def generate_rag_token(
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
) -> BeamResult:
    """Searches for the most likely answers under the mixture over documents.

    With one beam it gives what `generate_ensemble` gives.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[B, K, L]` int32, left-padded prompts, one per document.
        context_mask: `[B, K, L]` bool, True = real token.
        doc_scores: `[B, K]` float, logits of p_R.
        doc_mask: `[B, K]` bool, True = there is a document; None: all there. Without any
            document, all K prompts count the same.
        beams: Hypotheses a question, at least 1.
        max_new_tokens: T, at least 1.
        stop_ids: Tokens that end an answer.
        length_penalty: As in `generate_beam`.
        min_new_tokens: Stop tokens are not chosen before this many tokens.

    Returns:
        The best `beams` answers to each question; log-probabilities are those of the mixture.

    Raises:
        ValueError: The shapes do not fit together, or `beams` or `max_new_tokens` is below 1.

    References:
        Lewis et al., 2020, "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks",
        section 2.5 (RAG-Token).
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
    questions, docs, slots = context_ids.shape
    log_weights = doc_log_weights(doc_scores, doc_mask=doc_mask)

    def mix(logits: Array) -> Array:
        by_beam = logits.reshape(questions, docs, beams, -1)
        return jax.vmap(mix_log_probs, in_axes=(2, None), out_axes=1)(by_beam, log_weights)

    found = beam_search(
        beam_steps(decoder, params, mix, docs=docs, prompt_slots=slots),
        repeat_prompts(decoder, mixture.prefilled, beams),
        rows=questions,
        beams=beams,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        length_penalty=length_penalty,
        min_new_tokens=min_new_tokens,
    )
    return strip_stops(found, stop_ids)

"""Prompts and limits, which every decoding function takes, and prompts that were prefilled.

Shapes: B answers, K documents each (1 for a single prompt), L prompt slots, V vocabulary.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ragjax.generation.decoder import Decoder, Prefilled


class Prompts(NamedTuple):
    """Left-padded prompts: one an answer, or one for each document of a question.

    Attributes:
        ids: `[B, L]` int32; `[B, K, L]` with one prompt per document.
        mask: `[B, L]` or `[B, K, L]` bool, True = real token.
        doc_scores: `[B, K]` float, logits of p_R; None: all documents count the same.
        doc_mask: `[B, K]` bool, True = there is a document; None: all there. In a row without any
            document, all K prompts count the same.
    """

    ids: Array
    mask: Array
    doc_scores: Array | None = None
    doc_mask: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where an answer ends; hashable, as functions are compiled for it.

    Attributes:
        max_new_tokens: T, the most tokens of an answer, at least 1.
        stop_ids: Tokens that end an answer: end of text, and any token with a line break where
            answers are one line.
        min_new_tokens: Stop tokens are not chosen before this many tokens. 1 keeps a model that
            begins its answer on a new line from answering nothing.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    min_new_tokens: int = 0

    def __post_init__(self):
        """Raises ValueError if no token may be generated."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    def cache_length(self, slots: int) -> int:
        """Returns the slots of a cache for prompts of so many and their answers."""
        return slots + self.max_new_tokens - 1  # the last token is chosen, and never read

    def is_stop(self, token_ids: Array) -> Array:
        """Returns True for each stop token, in the shape of the ids."""
        return jnp.isin(token_ids, jnp.asarray(self.stop_ids, jnp.int32))

    def without_stops(self, log_probs: Array, *, where: Array | bool) -> Array:
        """Sets the stop tokens of `[..., V]` to -inf if `where`, a scalar, is True.

        The others stay as they are: what is left does not sum to one.
        """
        banned = np.isin(np.arange(log_probs.shape[-1]), self.stop_ids)
        banned = banned.reshape((1,) * (log_probs.ndim - 1) + (-1,)) & jnp.asarray(where)
        return jnp.where(banned, -jnp.inf, log_probs)


@dataclass(frozen=True, kw_only=True)
class PrefilledPrompts:
    """Prompts in the cache of a decoder, and how the documents of a question are mixed.

    Attributes:
        decoder: The language model's functions.
        params: Its parameters.
        state: Logits and cache of B * K rows.
        slots: L.
        log_weights: `[B, K]` float32, log p_R; None: one prompt an answer.
    """

    decoder: Decoder
    params: Any
    state: Prefilled
    slots: int
    log_weights: Array | None = None

    @property
    def docs(self) -> int:
        """K, the documents an answer."""
        return 1 if self.log_weights is None else self.log_weights.shape[1]

    @property
    def answers(self) -> int:
        """B, the number of answers."""
        return self.state.logits.shape[0] // self.docs

    def mix(self, logits: Array, *beams: int) -> Array:
        """Returns log-probabilities `[B, *beams, V]` from the decoder's logits, beams fastest."""
        if self.log_weights is None:
            return jax.nn.log_softmax(logits).reshape(self.answers, *beams, -1)
        by_doc = logits.reshape(*self.log_weights.shape, *beams, -1)
        mix = jax.vmap(mix_log_probs, (2, None), 1) if beams else mix_log_probs
        return mix(by_doc, self.log_weights)

    def advance(self, cache: Any, token_ids: Array) -> Prefilled:
        """Appends a token to each answer `[B, *beams]`, under all its documents."""
        rows = jnp.repeat(token_ids, self.docs, axis=0).reshape(-1)
        return self.decoder.decode_step(self.params, cache, rows)


def prefill_rows(
    decoder: Decoder, params: Any, prompts: Prompts, limits: Limits
) -> PrefilledPrompts:
    """Reads one prompt an answer, leaving room for the answers.

    Raises:
        ValueError: The prompts have document scores or a document mask.
    """
    if prompts.doc_scores is not None or prompts.doc_mask is not None:
        raise ValueError(
            "doc_scores and doc_mask must be None for one prompt an answer, got them with ids "
            f"{prompts.ids.shape}; generate_ensemble and generate_rag_* take documents"
        )
    slots = prompts.ids.shape[1]
    length = limits.cache_length(slots)
    state = decoder.prefill(params, prompts.ids, prompts.mask, cache_length=length)
    return PrefilledPrompts(decoder=decoder, params=params, state=state, slots=slots)


class _State(NamedTuple):
    """A `Prefilled` made of its parts."""

    logits: Array
    cache: Any


def repeat_rows(prefilled: PrefilledPrompts, times: int) -> PrefilledPrompts:
    """Copies each prompt that was read, one an answer, the copies side by side."""
    if times == 1:
        return prefilled
    state = prefilled.state
    logits = jnp.repeat(state.logits, times, axis=0)
    cache = prefilled.decoder.repeat(state.cache, times)
    return dataclasses.replace(prefilled, state=_State(logits, cache))


def prefill_documents(
    decoder: Decoder, params: Any, prompts: Prompts, limits: Limits
) -> PrefilledPrompts:
    """Reads one prompt for each document `[B, K, L]`, leaving room for the answers.

    Raises:
        ValueError: The shapes do not fit together.
    """
    rows, log_weights = split_documents(prompts)
    return dataclasses.replace(prefill_rows(decoder, params, rows, limits), log_weights=log_weights)


def split_documents(prompts: Prompts) -> tuple[Prompts, Array]:
    """Returns prompts `[B, K, L]` as `[B * K, L]` without scores, and log p_R `[B, K]`.

    Raises:
        ValueError: The shapes do not fit together.
    """
    log_weights = prompt_log_weights(prompts, axes="B, K, L")
    ids, mask = (array.reshape(-1, array.shape[-1]) for array in prompts[:2])
    return Prompts(ids, mask), log_weights


def prompt_log_weights(prompts: Prompts, *, axes: str) -> Array:
    """Returns log p_R `[..., K]` of prompts whose ids have these axes.

    Raises:
        ValueError: The shapes do not fit together.
    """
    ids, mask, scores, doc_mask = prompts
    weights = ids.shape[:-1]
    shapes = [value.shape for value in (scores, doc_mask) if value is not None]
    if ids.ndim != len(axes.split(", ")) or mask.shape != ids.shape or {*shapes} - {weights}:
        raise ValueError(
            f"ids and mask [{axes}], doc_scores and doc_mask [{axes[:-3]}] are needed, got "
            + ", ".join(
                f"{name} {'None' if value is None else value.shape}"
                for name, value in prompts._asdict().items()
            )
        )
    if scores is None:
        scores = jnp.zeros(weights, jnp.float32)
    return doc_log_weights(jnp.asarray(scores), doc_mask=doc_mask)


def doc_log_weights(doc_scores: Array, *, doc_mask: Array | None = None) -> Array:
    """Returns log p_R, the log-softmax of the scores over the documents that are there.

    Args:
        doc_scores: `[..., K]` float.
        doc_mask: `[..., K]` bool, True = there is a document; None: all there.

    Returns:
        `[..., K]` float32 in nats, -inf where masked; uniform in a row without any document.
    """
    scores = doc_scores.astype(jnp.float32)
    if doc_mask is not None:
        none = ~jnp.any(doc_mask, axis=-1, keepdims=True)
        scores = jnp.where(none, 0.0, jnp.where(doc_mask, scores, -jnp.inf))
    return jax.nn.log_softmax(scores, axis=-1)


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

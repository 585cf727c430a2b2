"""Fusion-in-Decoder: contexts encoded one by one, a decoder that attends to all of them at once.

    log_probs = fusion_token_log_probs(lm.config, lm.params, batch)  # [B, T], trains the reader
    mass = fusion_attention_mass(lm.config, lm.params, batch)        # [B, K]
    target = ragjax.losses.lsr_target(mass, temperature=0.1)         # ADist, for the retriever
    decoder = fusion_decoder(lm.config)                              # for ragjax.generation

For T5 and BART. Shapes: B questions, K contexts each, L context slots, T target slots, H heads,
E hidden. A context without tokens is as if it were not there.

References:
    Izacard and Grave, 2021, "Leveraging Passage Retrieval with Generative Models for Open Domain
    Question Answering", section 3.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ragjax.losses import attention_mass
from ragjax.models.inputs import check_batch
from ragjax.models.seq2seq.cache import CachedSeq2Seq, Prefilled
from ragjax.models.seq2seq.layers import KeyValues, Layer
from ragjax.models.seq2seq.model import (
    Memory,
    Params,
    Seq2SeqConfig,
    decode,
    encode,
    shift_right,
    target_log_probs,
)


class FusionBatch(NamedTuple):
    """The contexts of each question and its target."""

    context_ids: Array  # [B, K, L] int32, each context with its question; padded on either side
    context_mask: Array  # [B, K, L] bool, True = real token
    target_ids: Array  # [B, T] int32, padded on the right
    target_mask: Array  # [B, T] bool, True = token counts


def fusion_token_log_probs(
    config: Seq2SeqConfig, params: Params, batch: FusionBatch, *, remat: bool = False
) -> Array:
    """Scores the target tokens given all contexts: log p(y_t | c_1 … c_K, y_<t).

    Encoding costs K·L², decoding attends to K·L states; a causal decoder would need (K·L)².

    Args:
        config: Sizes.
        params: Parameters, the same as for one context.
        batch: Contexts and targets.
        remat: True: recompute each layer in the backward pass.

    Returns:
        `[B, T]` float32 in nats, exactly 0 where `target_mask` is False.

    Raises:
        ValueError: The shapes do not fit together.

    Gradients:
        With respect to `params`; a context without tokens contributes nothing.
    """
    check_batch(batch, context_rank=3)
    memory = _encode(config, params, batch.context_ids, batch.context_mask, remat=remat)
    return target_log_probs(
        config, params, memory, batch.target_ids, batch.target_mask, remat=remat
    )


def fusion_attention_mass(config: Seq2SeqConfig, params: Params, batch: FusionBatch) -> Array:
    """Scores each context by the attention paid to it, weighted by the values' norms (ADist).

    Equals `ragjax.losses.attention_mass` of all layers, one layer at a time.

    Args:
        config: Sizes.
        params: Parameters.
        batch: Contexts and targets.

    Returns:
        `[B, K]` float32, 0 for a context without tokens; `ragjax.losses.lsr_target` makes the
        retriever's target of it.

    Raises:
        ValueError: The shapes do not fit together.

    References:
        Izacard et al., 2023, "Atlas: Few-shot Learning with Retrieval Augmented Language Models",
        section 2.2 (attention distillation).
    """
    check_batch(batch, context_rank=3)

    def observe(layer: Layer, cross_input: Array, memory: KeyValues) -> Array:
        return attention_mass(
            *_attention(layer, cross_input, memory, batch),
            context_mask=batch.context_mask,
            token_mask=batch.target_mask,
        )

    memory = _encode(config, params, batch.context_ids, batch.context_mask)
    ids = shift_right(config, batch.target_ids)
    return decode(config, params, ids, memory=memory, observe=observe)[2].mean(axis=0)


@dataclass(frozen=True)
class FusionDecoder(CachedSeq2Seq):
    """Generates one answer a question from all its contexts; hashable.

    As the `decoder` of `ragjax.generation.generate_greedy`, with contexts `[B, K, L]`: everything
    after `prefill` is that of one long context.
    """

    def prefill(self, params: Params, ids: Array, mask: Array, *, cache_length: int) -> Prefilled:
        """Reads the contexts of each question and returns the logits of the answer's first token.

        Args:
            params: Parameters.
            ids: `[B, K, L]` int32, padded on either side.
            mask: `[B, K, L]` bool, True = real token.
            cache_length: K plus the number of tokens to append: `ids.shape[1]` and the tokens, as
                for a single context.

        Returns:
            Logits `[B, V]` and the cache.

        Raises:
            ValueError: `cache_length` is below K, or the shapes differ.
        """
        if ids.ndim != 3 or ids.shape != mask.shape or min(ids.shape[1:]) < 1:
            raise ValueError(
                f"ids and mask must both be [B, K >= 1, L >= 1], got {ids.shape} and {mask.shape}"
            )
        if cache_length < ids.shape[1]:
            raise ValueError(
                f"cache_length={cache_length} is below the number of contexts ({ids.shape[1]})"
            )
        memory = _encode(self.config, params, ids, mask)
        return self.start(params, memory, slots=cache_length - ids.shape[1] + 1)

    def score_subsets(
        self,
        params: Params,
        prefilled: Prefilled,
        keep: Array,
        target_ids: Array,
        target_mask: Array,
    ) -> Array:
        """Scores one target given each of several subsets of the contexts that have been read.

        A context that is left out is as if it had not been read. One subset at a time: what it
        takes beside the cache does not grow with their number.

        Args:
            params: Parameters.
            prefilled: From `prefill` of one question, B = 1.
            keep: `[V, K]` bool, True = the context counts.
            target_ids: `[T]` int32, right-padded.
            target_mask: `[T]` bool, True = token counts.

        Returns:
            `[V, T]` float32 log-probabilities in nats, 0 where masked.
        """
        memory = prefilled.cache.memory
        length = memory.mask.shape[1] // keep.shape[1]

        def score(kept: Array) -> Array:
            seen = memory._replace(mask=memory.mask & jnp.repeat(kept, length)[None])
            target = target_ids[None], target_mask[None]
            return target_log_probs(self.config, params, seen, *target)[0]

        return lax.map(score, keep)


def fusion_decoder(config: Seq2SeqConfig) -> FusionDecoder:
    """Returns what `ragjax.generation` calls a decoder, reading K contexts a question.

    Args:
        config: Sizes of a T5 or BART model: `LanguageModel.config`.
    """
    return FusionDecoder(config)


def _encode(
    config: Seq2SeqConfig, params: Params, ids: Array, mask: Array, *, remat: bool = False
) -> Memory:
    """Encodes each context alone; returns the states `[B, K * L, E]` and their mask."""
    questions, contexts, length = ids.shape
    flat = encode(config, params, ids.reshape(-1, length), mask.reshape(-1, length), remat=remat)
    return Memory(flat.reshape(questions, contexts * length, -1), mask.reshape(questions, -1))


def _attention(
    layer: Layer, cross_input: Array, memory: KeyValues, batch: FusionBatch
) -> tuple[Array, Array]:
    """Returns one layer's attention `[B, H, T, K, L]` and value norms `[B, H, K, L]`."""
    questions, contexts, length = batch.context_mask.shape
    mask = batch.context_mask.reshape(questions, 1, 1, -1)
    attention = layer.cross_attention.weights(cross_input, memory, mask=mask)
    norms = jnp.linalg.norm(memory.values.astype(jnp.float32), axis=-1)
    return (
        attention.reshape(*attention.shape[:3], contexts, length),
        norms.reshape(*norms.shape[:2], contexts, length),
    )

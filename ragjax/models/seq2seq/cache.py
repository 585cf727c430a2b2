"""Token-by-token use of an encoder-decoder model: contexts read once, answers cached.

Shapes: R rows, L context slots, C cache slots, T target slots, N layers, H heads, D head width, V
vocabulary. The decoder's cache holds the start token and the answer; contexts take none of it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ragjax.models.inputs import check_prompts
from ragjax.models.layers.vocabulary import logits
from ragjax.models.seq2seq.layers import KeyValues
from ragjax.models.seq2seq.model import (
    Memory,
    Params,
    Seq2SeqConfig,
    decode,
    encode,
    remember,
    target_log_probs,
)


class Seq2SeqCache(NamedTuple):
    """What the decoder's layers remember of the context and of the answer so far."""

    keys_values: KeyValues  # leaves [N, R, H, C, D], of the answer
    memory: Memory  # of the context, states with leaves [N, R, H, L, D]
    length: Array  # [] int32, next free slot


class Prefilled(NamedTuple):
    """A context that has been read."""

    logits: Array  # [R, V] float32, of the next token of the answer
    cache: Seq2SeqCache


@dataclass(frozen=True)
class CachedSeq2Seq:
    """The functions that generation needs, bound to one configuration; hashable.

    Attributes:
        config: Sizes of the model whose parameters the methods take.
    """

    config: Seq2SeqConfig

    def prefill(self, params: Params, ids: Array, mask: Array, *, cache_length: int) -> Prefilled:
        """Reads contexts and returns the logits of the answer's first token.

        Args:
            params: Parameters.
            ids: `[R, L]` int32, padded on either side.
            mask: `[R, L]` bool, True = real token.
            cache_length: L plus the number of tokens to append, as for a causal decoder.

        Returns:
            Logits `[R, V]` and the cache. With `forced_first_id`, the logits of all other tokens
            are -inf; `score` does not see that.

        Raises:
            ValueError: The cache is shorter than the contexts, or the shapes differ.
        """
        check_prompts(ids, mask, cache_length)
        encoded = encode(self.config, params, ids, mask)
        slots = cache_length - ids.shape[1] + 1
        return self.start(params, Memory(encoded, mask), slots=slots)

    def start(self, params: Params, context: Memory, *, slots: int) -> Prefilled:
        """Begins answers to contexts that have been encoded: feeds the start token.

        Args:
            params: Parameters.
            context: The encoder's output.
            slots: C, the start token and the tokens to append.

        Returns:
            Logits `[R, V]` of the first token, and the cache.

        Raises:
            ValueError: There are more slots than the decoder has positions.
        """
        config, limit = self.config, self.config.position_limit
        if limit is not None and slots > limit:
            raise ValueError(
                f"room for {slots} tokens (the start token included) was asked for, but the model "
                f"has {limit} positions; generate fewer tokens"
            )
        memory = remember(config, params, context)
        layers, rows, heads, _, width = memory.states.keys.shape
        empty = jnp.zeros((layers, rows, heads, slots, width), memory.states.keys.dtype)
        cache = Seq2SeqCache(KeyValues(empty, empty), memory, jnp.zeros((), jnp.int32))
        first = self.decode_step(params, cache, jnp.full(rows, config.decoder_start_id, jnp.int32))
        if config.forced_first_id is None:
            return first
        chosen = jnp.arange(first.logits.shape[1]) == config.forced_first_id
        return first._replace(logits=jnp.where(chosen[None, :], first.logits, -jnp.inf))

    def decode_step(self, params: Params, cache: Seq2SeqCache, token_ids: Array) -> Prefilled:
        """Appends one token to every row.

        The caller keeps the number of appended tokens within the cache's free slots: beyond it the
        last slot is overwritten, as a traced length cannot be checked.

        Args:
            params: Parameters.
            cache: What came before.
            token_ids: `[R]` int32.

        Returns:
            Logits `[R, V]` of the next token, and the cache with the token appended.
        """
        hidden, new, _ = decode(
            self.config,
            params,
            token_ids[:, None],
            memory=cache.memory,
            past=cache.keys_values,
            past_length=cache.length,
        )
        keys_values = jax.tree.map(
            lambda old, leaf: lax.dynamic_update_slice_in_dim(old, leaf, cache.length, axis=3),
            cache.keys_values,
            new,
        )
        cache = cache._replace(keys_values=keys_values, length=cache.length + 1)
        return Prefilled(logits(params, hidden[:, 0]), cache)

    def score(
        self, params: Params, prefilled: Prefilled, target_ids: Array, target_mask: Array
    ) -> Array:
        """Scores target tokens after contexts that have been read; equals `token_log_probs`.

        Args:
            params: Parameters.
            prefilled: From `prefill`; tokens appended since then are not looked at.
            target_ids: `[R, T]` int32, right-padded.
            target_mask: `[R, T]` bool, True = token counts.

        Returns:
            `[R, T]` float32 log-probabilities in nats, 0 where masked.
        """
        memory = prefilled.cache.memory
        return target_log_probs(self.config, params, memory, target_ids, target_mask)

    def repeat(self, cache: Seq2SeqCache, times: int) -> Seq2SeqCache:
        """Copies each row: row r becomes the rows from r * times to (r + 1) * times - 1."""
        keys_values, states = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, times, axis=1), (cache.keys_values, cache.memory.states)
        )
        mask = jnp.repeat(cache.memory.mask, times, axis=0)
        return Seq2SeqCache(keys_values, Memory(states, mask), cache.length)

    def reorder(self, cache: Seq2SeqCache, rows: Array, *, prompt_slots: int) -> Seq2SeqCache:
        """Gives each row the answer of another row that has the same context.

        Args:
            cache: Contexts and the answers so far, all of the same length.
            rows: `[R]` int32; row r goes on from the answer of `rows[r]`.
            prompt_slots: As for a causal decoder, whose cache holds the prompt in these slots;
                this one has its contexts elsewhere.

        Returns:
            The cache with the answers exchanged.
        """
        exchanged = jax.tree.map(lambda leaf: leaf[:, rows], cache.keys_values)
        return cache._replace(keys_values=exchanged)

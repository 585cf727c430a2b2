"""Token-by-token use of a causal decoder with a cache of keys and values of fixed size.

Shapes: R rows, L prompt slots, C cache slots, T target slots, N layers, V vocabulary. Prompts are
left-padded, so the next free slot of the cache is the same in every row.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.layers import KeyValues
from ragjax.models.decoder.model import causal, mask_positions, run_layers
from ragjax.models.inputs import check_prompts
from ragjax.models.layers.vocabulary import logits


class KVCache(NamedTuple):
    """What the layers remember of the tokens so far."""

    keys_values: KeyValues  # keys [N, R, kv_heads, D, C], values [N, R, kv_heads, C, D]
    mask: Array  # [R, C] bool, True = slot holds a real token
    positions: Array  # [R] int32, rotary position of the next token
    length: Array  # [] int32, next free slot


# The axis of the slots in each of `KVCache.keys_values`.
_SLOTS = KeyValues(keys=4, values=3)  # pyrefly: ignore[bad-argument-type]  (a tree of the same form)


class Prefilled(NamedTuple):
    """A prompt that has been read."""

    logits: Array  # [R, V] float32, of the token after the prompt
    cache: KVCache


@dataclass(frozen=True)
class CachedDecoder:
    """The functions that generation needs, bound to one configuration; hashable.

    Attributes:
        config: Sizes of the model whose parameters the methods take.
    """

    config: DecoderConfig

    def prefill(
        self, params: dict[str, Any], ids: Array, mask: Array, *, cache_length: int
    ) -> Prefilled:
        """Reads the prompts and returns the logits of the token that follows each.

        Args:
            params: Parameters.
            ids: `[R, L]` int32, left-padded.
            mask: `[R, L]` bool, True = real token.
            cache_length: Slots C of the cache: L plus the number of tokens to append.

        Returns:
            Logits `[R, V]` and the cache.

        Raises:
            ValueError: The cache is shorter than the prompt, or the shapes differ.
        """
        check_prompts(ids, mask, cache_length)
        free = cache_length - ids.shape[1]
        hidden, new = run_layers(
            self.config, params, ids, positions=mask_positions(mask), allowed=causal(mask)
        )

        def lengthen(leaf: Array, axis: int) -> Array:
            return jnp.pad(leaf, [(0, free * (place == axis)) for place in range(leaf.ndim)])

        cache = KVCache(
            keys_values=jax.tree.map(lengthen, new, _SLOTS),
            mask=jnp.pad(mask, ((0, 0), (0, free))),
            positions=jnp.sum(mask, axis=1, dtype=jnp.int32),
            length=jnp.asarray(ids.shape[1], jnp.int32),
        )
        return Prefilled(logits(params, hidden[:, -1]), cache)

    def decode_step(self, params: dict[str, Any], cache: KVCache, token_ids: Array) -> Prefilled:
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
        appended = jnp.ones((token_ids.shape[0], 1), bool)
        hidden, new = self._extend(params, cache, token_ids[:, None], appended)

        def append(old: Array, leaf: Array, axis: int) -> Array:
            return lax.dynamic_update_slice_in_dim(old, leaf, cache.length, axis=axis)

        cache = KVCache(
            keys_values=jax.tree.map(append, cache.keys_values, new, _SLOTS),
            mask=append(cache.mask, appended, 1),
            positions=cache.positions + 1,
            length=cache.length + 1,
        )
        return Prefilled(logits(params, hidden[:, 0]), cache)

    def score(
        self, params: dict[str, Any], prefilled: Prefilled, target_ids: Array, target_mask: Array
    ) -> Array:
        """Scores target tokens after prompts that have been read; equals `token_log_probs`.

        Args:
            params: Parameters.
            prefilled: From `prefill`; not changed.
            target_ids: `[R, T]` int32, right-padded.
            target_mask: `[R, T]` bool, True = token counts.

        Returns:
            `[R, T]` float32 log-probabilities in nats, 0 where masked.
        """
        scores = prefilled.logits[:, None]
        if target_ids.shape[1] > 1:
            hidden, _ = self._extend(
                params, prefilled.cache, target_ids[:, :-1], target_mask[:, :-1]
            )
            scores = jnp.concatenate([scores, logits(params, hidden)], axis=1)
        log_probs = jax.nn.log_softmax(scores, axis=-1)
        chosen = jnp.take_along_axis(log_probs, target_ids[:, :, None], axis=-1)[:, :, 0]
        return jnp.where(target_mask, chosen, 0.0)

    def repeat(self, cache: KVCache, times: int) -> KVCache:
        """Copies each row: row r becomes the rows from r * times to (r + 1) * times - 1."""
        return KVCache(
            jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=1), cache.keys_values),
            jnp.repeat(cache.mask, times, axis=0),
            jnp.repeat(cache.positions, times),
            cache.length,
        )

    def reorder(self, cache: KVCache, rows: Array, *, prompt_slots: int) -> KVCache:
        """Gives each row the answer of another row that has the same prompt.

        Args:
            cache: Prompts and the answers so far, all of the same length.
            rows: `[R]` int32; row r goes on from the answer of `rows[r]`.
            prompt_slots: L; the prompts, which are most of the cache, are not copied.

        Returns:
            The cache with the answers exchanged.
        """

        def exchange(leaf: Array, axis: int) -> Array:
            answers = lax.slice_in_dim(leaf, prompt_slots, None, axis=axis)[:, rows]
            return lax.dynamic_update_slice_in_dim(leaf, answers, prompt_slots, axis=axis)

        return cache._replace(keys_values=jax.tree.map(exchange, cache.keys_values, _SLOTS))

    def _extend(
        self, params: dict[str, Any], cache: KVCache, ids: Array, mask: Array
    ) -> tuple[Array, KeyValues]:
        """Runs the layers over new tokens `[R, T]` that follow those of the cache."""
        before = jnp.broadcast_to(cache.mask[:, None, :], (*ids.shape, cache.mask.shape[1]))
        return run_layers(
            self.config,
            params,
            ids,
            positions=cache.positions[:, None] + mask_positions(mask),
            allowed=jnp.concatenate([before, causal(mask)], axis=2),
            past=cache.keys_values,
            past_positions=mask_positions(cache.mask),
        )

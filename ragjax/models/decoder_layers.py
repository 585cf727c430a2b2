"""The layer of a Llama-family decoder and its rotary positions, as Flax NNX modules.

Shapes: R rows, T slots, S slots that are attended to, H hidden, D head width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ragjax.models.decoder_config import DecoderConfig, RotaryScaling
from ragjax.models.linear import Linear

# Finite, so that a slot that may attend to nothing yields numbers (which a mask then drops)
# instead of NaN, whose gradient no mask can drop.
_MASKED_SCORE = -1e9


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles of each slot."""

    cos: Array  # [R, T, D / 2] float32
    sin: Array  # [R, T, D / 2] float32


class KeyValues(NamedTuple):
    """Keys (rotated) and values of one layer, or of all layers with a leading axis N."""

    keys: Array  # [R, kv_heads, S, D]
    values: Array  # [R, kv_heads, S, D]


class RMSNorm(nnx.Module):
    """Scales each vector to unit root mean square, then by a learned weight."""

    def __init__(self, size: int, *, epsilon: float) -> None:
        """Creates a unit scale of `size` entries."""
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, hidden: Array) -> Array:
        """Normalises the last axis, in float32."""
        wide = hidden.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normalised = (wide * lax.rsqrt(mean_square + self.epsilon)).astype(hidden.dtype)
        return normalised * _expand(self.scale[...], normalised.ndim)


class DecoderLayer(nnx.Module):
    """One decoder layer: grouped-query attention and a gated feed-forward, both residual."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        """Creates random weights of the configuration's sizes."""
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        linear = functools.partial(Linear, rngs=rngs)
        self.config = config
        self.attention_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.query = linear(config.hidden_size, queries, use_bias=config.qkv_bias)
        self.key = linear(config.hidden_size, keys, use_bias=config.qkv_bias)
        self.value = linear(config.hidden_size, keys, use_bias=config.qkv_bias)
        self.output = linear(queries, config.hidden_size, use_bias=False)
        self.feed_forward_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.gate = linear(config.hidden_size, config.intermediate_size, use_bias=False)
        self.up = linear(config.hidden_size, config.intermediate_size, use_bias=False)
        self.down = linear(config.intermediate_size, config.hidden_size, use_bias=False)

    def __call__(
        self, hidden: Array, rotary: Rotary, allowed: Array, past: KeyValues | None = None
    ) -> tuple[Array, KeyValues]:
        """Applies the layer.

        Args:
            hidden: `[R, T, H]`.
            rotary: Angles of the T slots.
            allowed: `[R, T, S]` bool; True where slot t may attend to slot s. The S slots are those
                of `past` followed by the T new ones.
            past: Keys and values of earlier slots, or None.

        Returns:
            The new hidden states `[R, T, H]`, and the keys and values of the T slots.
        """
        normalised = self.attention_norm(hidden)
        queries = _rotate(self._split_heads(self.query(normalised)), rotary)
        new = KeyValues(
            _rotate(self._split_heads(self.key(normalised)), rotary),
            self._split_heads(self.value(normalised)),
        )
        hidden = hidden + self.output(_attend(queries, new, past, allowed))
        normalised = self.feed_forward_norm(hidden)
        gated = jax.nn.silu(self.gate(normalised)) * self.up(normalised)
        return hidden + self.down(gated), new

    def _split_heads(self, projected: Array) -> Array:
        rows, slots, _ = projected.shape
        return projected.reshape(rows, slots, -1, self.config.head_dim).swapaxes(1, 2)


def rotary_angles(config: DecoderConfig, positions: Array) -> Rotary:
    """Computes the rotary angles of each slot, `position / theta^(2 i / D)` for i < D/2.

    Args:
        config: Sizes.
        positions: `[R, T]` int32.

    Returns:
        Cosines and sines `[R, T, D / 2]`.

    References:
        Su et al., 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", 3.2.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        frequencies = _stretch(config.rope_scaling, frequencies)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def _stretch(scaling: RotaryScaling, frequencies: Array) -> Array:
    wavelengths = 2 * jnp.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = (scaling.original_positions / wavelengths - low) / (high - low)
    kept = jnp.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _rotate(heads: Array, rotary: Rotary) -> Array:
    # Hugging Face checkpoints pair entry i with entry i + D/2, not with its neighbour.
    first, second = jnp.split(heads, 2, axis=-1)
    cos = rotary.cos[:, None].astype(heads.dtype)
    sin = rotary.sin[:, None].astype(heads.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attend(queries: Array, new: KeyValues, past: KeyValues | None, allowed: Array) -> Array:
    """Returns the attended values `[R, T, heads * D]` of queries `[R, heads, T, D]`."""
    rows, heads, slots, width = queries.shape
    groups = new.keys.shape[1]
    # The query heads that share a key head become further query slots of it: one product each.
    queries = queries.reshape(rows, groups, heads // groups * slots, width) * width**-0.5
    parts = (new,) if past is None else (past, new)
    # Earlier keys are not concatenated with the new ones: that would copy the cache at each step.
    scores = jnp.concatenate(
        [jnp.einsum("rgqd,rgsd->rgqs", queries, part.keys) for part in parts], axis=-1
    ).astype(jnp.float32)
    scores = scores.reshape(rows, heads, slots, -1)
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, _MASKED_SCORE), axis=-1)
    weights = weights.astype(queries.dtype).reshape(rows, groups, heads // groups * slots, -1)
    split = 0 if past is None else past.keys.shape[2]
    weight_parts = (weights,) if past is None else (weights[..., :split], weights[..., split:])
    attended = functools.reduce(
        jnp.add,
        [
            jnp.einsum("rgqs,rgsd->rgqd", part_weights, part.values)
            for part_weights, part in zip(weight_parts, parts, strict=True)
        ],
    )
    return attended.reshape(rows, heads, slots, width).swapaxes(1, 2).reshape(rows, slots, -1)


def _expand(vector: Array, ndim: int) -> Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)

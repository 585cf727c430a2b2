"""The layer of a causal decoder, as a Flax NNX module.

Shapes: R rows, T slots, S slots that are attended to, H hidden, D head width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.layers.attention import attend
from ragjax.models.layers.linear import Linear
from ragjax.models.layers.norms import RMSNorm
from ragjax.models.layers.rotary import Rotary, rotate

# Finite, so that a slot that may attend to nothing yields numbers (which a mask then drops)
# instead of NaN, whose gradient no mask can drop.
_MASKED_SCORE = -1e9
_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}


class KeyValues(NamedTuple):
    """Keys (rotated) and values of one layer, or of all layers with a leading axis N."""

    # Slots last: one query's product with all keys then runs along memory. Attention of a decoding
    # step took two thirds of the time of the other order (32 rows, 202 slots, two CPU cores).
    keys: Array  # [R, kv_heads, D, S]
    values: Array  # [R, kv_heads, S, D]


class DecoderLayer(nnx.Module):
    """One decoder layer: grouped-query attention and a gated feed-forward, both residual."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        """Creates random weights of the configuration's sizes."""
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        linear = functools.partial(Linear, rngs=rngs)
        norm = functools.partial(
            RMSNorm, epsilon=config.rms_norm_eps, offset=config.family.norm_offset
        )
        sandwich, per_head = config.family.sandwich_norms, config.family.query_key_norm
        self.config = config
        self.attention_norm = norm(hidden)
        self.query = linear(hidden, queries, use_bias=config.qkv_bias)
        self.key = linear(hidden, keys, use_bias=config.qkv_bias)
        self.value = linear(hidden, keys, use_bias=config.qkv_bias)
        self.query_norm = norm(config.head_dim) if per_head else None
        self.key_norm = norm(config.head_dim) if per_head else None
        self.output = linear(queries, hidden, use_bias=config.output_bias)
        self.attention_output_norm = norm(hidden) if sandwich else None
        self.feed_forward_norm = norm(hidden)
        self.gate = linear(hidden, inner, use_bias=config.feed_forward_bias)
        self.up = linear(hidden, inner, use_bias=config.feed_forward_bias)
        self.down = linear(inner, hidden, use_bias=config.feed_forward_bias)
        self.feed_forward_output_norm = norm(hidden) if sandwich else None

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
        rows, slots, _ = hidden.shape
        normalised = self.attention_norm(hidden)
        queries, keys, values = (
            projection(normalised).reshape(rows, slots, -1, self.config.head_dim)
            for projection in (self.query, self.key, self.value)
        )
        queries = rotate(_apply(self.query_norm, queries), rotary)
        keys = rotate(_apply(self.key_norm, keys), rotary)
        new = KeyValues(keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2))
        scale = self.config.attention_scale
        if past is None:
            attended = attend(queries, keys, values, mask=allowed[:, None], scale=scale)
        else:
            attended = _attend_with_past(queries, new, past, allowed, scale=scale)
        output = self.output(attended.reshape(rows, slots, -1))
        hidden = hidden + _apply(self.attention_output_norm, output)
        normalised = self.feed_forward_norm(hidden)
        gated = _ACTIVATIONS[self.config.activation](self.gate(normalised)) * self.up(normalised)
        return hidden + _apply(self.feed_forward_output_norm, self.down(gated)), new


def _apply(norm: RMSNorm | None, hidden: Array) -> Array:
    return hidden if norm is None else norm(hidden)


def _attend_with_past(
    queries: Array, new: KeyValues, past: KeyValues, allowed: Array, *, scale: float
) -> Array:
    """Returns the attended values `[R, T, heads, D]` of queries of the same shape."""
    rows, slots, heads, width = queries.shape
    groups = new.keys.shape[1]
    # The query heads that share a key head become further query slots of it: one product each.
    queries = queries.swapaxes(1, 2).reshape(rows, groups, heads // groups * slots, width) * scale
    parts = (past, new)
    # Earlier keys are not concatenated with the new ones: that would copy the cache at each step.
    scores = jnp.concatenate(
        [jnp.matmul(queries, part.keys, preferred_element_type=jnp.float32) for part in parts],
        axis=-1,
    ).reshape(rows, heads, slots, -1)
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, _MASKED_SCORE), axis=-1)
    weights = weights.astype(queries.dtype).reshape(rows, groups, heads // groups * slots, -1)
    split = past.keys.shape[3]
    earlier, current = (
        jnp.einsum("rgqs,rgsd->rgqd", part_weights, part.values)
        for part_weights, part in zip(
            (weights[..., :split], weights[..., split:]), parts, strict=True
        )
    )
    return (earlier + current).reshape(rows, heads, slots, width).swapaxes(1, 2)

"""The layers of encoder-decoder models, as Flax NNX modules.

Shapes: R rows, L context slots, T slots that attend, S slots that are attended to, E hidden, H
heads, D head width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ragjax.models.layers.attention import attend
from ragjax.models.layers.linear import Initializer, Linear


class KeyValues(NamedTuple):
    """Keys and values of one layer, or of all layers with a leading axis N."""

    keys: Array  # [R, H, S, D]
    values: Array  # [R, H, S, D]


class Attention(nnx.Module):
    """Multi-head attention whose keys and values may come from another sequence."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        scale: float,
        use_bias: bool,
        query_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates random weights.

        Args:
            hidden_size: E, of the input and the output.
            num_heads: H.
            head_dim: D.
            scale: Factor of the scores q·k.
            use_bias: Whether the four projections add a bias.
            query_init: Draws the kernel of the queries; None: as `Linear` does.
            rngs: Source of the random keys.
        """
        inner = num_heads * head_dim
        self.num_heads, self.scale = num_heads, scale
        self.query = Linear(
            hidden_size, inner, use_bias=use_bias, kernel_init=query_init, rngs=rngs
        )
        self.key = Linear(hidden_size, inner, use_bias=use_bias, rngs=rngs)
        self.value = Linear(hidden_size, inner, use_bias=use_bias, rngs=rngs)
        self.output = Linear(inner, hidden_size, use_bias=use_bias, rngs=rngs)

    def keys_values(self, states: Array) -> KeyValues:
        """Projects `[R, S, E]` to keys and values `[R, H, S, D]`."""
        return KeyValues(
            self._heads(self.key(states)).swapaxes(1, 2),
            self._heads(self.value(states)).swapaxes(1, 2),
        )

    def __call__(
        self, hidden: Array, known: KeyValues, *, mask: Array, bias: Array | None = None
    ) -> Array:
        """Attends from `hidden` `[R, T, E]` to the S known slots.

        Args:
            hidden: `[R, T, E]`.
            known: Keys and values `[R, H, S, D]`.
            mask: Bool, broadcastable to `[R, H, T, S]`, True = may attend.
            bias: Float, broadcastable to `[R, H, T, S]`, added to the scores.

        Returns:
            `[R, T, E]`.
        """
        keys, values = (part.swapaxes(1, 2) for part in known)
        queries = self._heads(self.query(hidden))
        attended = attend(queries, keys, values, mask=mask, bias=bias, scale=self.scale)
        return self.output(attended.reshape(*hidden.shape[:2], -1))

    def weights(self, hidden: Array, known: KeyValues, *, mask: Array) -> Array:
        """Returns the attention probabilities `[R, H, T, S]` float32 of `__call__` without bias.

        They are exactly 0 outside the mask, unless a slot may attend to nothing.
        """
        queries = self._heads(self.query(hidden)) * self.scale
        scores = jnp.einsum("rthd,rhsd->rhts", queries, known.keys).astype(jnp.float32)
        return jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)

    def _heads(self, projected: Array) -> Array:
        return projected.reshape(*projected.shape[:2], self.num_heads, -1)


class LayerParts(NamedTuple):
    """What a family puts into a layer."""

    attention: Attention
    cross_attention: Attention | None  # None in an encoder
    feed_forward: Any  # nnx.Module, [R, T, E] -> [R, T, E]
    make_norm: Callable[[], Any]  # -> nnx.Module, [R, T, E] -> [R, T, E]
    norm_first: bool  # True: x + f(norm(x)), as T5; False: norm(x + f(x)), as BART


class Decoded(NamedTuple):
    """The result of a decoder layer."""

    hidden: Array  # [R, T, E]
    known: KeyValues  # [R, H, T, D], of the T slots' self-attention
    cross_input: Array  # [R, T, E], what asked the cross-attention's queries


class Layer(nnx.Module):
    """Self-attention, in a decoder cross-attention, and a feed-forward block, each residual."""

    def __init__(self, parts: LayerParts) -> None:
        """Joins the parts, with a norm for each."""
        self.norm_first = parts.norm_first
        self.attention = parts.attention
        self.attention_norm = parts.make_norm()
        if parts.cross_attention is not None:
            self.cross_attention = parts.cross_attention
            self.cross_norm = parts.make_norm()
        self.feed_forward = parts.feed_forward
        self.feed_forward_norm = parts.make_norm()

    def encode(self, hidden: Array, *, mask: Array, bias: Array | None) -> Array:
        """Applies an encoder's layer.

        Args:
            hidden: `[R, L, E]`.
            mask: `[R, 1, 1, L]` bool, True = token that is attended to.
            bias: Broadcastable to `[R, H, L, L]`, or None.

        Returns:
            `[R, L, E]`.
        """
        asked = self._before(self.attention_norm, hidden)
        known = self.attention.keys_values(asked)
        attended = self.attention(asked, known, mask=mask, bias=bias)
        hidden = self._after(self.attention_norm, hidden, attended)
        return self._feed_forward(hidden)

    def decode(
        self,
        hidden: Array,
        *,
        allowed: Array,
        bias: Array | None,
        past: KeyValues | None,
        memory: KeyValues,
        memory_mask: Array,
    ) -> Decoded:
        """Applies a decoder's layer.

        Args:
            hidden: `[R, T, E]`.
            allowed: Bool, broadcastable to `[R, H, T, S]`; the S slots are those of `past`
                followed by the T new ones.
            bias: Broadcastable to `[R, H, T, S]`, or None.
            past: Keys and values `[R, H, S - T, D]` of earlier slots, or None.
            memory: Keys and values `[R, H, L, D]` of the context, from `remember`.
            memory_mask: `[R, 1, 1, L]` bool, True = token of the context.

        Returns:
            The new hidden states and what later slots need of these.
        """
        asked = self._before(self.attention_norm, hidden)
        new = self.attention.keys_values(asked)
        known = new
        if past is not None:
            # The cache holds the answer so far, which is short: joining it costs little.
            pairs = zip(past, new, strict=True)
            known = KeyValues(*(jnp.concatenate(pair, axis=2) for pair in pairs))
        attended = self.attention(asked, known, mask=allowed, bias=bias)
        hidden = self._after(self.attention_norm, hidden, attended)
        asked = self._before(self.cross_norm, hidden)
        attended = self.cross_attention(asked, memory, mask=memory_mask)
        hidden = self._after(self.cross_norm, hidden, attended)
        return Decoded(self._feed_forward(hidden), new, asked)

    def remember(self, encoded: Array) -> KeyValues:
        """Projects the encoder's output `[R, L, E]` to the keys and values of cross-attention."""
        return self.cross_attention.keys_values(encoded)

    def _feed_forward(self, hidden: Array) -> Array:
        inner = self.feed_forward(self._before(self.feed_forward_norm, hidden))
        return self._after(self.feed_forward_norm, hidden, inner)

    def _before(self, norm: Any, hidden: Array) -> Array:
        return norm(hidden) if self.norm_first else hidden

    def _after(self, norm: Any, hidden: Array, change: Array) -> Array:
        return hidden + change if self.norm_first else norm(hidden + change)


class FeedForward(nnx.Module):
    """Two linear layers with an activation between them, optionally gated by a third."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Array], Array],
        *,
        gated: bool,
        use_bias: bool,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates random weights.

        Args:
            hidden_size: E, of the input and the output.
            intermediate_size: Width between the two.
            activation: Applied elementwise.
            gated: True: activation(x W_gate) * x W_up instead of activation(x W_up).
            use_bias: Whether the linear layers add a bias.
            rngs: Source of the random keys.
        """
        self.activation, self.gated = activation, gated
        sizes = hidden_size, intermediate_size
        if gated:
            self.gate = Linear(*sizes, use_bias=use_bias, rngs=rngs)
        self.up = Linear(*sizes, use_bias=use_bias, rngs=rngs)
        self.down = Linear(*sizes[::-1], use_bias=use_bias, rngs=rngs)

    def __call__(self, hidden: Array) -> Array:
        """Maps `[R, T, E]` to `[R, T, E]`."""
        if self.gated:
            return self.down(self.activation(self.gate(hidden)) * self.up(hidden))
        return self.down(self.activation(self.up(hidden)))

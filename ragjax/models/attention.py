"""Dot-product attention, in one place for every architecture.

Shapes: B rows, T query slots, S key slots, H query heads, G key heads (G divides H), D head width.
"""

import jax
import jax.numpy as jnp
from jax import Array

# Finite, so that a slot that may attend to nothing yields numbers (which a mask then drops)
# instead of NaN, whose gradient no mask can drop.
_MASKED_SCORE = -1e9


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Average the values, weighted by softmax(scale · q·k + bias) over the allowed slots.

    Args:
      queries: `[B, T, H, D]`.
      keys: `[B, S, G, D]`.
      values: `[B, S, G, D]`.
      mask: bool, broadcastable to `[B, H, T, S]`, True = may attend; None: everything.
      bias: float, broadcastable to `[B, H, T, S]`, added to the scaled scores.
      scale: factor of the scores; None: 1/√D.

    Returns:
      `[B, T, H, D]`, in the dtype of the queries; scores and softmax are float32. A slot that may
      attend to nothing gets finite numbers without meaning, with finite gradients.
    """
    rows, slots, heads, width = queries.shape
    groups = keys.shape[2]
    scale = width**-0.5 if scale is None else scale
    # Heads go before slots: one transposed copy here, and XLA's CPU code then multiplies matrices;
    # an einsum over [B, T, H, D] took 2.7 times as long. The query heads that share a key head
    # become further query slots of it: one product each.
    joined = (rows, groups, heads // groups * slots, -1)
    queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
    scores = (queries * scale).reshape(joined) @ keys.swapaxes(-1, -2)
    scores = scores.astype(jnp.float32).reshape(rows, heads, slots, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, _MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    attended = (weights.reshape(joined) @ values).reshape(rows, heads, slots, width)
    return attended.swapaxes(1, 2)

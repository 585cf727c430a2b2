"""Normalisation layers, computed in float32 whatever the dtype of their input."""

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

_EPSILON = 1e-5  # of `LayerNorm`


class RMSNorm(nnx.Module):
    """Scales each vector to unit root mean square, then by a learned weight."""

    def __init__(self, size: int, *, epsilon: float, offset: float = 0.0) -> None:
        """Creates a unit scale of `size` entries.

        Args:
            size: Entries of the last axis.
            epsilon: Added to the mean square before the root.
            offset: Added to the stored scale. Gemma stores scale - 1, and so do the parameters
                here: bfloat16 holds a small weight more finely than 1 + weight, weight decay pulls
                towards the same scale as in its training, and a checkpoint comes back bit by bit.
        """
        self.scale = nnx.Param(jnp.full(size, 1.0 - offset, jnp.float32))
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, hidden: Array) -> Array:
        """Normalises the last axis, in float32."""
        wide = hidden.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        axes = (1,) * (wide.ndim - 1) + (-1,)
        normalised = wide * lax.rsqrt(mean_square + self.epsilon) * scale.reshape(axes)
        return normalised.astype(hidden.dtype)


class LayerNorm(nnx.Module):
    """Scales each vector to mean 0 and variance 1 in float32, then by learned weights."""

    def __init__(self, size: int) -> None:
        """Creates a unit scale and a zero bias of `size` entries."""
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, hidden: Array) -> Array:
        """Normalises the last axis; the result has the dtype of the input."""
        wide = hidden.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        axes = (1,) * (hidden.ndim - 1) + (-1,)
        scale, bias = (part[...].reshape(axes) for part in (self.scale, self.bias))
        normalised = centred * lax.rsqrt(variance + _EPSILON)
        return (normalised * scale + bias).astype(hidden.dtype)


def layer_norm(
    size: int, *, epsilon: float, use_bias: bool = True, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """Returns Flax's layer norm with its slow variance.

    The fast one, E[x^2] - E[x]^2, cancels: it loses digits where the mean is large.
    """
    return nnx.LayerNorm(
        size, epsilon=epsilon, use_bias=use_bias, use_fast_variance=False, rngs=rngs
    )

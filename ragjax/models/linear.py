"""The linear layer that every architecture here is made of."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import Array

Initializer = Callable[..., Array]


class Linear(nnx.Module):
    """`x @ kernel + bias`, in the dtype of the parameters."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = True,
        kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        """Make random weights and, with `use_bias`, a bias of zeros.

        Args:
          inputs: size of the last axis of what goes in.
          outputs: size of the last axis of what comes out.
          use_bias: whether a bias is added.
          kernel_init: draws the kernel; None: normal, scaled by the number of inputs.
          rngs: source of the random key.
        """
        draw = kernel_init or nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if use_bias else None

    def __call__(self, inputs: Array) -> Array:
        """Map `[..., inputs]` to `[..., outputs]`."""
        outputs = inputs @ self.kernel[...]
        if self.bias is None:
            return outputs
        bias = self.bias[...]
        return outputs + bias.reshape((1,) * (outputs.ndim - 1) + bias.shape)

"""The linear layer that every architecture here is made of."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

Initializer = Callable[..., Array]


class Linear(nnx.Module):
    """`x @ kernel + bias`, in the dtype of the parameters; optionally with a LoRA adapter."""

    # The adapter, where `ragjax.models.layers.stacks.merge` found one in the parameters. Class
    # attributes: a layer without an adapter holds nothing of it.
    lora_down: nnx.Param | None = None  # [inputs, rank]
    lora_up: nnx.Param | None = None  # [rank, outputs]
    lora_scale: nnx.Param | None = None  # []

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = True,
        kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes random weights and, with `use_bias`, a bias of zeros.

        Args:
            inputs: Size of the last axis of what goes in.
            outputs: Size of the last axis of what comes out.
            use_bias: Whether a bias is added.
            kernel_init: Draws the kernel; None: normal, scaled by the number of inputs.
            rngs: Source of the random key.
        """
        draw = kernel_init or nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if use_bias else None

    def adapt(self, adapter: Mapping[str, Array]) -> None:
        """Adds a low-rank adapter.

        Args:
            adapter: "down" `[inputs, rank]`, "up" `[rank, outputs]` and "scale" `[]`; all with a
                leading axis where the layers are stacked.
        """
        self.lora_down = nnx.Param(adapter["down"])
        self.lora_up = nnx.Param(adapter["up"])
        self.lora_scale = nnx.Param(adapter["scale"])

    def __call__(self, inputs: Array) -> Array:
        """Maps `[..., inputs]` to `[..., outputs]`."""
        # As one matrix: the gradient of a product over several leading axes takes XLA's CPU code
        # twice as long (45 against 20 ms for 40 x 128 rows of 128, with the forward pass).
        rows = inputs.reshape(-1, inputs.shape[-1])
        outputs = rows @ self.kernel[...]
        if self.lora_down is not None and self.lora_up is not None and self.lora_scale is not None:
            # Two thin products: the adapted kernel and its gradient are never formed.
            scale = lax.stop_gradient(self.lora_scale[...])
            outputs = outputs + ((rows @ self.lora_down[...]) @ self.lora_up[...]) * scale
        if self.bias is not None:
            outputs = outputs + self.bias[...][None, :]
        return outputs.reshape(*inputs.shape[:-1], -1)

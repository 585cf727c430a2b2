"""The linear layer that every architecture here is made of, and the precision of its product."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

Initializer = Callable[..., Array]
# Fewer rows, as one token of each of a few answers, do not pay for rounding the kernel: .7 to 1.1
# times the speed of float32 at 4 to 32 rows, 1.2 to 1.4 at 128, 1.7 at 1024.
_ROUNDED_ROWS = 64


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
        outputs = product(rows, self.kernel[...])
        if self.lora_down is not None and self.lora_up is not None and self.lora_scale is not None:
            # Two thin products: the adapted kernel and its gradient are never formed.
            scale = lax.stop_gradient(self.lora_scale[...])
            outputs = outputs + ((rows @ self.lora_down[...]) @ self.lora_up[...]) * scale
        if self.bias is not None:
            outputs = outputs + self.bias[...][None, :]
        return outputs.reshape(*inputs.shape[:-1], -1)


def product(rows: Array, kernel: Array) -> Array:
    """Multiplies two matrices in the precision that `jax.default_matmul_precision` asks for.

    `bfloat16` rounds float32 factors to bfloat16 and adds in float32. It is what a TPU does by
    default; XLA's code for CPUs does not heed the setting, so it is done here, where there are rows
    enough for a gain. Gradients are those of the unrounded product: there the transposed factors
    cost a CPU what rounding saves.

    Args:
        rows: `[N, inputs]`.
        kernel: `[inputs, outputs]`.

    Returns:
        `[N, outputs]`, of the dtype of the factors.
    """
    exact = rows.dtype == kernel.dtype == jnp.float32 and len(rows) >= _ROUNDED_ROWS
    return _rounded_product(rows, kernel) if exact and rounds_on_cpu() else rows @ kernel


def rounds_on_cpu() -> bool:
    """Says whether `product` rounds the factors: it was asked for, and XLA does not do it."""
    return matmul_precision() == "bfloat16" and jax.default_backend() == "cpu"


def matmul_precision() -> str | None:
    """Returns `jax.default_matmul_precision` as it is; None: whatever is usual on the device."""
    return jax.config.jax_default_matmul_precision  # pyrefly: ignore[missing-attribute]  (set at run time)


@jax.custom_vjp
def _rounded_product(rows: Array, kernel: Array) -> Array:
    factors = rows.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    return jnp.matmul(*factors, preferred_element_type=jnp.float32)


def _forward(rows: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rounded_product(rows, kernel), (rows, kernel)


def _backward(factors: tuple[Array, Array], slopes: Array) -> tuple[Array, Array]:
    rows, kernel = factors
    return slopes @ kernel.T, rows.T @ slopes


_rounded_product.defvjp(_forward, _backward)

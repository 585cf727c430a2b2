"""Dot-product attention, in one place for every architecture.

Shapes: B rows, T query slots, S key slots, H query heads, G key heads (G divides H), D head width.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Implementation = Literal["matmul", "xla", "cudnn"]

# Finite, so that a slot that may attend to nothing yields numbers (which a mask then drops)
# instead of NaN, whose gradient no mask can drop.
_MASKED_SCORE = -1e9
# Widest head of cuDNN's flash attention: from Hopper (9.0) on, and before.
_HOPPER = 9.0
_WIDEST_HEAD = {True: 256, False: 128}


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """Average the values, weighted by softmax(scale · q·k + bias) over the allowed slots.

    Args:
      queries: `[B, T, H, D]`.
      keys: `[B, S, G, D]`.
      values: `[B, S, G, D]`.
      mask: bool, broadcastable to `[B, H, T, S]`, True = may attend; None: everything.
      bias: float, broadcastable to `[B, H, T, S]`, added to the scaled scores.
      scale: factor of the scores; None: 1/√D.
      implementation: "matmul" (plain products), "xla" or "cudnn" of
        `jax.nn.dot_product_attention`; None: the fastest that this backend has for these shapes.

    Returns:
      `[B, T, H, D]`, in the dtype of the queries; scores and softmax are float32. A slot that may
      attend to nothing gets finite numbers without meaning, with finite gradients.
    """
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    if implementation is None:
        # When traced, not by jax.lax.platform_dependent: under differentiation its branches keep
        # the union of what each needs, and so the weights [B, H, T, S] that cuDNN never makes.
        implementation = choose_implementation(
            queries, keys, masked=mask is not None or bias is not None, platform=_platform()
        )
    if implementation == "matmul":
        return _attend_by_matmul(queries, keys, values, mask, bias, scale)
    if implementation == "cudnn":
        mask, bias = (_with_slots(x, queries, keys) for x in (mask, bias))
        bias = None if bias is None else bias.astype(queries.dtype)
    return jax.nn.dot_product_attention(
        queries, keys, values, bias, mask, scale=scale, implementation=implementation
    )


def choose_implementation(
    queries: Array, keys: Array, *, masked: bool, platform: str
) -> Implementation:
    """Return the fastest implementation that a platform has for some arrays.

    Args:
      queries: `[B, T, H, D]`; shape and dtype are looked at.
      keys: `[B, S, G, D]`; likewise.
      masked: whether there is a mask or a bias.
      platform: of the backend: "cpu", "tpu", "gpu" or "rocm" where CUDA is not what drives the GPU,
        or "cuda:" and the compute capability, such as "cuda:9.0".

    Returns:
      An `implementation` of `attend`.
    """
    if platform == "cpu":
        # Measured in float32 on two cores: the gradient takes 0.7 to 0.8 of the time of "xla".
        return "matmul"
    if not platform.startswith("cuda:") or queries.dtype not in (jnp.bfloat16, jnp.float16):
        return "xla"
    width = queries.shape[-1]
    widest = _WIDEST_HEAD[float(platform.removeprefix("cuda:")) >= _HOPPER]
    # Its backward pass takes a mask of even sizes only.
    fits = not masked or (queries.shape[1] % 2 == 0 and keys.shape[1] % 2 == 0)
    same = queries.dtype == keys.dtype
    return "cudnn" if fits and same and width % 8 == 0 and width <= widest else "xla"


def _platform() -> str:
    """Return the platform that a trace is for, as `choose_implementation` takes it."""
    default = jax.config.jax_default_device  # pyrefly: ignore[missing-attribute]  (set at run time)
    if isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    device = jax.local_devices()[0] if default is None else default
    client = device.client
    if device.platform == "gpu" and "cuda" in client.platform_version:
        # Of all GPUs here the oldest: one program may run on any of them.
        capabilities = [float(each.compute_capability) for each in client.local_devices()]
        return f"cuda:{min(capabilities)}"
    return device.platform


def _with_slots(array: Array | None, queries: Array, keys: Array) -> Array | None:
    """Return a mask or bias that has all slots `[1 or B, 1 or H, T, S]`, as cuDNN wants it."""
    if array is None:
        return None
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return jnp.broadcast_to(array, (*array.shape[:2], queries.shape[1], keys.shape[1]))


def _attend_by_matmul(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array | None,
    bias: Array | None,
    scale: float,
) -> Array:
    rows, slots, heads, width = queries.shape
    groups = keys.shape[2]
    # Heads go before slots: one transposed copy here, and XLA's CPU code then multiplies matrices;
    # an einsum over [B, T, H, D] took 2.7 times as long. The query heads that share a key head
    # become further query slots of it: one product each.
    joined = (rows, groups, heads // groups * slots, -1)
    queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
    queries = (queries * scale).reshape(joined)
    scores = jnp.matmul(queries, keys.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, heads, slots, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, _MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    attended = (weights.reshape(joined) @ values).reshape(rows, heads, slots, width)
    return attended.swapaxes(1, 2)

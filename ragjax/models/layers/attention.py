"""Dot-product attention, in one place for every architecture.

Shapes: B rows, T query slots, S key slots, H query heads, G key heads (G divides H), D head width.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from ragjax.losses._mesh_axes import varying_alike

Implementation = Literal["matmul", "xla", "cudnn"]

# Finite, so that a slot that may attend to nothing yields numbers (which a mask then drops)
# instead of NaN, whose gradient no mask can drop.
_MASKED_SCORE = -1e9
# Widest head of cuDNN's flash attention: from Hopper (9.0) on, and before.
_HOPPER = 9.0
_WIDEST_HEAD = {True: 256, False: 128}
# Most scores of one row that are kept at a time, and of one block of queries where a row has more.
# 512 MiB in float32: 2,048 slots of 32 heads are not divided, 4,096 are, into blocks of 256.
_MOST_SCORES = 1 << 27
_SCORES_OF_BLOCK = 1 << 25


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
    """Averages the values, weighted by softmax(scale · q·k + bias) over the allowed slots.

    Args:
        queries: `[B, T, H, D]`.
        keys: `[B, S, G, D]`.
        values: `[B, S, G, D]`.
        mask: Bool, broadcastable to `[B, H, T, S]`, True = may attend; None: everything.
        bias: Float, broadcastable to `[B, H, T, S]`, added to the scaled scores.
        scale: Factor of the scores; None: 1/√D.
        implementation: "matmul" (plain products), "xla" or "cudnn" of
            `jax.nn.dot_product_attention`; None: the fastest that this backend has for these
            shapes.

    Returns:
        `[B, T, H, D]`, in the dtype of the queries; scores and softmax are float32. A slot that may
        attend to nothing gets finite numbers without meaning, with finite gradients.

    Gradients:
        To queries, keys, values and bias; "matmul" in reverse mode only (`jax.jvp` refuses).
    """
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    if implementation is None:
        # When traced, not by jax.lax.platform_dependent: under differentiation its branches keep
        # the union of what each needs, and so the weights [B, H, T, S] that cuDNN never makes.
        implementation = choose_implementation(queries, keys, platform=_platform())
    size = queries_at_once(queries, keys)
    if implementation != "cudnn" and size < queries.shape[1]:
        part = functools.partial(attend, scale=scale, implementation=implementation)
        return _attend_in_blocks(part, size, queries, keys, values, mask, bias)
    if implementation == "matmul":
        return _attend_by_matmul(queries, keys, values, mask, bias, scale)
    length = queries.shape[1]
    if implementation == "cudnn":
        mask, bias = (_with_slots(x, queries, keys) for x in (mask, bias))
        bias = None if bias is None else bias.astype(queries.dtype)
        if mask is not None or bias is not None:
            queries, keys, values, mask, bias = _even(queries, keys, values, mask, bias)
    # It mixes dtypes of its own in bfloat16, which a project may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            queries, keys, values, bias, mask, scale=scale, implementation=implementation
        )[:, :length]


def choose_implementation(queries: Array, keys: Array, *, platform: str) -> Implementation:
    """Returns the fastest implementation that a platform has for some arrays.

    Args:
        queries: `[B, T, H, D]`; shape and dtype are looked at.
        keys: `[B, S, G, D]`; likewise.
        platform: Of the backend: "cpu", "tpu", "gpu" or "rocm" where CUDA is not what drives the
            GPU, or "cuda:" and the compute capability, such as "cuda:9.0".

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
    fits = width % 8 == 0 and width <= widest
    return "cudnn" if fits and queries.dtype == keys.dtype else "xla"


def queries_at_once(queries: Array, keys: Array) -> int:
    """Returns how many of the T queries attend at a time where scores `[B, H, T, S]` are kept.

    All, unless a row has so many scores that they, not the weights or the other activations, are
    what fills the memory: 4,096 slots of 32 heads have 2 GiB a row.
    """
    slots, heads = queries.shape[1:3]
    of_query = heads * keys.shape[1]
    if slots * of_query <= _MOST_SCORES:
        return slots
    return min(slots, 1 << max(3, (_SCORES_OF_BLOCK // of_query).bit_length() - 1))


def _attend_in_blocks(
    part: Callable[..., Array],
    size: int,
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array | None,
    bias: Array | None,
) -> Array:
    """Returns `part` of all queries, which are given to it `size` at a time.

    No more than one block's scores are in memory, in the backward pass, too: it computes them
    again. XLA's own operations throughout, so any mesh divides rows and heads.
    """
    rows, slots, heads, _ = queries.shape
    blocks = -(-slots // size)

    def divided(array: Array | None, axis: int) -> Array | None:
        """Returns the array with leading blocks, where it has an axis of all the queries."""
        if array is None or array.ndim < 4 - axis or array.shape[axis - 4] == 1:
            return None
        axis += array.ndim - 4
        rest = blocks * size - slots
        array = jnp.pad(array, [(0, rest * (place == axis)) for place in range(array.ndim)])
        shape = (*array.shape[:axis], blocks, size, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis, 0)

    @jax.checkpoint
    def attend_block(block: tuple[Array | None, ...]) -> Array:
        asking, own_mask, own_bias = block
        return part(
            asking,
            keys,
            values,
            mask=mask if own_mask is None else own_mask,
            bias=bias if own_bias is None else own_bias,
        )

    attended = jax.lax.map(attend_block, (divided(queries, 1), divided(mask, 2), divided(bias, 2)))
    return jnp.moveaxis(attended, 0, 1).reshape(rows, blocks * size, heads, -1)[:, :slots]


def _platform() -> str:
    """Returns the platform that a trace is for, as `choose_implementation` takes it."""
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
    """Returns a mask or bias that has all slots `[1 or B, 1 or H, T, S]`, as cuDNN wants it."""
    if array is None:
        return None
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return jnp.broadcast_to(array, (*array.shape[:2], queries.shape[1], keys.shape[1]))


def _even(
    queries: Array, keys: Array, values: Array, mask: Array | None, bias: Array | None
) -> tuple[Array, Array, Array, Array, Array | None]:
    """Adds a masked slot to odd lengths: cuDNN's backward pass takes a mask of even sizes only."""
    lengths = queries.shape[1], keys.shape[1]
    odd_queries, odd_keys = (length % 2 for length in lengths)
    if mask is None:
        mask = jnp.ones((1, 1, *lengths), bool)
    if not odd_queries and not odd_keys:
        return queries, keys, values, mask, bias
    slots = ((0, 0), (0, 0), (0, odd_queries), (0, odd_keys))
    queries = jnp.pad(queries, ((0, 0), (0, odd_queries), (0, 0), (0, 0)))
    keys, values = (jnp.pad(x, ((0, 0), (0, odd_keys), (0, 0), (0, 0))) for x in (keys, values))
    bias = None if bias is None else jnp.pad(bias, slots)
    return queries, keys, values, jnp.pad(mask, slots), bias


def _attend_by_matmul(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array | None,
    bias: Array | None,
    scale: float,
) -> Array:
    # Heads go before slots: one transposed copy here, and XLA's CPU code then multiplies matrices;
    # an einsum over [B, T, H, D] took 2.7 times as long.
    queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
    # A mask is added as well: selecting would pass over the scores once more in either direction.
    addends = [] if bias is None else [bias.astype(jnp.float32)]
    if mask is not None:
        addends.append(jnp.where(mask, 0.0, _MASKED_SCORE))
    addends = [x.reshape((1,) * (4 - x.ndim) + x.shape) for x in addends]
    arrays = varying_alike(queries * scale, keys, values, *addends)
    return _weighted_values(*arrays).swapaxes(1, 2)


@jax.custom_vjp
def _weighted_values(queries: Array, keys: Array, values: Array, *addends: Array) -> Array:
    """Returns softmax(q·k + addends) @ values, `[B, H, T, D]`; keys and values are `[B, G, S, D]`.

    Its own backward pass takes half of the time of the derived one, on two CPU cores: it touches
    arrays `[B, H, T, S]` three times only.
    """
    return _weigh(queries, keys, values, *addends)[0]


def _weigh(queries: Array, keys: Array, values: Array, *addends: Array) -> tuple[Array, Any]:
    scores = _matmul(_grouped(queries, keys), keys.swapaxes(-1, -2))
    scores = scores.reshape(*queries.shape[:3], -1)
    for addend in addends:
        scores = scores + addend
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    attended = (_grouped(weights, keys) @ values).reshape(queries.shape)
    return attended, (queries, keys, values, addends, weights, attended)


def _weigh_backward(saved: Any, slope: Array) -> tuple[Array, ...]:
    queries, keys, values, addends, weights, attended = saved
    # What the softmax takes off, Σ_s w_s · slope_s, is the slope's product with the result.
    taken_off = (slope * attended).astype(jnp.float32).sum(axis=-1, keepdims=True)
    slopes = _grouped(slope, keys)
    to_weights = _matmul(slopes, values.swapaxes(-1, -2)).reshape(weights.shape)
    to_scores = weights * (to_weights - taken_off)
    grouped = _grouped(to_scores.astype(queries.dtype), keys)
    to_queries = (grouped @ keys).reshape(queries.shape)
    to_keys = grouped.swapaxes(-1, -2) @ _grouped(queries, keys)
    to_values = _grouped(weights, keys).swapaxes(-1, -2) @ slopes
    return to_queries, to_keys, to_values, *(_summed(to_scores, like=x) for x in addends)


_weighted_values.defvjp(_weigh, _weigh_backward)


def _grouped(array: Array, keys: Array) -> Array:
    """Returns `[B, H, T, X]` as `[B, G, H / G · T, X]`: one product for all heads of a key head."""
    return array.reshape(*keys.shape[:2], -1, array.shape[-1])


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _summed(array: Array, *, like: Array) -> Array:
    """Returns the sum over the axes along which `like` was broadcast to the array's shape."""
    axes = tuple(axis for axis, size in enumerate(like.shape) if size != array.shape[axis])
    return array.sum(axis=axes, keepdims=True).astype(like.dtype)

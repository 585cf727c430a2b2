"""Log-probs of target tokens without ever holding the logits of the whole vocabulary."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from ragjax.losses._common import Axes, wide
from ragjax.losses._mesh_axes import varying_alike

# Logits held at a time: 64 MiB in float32. Blocks below 512 entries would starve the matmul.
_BLOCK_ELEMENTS = 2**24
_SMALLEST_BLOCK = 512


def chunked_token_log_probs(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    targets: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Array:
    r"""Computes the log-prob of each target token from hidden states, in blocks of the vocabulary.

    .. math::
        \ell_t = \log p(y_t),\qquad p = \operatorname{softmax}(W h_t)

    Equals `token_log_probs(hidden @ unembedding.T, targets)`, but logits `[..., T, V]` exist for
    one block of the vocabulary only. The forward pass also keeps the softmax's mean row of the
    table, which is the gradient to the hidden states; the blocks are computed again for the
    table's gradient.

    Args:
        hidden: `[..., T, H]` floating-point, at the positions that predict the targets.
        unembedding: `[V, H]` floating-point: the embedding table where it is tied, else the
            kernel's transpose.
        targets: `[..., T]` integer token ids in 0 … V−1.
        mask: `[..., T]` bool, True = a target token; all, if not given.
        chunk_size: Vocabulary entries per block; chosen for about 64 MiB of logits, if not given.

    Returns:
        `[..., T]` log-probs in nats, float32 (float64 stays float64); 0 where masked. An id
        outside 0 … V−1 gives NaN.

    Raises:
        ValueError: Wrong rank, shape or dtype, or a block below 1.

    Gradients:
        ∂ℓ_t/∂logits = onehot(y_t) − softmax, to hidden and unembedding; none to a
        masked position's hidden state, whatever it holds (what the caller drops afterwards is not
        protected so). Reverse mode only: with several blocks `jax.jvp` refuses the custom rule. A
        table that is not differentiated costs the backward pass no product with the vocabulary.

    References:
        Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, section 3.
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024, section 4.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> hidden, table = jnp.ones((2, 3)), jnp.eye(4, 3)
        >>> log_probs = losses.chunked_token_log_probs(hidden, table, jnp.array([0, 3]))
        >>> print(np.asarray(log_probs).round(3))
        [-1.214 -2.214]
    """
    axes = Axes()
    # Not widened: the products with the vocabulary are of the inputs' dtype.
    hidden = axes.floats_as_given("hidden", hidden, "...TH")
    unembedding = axes.floats_as_given("unembedding", unembedding, "VH")
    targets = axes.integers("targets", targets, "...T")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    if mask is not None:
        mask = axes.mask("mask", mask, "...T")
        # NaN · 0 is NaN in the unembedding's gradient: what is masked must not enter the product.
        hidden = jnp.where(mask[..., None], hidden, 0.0)
    vocab = unembedding.shape[0]
    size = min(chunk_size or _default_block(vocab, targets.size), vocab)
    if size == vocab:
        # One block is what may be held: keeping its logits is faster than computing them again.
        logits = _logits(hidden, unembedding)
        logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(logits, axis=-1)
    else:
        hidden, unembedding, targets = varying_alike(hidden, unembedding, targets)
        logit, total = _logit_and_normaliser(size, hidden, unembedding, targets)
    log_probs = logit - total
    # What the look-ups made of an id outside does not matter here.
    log_probs = jnp.where((targets >= 0) & (targets < vocab), log_probs, jnp.nan)
    return log_probs if mask is None else jnp.where(mask, log_probs, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logit_and_normaliser(
    size: int, hidden: Array, table: Array, targets: Array
) -> tuple[Array, Array]:
    """Returns the target's logit and log Σ_v exp(logit), both `[..., T]`."""

    def step(carry: tuple[Array, Array], first: Any, block: Array) -> tuple[Array, Array]:
        largest, total = carry
        logits = _logits(hidden, block)  # [..., T, block]
        peak = jnp.maximum(largest, logits.max(axis=-1))
        total = total * jnp.exp(largest - peak) + jnp.exp(logits - peak[..., None]).sum(axis=-1)
        return peak, total

    logit = _row_dot(hidden, table[targets])
    zero = jnp.zeros_like(logit)
    largest, total = _over_blocks(step, (zero - jnp.inf, zero), table, size)
    return logit, jnp.log(total) + largest


def _forward(size: int, hidden: Array, table: Array, targets: Array) -> tuple[Any, Any]:
    """As `_logit_and_normaliser`, also keeping the softmax's mean row, the gradient to hidden."""

    def step(carry: tuple[Array, ...], first: Any, block: Array) -> tuple[Array, ...]:
        largest, total, mean = carry
        logits = _logits(hidden, block)  # [..., T, block]
        peak = jnp.maximum(largest, logits.max(axis=-1))
        scale, weights = jnp.exp(largest - peak), jnp.exp(logits - peak[..., None])
        # In the inputs' dtype: a float32 factor would take the matmul off the fast units.
        part = _dot(weights.astype(hidden.dtype), block, 0)  # [..., T, H]
        total = total * scale + weights.sum(axis=-1)
        return peak, total, mean * scale[..., None] + part

    logit = _row_dot(hidden, table[targets])
    zero = jnp.zeros_like(logit)
    initial = zero - jnp.inf, zero, jnp.zeros_like(hidden, dtype=logit.dtype)
    largest, total, mean = _over_blocks(step, initial, table, size)
    normaliser = jnp.log(total) + largest
    return (logit, normaliser), (hidden, table, targets, normaliser, mean / total[..., None])


def _backward(size: int, saved: Any, slopes: tuple[Array, Array]) -> tuple[Array, Array, None]:
    hidden, table, targets, normaliser, mean = saved
    to_logit, to_normaliser = slopes
    rows = table[targets].astype(to_logit.dtype)
    to_hidden = to_logit[..., None] * rows + to_normaliser[..., None] * mean
    axes = tuple(range(hidden.ndim - 1))

    def step(gradient: Array, first: Any, block: Array) -> Array:
        probs = jnp.exp(_logits(hidden, block) - normaliser[..., None])  # [..., T, block]
        column = (first + jnp.arange(block.shape[0])).astype(targets.dtype)
        hit = targets[..., None] == jnp.expand_dims(column, axes)
        to_logits = to_normaliser[..., None] * probs + jnp.where(hit, to_logit[..., None], 0.0)
        part = lax.dot_general(
            to_logits.astype(hidden.dtype),
            hidden,
            ((axes, axes), ((), ())),
            preferred_element_type=normaliser.dtype,
        )
        return lax.dynamic_update_slice_in_dim(gradient, part.astype(table.dtype), first, 0)

    return (
        to_hidden.astype(hidden.dtype),
        _over_blocks(step, jnp.zeros_like(table), table, size),
        None,
    )


_logit_and_normaliser.defvjp(_forward, _backward)


def _over_blocks(step: Callable[..., Any], carry: Any, table: Array, size: int) -> Any:
    """Runs `carry = step(carry, first row, block)` over blocks of `size` rows, the last smaller."""
    vocab = table.shape[0]
    blocks = vocab // size

    def body(carry: Any, first: Array) -> tuple[Any, None]:
        return step(carry, first, lax.dynamic_slice_in_dim(table, first, size)), None

    carry, _ = lax.scan(body, carry, size * jnp.arange(blocks))
    return step(carry, blocks * size, table[blocks * size :]) if vocab % size else carry


def _default_block(vocab: int, tokens: int) -> int:
    blocks = max(1, vocab // max(_SMALLEST_BLOCK, _BLOCK_ELEMENTS // max(1, tokens)))
    # Blocks that divide the vocabulary spare a smaller last one, whose logits are held besides.
    blocks = next((n for n in range(blocks, 2 * blocks + 1) if vocab % n == 0), blocks)
    return vocab // blocks


def _row_dot(hidden: Array, rows: Array) -> Array:
    dtype = wide(hidden, rows)
    return jnp.sum(hidden.astype(dtype) * rows.astype(dtype), axis=-1)


def _dot(left: Array, right: Array, axis: int) -> Array:
    """Contracts the last axis of `left` with one of `right`, added up in float32 (or wider)."""
    contracted = (((left.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, contracted, preferred_element_type=wide(left, right))


def _logits(hidden: Array, table: Array) -> Array:
    return _dot(hidden, table, 1)

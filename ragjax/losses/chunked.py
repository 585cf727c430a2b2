"""Log-probs of target tokens without ever holding the logits of the whole vocabulary."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from ragjax.losses._common import fraction

# Logits held at a time: 64 MiB in float32. Blocks below 512 entries would starve the matmul.
_BLOCK_ELEMENTS = 2**24
_SMALLEST_BLOCK = 512


def chunked_token_log_probs(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    targets: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Array:
    r"""Computes the log-prob of each target token from hidden states, in blocks of the vocabulary.

    .. math::
        \ell_t = (1 - \epsilon) \log p(y_t) + \frac{\epsilon}{V} \sum_v \log p(v),\qquad
        p = \operatorname{softmax}(W h_t)

    Equals `token_log_probs(hidden @ unembedding.T, targets)`, but logits `[..., T, V]` exist for
    one block of the vocabulary only, and are computed again in the backward pass.

    Args:
        hidden: `[..., T, H]` floating-point, at the positions that predict the targets.
        unembedding: `[V, H]` floating-point: the embedding table where it is tied, else the
            kernel's transpose.
        targets: `[..., T]` integer token ids in 0 … V−1.
        mask: `[..., T]` bool, True = a target token; all, if not given.
        label_smoothing: scalar ε in 0 … 1, 1 excluded.
        chunk_size: vocabulary entries per block; chosen for about 64 MiB of logits, if not given.

    Returns:
        `[..., T]` log-probs in nats, float32 (float64 stays float64); 0 where masked. An id
        outside 0 … V−1 gives NaN.

    Raises:
        ValueError: wrong rank, shape or dtype, smoothing out of range, or a block below 1.

    Gradients:
        ∂ℓ_t/∂logits = (1 − ε) onehot(y_t) + ε / V − softmax, to hidden and unembedding; none to a
        masked position's hidden state, whatever it holds. Only `mask` gives that protection: NaN
        states dropped from the result by the caller still reach the unembedding's gradient.

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
    hidden, unembedding, targets = map(jnp.asarray, (hidden, unembedding, targets))
    _check(hidden, unembedding, targets, mask, chunk_size)
    fraction("label_smoothing", label_smoothing)
    if mask is not None:
        # NaN · 0 is NaN in the unembedding's gradient: what is masked must not enter the product.
        hidden = jnp.where(jnp.asarray(mask)[..., None], hidden, 0.0)
    vocab = unembedding.shape[0]
    size = chunk_size or max(_SMALLEST_BLOCK, _BLOCK_ELEMENTS // max(1, targets.size))
    blocks = max(1, vocab // min(size, vocab))
    if chunk_size is None:
        # Blocks that divide the vocabulary spare a copy of the table (here and in its gradient).
        blocks = next((n for n in range(blocks, 2 * blocks + 1) if vocab % n == 0), blocks)
    size = vocab // blocks if chunk_size is None else min(size, vocab)
    whole = blocks * size

    def score(first: Array | int, table: Array) -> tuple[Array, Array]:
        """Returns the log of the block's share of the normaliser, and the target's logit or 0."""
        logits = _logits(hidden, table)  # [..., T, block]
        column = targets - first
        inside = (column >= 0) & (column < table.shape[0])
        column = jnp.clip(column, 0, table.shape[0] - 1)[..., None]
        chosen = jnp.take_along_axis(logits, column, axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1), jnp.where(inside, chosen, 0.0)

    # A block's logits are computed again in the backward pass: keeping them is what blocks avoid.
    again = jax.checkpoint(score)
    if whole == size:
        parts = [again(0, unembedding[:size])]
        normaliser, chosen = parts[0][0][None], parts[0][1][None]
    else:
        tables = unembedding[:whole].reshape(blocks, size, -1)
        normaliser, chosen = lax.map(lambda part: again(*part), (size * jnp.arange(blocks), tables))
    if whole < vocab:
        rest = again(whole, unembedding[whole:])
        normaliser = jnp.concatenate([normaliser, rest[0][None]])
        chosen = jnp.concatenate([chosen, rest[1][None]])
    logit, total = chosen.sum(axis=0), jax.nn.logsumexp(normaliser, axis=0)
    log_probs = logit - total
    if not isinstance(label_smoothing, int | float) or label_smoothing > 0:
        # The mean logit is the logit of the mean row: no block is needed for it.
        mean = unembedding.astype(log_probs.dtype).mean(axis=0, keepdims=True)
        everything = _logits(hidden.astype(log_probs.dtype), mean)[..., 0] - total
        log_probs = (1 - label_smoothing) * log_probs + label_smoothing * everything
    log_probs = jnp.where((targets >= 0) & (targets < vocab), log_probs, jnp.nan)
    return log_probs if mask is None else jnp.where(jnp.asarray(mask), log_probs, 0.0)


def _logits(hidden: Array, table: Array) -> Array:
    dtype = jnp.promote_types(jnp.result_type(hidden, table), jnp.float32)
    contracted = (((hidden.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(hidden, table, contracted, preferred_element_type=dtype)


def _check(
    hidden: Array, unembedding: Array, targets: Array, mask: ArrayLike | None, size: int | None
) -> None:
    def expect(name: str, array: Array, right: bool, words: str) -> None:
        if not right:
            raise ValueError(f"{name}: expected {words}, got {array.dtype}{list(array.shape)}.")

    def floating(array: Array) -> bool:
        return bool(jnp.issubdtype(array.dtype, jnp.floating))

    expect(
        "hidden",
        hidden,
        hidden.ndim >= 2 and floating(hidden),
        "a floating-point array of shape [..., T, H]",
    )
    width, slots = hidden.shape[-1], list(hidden.shape[:-1])
    right = unembedding.ndim == 2 and unembedding.shape[1] == width and floating(unembedding)
    words = f"a floating-point array of shape [V, H={width} (as hidden)]"
    expect("unembedding", unembedding, right, words)
    right = list(targets.shape) == slots and bool(jnp.issubdtype(targets.dtype, jnp.integer))
    expect("targets", targets, right, f"an integer array of shape {slots} (as hidden)")
    if mask is not None:
        keep = jnp.asarray(mask)
        right = list(keep.shape) == slots and keep.dtype == jnp.bool_
        expect("mask", keep, right, f"a bool array (True = keep) of shape {slots} (as hidden)")
    if size is not None and size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {size}.")

"""Argument checks and masked reductions shared by the losses.

Axis letters: `B` queries, `K` documents per query, `T` target tokens, `M` candidates.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class Axes:
    """Checks arguments against axis letters; a letter means one size in the whole call."""

    def __init__(self) -> None:
        """Starts with no size known."""
        self._sizes: dict[str, tuple[int, str]] = {}

    def floats(self, name: str, value: ArrayLike, letters: str) -> Array:
        """Returns `value` in float32 (or wider), checked to be floating-point of shape `letters`.

        Args:
            name: the argument's name, for the error.
            value: what the caller passed.
            letters: one letter per axis, such as `"BKT"`.

        Raises:
            ValueError: not floating-point, wrong rank, or a size that differs from an argument
                checked before.
        """
        array = self._checked(name, value, letters, jnp.floating, "floating-point")
        # Sums of log-probs and softmax lose whole nats in bfloat16.
        return array.astype(jnp.promote_types(array.dtype, jnp.float32))

    def integers(self, name: str, value: ArrayLike, letters: str) -> Array:
        """Returns `value`, checked to be integer of shape `letters`; raises as `floats`."""
        return self._checked(name, value, letters, jnp.integer, "integer")

    def mask(self, name: str, value: ArrayLike | None, letters: str) -> Array:
        """Returns `value`, checked to be bool of shape `letters`; `None` keeps everything.

        Raises as `floats`. Every letter must have been seen before.
        """
        if value is None:
            return jnp.ones([self._sizes[letter][0] for letter in letters], bool)
        return self._checked(name, value, letters, jnp.bool_, "bool (True = keep)")

    def _checked(self, name: str, value: ArrayLike, letters: str, kind: Any, words: str) -> Array:
        array = jnp.asarray(value)
        known = [self._sizes.get(letter, (None, ""))[0] for letter in letters]
        right_shape = array.ndim == len(letters) and all(
            size in (None, got) for size, got in zip(known, array.shape, strict=True)
        )
        if not right_shape or not jnp.issubdtype(array.dtype, kind):
            axes = ", ".join(map(self._describe, letters))
            raise ValueError(
                f"{name}: expected a {words} array of shape [{axes}], "
                f"got {array.dtype}{list(array.shape)}."
            )
        for letter, size in zip(letters, array.shape, strict=True):
            self._sizes.setdefault(letter, (size, name))
        return array

    def _describe(self, letter: str) -> str:
        if letter not in self._sizes:
            return letter
        size, source = self._sizes[letter]
        return f"{letter}={size} (as {source})"


def answer_log_probs(
    axes: Axes, name: str, value: ArrayLike, token_mask: ArrayLike | None
) -> Array:
    """Returns log p_LM(y | c∘x) `[B, K]`, summed over tokens where tokens are given.

    Args:
        axes: the call's checker.
        name: the argument's name, for the error.
        value: `[B, K, T]` per token, or `[B, K]` already summed.
        token_mask: `[B, T]` bool or None; must be None with `[B, K]`.

    Raises:
        ValueError: wrong rank, shape or dtype, or a token mask without tokens.
    """
    if jnp.ndim(value) != 2:
        log_probs = axes.floats(name, value, "BKT")
        keep = axes.mask("token_mask", token_mask, "BT")
        return jnp.sum(jnp.where(keep[:, None, :], log_probs, 0.0), axis=2)
    if token_mask is not None:
        raise ValueError(
            f"token_mask: expected None, because {name} of shape {list(jnp.shape(value))} is "
            f"already summed over tokens, got shape {list(jnp.shape(token_mask))}."
        )
    return axes.floats(name, value, "BK")


def positive_scalar(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a scalar above 0; one traced by jit is not looked at."""
    if jnp.ndim(value) or (is_known(value) and not 0 < float(value) < float("inf")):
        raise ValueError(f"{name}: expected a finite scalar above 0, got {value}.")


def fraction(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a scalar in 0 … 1, 1 excluded; as `positive_scalar`."""
    if jnp.ndim(value) or (is_known(value) and not 0 <= float(value) < 1):
        raise ValueError(f"{name}: expected a scalar of at least 0 and below 1, got {value}.")


def is_known(value: ArrayLike) -> bool:
    """Says whether the value can be looked at now, i.e. is not traced by jit, vmap or grad."""
    return not isinstance(value, jax.core.Tracer)


def masked_logsumexp(values: Array, mask: Array, *, axis: int) -> Array:
    """Returns log Σ exp over the kept entries; 0 with gradient 0 where none is kept.

    Args:
        values: floating-point, any shape; masked entries may hold anything.
        mask: bool, same shape, True = keep.
        axis: the axis to reduce.

    Returns:
        `values.shape` without `axis`.
    """
    total = jax.nn.logsumexp(jnp.where(mask, values, -jnp.inf), axis=axis)
    return jnp.where(mask.any(axis), total, 0.0)


def masked_log_softmax(values: Array, mask: Array) -> Array:
    """Returns the log-softmax of the kept entries over the last axis; -inf at the others.

    Args:
        values: `[B, K]` floating-point; masked entries may hold anything.
        mask: `[B, K]` bool, True = keep.

    Returns:
        `[B, K]` log-probs; a row with no kept entry is all -inf, with gradient 0.
    """
    # A row of nothing but -inf becomes NaN: the outer `where` replaces it, and the inner one keeps
    # its gradient from the values.
    log_probs = jax.nn.log_softmax(jnp.where(mask, values, -jnp.inf))
    return jnp.where(mask, log_probs, -jnp.inf)


def masked_kl(p_log_probs: Array, q_log_probs: Array, mask: Array) -> Array:
    """Returns KL(p‖q) `[B]` over the kept entries; an entry with p = 0 contributes 0.

    Args:
        p_log_probs: `[B, K]` log p, normalised over the kept entries; may be -inf.
        q_log_probs: `[B, K]` log q, likewise; -inf where p > 0 makes the result +inf.
        mask: `[B, K]` bool, True = keep.
    """
    # 0 · (-inf) is NaN, in the value and in the gradient: replace the arguments, not the product.
    # `!=` and not `>`, which would also drop a NaN and so hide it.
    support = mask & (p_log_probs != -jnp.inf)
    p_log_probs = jnp.where(support, p_log_probs, 0.0)
    q_log_probs = jnp.where(support, q_log_probs, 0.0)
    return jnp.sum(jnp.exp(p_log_probs) * (p_log_probs - q_log_probs), axis=1)

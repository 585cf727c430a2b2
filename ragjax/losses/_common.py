"""Argument checks and masked reductions shared by the losses.

Axis letters: `K` documents per query, `T` target tokens; `...` stands for any leading axes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class Axes:
    """Checks arguments against axis letters; a letter means one size in the whole call.

    Letters such as `"...KT"`: one per axis, where `...` stands for the leading axes, none
    included, which are the same in every argument that has them.
    """

    def __init__(self) -> None:
        """Starts with no size known."""
        self._sizes: dict[str, tuple[Any, str]] = {}

    def floats(self, name: str, value: ArrayLike, letters: str) -> Array:
        """Returns `value` in float32 (or wider), checked to be floating-point of shape `letters`.

        Args:
            name: The argument's name, for the error.
            value: What the caller passed.
            letters: One letter per axis, such as `"...KT"`.

        Raises:
            ValueError: Not floating-point, wrong rank, or a size that differs from an argument
                checked before.
        """
        array = self.floats_as_given(name, value, letters)
        # Sums of log-probs and softmax lose whole nats in bfloat16.
        return array.astype(wide(array))

    def floats_as_given(self, name: str, value: ArrayLike, letters: str) -> Array:
        """Returns `value` in its own dtype, checked and raising as `floats`."""
        return self._checked(name, value, letters, jnp.floating, "a floating-point")

    def integers(self, name: str, value: ArrayLike, letters: str) -> Array:
        """Returns `value` in int32 or wider, checked to be integer; raises as `floats`."""
        array = self._checked(name, value, letters, jnp.integer, "an integer")
        # An int8 cannot even be compared with the size of a vocabulary.
        return array if array.dtype.itemsize >= 4 else array.astype(jnp.int32)

    def mask(self, name: str, value: ArrayLike | None, letters: str) -> Array:
        """Returns `value`, checked to be bool of shape `letters`; `None` keeps everything.

        Raises as `floats`. Every letter must have been seen before.
        """
        if value is None:
            named = (self._sizes[letter][0] for letter in letters.removeprefix("..."))
            return jnp.ones([*self._sizes["..."][0], *named], bool)
        return self._checked(name, value, letters, jnp.bool_, "a bool (True = keep)")

    def answers(self, name: str, value: ArrayLike, token_mask: ArrayLike | None) -> Array:
        """Returns log p_LM(y | c∘x) `[..., K]`, summed over tokens where tokens are given.

        Args:
            name: The argument's name, for the error.
            value: `[..., K, T]` per token, or `[..., K]` already summed. The leading axes must
                have been seen before: they tell one from the other.
            token_mask: `[..., T]` bool or None; must be None with `[..., K]`.

        Raises:
            ValueError: Wrong rank, shape or dtype, or a token mask without tokens.
        """
        leading, _ = self._sizes["..."]
        if jnp.ndim(value) != len(leading) + 1:
            log_probs = self.floats(name, value, "...KT")
            keep = self.mask("token_mask", token_mask, "...T")
            return jnp.sum(jnp.where(keep[..., None, :], log_probs, 0.0), axis=-1)
        if token_mask is not None:
            raise ValueError(
                f"token_mask: expected None, because {name} of shape {list(jnp.shape(value))} is "
                f"already summed over tokens, got shape {list(jnp.shape(token_mask))}"
            )
        return self.floats(name, value, "...K")

    def _checked(self, name: str, value: ArrayLike, letters: str, kind: Any, words: str) -> Array:
        array = jnp.asarray(value)
        named = letters.removeprefix("...")
        axes, sizes = list(named), [*array.shape]
        if named != letters:
            first = array.ndim - len(named)
            axes, sizes = ["...", *axes], [sizes[:first], *sizes[first:]]
        right_shape = len(axes) == len(sizes) and all(
            self._sizes.get(axis, (size, ""))[0] == size
            for axis, size in zip(axes, sizes, strict=True)
        )
        if not right_shape or not jnp.issubdtype(array.dtype, kind):
            expected = ", ".join(map(self._describe, axes))
            raise ValueError(
                f"{name}: expected {words} array of shape [{expected}], "
                f"got {array.dtype}{list(array.shape)}"
            )
        for axis, size in zip(axes, sizes, strict=True):
            self._sizes.setdefault(axis, (size, name))
        return array

    def _describe(self, axis: str) -> str:
        if axis not in self._sizes:
            return axis
        size, source = self._sizes[axis]
        return f"{axis}={size} (as {source})"


def alike(*arrays: Array) -> list[Array]:
    """Returns the arrays in the widest of their dtypes, at least float32."""
    dtype = wide(*arrays)
    return [array.astype(dtype) for array in arrays]


def wide(*arrays: Array) -> jnp.dtype:
    """Returns the widest of the arrays' dtypes, at least float32."""
    # Not `promote_types`, which refuses to mix dtypes where a project has set it to be strict.
    dtypes = [jnp.dtype(jnp.float32), *(array.dtype for array in arrays)]
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


def checked_docs(doc_mask: ArrayLike | None, **arrays: ArrayLike) -> list[Array]:
    """Returns arrays `[..., K]` in float32 (or wider) by name, checked, then the document mask."""
    axes = Axes()
    checked = alike(*(axes.floats(name, value, "...K") for name, value in arrays.items()))
    return [*checked, axes.mask("doc_mask", doc_mask, "...K")]


def checked_answers(
    doc_scores: ArrayLike,
    log_probs: ArrayLike,
    doc_mask: ArrayLike | None,
    token_mask: ArrayLike | None,
    name: str = "log_probs",
) -> tuple[Axes, Array, Array, Array]:
    """Returns the checker, scores, summed answer log-probs and document mask, each `[..., K]`.

    Args:
        doc_scores: `[..., K]`.
        log_probs: As `Axes.answers` takes it.
        doc_mask: `[..., K]` bool or None.
        token_mask: `[..., T]` bool or None.
        name: What the caller calls `log_probs`, for the error.

    Raises:
        ValueError: As `Axes.answers`.
    """
    axes = Axes()
    scores = axes.floats("doc_scores", doc_scores, "...K")
    scores, answers = alike(scores, axes.answers(name, log_probs, token_mask))
    return axes, scores, answers, axes.mask("doc_mask", doc_mask, "...K")


def positive_scalar(name: str, value: Any, dtype: Any) -> float | Array:
    """Returns `value` as a factor of arrays of `dtype`, whatever its own.

    Raises:
        ValueError: It is not a scalar above 0; one traced by jit is not looked at.
    """
    if jnp.ndim(value) or (is_known(value) and not 0 < float(value) < float("inf")):
        raise ValueError(f"{name}: expected a finite scalar above 0, got {value}")
    return _factor(value, dtype)


def weight_scalar(name: str, value: Any, dtype: Any) -> float | Array:
    """Returns `value` as `positive_scalar` does, if it is finite and at least 0."""
    if jnp.ndim(value) or (is_known(value) and not 0 <= float(value) < float("inf")):
        raise ValueError(f"{name}: expected a finite scalar of at least 0, got {value}")
    return _factor(value, dtype)


def _factor(value: Any, dtype: Any) -> float | Array:
    # A Python number takes the dtype of what it meets; NumPy's have one of their own.
    return float(value) if is_known(value) else value.astype(dtype)


def is_known(value: ArrayLike) -> bool:
    """Says whether the value can be looked at now, i.e. is not traced by jit, vmap or grad."""
    return not isinstance(value, jax.core.Tracer)


def masked_logsumexp(values: Array, mask: Array, *, axis: int) -> Array:
    """Returns log Σ exp over the kept entries; 0 with gradient 0 where none is kept.

    Where all that is kept is -inf, the result is -inf, with gradient 0.

    Args:
        values: Floating-point, any shape; masked entries may hold anything.
        mask: Bool, same shape, True = keep.
        axis: The axis to reduce.

    Returns:
        `values.shape` without `axis`.
    """
    kept, some = _kept(values, mask, axis)
    total = jax.nn.logsumexp(kept, axis=axis)
    return jnp.where(some, total, jnp.where(mask.any(axis), -jnp.inf, 0.0))


def masked_log_softmax(values: Array, mask: Array) -> Array:
    """Returns the log-softmax of the kept entries over the last axis; -inf at the others.

    Args:
        values: `[..., K]` floating-point; masked entries may hold anything.
        mask: `[..., K]` bool, True = keep.

    Returns:
        `[..., K]` log-probs; a row that keeps no entry, or none but -inf, is all -inf, with
        gradient 0.
    """
    kept, some = _kept(values, mask, -1)
    return jnp.where(mask & some[..., None], jax.nn.log_softmax(kept), -jnp.inf)


def masked_kl(p_log_probs: Array, q_log_probs: Array, mask: Array) -> Array:
    """Returns KL(p‖q) `[...]` over the kept entries; an entry with p = 0 contributes 0.

    Args:
        p_log_probs: `[..., K]` log p, normalised over the kept entries; may be -inf.
        q_log_probs: `[..., K]` log q, likewise; -inf where p > 0 makes the result +inf, with
            gradient 0.
        mask: `[..., K]` bool, True = keep.
    """
    # 0 · (-inf) is NaN, in the value and in the gradient: replace the arguments, not the product.
    # `!=` and not `>`, which would also drop a NaN and so hide it.
    support = mask & (p_log_probs != -jnp.inf)
    infinite = support & (q_log_probs == -jnp.inf)
    p_log_probs = jnp.where(support, p_log_probs, 0.0)
    q_log_probs = jnp.where(support & ~infinite, q_log_probs, 0.0)
    total = jnp.sum(jnp.exp(p_log_probs) * (p_log_probs - q_log_probs), axis=-1)
    return jnp.where(infinite.any(axis=-1), jnp.inf, total)


def _kept(values: Array, mask: Array, axis: int) -> tuple[Array, Array]:
    """Returns the values, -inf where masked, and where along `axis` one of them is not -inf.

    Of nothing but -inf a softmax makes NaN, in the value and in the gradient: there the values are
    replaced by 0, for the caller to replace the result.
    """
    kept = jnp.where(mask, values, -jnp.inf)
    # `!=` and not `>`: a NaN stays visible.
    some = (kept != -jnp.inf).any(axis)
    return jnp.where(jnp.expand_dims(some, axis), kept, 0.0), some

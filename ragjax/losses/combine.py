"""Several objectives in one training step."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ragjax.losses._common import Axes, alike


class CombinedLoss(NamedTuple):
    """A weighted sum and its parts."""

    total: Array
    """`[...]` Σ_n weight_n · loss_n."""
    parts: dict[str, Array]
    """Each loss `[...]` as it came, without its weight."""


def combine_losses(
    parts: Mapping[str, ArrayLike], weights: Mapping[str, float | Array]
) -> CombinedLoss:
    r"""Weighs losses and reports each.

    .. math::
        L = \sum_n \lambda_n L_n

    Args:
        parts: Losses `[...]` by name.
        weights: A scalar λ for each name. A weight of 0 turns a loss off: it is reported, and what
            it holds, NaN included, reaches neither the total nor the gradient.

    Returns:
        `CombinedLoss`.

    Raises:
        ValueError: No loss, names that differ, a wrong shape or dtype.

    Gradients:
        λ_n to every loss.

    References:
        Izacard et al., Atlas: Few-shot Learning with Retrieval Augmented Language Models, 2023,
        section 2.2 (language-model and retriever losses in one step).

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> combined = losses.combine_losses(
        ...     {"marginal": jnp.array([2.0]), "lsr": jnp.array([1.0])},
        ...     {"marginal": 1.0, "lsr": 0.5})
        >>> print(combined.total, sorted(combined.parts))
        [2.5] ['lsr', 'marginal']
    """
    if not parts or set(parts) != set(weights):
        raise ValueError(
            f"weights: expected one for each of {sorted(parts)}, got {sorted(weights)}"
        )
    axes = Axes()
    floats = alike(*(axes.floats(name, loss, "...") for name, loss in parts.items()))
    checked = dict(zip(parts, floats, strict=True))
    total = jnp.zeros_like(next(iter(checked.values())))
    for name, loss in checked.items():
        weight = jnp.asarray(weights[name])
        if weight.ndim:
            raise ValueError(f"weights[{name!r}]: expected a scalar, got shape {weight.shape}")
        total = total + weight.astype(loss.dtype) * jnp.where(weight == 0, 0.0, loss)
    return CombinedLoss(total, checked)

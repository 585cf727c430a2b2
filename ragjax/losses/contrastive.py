"""Supervised retrieval: the gold document against all other candidates."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ragjax.losses._common import Axes, is_known, masked_log_softmax


def info_nce_loss(
    scores: ArrayLike, positives: ArrayLike, *, mask: ArrayLike | None = None
) -> Array:
    r"""Computes the softmax cross-entropy of the gold document among all candidates.

    .. math::
        L = -\log \frac{\exp(s_{+})}{\sum_m \exp(s_m)}

    loss = −log softmax_m(s_m)[positive]. The M candidates of a query are usually every document
    of the global batch: its own, the other queries' (in-batch negatives) and hard negatives.

    Args:
        scores: `[..., M]` live, differentiable scores, already scaled.
        positives: `[...]` integer, the column of each query's gold document.
        mask: `[..., M]` bool, True = keep; all, if not given. False drops a false negative, such as
            another copy of the gold document. The gold column itself is always kept, so
            `doc_ids != gold_id` is a fit mask; but a row that is all False is no query.

    Returns:
        `[...]` in nats, float32. A row with an all-False mask has loss 0 and gradient 0.

    Raises:
        ValueError: Wrong rank, shape or dtype, or a positive outside 0 … M−1 in a row that has
            candidates. Under jit or vmap the values cannot be looked at, and the loss is NaN.

    Gradients:
        ∂/∂scores = softmax(scores) − onehot(positive) over the kept columns, 0 elsewhere.

    References:
        Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, 2020,
        section 3.2.
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018,
        section 2.3.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> scores = jnp.zeros((1, 4))
        >>> print(np.asarray(losses.info_nce_loss(scores, jnp.array([2]))).round(3))  # log 4
        [1.386]
    """
    axes = Axes()
    scores = axes.floats("scores", scores, "...M")
    positives = axes.integers("positives", positives, "...")
    mask = axes.mask("mask", mask, "...M")
    size = scores.shape[-1]
    has_candidates = mask.any(axis=-1)
    out_of_range = has_candidates & ((positives < 0) | (positives >= size))
    if is_known(out_of_range) and out_of_range.any():
        raise ValueError(
            f"positives: expected columns in 0 … {size - 1} (scores has M={size}), "
            f"got {positives.tolist()}"
        )
    is_positive = jax.nn.one_hot(positives, size, dtype=bool)  # [..., M]
    keep = (mask | is_positive) & has_candidates[..., None]
    log_probs = masked_log_softmax(scores, keep)
    chosen = jnp.sum(jnp.where(is_positive & keep, log_probs, 0.0), axis=-1)
    return jnp.where(out_of_range, jnp.nan, -chosen)

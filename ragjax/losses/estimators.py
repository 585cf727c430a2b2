"""Gradients through the choice of documents: Gumbel top-k and REINFORCE.

Letters: `S` sampled documents per query.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from ragjax.losses._common import (
    Axes,
    alike,
    checked_docs,
    is_known,
    masked_log_softmax,
    positive_scalar,
)


class SampledDocs(NamedTuple):
    """Documents drawn without replacement."""

    indices: Array
    """`[..., S]` int32, columns of the documents in the order of drawing; 0 where mask is False."""
    weights: Array
    """`[..., S, K]` one-hot rows; their gradient is that of a softmax (straight-through)."""
    mask: Array
    """`[..., S]` bool, False where fewer than S documents were left."""


def gumbel_top_k(
    doc_scores: ArrayLike,
    key: Array,
    *,
    num_samples: int,
    temperature: float | Array = 1.0,
    doc_mask: ArrayLike | None = None,
) -> SampledDocs:
    r"""Draws documents without replacement from p_R, differentiably (straight-through).

    .. math::
        w_i = \operatorname{onehot}\big(\arg\max_{c \notin w_{<i}} (s_c + G_c)\big)
        \quad\text{forward,}\qquad
        \operatorname{softmax}_{c \notin w_{<i}}\big((s_c + G_c) / \tau\big) \quad\text{backward}

    with G standard Gumbel noise: the order is that of successive draws from p_R.

    Args:
        doc_scores: `[..., K]` live, differentiable retrieval scores, already scaled.
        key: A `jax.random` key.
        num_samples: S, documents drawn per query, 1 … K.
        temperature: Scalar τ > 0 of the relaxed draw.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `SampledDocs`.

    Raises:
        ValueError: Wrong rank, shape or dtype, S out of range, τ not a positive scalar.

    Gradients:
        Biased, low variance: through `weights` to `doc_scores`, as if drawing were the softmax.

    References:
        Kool et al., Stochastic Beams and Where to Find Them, 2019, section 2.
        Zamani and Bendersky, Stochastic RAG: End-to-End Retrieval-Augmented Generation through
        Expected Utility Maximization, 2024, section 2.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> doc_scores = jnp.array([[0.0, 50.0, 100.0]])
        >>> docs = losses.gumbel_top_k(doc_scores, jax.random.key(0), num_samples=2)
        >>> print(docs.indices)
        [[2 1]]
    """
    scores, left = checked_docs(doc_mask, doc_scores=doc_scores)
    temperature = positive_scalar("temperature", temperature, scores.dtype)
    size = scores.shape[-1]
    if not 1 <= num_samples <= size:
        raise ValueError(f"num_samples: expected 1 … K={size}, got {num_samples}")
    noisy = scores + jax.random.gumbel(key, scores.shape, scores.dtype)
    indices, weights, masks = [], [], []
    for _ in range(num_samples):
        soft = jnp.exp(masked_log_softmax(noisy / temperature, left))
        any_left = left.any(axis=-1)
        index = jnp.argmax(jnp.where(left, noisy, -jnp.inf), axis=-1)
        hard = jax.nn.one_hot(index, size, dtype=bool) & any_left[..., None]
        # Forward exactly the one-hot row, backward the softmax.
        weights.append(hard.astype(soft.dtype) + (soft - lax.stop_gradient(soft)))
        indices.append(index)  # 0 where none is left
        masks.append(any_left)
        left = left & ~hard
    return SampledDocs(jnp.stack(indices, -1), jnp.stack(weights, -2), jnp.stack(masks, -1))


def stochastic_rag_loss(
    doc_scores: ArrayLike,
    utilities: ArrayLike,
    key: Array,
    *,
    num_samples: int,
    temperature: float | Array = 1.0,
    doc_mask: ArrayLike | None = None,
) -> Array:
    r"""Computes the negative mean utility of documents drawn with Gumbel top-k.

    .. math::
        L = -\frac1S \sum_i \sum_c w_{ic}\, u_c

    Args:
        doc_scores: `[..., K]` live, differentiable retrieval scores, already scaled.
        utilities: `[..., K]` what the answer is worth given each document: p_LM(y|c∘x), its log, or
            a metric such as F1 of the generated answer; larger is better.
        key: A `jax.random` key.
        num_samples: S, documents drawn per query, 1 … K.
        temperature: Scalar τ > 0 of the relaxed draw.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `[...]` float32, in the utility's unit with its sign changed. 0 without a document; +inf,
        with gradient 0, where a document's utility is -inf.

    Raises:
        ValueError: As `gumbel_top_k`.

    Gradients:
        To doc_scores straight through (biased); to the utilities of the drawn documents −1/S.

    References:
        Zamani and Bendersky, Stochastic RAG: End-to-End Retrieval-Augmented Generation through
        Expected Utility Maximization, 2024, section 2.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> doc_scores, utilities = jnp.array([[0.0, 99.0]]), jnp.array([[0.1, 0.7]])
        >>> print(losses.stochastic_rag_loss(
        ...     doc_scores, utilities, jax.random.key(0), num_samples=1))
        [-0.7]
    """
    scores, utilities, keep = checked_docs(doc_mask, doc_scores=doc_scores, utilities=utilities)
    docs = gumbel_top_k(
        scores, key, num_samples=num_samples, temperature=temperature, doc_mask=keep
    )
    # A weight of 0 times -inf is NaN; what the documents are worth on average is -inf.
    worthless = keep & (utilities == -jnp.inf)
    utilities = jnp.where(keep & ~worthless, utilities, 0.0)
    total = jnp.einsum("...sk,...k->...", docs.weights, utilities)
    mean = total / jnp.maximum(docs.mask.sum(axis=-1), 1).astype(total.dtype)
    return jnp.where(worthless.any(axis=-1), jnp.inf, -mean)


def reinforce_loss(
    doc_scores: ArrayLike,
    samples: ArrayLike,
    utilities: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
) -> Array:
    r"""Computes REINFORCE with the leave-one-out baseline for the expected utility of retrieval.

    .. math::
        L = -\frac1S \sum_i \operatorname{sg}\Big(u_i - \frac1{S-1} \sum_{j \ne i} u_j\Big)
            \log p_R(c_i|x)

    Its gradient is an unbiased estimate of −∂/∂s Σ_c p_R(c) u_c when the S documents were drawn
    independently from p_R (`jax.random.categorical`), which may repeat one. Its value means
    nothing.

    Args:
        doc_scores: `[..., K]` live, differentiable retrieval scores, already scaled.
        samples: `[..., S]` integer, columns of the drawn documents, S ≥ 2.
        utilities: `[..., S]` observed utility of each draw; larger is better.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `[...]` float32. A query with no document has loss 0 and gradient 0; one with a utility of
        -inf has loss +inf and gradient 0.

    Raises:
        ValueError: Wrong rank, shape or dtype, fewer than two draws, or a column outside
            0 … K−1. Under jit or vmap the values cannot be looked at, and the loss is NaN.

    Gradients:
        To doc_scores only.

    References:
        Williams, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
        Learning, 1992, section 3. Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free!,
        2019, section 2.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> slope = jax.grad(lambda s: losses.reinforce_loss(
        ...     s, jnp.array([[0, 1]]), jnp.array([[1.0, 0.0]])).sum())(jnp.zeros((1, 2)))
        >>> print(slope)  # descent raises the score of document 0
        [[-0.5  0.5]]
    """
    axes = Axes()
    scores = axes.floats("doc_scores", doc_scores, "...K")
    samples = axes.integers("samples", samples, "...S")
    scores, utilities = alike(scores, axes.floats("utilities", utilities, "...S"))
    keep = axes.mask("doc_mask", doc_mask, "...K")
    size, draws = scores.shape[-1], samples.shape[-1]
    if draws < 2:
        raise ValueError(f"samples: expected at least 2 draws per query, got S={draws}")
    outside = keep.any(axis=-1, keepdims=True) & ((samples < 0) | (samples >= size))
    if is_known(outside) and outside.any():
        raise ValueError(
            f"samples: expected columns in 0 … {size - 1} (doc_scores has K={size}), "
            f"got {samples.tolist()}"
        )
    # A look-up beyond the columns would fill in True for the mask.
    samples = jnp.clip(samples, 0, size - 1)
    log_probs = jnp.take_along_axis(masked_log_softmax(scores, keep), samples, axis=-1)
    kept = jnp.take_along_axis(keep, samples, axis=-1)
    # The advantage over a draw of -inf is infinite, and NaN among the others.
    worthless = kept & (utilities == -jnp.inf)
    utilities = jnp.where(kept & ~worthless, utilities, 0.0)
    # A baseline of the other draws leaves the estimate unbiased; utilities carry no gradient.
    total = utilities.sum(axis=-1, keepdims=True)
    advantage = lax.stop_gradient((draws * utilities - total) / (draws - 1))
    terms = advantage * jnp.where(kept, log_probs, 0.0)
    loss = -jnp.where(outside, jnp.nan, terms).mean(axis=-1)
    return jnp.where(worthless.any(axis=-1), jnp.inf, loss)

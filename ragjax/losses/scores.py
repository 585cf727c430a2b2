"""Scores of documents: the language model's likelihood of the answer, four ways.

They share one signature, so that a trainer can be handed any of them.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ragjax.losses._common import (
    Axes,
)


def prob(sequence_log_probs: ArrayLike, lengths: ArrayLike) -> Array:
    r"""Scores each document by the probability it gives the answer: g = exp(ℓ_c).

    .. math::
        g_c = \exp(\ell_c)

    The formula as RA-DIT and REPLUG print it. exp underflows below ℓ ≈ −103 and its differences
    vanish long before: for answers of more than a few tokens the target is uniform, and nothing
    can be learned from it. Watch `target_entropy`.

    Args:
        sequence_log_probs: `[..., K]` ℓ_c in nats.
        lengths: `[...]` integer, target tokens per query; not used by this score.

    Returns:
        `[..., K]` float32 in 0 … 1.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        exp(ℓ_c); `lsr_target` stops it.

    References:
        Lin et al., RA-DIT: Retrieval-Augmented Dual Instruction Tuning, 2024, section 2.4.
        Shi et al., REPLUG: Retrieval-Augmented Black-Box Language Models, 2024, section 4.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> log_probs = jnp.log(jnp.array([[0.5, 0.1]]))
        >>> print(np.asarray(losses.prob(log_probs, jnp.array([3]))).round(3))
        [[0.5 0.1]]
    """
    return jnp.exp(log_prob(sequence_log_probs, lengths))


def prob_per_token(sequence_log_probs: ArrayLike, lengths: ArrayLike) -> Array:
    r"""Scores each document by the geometric mean of the token probabilities: g = exp(ℓ_c / T).

    .. math::
        g_c = \exp(\ell_c / T)

    Args:
        sequence_log_probs: `[..., K]` ℓ_c in nats.
        lengths: `[...]` integer, target tokens per query.

    Returns:
        `[..., K]` float32 in 0 … 1; 1 for an answer of no tokens.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        exp(ℓ_c / T) / T; `lsr_target` stops it.

    References:
        Shi et al., REPLUG: Retrieval-Augmented Black-Box Language Models, 2024, section 4, with
        the probability taken per token.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> log_probs = jnp.array([[-2.0, -8.0]])
        >>> print(np.asarray(losses.prob_per_token(log_probs, jnp.array([4]))).round(3))
        [[0.607 0.135]]
    """
    return jnp.exp(log_prob_per_token(sequence_log_probs, lengths))


def log_prob(sequence_log_probs: ArrayLike, lengths: ArrayLike) -> Array:
    r"""Scores each document by the log-prob it gives the answer: g = ℓ_c.

    .. math::
        g_c = \ell_c

    With temperature 1 the target is the posterior under a uniform retriever.

    Args:
        sequence_log_probs: `[..., K]` ℓ_c in nats.
        lengths: `[...]` integer, target tokens per query; not used by this score.

    Returns:
        `[..., K]` float32, nats.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        1; `lsr_target` stops it.

    References:
        Izacard et al., Atlas: Few-shot Learning with Retrieval Augmented Language Models, 2023,
        section 2.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> print(losses.log_prob(jnp.array([[-2.0, -8.0]]), jnp.array([4])))
        [[-2. -8.]]
    """
    axes = Axes()
    log_probs = axes.floats("sequence_log_probs", sequence_log_probs, "...K")
    axes.integers("lengths", lengths, "...")
    return log_probs


def log_prob_per_token(sequence_log_probs: ArrayLike, lengths: ArrayLike) -> Array:
    r"""Scores each document by the mean log-prob of the answer's tokens: g = ℓ_c / T.

    .. math::
        g_c = \ell_c / T

    The score whose spread does not depend on the answer's length; Atlas's pdist uses it.

    Args:
        sequence_log_probs: `[..., K]` ℓ_c in nats.
        lengths: `[...]` integer, target tokens per query.

    Returns:
        `[..., K]` float32, nats per token; 0 for an answer of no tokens.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        1 / T; `lsr_target` stops it.

    References:
        Izacard et al., Atlas: Few-shot Learning with Retrieval Augmented Language Models, 2023,
        section 2.2 (perplexity distillation).

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> print(losses.log_prob_per_token(jnp.array([[-2.0, -8.0]]), jnp.array([4])))
        [[-0.5 -2. ]]
    """
    log_probs = log_prob(sequence_log_probs, lengths)
    return log_probs / jnp.maximum(jnp.asarray(lengths), 1).astype(log_probs.dtype)[..., None]

"""Scores of documents: how likely the language model finds the answer, four ways, or the question.

Those by the answer share one signature, so that a trainer can be handed any of them.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ragjax.losses._common import (
    Axes,
    checked_answers,
    masked_log_softmax,
    weight_scalar,
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


def rerank_log_probs(
    doc_scores: ArrayLike,
    log_probs: ArrayLike,
    *,
    weight: ArrayLike,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    r"""Ranks the documents again by how likely each makes the question; no answer is needed.

    .. math::
        \log p(c|x) = \log\operatorname{softmax}_c \Big(
            \log p_R(c|x) + \alpha \sum_t \log p_{LM}(x_t | c, x_{<t})\Big)

    Bayes' rule where α = 1, with p_R as the prior of a document and the language model as the
    likelihood of the question. UPR takes the mean over the tokens of the question and no prior.

    Args:
        doc_scores: `[..., K]` retrieval scores, already scaled: logits of p_R, or the fused scores
            of a hybrid search. Only their differences count.
        log_probs: `[..., K, T]` log p_LM(x_t | c, x_<t) in nats, or `[..., K]`: their sum, their
            mean, or any other score of the pair, such as a cross-encoder's logit.
        weight: α, a finite scalar of at least 0; 0 leaves log p_R as it is.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.
        token_mask: `[..., T]` bool, True = a token of the question; all, if not given.

    Returns:
        `[..., K]` log-probs in nats, float32; -inf at masked documents.

    Raises:
        ValueError: Wrong rank, shape or dtype, or a weight that is negative or not finite.

    Gradients:
        The ordinary derivative of the log-softmax, to scores, log-probs and weight.

    References:
        Sachan et al., Improving Passage Retrieval with Zero-Shot Question Generation, 2022 (UPR),
        section 2.2.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> question_probs = jnp.array([[0.1, 0.3]])
        >>> ranked = losses.rerank_log_probs(
        ...     jnp.zeros((1, 2)), jnp.log(question_probs), weight=1.0)
        >>> print(np.asarray(jnp.exp(ranked)).round(3))
        [[0.25 0.75]]
    """
    _, scores, likely, keep = checked_answers(doc_scores, log_probs, doc_mask, token_mask)
    factor = weight_scalar("weight", weight, scores.dtype)
    # 0 · (-inf) is NaN, in the value and in the gradient: replace the argument, not the product.
    possible = keep & (likely != -jnp.inf)
    added = factor * jnp.where(possible, likely, 0.0)
    impossible = jnp.where(jnp.asarray(factor) > 0, -jnp.inf, 0.0).astype(scores.dtype)
    return masked_log_softmax(scores + jnp.where(possible, added, impossible), keep)

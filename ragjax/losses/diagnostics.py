"""Metrics of a retriever in training, one per query, to be averaged by the caller.

They are differentiable like any other function: an entropy may serve as a regulariser.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ragjax.losses._common import (
    Axes,
    alike,
    checked_answers,
    checked_docs,
    masked_kl,
    masked_log_softmax,
)
from ragjax.losses.language_modeling import sequence_log_probs
from ragjax.losses.marginal import rag_sequence_loss


class Entropy(NamedTuple):
    """The entropy of a distribution over documents."""

    nats: Array
    """`[...]` H = −Σ_c p_c log p_c."""
    normalized: Array
    """`[...]` H / log(number of kept documents): 1 is uniform; 0 is one document, or none kept."""


def retriever_entropy(doc_scores: ArrayLike, *, doc_mask: ArrayLike | None = None) -> Entropy:
    r"""Measures how undecided the retriever is: H(p_R), with p_R = softmax_c(doc_scores).

    .. math::
        H(p_R) = -\sum_c p_R(c) \log p_R(c)

    Args:
        doc_scores: `[..., K]` retrieval scores, already scaled.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `Entropy` of two `[...]` float32 arrays. Normalised values near 1 mean that the scale of the
        scores is too small for their spread.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        ∂H/∂doc_scores = −p_R ⊙ (log p_R + H).

    References:
        Shannon, A Mathematical Theory of Communication, 1948, section 6.

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> print(losses.retriever_entropy(jnp.zeros((1, 4))).normalized)
        [1.]
    """
    scores, keep = checked_docs(doc_mask, doc_scores=doc_scores)
    return _entropy(masked_log_softmax(scores, keep), keep)


def target_entropy(target_log_probs: ArrayLike, *, doc_mask: ArrayLike | None = None) -> Entropy:
    r"""Measures how much the language model's target says: H(q).

    .. math::
        H(q) = -\sum_c q(c) \log q(c)

    A normalised value ≥ 0.98 is a uniform target, from which nothing can be learned (use a score
    per token or a smaller temperature), one ≤ 0.02 a single document (use a larger temperature).

    Args:
        target_log_probs: `[..., K]` log q in nats, from `lsr_target`; -inf is allowed.
        doc_mask: `[..., K]` bool, True = a document; all, if not given. Leave out negatives that
            were appended with target zero: they would count in log K.

    Returns:
        `Entropy` of two `[...]` float32 arrays.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        The ordinary derivative; `lsr_target` has stopped what lies before.

    References:
        Shannon, A Mathematical Theory of Communication, 1948, section 6.

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> print(losses.target_entropy(jnp.log(jnp.array([[0.0, 1.0]]))).normalized)
        [-0.]
    """
    return _entropy(*checked_docs(doc_mask, target_log_probs=target_log_probs))


def posterior_entropy(
    doc_scores: ArrayLike,
    token_log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Entropy:
    r"""Measures how many documents explain the answer: the entropy of `document_posterior`.

    .. math::
        H = -\sum_c p(c|x,y) \log p(c|x,y)

    Args:
        doc_scores: `[..., K]` retrieval scores, already scaled.
        token_log_probs: `[..., K, T]` ℓ_ct = log p_LM(y_t | c∘x, y_<t) in nats.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.
        token_mask: `[..., T]` bool, True = a target token; all, if not given.

    Returns:
        `Entropy` of two `[...]` float32 arrays.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        The ordinary derivative, to scores and log-probs alike.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.1.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> entropy = losses.posterior_entropy(jnp.zeros((1, 2)), jnp.zeros((1, 2, 3)))
        >>> print(np.asarray(entropy.nats).round(3))  # log 2
        [0.693]
    """
    _, scores, answers, keep = checked_answers(
        doc_scores, token_log_probs, doc_mask, token_mask, "token_log_probs"
    )
    return _entropy(masked_log_softmax(scores + answers, keep), keep)


def kl_divergence(
    p_log_probs: ArrayLike, q_log_probs: ArrayLike, *, doc_mask: ArrayLike | None = None
) -> Array:
    r"""Compares two distributions over the same documents: KL(p‖q) = Σ_c p (log p − log q).

    .. math::
        KL(p \| q) = \sum_c p(c) \big(\log p(c) - \log q(c)\big)

    Args:
        p_log_probs: `[..., K]` log p in nats; -inf (p = 0) contributes 0.
        q_log_probs: `[..., K]` log q in nats; -inf where p > 0 makes the result +inf.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `[...]` in nats, float32, ≥ 0; 0 if no document is kept.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        The ordinary derivative, to both; `lsr_loss` and `pdist_loss` are the losses.

    References:
        Kullback and Leibler, On Information and Sufficiency, 1951, section 2.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> p, q = jnp.log(jnp.array([[0.0, 1.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
        >>> print(np.asarray(losses.kl_divergence(p, q)).round(3))
        [0.693]
    """
    return masked_kl(*checked_docs(doc_mask, p_log_probs=p_log_probs, q_log_probs=q_log_probs))


def agreement(
    doc_scores: ArrayLike, target_log_probs: ArrayLike, *, doc_mask: ArrayLike | None = None
) -> Array:
    r"""Says whether retriever and target prefer the same document: argmax s = argmax log q.

    .. math::
        a = \big[ \operatorname{argmax}_c s_c = \operatorname{argmax}_c q(c) \big]

    Args:
        doc_scores: `[..., K]` retrieval scores.
        target_log_probs: `[..., K]` log q in nats; -inf is allowed.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `[...]` float32, 1 where they agree, else 0; ties go to the first document. 0 without one.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        None (piecewise constant).

    References:
        Izacard et al., Atlas: Few-shot Learning with Retrieval Augmented Language Models, 2023,
        section 2.2, for the pair of distributions compared.

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> print(losses.agreement(jnp.array([[2.0, 1.0]]), jnp.log(jnp.array([[0.9, 0.1]]))))
        [1.]
    """
    scores, target, keep = checked_docs(
        doc_mask, doc_scores=doc_scores, target_log_probs=target_log_probs
    )
    best_score = jnp.argmax(jnp.where(keep, scores, -jnp.inf), axis=-1)
    best_target = jnp.argmax(jnp.where(keep, target, -jnp.inf), axis=-1)
    return (keep.any(axis=-1) & (best_score == best_target)).astype(scores.dtype)


def retrieval_utility(
    doc_scores: ArrayLike,
    token_log_probs: ArrayLike,
    no_doc_token_log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    r"""Measures what retrieval adds: log p(y|x) with documents minus log p_LM(y|x) without.

    .. math::
        u = \log \sum_c p_R(c|x)\, p_{LM}(y|c \circ x) - \log p_{LM}(y|x)

    utility = log Σ_c p_R(c|x) p_LM(y|c∘x) − log p_LM(y|x)

    Args:
        doc_scores: `[..., K]` retrieval scores, already scaled.
        token_log_probs: `[..., K, T]` ℓ_ct = log p_LM(y_t | c∘x, y_<t) in nats.
        no_doc_token_log_probs: `[..., T]` log p_LM(y_t | x, y_<t) in nats.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.
        token_mask: `[..., T]` bool, True = a target token; all, if not given.

    Returns:
        `[...]` in nats, float32; above 0 where retrieval helps. 0 for a query with no document,
        and for an answer that is impossible with and without.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        Those of −`rag_sequence_loss`; −1 to every kept no-document log-prob.

    References:
        Guu et al., REALM: Retrieval-Augmented Language Model Pre-Training, 2020 (retrieval
        utility, there per document).

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> with_docs, without = jnp.full((1, 2, 3), -1.0), jnp.full((1, 3), -2.0)
        >>> print(losses.retrieval_utility(jnp.zeros((1, 2)), with_docs, without))
        [3.]
    """
    axes = Axes()
    axes.floats("token_log_probs", token_log_probs, "...KT")
    axes.floats("no_doc_token_log_probs", no_doc_token_log_probs, "...T")
    doc_mask = axes.mask("doc_mask", doc_mask, "...K")
    loss = rag_sequence_loss(doc_scores, token_log_probs, doc_mask=doc_mask, token_mask=token_mask)
    without = sequence_log_probs(no_doc_token_log_probs, token_mask=token_mask)
    loss, without = alike(loss, without)
    # What is impossible either way gains nothing; the difference would be NaN.
    counts = doc_mask.any(axis=-1) & ((loss != jnp.inf) | (without != -jnp.inf))
    return jnp.where(counts, -loss - jnp.where(counts, without, 0.0), 0.0)


class Degeneracy(NamedTuple):
    """Whether a target is uniform or a single document."""

    uniform: Array
    """`[...]` bool, normalised entropy ≥ 0.98: use a score per token or a smaller temperature."""
    one_hot: Array
    """`[...]` bool, normalised entropy ≤ 0.02 with two documents or more: a larger temperature."""


def target_degeneracy(
    target_log_probs: ArrayLike, *, doc_mask: ArrayLike | None = None
) -> Degeneracy:
    """Says which targets are flat or a single document, by the limits of `target_entropy`.

    Args:
        target_log_probs: `[..., K]` log q in nats; -inf is allowed.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `Degeneracy` of two `[...]` bool arrays, both False with fewer than two documents.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        None (bool).

    References:
        Shannon, A Mathematical Theory of Communication, 1948, section 6.

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> print(losses.target_degeneracy(jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))).uniform)
        [ True False]
    """
    target, keep = checked_docs(doc_mask, target_log_probs=target_log_probs)
    entropy, choice = _entropy(target, keep).normalized, keep.sum(axis=-1) > 1
    return Degeneracy(entropy >= 0.98, choice & (entropy <= 0.02))


def _entropy(log_probs: Array, mask: Array) -> Entropy:
    # KL to the uniform distribution over one document (log 1 = 0) is −H, with p = 0 handled.
    nats = -masked_kl(log_probs, jnp.zeros_like(log_probs), mask)
    count = mask.sum(axis=-1).astype(nats.dtype)
    return Entropy(nats, nats / jnp.log(jnp.maximum(count, 2)))

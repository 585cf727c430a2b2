"""The answer's likelihood with the retrieved documents summed out."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ragjax.losses._common import Axes, masked_log_softmax, masked_logsumexp


def rag_sequence_loss(
    doc_scores: ArrayLike,
    token_log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    """Computes the negative marginal log-likelihood, one document per whole answer.

    loss = −log Σ_c p_R(c|x) p_LM(y|c∘x) = −LSE_c(log p_R(c) + Σ_t ℓ_ct), with p_R the softmax of
    `doc_scores` over the K documents. Equals `rag_token_loss` only for T = 1.

    Args:
        doc_scores: `[B, K]` live, differentiable retrieval scores, already scaled.
        token_log_probs: `[B, K, T]` ℓ_ct = log p_LM(y_t | c∘x, y_<t) in nats.
        doc_mask: `[B, K]` bool, True = a document; all, if not given.
        token_mask: `[B, T]` bool, True = a target token; all, if not given.

    Returns:
        `[B]` in nats, float32. A query with no document has loss 0 and gradient 0.

    Raises:
        ValueError: wrong rank, shape or dtype.

    Gradients:
        ∂/∂doc_scores = p_R − posterior; ∂/∂ℓ_ct = −posterior_c at every kept token: both towers
        learn. The posterior is `document_posterior`.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.1 (RAG-Sequence).
    """
    joint, doc_mask = _joint_log_probs(doc_scores, token_log_probs, doc_mask, token_mask)
    return -masked_logsumexp(joint, doc_mask, axis=1)


def rag_token_loss(
    doc_scores: ArrayLike,
    token_log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    """Computes the negative marginal log-likelihood, documents summed out at every token.

    loss = −Σ_t log Σ_c p_R(c|x) p_LM(y_t|c∘x, y_<t) = −Σ_t LSE_c(log p_R(c) + ℓ_ct). Each token may
    rely on another document. Equals `rag_sequence_loss` only for T = 1.

    Args:
        doc_scores: `[B, K]` live, differentiable retrieval scores, already scaled.
        token_log_probs: `[B, K, T]` ℓ_ct = log p_LM(y_t | c∘x, y_<t) in nats.
        doc_mask: `[B, K]` bool, True = a document; all, if not given.
        token_mask: `[B, T]` bool, True = a target token; all, if not given.

    Returns:
        `[B]` in nats, float32. A query with no document has loss 0 and gradient 0.

    Raises:
        ValueError: wrong rank, shape or dtype.

    Gradients:
        With r_ct = softmax_c(log p_R(c) + ℓ_ct): ∂/∂doc_scores = Σ_t (p_R − r_t) and
        ∂/∂ℓ_ct = −r_ct: both towers learn.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.1 (RAG-Token).
        Guu et al., REALM: Retrieval-Augmented Language Model Pre-Training, 2020, section 3.
    """
    axes = Axes()
    scores = axes.floats("doc_scores", doc_scores, "BK")
    log_probs = axes.floats("token_log_probs", token_log_probs, "BKT")
    doc_mask = axes.mask("doc_mask", doc_mask, "BK")
    token_mask = axes.mask("token_mask", token_mask, "BT")
    joint = masked_log_softmax(scores, doc_mask)[:, :, None] + log_probs  # [B, K, T]
    keep = doc_mask[:, :, None] & token_mask[:, None, :]
    return -jnp.sum(masked_logsumexp(joint, keep, axis=1), axis=1)


def document_posterior(
    doc_scores: ArrayLike,
    token_log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    """Computes which documents explain the answer, given that the answer is known.

    log p(c|x,y) = log_softmax_c(log p_R(c) + Σ_t ℓ_ct), the posterior of the sequence form.

    Args:
        doc_scores: `[B, K]` retrieval scores, already scaled.
        token_log_probs: `[B, K, T]` ℓ_ct = log p_LM(y_t | c∘x, y_<t) in nats.
        doc_mask: `[B, K]` bool, True = a document; all, if not given.
        token_mask: `[B, T]` bool, True = a target token; all, if not given.

    Returns:
        `[B, K]` log-probs in nats, float32; -inf at masked documents.

    Raises:
        ValueError: wrong rank, shape or dtype.

    Gradients:
        The ordinary derivative of the log-softmax, to scores and log-probs alike; as a training
        target, stop it first.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.1.
    """
    joint, doc_mask = _joint_log_probs(doc_scores, token_log_probs, doc_mask, token_mask)
    return masked_log_softmax(joint, doc_mask)


def _joint_log_probs(
    doc_scores: ArrayLike,
    token_log_probs: ArrayLike,
    doc_mask: ArrayLike | None,
    token_mask: ArrayLike | None,
) -> tuple[Array, Array]:
    """Returns log p_R(c) + ℓ_c `[B, K]` (anything at masked documents) and the document mask."""
    axes = Axes()
    scores = axes.floats("doc_scores", doc_scores, "BK")
    log_probs = axes.floats("token_log_probs", token_log_probs, "BKT")
    doc_mask = axes.mask("doc_mask", doc_mask, "BK")
    token_mask = axes.mask("token_mask", token_mask, "BT")
    answer_log_probs = jnp.sum(jnp.where(token_mask[:, None, :], log_probs, 0.0), axis=2)
    return masked_log_softmax(scores, doc_mask) + answer_log_probs, doc_mask

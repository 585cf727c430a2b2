"""The answer's likelihood with the retrieved documents summed out."""

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from ragjax.losses._common import (
    Axes,
    alike,
    checked_answers,
    masked_log_softmax,
    masked_logsumexp,
)


def rag_sequence_loss(
    doc_scores: ArrayLike,
    log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    r"""Computes the negative marginal log-likelihood, one document per whole answer.

    .. math::
        L = -\log \sum_c p_R(c|x)\, p_{LM}(y|c \circ x)
          = -\operatorname{LSE}_c \Big(\log p_R(c|x) + \sum_t \ell_{ct}\Big)

    with p_R the softmax of `doc_scores` over the K documents. Equals `rag_token_loss` only for
    T = 1.

    Args:
        doc_scores: `[..., K]` live, differentiable retrieval scores, already scaled.
        log_probs: `[..., K, T]` ℓ_ct = log p_LM(y_t | c∘x, y_<t) in nats, or `[..., K]` summed
            over t.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.
        token_mask: `[..., T]` bool, True = a target token; all, if not given.

    Returns:
        `[...]` in nats, float32. A query with no document has loss 0 and gradient 0; one whose
        answer no document makes possible has loss +inf and gradient 0.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        ∂/∂doc_scores = p_R − posterior; ∂/∂ℓ_ct = −posterior_c at every kept token: both models
        are trained. The posterior is `document_posterior`.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.1 (RAG-Sequence).

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> doc_scores = jnp.log(jnp.array([[0.75, 0.25]]))
        >>> answer_probs = jnp.array([[0.1, 0.5]])
        >>> loss = losses.rag_sequence_loss(doc_scores, jnp.log(answer_probs))
        >>> print(round(float(jnp.exp(-loss)[0]), 4))  # 0.75 * 0.1 + 0.25 * 0.5
        0.2
    """
    _, scores, answers, keep = checked_answers(doc_scores, log_probs, doc_mask, token_mask)
    return -masked_logsumexp(masked_log_softmax(scores, keep) + answers, keep, axis=-1)


def rag_token_loss(
    doc_scores: ArrayLike,
    log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    r"""Computes the negative marginal log-likelihood, documents summed out at every token.

    .. math::
        L = -\sum_t \log \sum_c p_R(c|x)\, p_{LM}(y_t|c \circ x, y_{<t})
          = -\sum_t \operatorname{LSE}_c \big(\log p_R(c|x) + \ell_{ct}\big)

    Each token may rely on another document. Equals `rag_sequence_loss` only for T = 1.

    Args:
        doc_scores: `[..., K]` live, differentiable retrieval scores, already scaled.
        log_probs: `[..., K, T]` ℓ_ct = log p_LM(y_t | c∘x, y_<t) in nats.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.
        token_mask: `[..., T]` bool, True = a target token; all, if not given.

    Returns:
        `[...]` in nats, float32. A query with no document has loss 0 and gradient 0.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        With r_ct = softmax_c(log p_R(c) + ℓ_ct): ∂/∂doc_scores = Σ_t (p_R − r_t) and
        ∂/∂ℓ_ct = −r_ct: both models are trained.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.1 (RAG-Token).
        Guu et al., REALM: Retrieval-Augmented Language Model Pre-Training, 2020, section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> doc_scores = jnp.log(jnp.array([[0.5, 0.5]]))
        >>> token_probs = jnp.array([[[0.8, 0.2], [0.2, 0.8]]])
        >>> loss = losses.rag_token_loss(doc_scores, jnp.log(token_probs))
        >>> print(round(float(jnp.exp(-loss)[0]), 4))  # each token from its own document: 0.5 ** 2
        0.25
    """
    axes = Axes()
    scores, tokens = alike(
        axes.floats("doc_scores", doc_scores, "...K"), axes.floats("log_probs", log_probs, "...KT")
    )
    doc_keep = axes.mask("doc_mask", doc_mask, "...K")
    token_keep = axes.mask("token_mask", token_mask, "...T")
    prior = masked_log_softmax(scores, doc_keep)[..., None]  # [..., K, 1]
    keep = doc_keep[..., None] & token_keep[..., None, :]  # [..., K, T]
    return -jnp.sum(masked_logsumexp(prior + tokens, keep, axis=-2), axis=-1)


def emdr2_loss(
    doc_scores: ArrayLike,
    log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    r"""Computes the retriever's half of EMDR²: the marginal likelihood with the LM held constant.

    .. math::
        L = -\sum_t \operatorname{LSE}_c \big(\log p_R(c|x) + \operatorname{sg}(\ell_{ct})\big)

    Given `[..., K]` answer log-probs this is the whole-answer form that the paper prints; given
    `[..., K, T]` it is the token form that the released code computes.

    Args:
        doc_scores: `[..., K]` live, differentiable retrieval scores, already scaled.
        log_probs: `[..., K, T]` ℓ_ct = log p_LM(y_t | c∘x, y_<t) in nats, or `[..., K]` summed
            over t.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.
        token_mask: `[..., T]` bool, True = a target token; all, if not given.

    Returns:
        `[...]` in nats, float32. A query with no document has loss 0 and gradient 0.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        ∂/∂doc_scores as in `rag_token_loss`; none to `log_probs`.

    References:
        Singh et al., End-to-End Training of Multi-Document Reader and Retriever for Open-Domain
        Question Answering, 2021, section 2.3.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> to_scores = jax.grad(lambda scores: losses.emdr2_loss(
        ...     scores, jnp.log(jnp.array([[0.1, 0.3]]))).sum())
        >>> print(np.asarray(to_scores(jnp.zeros((1, 2)))).round(3))  # p_R - posterior
        [[ 0.25 -0.25]]
    """
    # The reader has a loss of its own in EMDR²; this path trains the retriever only.
    log_probs = stop_gradient(jnp.asarray(log_probs))
    summed = log_probs.ndim == jnp.ndim(doc_scores)
    loss = rag_sequence_loss if summed else rag_token_loss
    return loss(doc_scores, log_probs, doc_mask=doc_mask, token_mask=token_mask)


def document_posterior(
    doc_scores: ArrayLike,
    log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    r"""Computes which documents explain the answer, given that the answer is known.

    .. math::
        \log p(c|x,y) = \log\operatorname{softmax}_c \Big(\log p_R(c|x) + \sum_t \ell_{ct}\Big)

    This is the posterior of the sequence form.

    Args:
        doc_scores: `[..., K]` retrieval scores, already scaled.
        log_probs: `[..., K, T]` ℓ_ct = log p_LM(y_t | c∘x, y_<t) in nats, or `[..., K]` summed
            over t.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.
        token_mask: `[..., T]` bool, True = a target token; all, if not given.

    Returns:
        `[..., K]` log-probs in nats, float32; -inf at masked documents.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        The ordinary derivative of the log-softmax, to scores and log-probs alike; as a training
        target, stop it first.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.1.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> answer_probs = jnp.array([[0.1, 0.3]])
        >>> posterior = losses.document_posterior(jnp.zeros((1, 2)), jnp.log(answer_probs))
        >>> print(np.asarray(jnp.exp(posterior)).round(3))
        [[0.25 0.75]]
    """
    _, scores, answers, keep = checked_answers(doc_scores, log_probs, doc_mask, token_mask)
    # Not the log-softmax of the scores: its normaliser cancels in the second one.
    return masked_log_softmax(scores + answers, keep)


def leave_one_out_log_probs(
    doc_scores: ArrayLike,
    log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    r"""Computes what the answer's log-likelihood would be if each document had not been retrieved.

    .. math::
        \ell^{(-c)} = \log \sum_{d \ne c} p_R(d|x, d \ne c)\, p_{LM}(y|d \circ x)

    With `loop_target` a target for readers that see one document at a time, and, subtracted from
    the marginal log-likelihood, an attribution of the answer to its documents.

    Args:
        doc_scores: `[..., K]` retrieval scores, already scaled.
        log_probs: `[..., K, T]` ℓ_ct = log p_LM(y_t | c∘x, y_<t) in nats, or `[..., K]` summed
            over t.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.
        token_mask: `[..., T]` bool, True = a target token; all, if not given.

    Returns:
        `[..., K]` in nats, float32: 0 at masked documents, and at a document without which none is
        left.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        The ordinary derivative, to scores and log-probs alike; `loop_target` stops it.

    References:
        Izacard et al., Atlas: Few-shot Learning with Retrieval Augmented Language Models, 2023,
        section 2.2 (LOOP), there for a reader that sees all documents at once.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> without = losses.leave_one_out_log_probs(
        ...     jnp.zeros((1, 3)), jnp.log(jnp.array([[0.6, 0.2, 0.1]])))
        >>> print(np.asarray(jnp.exp(without)).round(3))  # the mean of the other two
        [[0.15 0.35 0.4 ]]
    """
    _, scores, answers, keep = checked_answers(doc_scores, log_probs, doc_mask, token_mask)
    others = keep[..., None, :] & keep[..., :, None]  # [..., left out, K]
    others &= jnp.broadcast_to(~jnp.eye(keep.shape[-1], dtype=bool), others.shape)
    joint = jnp.broadcast_to((scores + answers)[..., None, :], others.shape)
    prior = jnp.broadcast_to(scores[..., None, :], others.shape)
    return masked_logsumexp(joint, others, axis=-1) - masked_logsumexp(prior, others, axis=-1)

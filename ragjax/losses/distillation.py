"""LM-supervised retrieval: training the retriever on which documents help the language model.

    lengths = token_mask.sum(-1)
    scores = log_prob_per_token(sequence_log_probs(token_log_probs, token_mask=token_mask), lengths)
    target = lsr_target(scores, temperature=0.1, doc_mask=doc_mask)
    loss = lsr_loss(doc_scores, target, doc_mask=doc_mask).mean()

`ragjax.losses.scores` has the scores that are compared.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ragjax.losses._common import (
    Axes,
    alike,
    checked_docs,
    is_known,
    masked_kl,
    masked_log_softmax,
    positive_scalar,
)


def lsr_target(
    scores: ArrayLike, *, temperature: float | Array, doc_mask: ArrayLike | None = None
) -> Array:
    r"""Turns document scores into the distribution the retriever should learn.

    .. math::
        \log q(c) = \log\operatorname{softmax}_c(g_c / \tau)

    log q(c) = log_softmax_c(g_c / τ)

    Args:
        scores: `[..., K]` g from one of the score functions.
        temperature: Scalar τ > 0, in the scores' units; smaller is sharper.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `[..., K]` log q in nats, float32; -inf at masked documents, and everywhere where every
        score is -inf: a target that teaches nothing.

    Raises:
        ValueError: Wrong rank, shape or dtype, or a temperature that is not a positive scalar
            (one traced by jit cannot be checked).

    Gradients:
        None: the target is a constant.

    References:
        Lin et al., RA-DIT: Retrieval-Augmented Dual Instruction Tuning, 2024, section 2.4.
        Shi et al., REPLUG: Retrieval-Augmented Black-Box Language Models, 2024, section 4.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> target = losses.lsr_target(jnp.array([[-0.5, -1.0]]), temperature=0.5)
        >>> print(np.asarray(jnp.exp(target)).round(3))
        [[0.731 0.269]]
    """
    scores, doc_mask = checked_docs(doc_mask, scores=scores)
    temperature = positive_scalar("temperature", temperature, scores.dtype)
    # Otherwise the LM could lower the loss by agreeing with the retriever.
    return jax.lax.stop_gradient(masked_log_softmax(scores / temperature, doc_mask))


def lsr_loss(
    doc_scores: ArrayLike, target_log_probs: ArrayLike, *, doc_mask: ArrayLike | None = None
) -> Array:
    r"""Computes KL(p_R‖p_LSR), the LM-supervised retrieval loss as RA-DIT and REPLUG print it.

    .. math::
        L = \sum_c p_R(c) \big(\log p_R(c) - \log q(c)\big)

    loss = Σ_c p_R(c) (log p_R(c) − log q(c)), with p_R = softmax_c(doc_scores). The gradient of a
    document is scaled by p_R of it: one that the retriever ranks far down is hardly pulled up
    (`pdist_loss` does).

    Args:
        doc_scores: `[..., K]` live, differentiable retrieval scores, already scaled.
        target_log_probs: `[..., K]` log q in nats, from `lsr_target`; finite at every kept
            document.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `[...]` in nats, float32, ≥ 0. A query with no document has loss 0 and gradient 0.

    Raises:
        ValueError: Wrong rank, shape or dtype, or a target of -inf at a kept document, where the
            divergence is infinite. Under jit or vmap the values cannot be looked at, and such a
            query has loss +inf and gradient 0.

    Gradients:
        ∂/∂doc_scores = p_R ⊙ (log(p_R / q) − loss). None to the target.

    References:
        Lin et al., RA-DIT: Retrieval-Augmented Dual Instruction Tuning, 2024, section 2.4.
        Shi et al., REPLUG: Retrieval-Augmented Black-Box Language Models, 2024, section 4.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> target = jnp.log(jnp.array([[0.1, 0.9]]))
        >>> print(np.asarray(losses.lsr_loss(jnp.zeros((1, 2)), target)).round(3))
        [0.511]
    """
    scores, target, doc_mask = _checked_pair(doc_scores, target_log_probs, doc_mask)
    impossible = doc_mask & (target == -jnp.inf)
    if is_known(impossible) and impossible.any():
        raise ValueError(
            "target_log_probs: expected finite values at every kept document, got "
            f"{impossible.sum()} of -inf, for which KL(p_R‖p_LSR) is infinite; use pdist_loss or "
            "mask these documents"
        )
    return masked_kl(masked_log_softmax(scores, doc_mask), target, doc_mask)


def pdist_loss(
    doc_scores: ArrayLike, target_log_probs: ArrayLike, *, doc_mask: ArrayLike | None = None
) -> Array:
    r"""Computes KL(p_LSR‖p_R), perplexity distillation: the forward direction of `lsr_loss`.

    .. math::
        L = \sum_c q(c) \big(\log q(c) - \log p_R(c)\big)

    loss = Σ_c q(c) (log q(c) − log p_R(c)), with p_R = softmax_c(doc_scores). A useful document is
    pulled up however far down the retriever ranks it. A target of -inf (probability zero) counts
    in p_R and nowhere else: so the batch's other documents join the softmax as negatives.

    Args:
        doc_scores: `[..., K]` live, differentiable retrieval scores, already scaled.
        target_log_probs: `[..., K]` log q in nats, from `lsr_target`; -inf is allowed.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `[...]` in nats, float32, ≥ 0. A query with no document has loss 0 and gradient 0.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        ∂/∂doc_scores = p_R − q. None to the target.

    References:
        Izacard et al., Atlas: Few-shot Learning with Retrieval Augmented Language Models, 2023,
        section 2.2 (perplexity distillation).
        Shi et al., REPLUG: Retrieval-Augmented Black-Box Language Models, NAACL 2024, section 4
        (the camera-ready version prints this direction).

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> target = jnp.log(jnp.array([[0.0, 1.0]]))
        >>> print(np.asarray(losses.pdist_loss(jnp.zeros((1, 2)), target)).round(3))  # log 2
        [0.693]
    """
    scores, target, doc_mask = _checked_pair(doc_scores, target_log_probs, doc_mask)
    return masked_kl(target, masked_log_softmax(scores, doc_mask), doc_mask)


def _checked_pair(
    doc_scores: ArrayLike, target_log_probs: ArrayLike, doc_mask: ArrayLike | None
) -> tuple[Array, Array, Array]:
    scores, target, keep = checked_docs(
        doc_mask, doc_scores=doc_scores, target_log_probs=target_log_probs
    )
    # A target that did not come from `lsr_target` must not train the language model either.
    return scores, jax.lax.stop_gradient(target), keep


def loop_target(
    leave_one_out_log_probs: ArrayLike,
    *,
    temperature: float | Array,
    doc_mask: ArrayLike | None = None,
) -> Array:
    r"""Turns leave-one-out log-likelihoods into a target.

    A document is the likelier the less likely the answer is without it.

    .. math::
        \log q(c) = \log\operatorname{softmax}_c\big(-\ell^{(-c)} / \tau\big)

    Args:
        leave_one_out_log_probs: `[..., K]` log-prob of the answer without document c, in nats (per
            token, for a target that does not depend on the answer's length): from a reader of all
            documents, or from `ragjax.losses.leave_one_out_log_probs`.
        temperature: Scalar τ > 0, in nats; smaller is sharper.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.

    Returns:
        `[..., K]` log q in nats, float32; -inf at masked documents. For `lsr_loss`, `pdist_loss`.
        Documents without which the answer is impossible (-inf) share the whole target; -inf
        everywhere where each of them is such a one.

    Raises:
        ValueError: Wrong rank, shape or dtype, or a temperature that is not a positive scalar.

    Gradients:
        None: the target is a constant.

    References:
        Izacard et al., Atlas: Few-shot Learning with Retrieval Augmented Language Models, 2023,
        section 2.2 (leave-one-out perplexity distillation).

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> target = losses.loop_target(jnp.log(jnp.array([[0.1, 0.3]])), temperature=1.0)
        >>> print(np.asarray(jnp.exp(target)).round(3))  # the answer needs document 0
        [[0.75 0.25]]
    """
    without, keep = checked_docs(doc_mask, leave_one_out_log_probs=leave_one_out_log_probs)
    needed = keep & (without == -jnp.inf)
    # Documents without which the answer is impossible share the target: the limit, where the
    # softmax would be NaN. Where that is every one, the answer is impossible with them as well.
    some = needed.any(axis=-1, keepdims=True) & (keep & ~needed).any(axis=-1, keepdims=True)
    scores = jnp.where(needed, jnp.where(some, 0.0, -jnp.inf), jnp.where(some, -jnp.inf, -without))
    return lsr_target(scores, temperature=temperature, doc_mask=keep)


def attention_mass(
    attention: ArrayLike,
    value_norms: ArrayLike,
    *,
    context_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    r"""Scores each document by the attention that a Fusion-in-Decoder reader pays to it (ADist).

    .. math::
        g_c = \frac1{A\,T} \sum_{a,t,l} \alpha_{atcl}\, \lVert v_{acl} \rVert

    Made for `lsr_target`, which turns it into a target.

    Args:
        attention: `[..., A, T, K, L]` cross-attention probabilities α of the target tokens; A are
            all heads of all layers.
        value_norms: `[..., A, K, L]` norms of the value vectors.
        context_mask: `[..., K, L]` bool, True = a token of the document; all, if not given.
        token_mask: `[..., T]` bool, True = a target token; all, if not given.

    Returns:
        `[..., K]` float32; 0 for an answer of no tokens.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        The ordinary derivative; `lsr_target` stops it.

    References:
        Izacard et al., Atlas: Few-shot Learning with Retrieval Augmented Language Models, 2023,
        section 2.2 (attention distillation); summed over a document's tokens as in the released
        code's normsum.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> attention = jnp.array([0.7, 0.1, 0.1, 0.1]).reshape(1, 1, 1, 2, 2)
        >>> print(np.asarray(losses.attention_mass(attention, jnp.ones((1, 1, 2, 2)))).round(2))
        [[0.8 0.2]]
    """
    axes = Axes()
    attention, norms = alike(
        axes.floats("attention", attention, "...ATKL"),
        axes.floats("value_norms", value_norms, "...AKL"),
    )
    context_keep = axes.mask("context_mask", context_mask, "...KL")
    token_keep = axes.mask("token_mask", token_mask, "...T")
    keep = token_keep[..., None, :, None, None] & context_keep[..., None, None, :, :]
    norms = jnp.where(context_keep[..., None, :, :], norms, 0.0)[..., None, :, :]
    total = jnp.sum(jnp.where(keep, attention, 0.0) * norms, axis=(-4, -3, -1))
    count = jnp.maximum(token_keep.sum(axis=-1), 1) * attention.shape[-4]
    return total / count.astype(total.dtype)[..., None]

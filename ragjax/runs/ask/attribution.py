"""Which documents an answer rests on: posterior, leave-one-out, utility over no document.

Shapes: B questions, K documents each, T answer tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ragjax import losses
from ragjax.runs.ask.reader import Joint


class Attribution(NamedTuple):
    """How the log-likelihood of given answers comes about; float32, nats."""

    prior: np.ndarray  # [B, K] p_R(c|x), a probability; 0 at masked documents
    # [B, K] p(c|x,y), a probability; 0 at masked documents; NaN where they were read at once
    posterior: np.ndarray
    log_probs: np.ndarray  # [B] log p(y|x), the documents summed out or read at once
    doc_log_probs: np.ndarray  # [B, K] log p_LM(y|c∘x); -inf at masked documents
    no_doc_log_probs: np.ndarray  # [B] log p_LM(y|x), closed book
    without: np.ndarray  # [B, K] log p(y|x) - log p(y|x) without c: above 0 where c helps
    utility: np.ndarray  # [B] log p(y|x) - log p_LM(y|x): above 0 where retrieval helps


def attribute(
    doc_scores: ArrayLike,
    token_log_probs: ArrayLike,
    no_doc_token_log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Attribution:
    r"""Attributes given answers to the documents they were read from.

    .. math::
        p(c|x,y) \propto p_R(c|x)\, p_{LM}(y|c \circ x), \qquad
        \Delta_c = \log p(y|x) - \log p(y|x, C' \setminus c), \qquad
        u = \log p(y|x) - \log p_{LM}(y|x)

    Leaving out the only document leaves the closed book, so there Δ_c = u.

    Args:
        doc_scores: `[B, K]` logits of p_R.
        token_log_probs: `[B, K, T]` log p_LM(y_t | c∘x, y_<t) in nats.
        no_doc_token_log_probs: `[B, T]` log p_LM(y_t | x, y_<t) in nats.
        doc_mask: `[B, K]` bool, True = a document; all, if not given.
        token_mask: `[B, T]` bool, True = a token of the answer; all, if not given.

    Returns:
        The attribution; a question without documents has the closed book's likelihood and
        utility 0.

    Raises:
        ValueError: wrong rank, shape or dtype.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.1, for the marginal and so its posterior.
        Guu et al., REALM: Retrieval-Augmented Language Model Pre-Training, 2020, for the utility.
    """
    masks = {"doc_mask": doc_mask, "token_mask": token_mask}
    arrays = _measure(doc_scores, token_log_probs, no_doc_token_log_probs, **masks)
    found = Attribution(**jax.device_get(arrays))
    closed = found.no_doc_log_probs
    keep = np.ones(found.prior.shape, bool) if doc_mask is None else np.asarray(doc_mask)
    count = keep.sum(axis=1)[:, None]
    marginal = np.where(count[:, 0] > 0, found.log_probs, closed)
    left = np.where(count == 1, closed[:, None], found.without)
    return found._replace(
        prior=np.exp(found.prior),
        posterior=np.exp(found.posterior),
        log_probs=marginal,
        doc_log_probs=np.where(keep, found.doc_log_probs, -np.inf),
        without=np.where(keep, marginal[:, None] - left, 0.0),
    )


@jax.jit
def _measure(
    doc_scores: ArrayLike, token_log_probs: ArrayLike, closed: ArrayLike, **masks: Any
) -> dict[str, Array]:
    """Returns what `ragjax.losses` says of each field, probabilities as their logarithms."""
    token_mask = masks["token_mask"]
    posterior = losses.document_posterior(doc_scores, token_log_probs, **masks)
    # The posterior of an answer that every document explains equally well.
    equal = jnp.zeros(posterior.shape, jnp.float32)
    return dict(
        prior=losses.document_posterior(doc_scores, equal, doc_mask=masks["doc_mask"]),
        posterior=posterior,
        log_probs=-losses.rag_sequence_loss(doc_scores, token_log_probs, **masks),
        doc_log_probs=losses.sequence_log_probs(token_log_probs, token_mask=token_mask),
        no_doc_log_probs=losses.sequence_log_probs(closed, token_mask=token_mask),
        without=losses.leave_one_out_log_probs(doc_scores, token_log_probs, **masks),
        utility=losses.retrieval_utility(doc_scores, token_log_probs, closed, **masks),
    )


def attribute_jointly(
    doc_scores: ArrayLike,
    joint: Joint,
    no_doc_token_log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike,
    token_mask: ArrayLike,
) -> Attribution:
    """Attributes an answer to documents that the decoder attended to all at once.

    Such an answer is no mixture over documents, so no posterior applies: it is NaN. What each
    document changes is measured by leaving it out.

    Args:
        doc_scores: `[1, K]` logits of p_R.
        joint: Log-probabilities of the answer under all documents, without each, and each alone.
        no_doc_token_log_probs: `[1, T]` log p_LM(y_t | x, y_<t) in nats.
        doc_mask: `[1, K]` bool, True = a document; at least one.
        token_mask: `[1, T]` bool, True = a token of the answer.
    """
    apart = attribute(
        doc_scores,
        joint.alone[None],
        no_doc_token_log_probs,
        doc_mask=doc_mask,
        token_mask=token_mask,
    )
    counted = np.asarray(token_mask)
    whole, without = (
        np.where(counted, part[None], 0).sum(axis=-1) for part in (joint.whole, joint.without)
    )
    keep, closed = np.asarray(doc_mask), apart.no_doc_log_probs
    left = np.where(keep.sum(axis=1)[:, None] == 1, closed[:, None], without)
    return apart._replace(
        posterior=np.full(keep.shape, np.nan, np.float32),
        log_probs=whole,
        without=np.where(keep, whole[:, None] - left, 0.0),
        utility=whole - closed,
    )

"""Terms of the end-to-end objective: what is minimised of the scores and the log-probs of a batch.

B questions, S document slots each (K retrieved, the null document, a judged one), M = B * S, K the
candidates among them, L and T tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ragjax.losses import (
    emdr2_loss,
    info_nce_loss,
    lm_loss,
    loop_target,
    lsr_target,
    pdist_loss,
    rag_sequence_loss,
    rag_token_loss,
    reinforce_loss,
    sequence_log_probs,
    stochastic_rag_loss,
)
from ragjax.models.inputs import Tokens

NULL_DOC = -1
"""The id of the null document."""
NO_SLOT = -2
"""The id in a slot that holds no document."""


class RagBatch(NamedTuple):
    """Questions, the documents that were retrieved for them, and their answers."""

    queries: Tokens  # [B, L]
    docs: Tokens  # [B, S, L]
    doc_ids: Array  # [B, S] int32 corpus rows, NULL_DOC or NO_SLOT
    doc_mask: Array  # [B, K] bool, True = a candidate that the language model reads
    context_ids: Array  # [B, K, L] int32, left-padded c∘x
    context_mask: Array  # [B, K, L] bool, True = real token
    target_ids: Array  # [B, T] int32, right-padded
    target_mask: Array  # [B, T] bool, True = answer token
    # For the contrastive term only: the slot of a judged document of each question, -1 for none.
    positive: Array | None = None  # [B] int32
    # Documents of the batch that are no negatives of a question, though other questions retrieved
    # them: judged relevant to it, or what it was made from. None: nothing is known of them.
    relevant: Array | None = None  # [B, M] bool


class LMReader(NamedTuple):
    """What a language model tells of a batch; None where it cannot."""

    log_probs: Callable[[Any, RagBatch], Array] | None  # [B, K, T], each document alone
    fused_log_probs: Callable[[Any, RagBatch], Array] | None = None  # [B, T], all at once
    attention: Callable[[Any, RagBatch], Array] | None = None  # [B, K] attention to each document


class Outputs(NamedTuple):
    """What the terms of the objective are functions of."""

    batch: RagBatch
    doc_scores: Array  # [B, K] live scores of the candidates
    batch_scores: Array  # [B, M] live scores of every document of the batch
    log_probs: Callable[[], Array]  # [B, K, T]
    fused_log_probs: Callable[[], Array]  # [B, T]
    attention: Callable[[], Array]  # [B, K]
    # [B, K] log-prob of the whole answer without each document, constant
    leave_one_out: Callable[[], Array]
    key: Array  # of the step's random draws
    # [M] int32 ids of the documents of `batch_scores`; None: those of the batch in their order
    ids: Array | None = None
    first: Array | int = 0  # [] int32, place among them of the first slot of the first question

    @property
    def batch_ids(self) -> Array:
        """Ids of all documents that the questions are scored with, `[M]` int32."""
        return self.batch.doc_ids.reshape(-1) if self.ids is None else self.ids


Term = Callable[[Outputs], Array]  # -> [B] nats
Score = Callable[[Array, Array], Array]
"""(log p_LM(y|c∘x) [B, K], answer lengths [B]) -> [B, K], such as `losses.log_prob_per_token`."""
Divergence = Callable[..., Array]
"""`losses.pdist_loss`, KL(q‖p_R), or `losses.lsr_loss`, KL(p_R‖q)."""


def sequence_term(outputs: Outputs) -> Array:
    """Returns `rag_sequence_loss` over the candidates, `[B]`."""
    return _marginal(rag_sequence_loss, outputs)


def token_term(outputs: Outputs) -> Array:
    """Returns `rag_token_loss` over the candidates, `[B]`."""
    return _marginal(rag_token_loss, outputs)


def emdr2_term(outputs: Outputs) -> Array:
    """Returns `emdr2_loss` over the candidates, `[B]`: it teaches the retriever alone."""
    return _marginal(emdr2_loss, outputs)


def lm_term(outputs: Outputs) -> Array:
    """Returns the mean over the candidates of −log p_LM(y|c∘x), `[B]`."""
    mask = outputs.batch.doc_mask
    summed = lm_loss(outputs.log_probs(), doc_mask=mask, token_mask=outputs.batch.target_mask)
    return summed / jnp.maximum(1, mask.sum(axis=1)).astype(summed.dtype)


def fused_lm_term(outputs: Outputs) -> Array:
    """Returns −log p_LM(y | x and all candidates), `[B]`."""
    fused = outputs.fused_log_probs()[:, None, :]  # one reading in place of K
    return lm_loss(fused, token_mask=outputs.batch.target_mask)


def make_lsr_term(score: Score, temperature: float, divergence: Divergence = pdist_loss) -> Term:
    """Builds KL(p_LSR‖p_R) over the candidates; p_LSR from the live language model, held constant.

    Args:
        score: Of each document.
        temperature: τ, in units of the score.
        divergence: `pdist_loss`, or `lsr_loss` for KL(p_R‖p_LSR).
    """

    def term(outputs: Outputs) -> Array:
        mask = outputs.batch.doc_mask
        target = lsr_target(_scored(outputs, score), temperature=temperature, doc_mask=mask)
        return divergence(outputs.doc_scores, target, doc_mask=mask)

    return term


def make_attention_term(temperature: float, divergence: Divergence = pdist_loss) -> Term:
    """Builds KL(q‖p_R) with q from the decoder's attention to each document (Atlas, ADist)."""

    def term(outputs: Outputs) -> Array:
        mask = outputs.batch.doc_mask
        target = lsr_target(outputs.attention(), temperature=temperature, doc_mask=mask)
        return divergence(outputs.doc_scores, target, doc_mask=mask)

    return term


def make_leave_one_out_term(temperature: float, divergence: Divergence = pdist_loss) -> Term:
    """Builds KL(q‖p_R) with q from what the answer loses without each document (Atlas, LOOP).

    Args:
        temperature: τ, in nats per answer token.
        divergence: `pdist_loss`, or `lsr_loss` for KL(p_R‖q).
    """

    def term(outputs: Outputs) -> Array:
        mask = outputs.batch.doc_mask
        without = outputs.leave_one_out()
        lengths = jnp.maximum(1, outputs.batch.target_mask.sum(axis=1)).astype(without.dtype)
        target = loop_target(without / lengths[:, None], temperature=temperature, doc_mask=mask)
        return divergence(outputs.doc_scores, target, doc_mask=mask)

    return term


def make_gumbel_term(score: Score, num_samples: int) -> Term:
    """Builds `stochastic_rag_loss`: documents drawn with Gumbel top-k, both models learn.

    Args:
        score: The utility of each document.
        num_samples: S, drawn without replacement; all candidates where there are fewer.
    """

    def term(outputs: Outputs) -> Array:
        return stochastic_rag_loss(
            outputs.doc_scores,
            _scored(outputs, score),
            outputs.key,
            num_samples=min(num_samples, outputs.doc_scores.shape[1]),
            doc_mask=outputs.batch.doc_mask,
        )

    return term


def make_reinforce_term(score: Score, num_samples: int) -> Term:
    """Builds `reinforce_loss`, the leave-one-out baseline in it: it teaches the retriever alone.

    Args:
        score: The utility of each document.
        num_samples: S ≥ 2, drawn with replacement.
    """

    def term(outputs: Outputs) -> Array:
        mask, utilities = outputs.batch.doc_mask, _scored(outputs, score)
        logits = jnp.where(mask, outputs.doc_scores, jnp.finfo(jnp.float32).min)
        shape = (num_samples, len(logits))
        samples = jax.random.categorical(outputs.key, logits, axis=-1, shape=shape).T  # [B, S]
        drawn = jnp.take_along_axis(utilities, samples, axis=1)
        return reinforce_loss(outputs.doc_scores, samples, drawn, doc_mask=mask)

    return term


def contrastive_term(outputs: Outputs) -> Array:
    """Returns −log p(judged document) among all documents of the batch (DPR), `[B]`.

    A question without a judged document has loss 0; other documents judged relevant to it are no
    negatives, and neither is a second copy of the same document.
    """
    batch = outputs.batch
    assert batch.positive is not None and batch.relevant is not None, "set for this term"
    rows = jnp.arange(len(batch.positive), dtype=jnp.int32)
    columns = outputs.first + rows * batch.doc_ids.shape[1] + jnp.maximum(batch.positive, 0)
    distinct = (outputs.batch_ids >= 0) & _first_of_its_kind(outputs.batch_ids)
    judged = batch.positive >= 0
    mask = distinct[None, :] & ~batch.relevant & judged[:, None]
    # `info_nce_loss` keeps the positive itself; a question whose negatives are all masked counts 0.
    return info_nce_loss(outputs.batch_scores, columns.astype(jnp.int32), mask=mask)


def negatives_term(outputs: Outputs) -> Array:
    r"""Returns how little p_R, taken over the batch, leaves to the question's candidates, `[B]`.

    .. math::
        L = -\log \sum_{c \in C} p_R(c | C \cup \text{batch})

    Added to `sequence_term`, the marginal over C, it gives the marginal over all documents of the
    batch, those of other questions explaining nothing; added to KL(p_LSR‖p_R) over C it gives that
    KL over the batch with target 0 there. `token_term` and `emdr2_term` sum documents out at every
    token, and need `token_negatives_term`. It keeps the embedding space in place while the softmax
    over C re-ranks within it. A document in `batch.relevant` is left out.
    """
    batch = outputs.batch
    flat = outputs.batch_ids
    candidates = jnp.where(batch.doc_mask, batch.doc_ids[:, : batch.doc_mask.shape[1]], NO_SLOT)
    own = (flat[None, None, :] == candidates[:, :, None]).any(axis=1)  # [B, M]
    others = (flat >= 0) & _first_of_its_kind(flat)
    negative = others[None, :] & ~own
    if batch.relevant is not None:
        negative &= ~batch.relevant
    has_documents = batch.doc_mask.any(axis=1)
    # Masked before the reductions: -inf in a row of nothing but -inf has no gradient.
    far = jnp.finfo(jnp.float32).min
    ours = jax.nn.logsumexp(jnp.where(batch.doc_mask, outputs.doc_scores, far), axis=1)
    theirs = jax.nn.logsumexp(jnp.where(negative, outputs.batch_scores, far), axis=1)
    return jnp.where(has_documents, jnp.logaddexp(ours, theirs) - ours, 0.0)


def token_negatives_term(outputs: Outputs) -> Array:
    r"""Returns `negatives_term` once for each answer token, `[B]`.

    .. math::
        L = -T \log \sum_{c \in C} p_R(c | C \cup \text{batch})

    Added to `token_term` or `emdr2_term` it gives the same over all documents of the batch: there
    p_R weighs the documents anew at each of the T tokens.
    """
    once = negatives_term(outputs)
    return outputs.batch.target_mask.sum(axis=1).astype(once.dtype) * once


def _marginal(loss: Callable[..., Array], outputs: Outputs) -> Array:
    batch = outputs.batch
    return loss(
        outputs.doc_scores,
        outputs.log_probs(),
        doc_mask=batch.doc_mask,
        token_mask=batch.target_mask,
    )


def _scored(outputs: Outputs, score: Score) -> Array:
    target_mask = outputs.batch.target_mask
    sums = sequence_log_probs(outputs.log_probs(), token_mask=target_mask)
    return score(sums, target_mask.sum(axis=1))


def _first_of_its_kind(flat: Array) -> Array:
    """Tells, for each slot of the batch `[M]`, whether no earlier one holds the same document."""
    same = flat[:, None] == flat[None, :]
    return ~jnp.tril(same, k=-1).any(axis=1)

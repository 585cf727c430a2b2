"""End-to-end training: both models through the likelihood of the answer over what was retrieved.

The documents are chosen by an index that may be old; their scores are computed live, from queries
and documents that are encoded in the step, so the gradient into both towers is exact.

B questions, S document slots each (K retrieved, the null document, a judged one), M = B * S, K the
candidates among them, L and T tokens, D embedding size.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ragjax.losses import (
    agreement,
    combine_losses,
    document_posterior,
    emdr2_loss,
    encode_in_chunks,
    info_nce_loss,
    lm_loss,
    lsr_target,
    pdist_loss,
    posterior_entropy,
    rag_sequence_loss,
    rag_token_loss,
    retriever_entropy,
    target_entropy,
)
from ragjax.models.inputs import LMBatch, Tokens
from ragjax.models.seq2seq.fusion import FusionBatch
from ragjax.training.lsr import Encode, towers
from ragjax.training.steps import LossFn, Metrics

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


Term = Callable[[Outputs], Array]  # -> [B] nats


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
    return summed / jnp.maximum(1, mask.sum(axis=1))


def fused_lm_term(outputs: Outputs) -> Array:
    """Returns −log p_LM(y | x and all candidates), `[B]`."""
    fused = outputs.fused_log_probs()[:, None, :]  # one reading in place of K
    return lm_loss(fused, token_mask=outputs.batch.target_mask)


def make_lsr_term(score: Callable[[Array, Array], Array], temperature: float) -> Term:
    """Builds KL(p_LSR‖p_R) over the candidates; p_LSR from the live language model, held constant.

    Args:
        score: `(log p_LM(y|c∘x) [B, K], answer lengths [B]) -> [B, K]`, such as
            `losses.log_prob_per_token`.
        temperature: τ, in units of the score.
    """

    def term(outputs: Outputs) -> Array:
        sums = outputs.log_probs().astype(jnp.float32).sum(axis=2)
        lengths = outputs.batch.target_mask.sum(axis=1)
        return _distilled(outputs, score(sums, lengths), temperature)

    return term


def make_attention_term(temperature: float) -> Term:
    """Builds KL(q‖p_R) with q from the decoder's attention to each document (Atlas, ADist)."""

    def term(outputs: Outputs) -> Array:
        return _distilled(outputs, outputs.attention(), temperature)

    return term


def contrastive_term(outputs: Outputs) -> Array:
    """Returns −log p(judged document) among all documents of the batch (DPR), `[B]`.

    A question without a judged document has loss 0; other documents judged relevant to it are no
    negatives, and neither is a second copy of the same document.
    """
    batch = outputs.batch
    assert batch.positive is not None and batch.relevant is not None, "set for this term"
    rows = jnp.arange(len(batch.positive), dtype=jnp.int32)
    columns = rows * batch.doc_ids.shape[1] + jnp.maximum(batch.positive, 0)
    distinct = (batch.doc_ids.reshape(-1) >= 0) & _first_of_its_kind(batch.doc_ids)
    judged = batch.positive >= 0
    mask = distinct[None, :] & ~batch.relevant & judged[:, None]
    # `info_nce_loss` keeps the positive itself; a question whose negatives are all masked counts 0.
    return info_nce_loss(outputs.batch_scores, columns.astype(jnp.int32), mask=mask)


def negatives_term(outputs: Outputs) -> Array:
    r"""Returns how little p_R, taken over the batch, leaves to the question's candidates, `[B]`.

    .. math::
        L = -\log \sum_{c \in C} p_R(c | C \cup \text{batch})

    Added to the marginal over C it gives the marginal over all documents of the batch, those of
    other questions explaining nothing; added to KL(p_LSR‖p_R) over C it gives that KL over the
    batch with target 0 there. It keeps the embedding space in place while the softmax over C
    re-ranks within it. A document in `batch.relevant` is left out.
    """
    batch = outputs.batch
    flat = batch.doc_ids.reshape(-1)  # [M]
    candidates = jnp.where(batch.doc_mask, batch.doc_ids[:, : batch.doc_mask.shape[1]], NO_SLOT)
    own = (flat[None, None, :] == candidates[:, :, None]).any(axis=1)  # [B, M]
    others = (flat >= 0) & _first_of_its_kind(batch.doc_ids)
    negative = others[None, :] & ~own
    if batch.relevant is not None:
        negative &= ~batch.relevant
    has_documents = batch.doc_mask.any(axis=1)
    # Masked before the reductions: -inf in a row of nothing but -inf has no gradient.
    far = jnp.finfo(jnp.float32).min
    ours = jax.nn.logsumexp(jnp.where(batch.doc_mask, outputs.doc_scores, far), axis=1)
    theirs = jax.nn.logsumexp(jnp.where(negative, outputs.batch_scores, far), axis=1)
    return jnp.where(has_documents, jnp.logaddexp(ours, theirs) - ours, 0.0)


def make_rag_loss(
    encode: Encode,
    reader: LMReader,
    terms: Mapping[str, tuple[float, Term]],
    *,
    scale: float,
    chunk_tokens: int | None = 2048,
    merge_tower: Callable[[Any, Any], Any] | None = None,
    merge_lm: Callable[[Any, Any], Any] | None = None,
) -> LossFn:
    """Builds the end-to-end loss over live scores s = scale · q·d, averaged over the questions.

    Args:
        encode: `(params, tokens) -> [rows, D]`, the same function for both towers.
        reader: The language model's functions, of its whole parameters.
        terms: Name to (weight, term). A term of weight 0 is reported and teaches nothing.
        scale: Factor from similarity to score (20 for cosines: 1/temperature of p_R).
        chunk_tokens: Documents are encoded in chunks of about this many tokens, and again in the
            backward pass; None: at once, which a batch sharded over devices wants.
        merge_tower: `(trainable, frozen)` of one tower to its parameters; None: towers train whole.
        merge_lm: `(trainable, frozen)` of the language model to its parameters; None: it trains as
            a whole, or not at all.

    Returns:
        `(params, frozen, batch, key) -> (loss [], metrics)` for `make_train_step`. `params` holds
        `lm` where the language model learns, and the towers that learn (`shared`, or `query` and
        `doc`); `frozen` is `{"lm": ..., "towers": ...}`, what of each does not. Metrics are means
        over the questions: each term by name, entropies as fractions of their maximum, `utility`
        (nats that the documents add over the null document) where there is one.

    Gradients:
        To both towers through the live scores and to the language model through its log-probs, as
        each term's docstring says; none to targets.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.1; Guu et al., REALM, 2020, section 3.2 (null document, live scores of retrieved
        ids); Singh et al., End-to-End Training of Multi-Document Reader and Retriever, 2021,
        section 2; Izacard et al., Atlas, 2022, section 2.2.
    """
    weights = {name: weight for name, (weight, _) in terms.items()}

    def loss(params: Any, frozen: Any, batch: RagBatch, key: Array) -> tuple[Array, Metrics]:
        del key  # no dropout: what is scored is what is trained
        lm_params = _lm_params(params, frozen, merge_lm)
        trained_towers = {name: part for name, part in params.items() if name != "lm"}
        query_params, doc_params = towers(trained_towers, frozen["towers"], merge_tower)
        own, everyone = _scores(encode, query_params, doc_params, batch, scale, chunk_tokens)
        outputs = Outputs(
            batch=batch,
            doc_scores=own[:, : batch.doc_mask.shape[1]],
            batch_scores=everyone,
            log_probs=_once(reader.log_probs, lm_params, batch),
            fused_log_probs=_once(reader.fused_log_probs, lm_params, batch),
            attention=_once(reader.attention, lm_params, batch),
        )
        combined = combine_losses(
            {name: term(outputs) for name, (_, term) in terms.items()}, weights
        )
        metrics = {name: part.mean() for name, part in combined.parts.items()}
        return combined.total.mean(), metrics | _diagnostics(outputs, reader)

    return loss


def _lm_params(params: Any, frozen: Any, merge: Callable[[Any, Any], Any] | None) -> Any:
    if "lm" not in params:
        return frozen["lm"]
    return merge(params["lm"], frozen["lm"]) if merge else params["lm"]


def _scores(
    encode: Encode,
    query_params: Any,
    doc_params: Any,
    batch: RagBatch,
    scale: float,
    chunk_tokens: int | None,
) -> tuple[Array, Array]:
    """Returns live scores of each question's own slots `[B, S]` and of all documents `[B, M]`."""
    questions, slots, length = batch.docs.ids.shape
    queries = encode(query_params, batch.queries)  # [B, D]
    flat = Tokens(*(leaf.reshape(questions * slots, length) for leaf in batch.docs))
    chunk = flat.ids.shape[0] if chunk_tokens is None else max(1, chunk_tokens // length)
    docs = encode_in_chunks(encode, doc_params, flat, chunk_size=chunk)  # [M, D]
    highest = jax.lax.Precision.HIGHEST
    own = jnp.einsum("bd,bsd->bs", queries, docs.reshape(questions, slots, -1), precision=highest)
    everyone = jnp.einsum("bd,md->bm", queries, docs, precision=highest)
    return scale * own, scale * everyone


def _once(function: Callable[[Any, RagBatch], Array] | None, params: Any, batch: RagBatch) -> Any:
    """Returns a function of nothing that computes when first called, and then remembers."""
    known: list[Array] = []

    def compute() -> Array:
        if function is None:
            raise ValueError("this reader does not give what a term of the objective asks for")
        if not known:
            known.append(function(params, batch))
        return known[0]

    return compute


def _marginal(loss: Callable[..., Array], outputs: Outputs) -> Array:
    batch = outputs.batch
    return loss(
        outputs.doc_scores,
        outputs.log_probs(),
        doc_mask=batch.doc_mask,
        token_mask=batch.target_mask,
    )


def _distilled(outputs: Outputs, score: Array, temperature: float) -> Array:
    mask = outputs.batch.doc_mask
    target = lsr_target(score, temperature=temperature, doc_mask=mask)
    return pdist_loss(outputs.doc_scores, target, doc_mask=mask)


def _first_of_its_kind(doc_ids: Array) -> Array:
    """Tells, for each slot of the batch `[M]`, whether no earlier one holds the same document."""
    flat = doc_ids.reshape(-1)
    same = flat[:, None] == flat[None, :]
    return ~jnp.tril(same, k=-1).any(axis=1)


def _diagnostics(outputs: Outputs, reader: LMReader) -> Metrics:
    batch, mask = outputs.batch, outputs.batch.doc_mask
    metrics = {
        "retriever_entropy": retriever_entropy(outputs.doc_scores, doc_mask=mask).normalized.mean()
    }
    if reader.log_probs is None and reader.attention is None:
        return metrics
    if reader.log_probs is None:
        mass = lsr_target(outputs.attention(), temperature=1.0, doc_mask=mask)
        return metrics | {
            "target_entropy": target_entropy(mass, doc_mask=mask).normalized.mean(),
            "agreement": agreement(outputs.doc_scores, mass, doc_mask=mask).mean(),
        }
    log_probs = outputs.log_probs()
    seen = {"doc_mask": mask, "token_mask": batch.target_mask}
    posterior = document_posterior(outputs.doc_scores, log_probs, **seen)
    marginal = rag_sequence_loss(outputs.doc_scores, log_probs, **seen)
    tokens = jnp.maximum(1, batch.target_mask.sum(axis=1))
    metrics |= {
        "posterior_entropy": posterior_entropy(
            outputs.doc_scores, log_probs, **seen
        ).normalized.mean(),
        "agreement": agreement(outputs.doc_scores, posterior, doc_mask=mask).mean(),
        "marginal_nll": (marginal / tokens).mean(),  # nats per token, whatever is minimised
    }
    last = batch.doc_ids[:, mask.shape[1] - 1]
    has_null = (last == NULL_DOC) & mask[:, -1]
    null = jnp.where(batch.target_mask, log_probs[:, -1].astype(jnp.float32), 0.0).sum(axis=1)
    utility = jnp.where(has_null, -marginal - null, 0.0).sum() / jnp.maximum(1, has_null.sum())
    return metrics | {"utility": utility}


def separate_reader(
    token_log_probs: Callable[[Any, LMBatch], Array],
) -> Callable[[Any, RagBatch], Array]:
    """Builds `LMReader.log_probs` of a language model that reads each document alone.

    Args:
        token_log_probs: `(params, LMBatch of R rows) -> [R, T]`.

    Returns:
        `(params, batch) -> [B, K, T]` float32.
    """

    def log_probs(params: Any, batch: RagBatch) -> Array:
        questions, count, length = batch.context_ids.shape
        rows = questions * count
        targets = batch.target_ids.shape[1]

        def repeated(leaf: Array) -> Array:
            return jnp.broadcast_to(leaf[:, None], (questions, count, targets)).reshape(rows, -1)

        # A slot without a document is one row less to sum over.
        mask = repeated(batch.target_mask) & batch.doc_mask.reshape(rows, 1)
        flat = LMBatch(
            batch.context_ids.reshape(rows, length),
            batch.context_mask.reshape(rows, length),
            repeated(batch.target_ids),
            mask,
        )
        return token_log_probs(params, flat).reshape(questions, count, targets)

    return log_probs


def fusion_reader(
    token_log_probs: Callable[[Any, FusionBatch], Array],
) -> Callable[[Any, RagBatch], Array]:
    """Builds `LMReader.fused_log_probs` (or `attention`) of a Fusion-in-Decoder.

    Args:
        token_log_probs: `(params, FusionBatch) -> [B, T]`, or `[B, K]` for the attention.

    Returns:
        `(params, batch) -> ` the same, of the documents that are there.
    """

    def read(params: Any, batch: RagBatch) -> Array:
        # A context without tokens is as if it were not there.
        mask = batch.context_mask & batch.doc_mask[:, :, None]
        return token_log_probs(
            params, FusionBatch(batch.context_ids, mask, batch.target_ids, batch.target_mask)
        )

    return read

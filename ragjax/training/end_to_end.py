"""End-to-end training: both models through the likelihood of the answer over what was retrieved.

The documents are chosen by an index that may be old; their scores are computed live, from queries
and documents that are encoded in the step, so the gradient into both towers is exact.

B questions, S document slots each (K retrieved, the null document, a judged one), M = B * S, K the
candidates among them, L and T tokens, D embedding size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ragjax.losses import (
    agreement,
    combine_losses,
    document_posterior,
    encode_in_chunks,
    leave_one_out_log_probs,
    lsr_target,
    posterior_entropy,
    rag_sequence_loss,
    retriever_entropy,
    sequence_log_probs,
    target_entropy,
)
from ragjax.models.inputs import LMBatch, Tokens
from ragjax.models.seq2seq.fusion import FusionBatch
from ragjax.training.lsr import Encode, gathered, towers
from ragjax.training.steps import LossFn, Metrics
from ragjax.training.terms import NO_SLOT as NO_SLOT
from ragjax.training.terms import NULL_DOC as NULL_DOC
from ragjax.training.terms import LMReader as LMReader
from ragjax.training.terms import Outputs as Outputs
from ragjax.training.terms import RagBatch as RagBatch
from ragjax.training.terms import Term as Term
from ragjax.training.terms import contrastive_term as contrastive_term
from ragjax.training.terms import emdr2_term as emdr2_term
from ragjax.training.terms import fused_lm_term as fused_lm_term
from ragjax.training.terms import lm_term as lm_term
from ragjax.training.terms import make_attention_term as make_attention_term
from ragjax.training.terms import make_gumbel_term as make_gumbel_term
from ragjax.training.terms import make_leave_one_out_term as make_leave_one_out_term
from ragjax.training.terms import make_lsr_term as make_lsr_term
from ragjax.training.terms import make_reinforce_term as make_reinforce_term
from ragjax.training.terms import negatives_term as negatives_term
from ragjax.training.terms import sequence_term as sequence_term
from ragjax.training.terms import token_negatives_term as token_negatives_term
from ragjax.training.terms import token_term as token_term


def make_rag_loss(
    encode: Encode,
    reader: LMReader,
    terms: Mapping[str, tuple[float, Term]],
    *,
    scale: float,
    chunk_tokens: int | None = 2048,
    merge_tower: Callable[[Any, Any], Any] | None = None,
    merge_lm: Callable[[Any, Any], Any] | None = None,
    encode_queries: Encode | None = None,
    axis_name: str | None = None,
) -> LossFn:
    """Builds the end-to-end loss over live scores s = scale · q·d, averaged over the questions.

    Args:
        encode: `(params, tokens) -> [rows, D]` of documents, and of queries if no other is given.
        reader: The language model's functions, of its whole parameters.
        terms: Name to (weight, term). A term of weight 0 is reported and teaches nothing.
        scale: Factor from similarity to score (20 for cosines: 1/temperature of p_R).
        chunk_tokens: Documents are encoded in chunks of about this many tokens, and again in the
            backward pass; None: at once, which a batch sharded over devices wants.
        merge_tower: `(trainable, frozen)` of one tower to its parameters; None: towers train whole.
        merge_lm: `(trainable, frozen)` of the language model to its parameters; None: it trains as
            a whole, or not at all.
        encode_queries: Of queries, where they have another architecture; None: `encode`.
        axis_name: Mapped axis over which the questions are divided; the documents of all of them
            are gathered for the terms that compare within the batch.

    Returns:
        `(params, frozen, batch, key) -> (loss [], metrics)` for `make_train_step`. `params` holds
        `lm` where the language model learns, and the towers that learn (`shared`, or `query` and
        `doc`); `frozen` is `{"lm": ..., "towers": ...}`, what of each does not. Metrics are means
        over the questions: each term by name, entropies as fractions of their maximum, `utility`
        (nats that the documents add over the null document) where there is one. A question whose
        answer has probability 0 whatever is read counts 0 in the loss and in the gradient, and in
        no metric but `impossible_answers`, how many there were.

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
        # No dropout: what is scored is what is trained.
        lm_params = _lm_params(params, frozen, merge_lm)
        trained_towers = {name: part for name, part in params.items() if name != "lm"}
        query_params, doc_params = towers(trained_towers, frozen["towers"], merge_tower)
        batch = _without_masked(batch)
        queries = (encode_queries or encode)(query_params, batch.queries)  # [B, D]
        own, docs = _scores(encode, queries, doc_params, batch, scale, chunk_tokens)
        everyone = jnp.einsum(
            "bd,md->bm", queries, gathered(docs, axis_name), precision=jax.lax.Precision.HIGHEST
        )
        doc_scores = own[:, : batch.doc_mask.shape[1]]
        log_probs = _once(reader.log_probs, lm_params, batch)
        outputs = Outputs(
            batch=batch,
            doc_scores=doc_scores,
            batch_scores=scale * everyone,
            ids=gathered(batch.doc_ids.reshape(-1), axis_name),
            first=0 if axis_name is None else jax.lax.axis_index(axis_name) * batch.doc_ids.size,
            log_probs=log_probs,
            fused_log_probs=_once(reader.fused_log_probs, lm_params, batch),
            attention=_once(reader.attention, lm_params, batch),
            leave_one_out=_leave_one_out(reader, lm_params, batch, doc_scores, log_probs),
            key=key,
        )
        combined = combine_losses(
            {name: term(outputs) for name, (_, term) in terms.items()}, weights
        )
        lost = _impossible(outputs, reader) | (combined.total == jnp.inf)
        metrics = {name: _mean(part, ~lost) for name, part in combined.parts.items()}
        metrics |= _diagnostics(outputs, reader, ~lost) | {"impossible_answers": lost.sum()}
        # Divided by all questions, so that the others weigh what they weigh without it.
        return jnp.where(lost, 0.0, combined.total).mean(), metrics

    return loss


def _without_masked(batch: RagBatch) -> RagBatch:
    """Marks the slots of masked candidates as holding no document."""
    count = batch.doc_mask.shape[1]
    candidates = jnp.where(batch.doc_mask, batch.doc_ids[:, :count], NO_SLOT)
    return batch._replace(doc_ids=jnp.asarray(batch.doc_ids).at[:, :count].set(candidates))


def _impossible(outputs: Outputs, reader: LMReader) -> Array:
    """Returns whether no candidate makes the answer possible though there are some, `[B]`."""
    batch = outputs.batch
    if reader.log_probs is None:
        return jnp.zeros(len(batch.doc_mask), bool)
    answers = sequence_log_probs(outputs.log_probs(), token_mask=batch.target_mask)
    return batch.doc_mask.any(axis=1) & ~(batch.doc_mask & (answers != -jnp.inf)).any(axis=1)


def _mean(values: Array, rows: Array) -> Array:
    """Returns the mean over some rows; 0 over none."""
    return jnp.where(rows, values, 0.0).sum() / jnp.maximum(1, rows.sum()).astype(values.dtype)


def _lm_params(params: Any, frozen: Any, merge: Callable[[Any, Any], Any] | None) -> Any:
    if "lm" not in params:
        return frozen["lm"]
    return merge(params["lm"], frozen["lm"]) if merge else params["lm"]


def _scores(
    encode: Encode,
    queries: Array,
    doc_params: Any,
    batch: RagBatch,
    scale: float,
    chunk_tokens: int | None,
) -> tuple[Array, Array]:
    """Returns live scores of each question's own slots `[B, S]`, and all documents `[M, D]`."""
    questions, slots, length = batch.docs.ids.shape
    flat = Tokens(*(leaf.reshape(questions * slots, length) for leaf in batch.docs))
    chunk = flat.ids.shape[0] if chunk_tokens is None else max(1, chunk_tokens // length)
    docs = encode_in_chunks(encode, doc_params, flat, chunk_size=chunk)  # [M, D]
    # What an encoder makes of no token may be NaN, and 0 · NaN is NaN in the queries' gradient.
    docs = jnp.where((batch.doc_ids != NO_SLOT).reshape(-1, 1), docs, 0.0)
    highest = jax.lax.Precision.HIGHEST
    own = jnp.einsum("bd,bsd->bs", queries, docs.reshape(questions, slots, -1), precision=highest)
    return scale * own, docs


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


def _leave_one_out(
    reader: LMReader, params: Any, batch: RagBatch, doc_scores: Array, log_probs: Callable[[], Any]
) -> Callable[[], Array]:
    """Returns what computes `Outputs.leave_one_out`: a fusion reader reads once more for each."""
    if reader.fused_log_probs is None:
        seen = {"doc_mask": batch.doc_mask, "token_mask": batch.target_mask}
        return lambda: leave_one_out_log_probs(doc_scores, log_probs(), **seen)
    fused, columns = reader.fused_log_probs, jnp.arange(batch.doc_mask.shape[1])
    held = jax.lax.stop_gradient(params)  # a target: nothing is kept for a backward pass

    def without(column: Array) -> Array:
        others = batch._replace(doc_mask=batch.doc_mask & (columns != column)[None])
        read = sequence_log_probs(fused(held, others), token_mask=batch.target_mask)
        return jnp.where(others.doc_mask.any(axis=1), read, 0.0)

    return lambda: jax.lax.map(without, columns).T


def _diagnostics(outputs: Outputs, reader: LMReader, rows: Array) -> Metrics:
    """Returns means over the questions `rows` `[B]`."""
    batch, mask = outputs.batch, outputs.batch.doc_mask
    entropy = retriever_entropy(outputs.doc_scores, doc_mask=mask).normalized
    metrics = {"retriever_entropy": _mean(entropy, rows)}
    if reader.log_probs is None and reader.attention is None:
        return metrics
    if reader.log_probs is None:
        mass = lsr_target(outputs.attention(), temperature=1.0, doc_mask=mask)
        return metrics | {
            "target_entropy": _mean(target_entropy(mass, doc_mask=mask).normalized, rows),
            "agreement": _mean(agreement(outputs.doc_scores, mass, doc_mask=mask), rows),
        }
    log_probs = outputs.log_probs()
    seen = {"doc_mask": mask, "token_mask": batch.target_mask}
    posterior = document_posterior(outputs.doc_scores, log_probs, **seen)
    marginal = rag_sequence_loss(outputs.doc_scores, log_probs, **seen)
    tokens = jnp.maximum(1, batch.target_mask.sum(axis=1)).astype(marginal.dtype)
    entropy = posterior_entropy(outputs.doc_scores, log_probs, **seen).normalized
    metrics |= {
        "posterior_entropy": _mean(entropy, rows),
        "agreement": _mean(agreement(outputs.doc_scores, posterior, doc_mask=mask), rows),
        "marginal_nll": _mean(marginal / tokens, rows),  # nats per token, whatever is minimised
    }
    last = batch.doc_ids[:, mask.shape[1] - 1]
    has_null = (last == NULL_DOC) & mask[:, -1]
    null = sequence_log_probs(log_probs[:, -1], token_mask=batch.target_mask)
    known = rows & has_null & (null != -jnp.inf)
    return metrics | {"utility": _mean(-marginal - jnp.where(known, null, 0.0), known)}


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

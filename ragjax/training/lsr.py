"""The retriever half of dual training: LM-supervised retrieval (LSR)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ragjax.losses import agreement, encode_in_chunks, retriever_entropy, target_entropy
from ragjax.models.inputs import Tokens
from ragjax.training.steps import LossFn, Metrics

Encode = Callable[[Any, Tokens], jax.Array]


class LsrBatch(NamedTuple):
    """Questions, the batch's distinct documents, and what the language model thinks of them."""

    queries: Tokens  # [B, L]
    docs: Tokens  # [M, L], every candidate of the batch once; rows past the last are padding
    target_log_probs: jax.Array  # [B, M] float32, log q; −inf where not a candidate of the query
    candidate_mask: jax.Array  # [B, M] bool, True for the K candidates of the query
    doc_mask: jax.Array  # [M] bool, False for padding rows
    # [B, M] bool, True for documents that are no negatives of the query, such as itself; None: all.
    excluded: jax.Array | None = None


def towers(
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any] | None,
    merge: Callable[[Any, Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Returns the parameters of the query and of the document encoder.

    Args:
        trainable: Either `{"shared": ...}` or any of `{"query": ..., "doc": ...}`.
        frozen: The towers that are not trained, by the same names; with `merge` also, under the
            names of those that are, what of them is not trained.
        merge: `(trainable, frozen)` of one tower to its parameters; None: towers train as a whole.
    """
    known = {**(frozen or {}), **trainable}
    if merge is not None:
        parts = {name: merge(tower, (frozen or {})[name]) for name, tower in trainable.items()}
        known |= parts
    if "shared" in known:
        return known["shared"], known["shared"]
    return known["query"], known["doc"]


def make_lsr_loss(
    encode: Encode,
    objective: Callable[..., jax.Array],
    *,
    scale: float,
    in_batch: bool,
    chunk_tokens: int = 2048,
    merge: Callable[[Any, Any], Any] | None = None,
    encode_queries: Encode | None = None,
    axis_name: str | None = None,
) -> LossFn:
    """Builds the LSR loss over live scores s = scale · q·d, averaged over the questions.

    Args:
        encode: `(params, tokens) -> [rows, D]` of documents, and of queries if no other is given.
        objective: `lsr_loss` (KL(p_R‖p_LSR), as RA-DIT and REPLUG print it) or `pdist_loss`
            (KL(p_LSR‖p_R), as their code and Atlas compute it).
        scale: Factor from similarity to score (20 for cosines: 1/temperature of p_R).
        in_batch: True: the softmax runs over every document of the batch, those that are not the
            query's own candidates with target 0, which keeps the rest of the embedding space in
            place. False: over the K candidates only, as the papers do. `lsr_loss` needs False: its
            KL to a target of probability zero is infinite.
        chunk_tokens: Documents are encoded in chunks of about this many tokens, and again in the
            backward pass, so memory does not grow with the batch. Changes nothing else.
        merge: `(trainable, frozen)` of one tower to its parameters, where part of a tower is frozen
            (see `towers`); None: towers train as a whole.
        encode_queries: Of queries, where they have another architecture; None: `encode`.
        axis_name: Mapped axis over which the rows of queries and of documents are divided; every
            device's documents are gathered for all queries.

    Returns:
        `(params, frozen, batch, key) -> (loss [], metrics)` for `make_train_step`; entropies are
        fractions of their maximum, over the questions of more than one candidate, as `agreement`
        is. A question whose target is impossible (log q of -inf at all candidates, or, for
        `lsr_loss`, at one) counts 0 in all of them; `impossible_answers` says how many there were.

    Gradients:
        To the towers in the trainable parameters; none to the target, hence none to the LM.

    References:
        Lin et al., RA-DIT, 2023, section 2.4; Shi et al., REPLUG, 2023, section 4; Izacard et al.,
        Atlas, 2022, section 2.2.
    """

    def loss(params: Any, frozen: Any, batch: LsrBatch, key: jax.Array) -> tuple[Any, Metrics]:
        del key  # no dropout: see rule 8 of the objectives (targets are scored without it)
        query_params, doc_params = towers(params, frozen, merge)
        queries = (encode_queries or encode)(query_params, batch.queries)  # [B, D]
        chunk = max(1, chunk_tokens // batch.docs.ids.shape[1])
        docs = encode_in_chunks(encode, doc_params, batch.docs, chunk_size=chunk)  # [M, D]
        # What an encoder makes of padding may be NaN, and 0 · NaN is NaN in the others' gradient.
        real = batch.candidate_mask.any(axis=1)
        queries = jnp.where(real[:, None], queries, 0.0)
        docs = gathered(jnp.where(batch.doc_mask[:, None], docs, 0.0), axis_name)
        scores = scale * jnp.einsum(
            "bd,md->bm", queries, docs, precision=jax.lax.Precision.HIGHEST
        )  # [B, M]
        everyone = jnp.broadcast_to(gathered(batch.doc_mask, axis_name)[None, :], scores.shape)
        if batch.excluded is not None:
            everyone &= ~batch.excluded
        mask = everyone if in_batch else batch.candidate_mask & everyone
        per_query = objective(scores, batch.target_log_probs, doc_mask=mask)  # [B]
        # A padding query (no candidate) has loss 0 by the losses' own rule and must not count.
        count = jnp.maximum(1, real.sum()).astype(per_query.dtype)
        candidates = batch.candidate_mask
        possible = (candidates & (batch.target_log_probs != -jnp.inf)).any(axis=1)
        lost = real & (~possible | (per_query == jnp.inf))
        metrics = {
            "retriever_entropy": retriever_entropy(scores, doc_mask=candidates).normalized,
            "target_entropy": target_entropy(
                batch.target_log_probs, doc_mask=candidates
            ).normalized,
            "agreement": agreement(scores, batch.target_log_probs, doc_mask=candidates),
        }
        kept = real & ~lost
        # One candidate alone has no entropy, and nothing to agree about.
        several = kept & (candidates.sum(axis=1) > 1)
        compared = jnp.maximum(1, several.sum()).astype(per_query.dtype)
        means = {k: jnp.where(several, v, 0.0).sum() / compared for k, v in metrics.items()}
        loss = jnp.where(kept, per_query, 0.0).sum() / count
        return loss, means | {"impossible_answers": lost.sum()}

    return loss


def real_questions(batch: LsrBatch) -> jax.Array:
    """Returns what the loss is a mean over, for `make_train_step`: `[]` int32."""
    return batch.candidate_mask.any(axis=1).sum()


def gathered(rows: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the rows of all devices of a mapped axis one after the other; None: the rows."""
    return rows if axis_name is None else jax.lax.all_gather(rows, axis_name, tiled=True)

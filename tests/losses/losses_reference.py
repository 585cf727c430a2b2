"""Every loss again, in float64 numpy, query by query, with masked entries removed, not masked.

`CASES` names each loss as a function of a `Batch`, with its reference; `OTHERS` what other modules
test the values of; `FUNCTIONS` both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ragjax import losses


class Batch(NamedTuple):
    doc_scores: np.ndarray  # [B, K]
    token_log_probs: np.ndarray  # [B, K, T]
    target: np.ndarray  # [B, K] log q, finite where kept
    sparse_target: np.ndarray  # [B, K] log q, -inf at some kept documents
    no_doc_log_probs: np.ndarray  # [B, T]
    positives: np.ndarray  # [B]
    doc_mask: np.ndarray  # [B, K]
    token_mask: np.ndarray  # [B, T]


def make_batch(rng, *, num_queries=5, num_docs=6, num_tokens=4, masked=True) -> Batch:
    """Rows 0, 5, ...: all kept; 1: some docs, one token; 2: one doc; 3: no doc; 4: no token."""
    doc_mask = rng.random((num_queries, num_docs)) < 0.7
    token_mask = np.arange(num_tokens) < rng.integers(2, num_tokens + 1, (num_queries, 1))
    doc_mask[:, 1] = doc_mask[:, 4] = True
    doc_mask[0::5], token_mask[0::5] = True, True
    token_mask[1::5] = np.arange(num_tokens) < 1
    doc_mask[2::5] = np.arange(num_docs) == 1
    doc_mask[3::5] = False
    token_mask[4::5] = False
    if not masked:
        doc_mask[:], token_mask[:] = True, True
    keep = doc_mask.any(1, keepdims=True) & doc_mask
    raw = rng.normal(size=doc_mask.shape) * 2
    half = keep & (np.arange(num_docs) % 4 != 0)
    return Batch(
        doc_scores=f32(rng.normal(size=doc_mask.shape) * 3),
        token_log_probs=f32(-rng.exponential(2, size=(*doc_mask.shape, num_tokens))),
        target=f32(_log_softmax(raw, keep)),
        sparse_target=f32(_log_softmax(raw, half)),
        no_doc_log_probs=f32(-rng.exponential(2, size=token_mask.shape)),
        positives=np.ones(num_queries, np.int32),
        doc_mask=doc_mask,
        token_mask=token_mask,
    )


def with_value(array, index, value) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


def f32(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def as_float64(batch: Batch) -> Batch:
    return Batch(*(a.astype(np.float64) if a.dtype == np.float32 else a for a in batch))


def _log_softmax(values, keep):
    exps = np.where(keep, np.exp(values), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(keep, np.log(exps / exps.sum(1, keepdims=True)), -np.inf)


def softmax(values):
    return np.exp(values) / np.exp(values).sum()


def _each(batch, one_query, without_docs=0.0):
    """Calls one_query(scores [k], log_probs [k, t], row, kept docs) with only what is kept."""
    losses = []
    for row, (docs, tokens) in enumerate(zip(batch.doc_mask, batch.token_mask, strict=True)):
        log_probs = batch.token_log_probs[row][docs][:, tokens]
        scores = batch.doc_scores[row][docs]
        losses.append(one_query(scores, log_probs, row, docs) if docs.any() else without_docs)
    return np.array(losses)


def _kl(p, q):
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def _entropy(p):
    return -sum(a * np.log(a) for a in p if a > 0)


def posterior(scores, log_probs):
    joint = softmax(scores) * np.exp(log_probs.sum(1))
    return joint / joint.sum()


def rag_sequence(batch):
    return _each(
        batch, lambda s, ell, *_: -np.log((softmax(s) * np.exp(ell).prod(1, initial=1)).sum())
    )


def rag_token(batch):
    return _each(
        batch, lambda s, ell, *_: -np.log((softmax(s)[:, None] * np.exp(ell)).sum(0)).sum()
    )


def lm(batch):
    return _each(batch, lambda s, ell, *_: -ell.sum())


def lsr(batch):
    return _each(batch, lambda s, ell, row, docs: _kl(softmax(s), np.exp(batch.target[row][docs])))


def pdist(batch):
    return _each(
        batch, lambda s, ell, row, docs: _kl(np.exp(batch.sparse_target[row][docs]), softmax(s))
    )


def info_nce(batch):
    def one_query(scores, _, row, docs):
        return -np.log(softmax(scores)[list(np.flatnonzero(docs)).index(batch.positives[row])])

    return _each(batch, one_query)


def retriever_entropy(batch):
    return _each(batch, lambda s, *_: _entropy(softmax(s)))


def retriever_entropy_normalized(batch):
    return _each(batch, lambda s, *_: _entropy(softmax(s)) / np.log(len(s)) if len(s) > 1 else 0.0)


def target_entropy(batch):
    return _each(batch, lambda s, ell, row, docs: _entropy(np.exp(batch.sparse_target[row][docs])))


def posterior_entropy(batch):
    return _each(batch, lambda s, ell, *_: _entropy(posterior(s, ell)))


def retrieval_utility(batch):
    without = np.where(batch.token_mask, batch.no_doc_log_probs, 0).sum(1)
    return np.where(batch.doc_mask.any(1), -rag_sequence(batch) - without, 0)


def _call(function, *fields, masks=("doc_mask",), **options):
    def of_batch(b: Batch):
        arrays = (getattr(b, field) for field in fields)
        return function(*arrays, **{name: getattr(b, name) for name in masks}, **options)

    return of_batch


def _answers(function, *fields, **options):
    both = ("doc_mask", "token_mask")
    return _call(function, "doc_scores", "token_log_probs", *fields, masks=both, **options)


def _part(name, function):
    return lambda b: getattr(function(b), name)


def _exp(function):
    return lambda b: jnp.exp(function(b))


_retriever_entropy = _call(losses.retriever_entropy, "doc_scores")

CASES = {
    "rag_sequence_loss": (_answers(losses.rag_sequence_loss), rag_sequence),
    "rag_token_loss": (_answers(losses.rag_token_loss), rag_token),
    "lm_loss": (_call(losses.lm_loss, "token_log_probs", masks=("doc_mask", "token_mask")), lm),
    "lsr_loss": (_call(losses.lsr_loss, "doc_scores", "target"), lsr),
    "pdist_loss": (_call(losses.pdist_loss, "doc_scores", "sparse_target"), pdist),
    "info_nce_loss": (
        lambda b: losses.info_nce_loss(b.doc_scores, b.positives, mask=b.doc_mask),
        info_nce,
    ),
    "retriever_entropy": (_part("nats", _retriever_entropy), retriever_entropy),
    "retriever_entropy_normalized": (
        _part("normalized", _retriever_entropy),
        retriever_entropy_normalized,
    ),
    "target_entropy": (
        _part("nats", _call(losses.target_entropy, "sparse_target")),
        target_entropy,
    ),
    "posterior_entropy": (_part("nats", _answers(losses.posterior_entropy)), posterior_entropy),
    "kl_divergence": (
        _call(losses.kl_divergence, "sparse_target", "target"),
        lambda b: pdist(b._replace(doc_scores=b.target)),
    ),
    "retrieval_utility": (
        _answers(losses.retrieval_utility, "no_doc_log_probs"),
        retrieval_utility,
    ),
}


def _attention_mass(b: Batch):
    attention = jnp.exp(jnp.swapaxes(b.token_log_probs, -1, -2))[..., None, :, :, None]
    norms, keep = jnp.exp(b.doc_scores)[..., None, :, None], b.doc_mask[..., None]
    return losses.attention_mass(attention, norms, context_mask=keep, token_mask=b.token_mask)


def _dpr(b: Batch):
    """K queries of T numbers, two documents each."""
    docs = jnp.stack([jnp.sin(b.token_log_probs), jnp.cos(b.token_log_probs)], axis=-2)
    ids = jnp.broadcast_to(jnp.arange(12).reshape(6, 2) % 5, docs.shape[:-1])
    keep = jnp.stack([b.doc_mask, b.doc_mask], axis=-1)
    return losses.dpr_loss(b.token_log_probs, docs, doc_ids=ids, doc_mask=keep)


def _symmetric(b: Batch):
    ids = jnp.broadcast_to(jnp.arange(6) % 5, b.doc_mask.shape)
    docs = jnp.sin(b.token_log_probs)
    return losses.symmetric_contrastive_loss(
        b.token_log_probs, docs, doc_ids=ids, doc_mask=b.doc_mask
    )


def _degeneracy(b: Batch):
    flags = losses.target_degeneracy(40 * b.sparse_target, doc_mask=b.doc_mask)
    return flags.uniform.astype(jnp.float32) + 2 * flags.one_hot.astype(jnp.float32)


def _drawn(b: Batch):
    docs = _call(losses.gumbel_top_k, "doc_scores", key=KEY, num_samples=2)(b)
    return docs.weights * b.token_log_probs[..., :2].swapaxes(-1, -2).astype(docs.weights.dtype)


def _reinforce(b: Batch):
    samples = jnp.stack([b.positives, 0 * b.positives], axis=-1)
    utilities = b.token_log_probs[..., :2, 0]
    return losses.reinforce_loss(b.doc_scores, samples, utilities, doc_mask=b.doc_mask)


def _combined(b: Batch):
    parts = {"a": b.doc_scores[..., 0], "b": b.token_log_probs[..., 0, 0]}
    return losses.combine_losses(parts, {"a": 1.0, "b": 0.5}).total


def _token_ids(b: Batch):
    return jnp.broadcast_to(b.positives[..., None], b.doc_scores.shape)


KEY, TABLE = jax.random.key(0), f32(np.sin(np.arange(36)).reshape(9, 4))

OTHERS = {
    "emdr2_loss": _answers(losses.emdr2_loss),
    "emdr2_loss of whole answers": lambda b: losses.emdr2_loss(
        b.doc_scores, b.token_log_probs.sum(-1), doc_mask=b.doc_mask
    ),
    "document_posterior": _exp(_answers(losses.document_posterior)),
    "rerank_log_probs": _exp(_answers(losses.rerank_log_probs, weight=0.5)),
    "leave_one_out_log_probs": _answers(losses.leave_one_out_log_probs),
    "lsr_target": _exp(_call(losses.lsr_target, "doc_scores", temperature=0.5)),
    "loop_target": _exp(_call(losses.loop_target, "doc_scores", temperature=0.5)),
    "attention_mass": _attention_mass,
    "agreement": _call(losses.agreement, "doc_scores", "target"),
    "target_degeneracy": _degeneracy,
    "dpr_loss": _dpr,
    "symmetric_contrastive_loss": _symmetric,
    "gumbel_top_k": _drawn,
    "stochastic_rag_loss": lambda b: losses.stochastic_rag_loss(
        b.doc_scores, b.token_log_probs[..., 0], KEY, num_samples=2, doc_mask=b.doc_mask
    ),
    "reinforce_loss": _reinforce,
    "combine_losses": _combined,
    "sequence_log_probs": _call(
        losses.sequence_log_probs, "token_log_probs", masks=("token_mask",)
    ),
    "sequence_log_probs given no document": lambda b: losses.sequence_log_probs(
        b.token_log_probs[..., 0, :], token_mask=b.token_mask
    ),
    "token_log_probs": lambda b: losses.token_log_probs(b.token_log_probs, _token_ids(b)),
    "chunked_token_log_probs": lambda b: losses.chunked_token_log_probs(
        b.token_log_probs, TABLE, _token_ids(b), mask=b.doc_mask, chunk_size=4
    ),
} | {
    score.__name__: lambda b, score=score: score(b.token_log_probs.sum(-1), b.token_mask.sum(-1))
    for score in (losses.prob, losses.prob_per_token, losses.log_prob, losses.log_prob_per_token)
}
FUNCTIONS = {name: loss for name, (loss, _) in CASES.items()} | OTHERS

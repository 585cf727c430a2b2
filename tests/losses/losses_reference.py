"""Every loss again, in float64 numpy, query by query, with masked entries removed, not masked."""

from typing import NamedTuple

import numpy as np


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

"""How far the index has drifted from the live document encoder, measured and not only counted.

    drift = EmbeddingDrift(task)(params, snapshot)  # 0.0 for an index that is up to date

P = probes, N = documents, D = embedding size, B = queries, C = candidates, K = results.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax.index import base
from ragjax.refresh.encode import encode_corpus
from ragjax.refresh.task import EncodeTask

DocEmbeddings = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Returns the embeddings `[R, D]` of documents `[R]`, given by row."""


def top_k_overlap(before: base.SearchResult, after: base.SearchResult) -> float:
    """Returns the mean fraction of a query's documents that two results have in common.

    For each query `|before & after| / max(|before|, |after|)` over the real results.

    Args:
        before: `[B, K]` results.
        after: `[B, K]` results of the same queries.

    Returns:
        A fraction; queries without any result are left out, and 1.0 if all are.

    Raises:
        ValueError: The results are not of the same queries and k.
    """
    if before.mask.shape != after.mask.shape:
        raise ValueError(
            f"Results {before.mask.shape} and {after.mask.shape} cannot be compared; search for "
            "the same queries and the same k"
        )
    same = before.doc_ids[:, :, None] == after.doc_ids[:, None, :]  # [B, K, K]
    same &= before.mask[:, :, None] & after.mask[:, None, :]
    common = same.any(axis=2).sum(axis=1)
    real = np.maximum(before.mask.sum(axis=1), after.mask.sum(axis=1))
    compared = real > 0
    return float(np.mean(common[compared] / real[compared])) if compared.any() else 1.0


def rerank(
    result: base.SearchResult, query_embeddings: ArrayLike, doc_embeddings: DocEmbeddings, k: int
) -> base.SearchResult:
    """Scores candidates again with live document embeddings and keeps the best k.

    A stale index then only decides which documents are considered: search for a few times k, and
    what is returned and its scores are the live encoder's.

    Args:
        result: `[B, C]` candidates; masked slots are ignored.
        query_embeddings: `[B, D]` live query embeddings.
        doc_embeddings: Encodes documents; called at most once, with the distinct candidates of
            all queries in ascending order.
        k: Documents kept for each query.

    Returns:
        Exactly k columns, best first, equal scores ordered by the lower id; scores are inner
        products in float32. Slots beyond a query's candidates are masked.

    Raises:
        ValueError: `k` is not positive, the numbers of queries or rows differ, or an embedding is
            not finite.
    """
    num_queries = len(result.mask)
    queries = np.asarray(query_embeddings)
    if len(queries) != num_queries:
        raise ValueError(f"Got {len(queries)} query embeddings for {num_queries} results")
    if k < 1:
        raise ValueError(f"k must be a positive integer, got {k!r}")
    rows = np.unique(result.doc_ids[result.mask]).astype(np.int64)
    if not len(rows):
        return base.empty_result(num_queries, k)
    documents = base.check_embeddings(doc_embeddings(rows), name="live document embeddings")
    if len(documents) != len(rows):
        raise ValueError(f"Got {len(documents)} live embeddings for {len(rows)} documents")
    queries = base.check_query_embeddings(queries, dim=documents.shape[1])
    scores = np.full(result.mask.shape, -np.inf, np.float32)
    for query, (doc_ids, real) in enumerate(zip(result.doc_ids, result.mask, strict=True)):
        candidates = documents[np.searchsorted(rows, doc_ids[real])]
        # Unlike a matmul, this rounds equal rows equally wherever they stand, so ties are ties.
        scores[query, real] = (candidates * queries[query]).sum(axis=1)
    order = np.lexsort((result.doc_ids, -scores), axis=1)[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    return base.pad_result(np.take_along_axis(result.doc_ids, order, axis=1), best, k)


def live_embeddings(task: EncodeTask, params: Any) -> DocEmbeddings:
    """Returns what encodes some documents of a task now, in this thread, for `rerank`."""
    return lambda rows: encode_corpus(task, params, rows=rows)


def indexed_embeddings(
    snapshot: base.IndexSnapshot, rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Returns the embeddings `[R, D]` of some documents as they were indexed.

    Raises:
        ValueError: The snapshot does not give its embeddings back.
    """
    if snapshot.doc_embeddings is None:
        raise ValueError(
            f"Index version {snapshot.version} has no doc_embeddings to compare live ones with; "
            "make the IndexSnapshot with them, or measure TopKDrift"
        )
    return snapshot.doc_embeddings(rows)


class EmbeddingDrift:
    """The mean of 1 - cosine(live embedding, embedding in the index) over sampled documents.

    A measurement encodes P documents. Two embeddings of length 0 are equal; one alone counts as
    a drift of 1.
    """

    def __init__(
        self,
        task: EncodeTask,
        indexed: Callable[[base.IndexSnapshot, NDArray[np.int64]], ArrayLike] = indexed_embeddings,
        *,
        num_probes: int = 256,
        seed: int = 0,
    ) -> None:
        """Draws the documents.

        Args:
            task: The corpus and the document encoder.
            indexed: Reads embeddings `[P, D]` of the given rows out of a snapshot; called once
                for each version.
            num_probes: Documents to draw, or all where there are fewer.
            seed: Of the sample.

        Raises:
            ValueError: No probes.
        """
        if num_probes < 1:
            raise ValueError(f"num_probes must be at least 1, got {num_probes}")
        size = len(task.documents)
        sample = np.random.default_rng(seed).choice(size, min(num_probes, size), replace=False)
        self.rows: NDArray[np.int64] = np.sort(sample).astype(np.int64)
        self._task = task
        self._indexed = indexed
        self._cached: tuple[int, NDArray[np.float32]] | None = None

    def __call__(self, params: Any, snapshot: base.IndexSnapshot) -> float:
        """Returns the drift, from 0 to 2 (up to rounding).

        Args:
            params: Live parameters of the document encoder.
            snapshot: The index that serves.

        Raises:
            ValueError: The snapshot's embeddings are not `[P, D]`, or an embedding is not finite.
        """
        live = live_embeddings(self._task, params)(self.rows)
        if self._cached is None or self._cached[0] != snapshot.version:
            embeddings = self._indexed(snapshot, self.rows)
            self._cached = (
                snapshot.version,
                base.check_embeddings(embeddings, name="embeddings in the index"),
            )
        indexed = self._cached[1]
        if indexed.shape != live.shape:
            raise ValueError(
                f"The index gave embeddings {indexed.shape} of {live.shape[0]} documents that the "
                f"encoder embeds as {live.shape}; both must be of the same corpus and encoder"
            )
        return float(np.mean(_cosine_distances(live, indexed)))


class TopKDrift:
    """The fraction of the top k that live document embeddings would replace.

    The documents that the index returns are compared with the best of the `factor` x k candidates
    after `rerank`. What is not among the candidates cannot come in, so this is a lower bound; and
    a measurement encodes up to P x `factor` x k documents, more than `EmbeddingDrift` does.
    """

    def __init__(
        self,
        task: EncodeTask,
        encode_queries: Callable[[], ArrayLike],
        *,
        k: int = 10,
        factor: int = 4,
    ) -> None:
        """Takes the probes.

        Args:
            task: The corpus and the document encoder.
            encode_queries: Returns live embeddings `[P, D]` of the probe queries. It takes no
                parameters, since those of the query encoder may live elsewhere.
            k: Documents compared for each query.
            factor: Candidates for each of them.

        Raises:
            ValueError: `k` is not positive, or `factor` leaves nothing to choose from.
        """
        if k < 1 or factor < 2:
            raise ValueError(f"k must be at least 1 and factor at least 2, got {k} and {factor}")
        self._task = task
        self._encode_queries = encode_queries
        self._k = k
        self._candidates = k * factor

    def __call__(self, params: Any, snapshot: base.IndexSnapshot) -> float:
        """Returns the drift, from 0 to 1.

        Args:
            params: Live parameters of the document encoder.
            snapshot: The index that serves; its queries are embeddings.
        """
        queries = np.asarray(self._encode_queries(), np.float32)
        size = snapshot.index.size
        k = min(self._k, size)
        found = snapshot.index.search(queries, min(self._candidates, size))
        after = rerank(found, queries, live_embeddings(self._task, params), k)
        return 1.0 - top_k_overlap(found.top(k), after)


def _cosine_distances(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns 1 - cosine of each pair of rows `[P, D]`."""
    norms = [np.linalg.norm(side.astype(np.float64), axis=1) for side in (left, right)]
    product = norms[0] * norms[1]
    dots = (left.astype(np.float64) * right).sum(axis=1)
    distances = 1 - dots / np.where(product == 0, 1.0, product)
    return np.where((norms[0] == 0) & (norms[1] == 0), 0.0, distances)

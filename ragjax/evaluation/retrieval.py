"""Retrieval metrics per query, as trec_eval defines them.

Every function takes, for each of Q queries, a ranking (best document first) and the grades of the
judged documents, and returns one float64 per query. Rankings hold document ids (strings) or corpus
rows (integers), in the same kind as the keys of the grades; the id -1 of a masked search slot is
skipped and takes no rank. A document is relevant when its grade is above 0; documents without a
grade count as grade 0. A query without any relevant document has no defined value: it is NaN here
(trec_eval writes 0, which would lower the mean by a property of the data), and `intervals` leaves
it out.

Example:
    recall = recall_at_k([["d2", "d1"]], [{"d1": 1}], k=5)  # array([1.])
"""

import numbers
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ragjax.data.matching import refuse_string

DocId = str | int
RankedDocs = Sequence[Sequence[DocId]] | np.ndarray
Grades = Sequence[Mapping[str, float]] | Sequence[Mapping[int, float]]

MASKED_ID = -1


def recall_at_k(rankings: RankedDocs, grades: Grades, *, k: int) -> np.ndarray:
    """Measures which fraction of a query's relevant documents stand among the first k.

    Args:
        rankings: Q rankings, best first, or an integer array [Q, K] of corpus rows.
        grades: Q mappings from document id (or row) to grade, in the order of `rankings`.
        k: Cut-off in ranks, at least 1. A shorter ranking is used as it is.

    Returns:
        [Q] float64, fraction in [0, 1]; NaN for a query without relevant documents.

    Raises:
        ValueError: If lengths or id kinds differ, a ranking repeats a document, or k < 1.
    """
    _check_cutoff(k)

    def recall(ranked: list[DocId], relevant: dict[DocId, float]) -> float:
        return sum(doc in relevant for doc in ranked[:k]) / len(relevant)

    return _per_query(rankings, grades, recall)


def reciprocal_rank(rankings: RankedDocs, grades: Grades, *, k: int = 10) -> np.ndarray:
    """Computes 1 / rank of the first relevant document among the first k; its mean is MRR@k.

    Args:
        rankings: Q rankings, best first, or an integer array [Q, K] of corpus rows.
        grades: Q mappings from document id (or row) to grade, in the order of `rankings`.
        k: Cut-off in ranks, at least 1.

    Returns:
        [Q] float64 in [0, 1], 0 where no relevant document is among the first k; NaN for a query
        without relevant documents.

    Raises:
        ValueError: If lengths or id kinds differ, a ranking repeats a document, or k < 1.
    """
    _check_cutoff(k)

    def first(ranked: list[DocId], relevant: dict[DocId, float]) -> float:
        ranks = (rank for rank, doc in enumerate(ranked[:k], start=1) if doc in relevant)
        return 1.0 / next(ranks, np.inf)

    return _per_query(rankings, grades, first)


def ndcg(rankings: RankedDocs, grades: Grades, *, k: int = 10) -> np.ndarray:
    """Computes the normalised discounted cumulative gain of the first k documents.

    DCG@k = sum over ranks r <= k of grade_r / log2(r + 1), divided by the DCG@k of the best
    possible ranking. The gain is the grade itself, as in trec_eval, not 2**grade - 1.

    Args:
        rankings: Q rankings, best first, or an integer array [Q, K] of corpus rows.
        grades: Q mappings from document id (or row) to grade, in the order of `rankings`.
        k: Cut-off in ranks, at least 1.

    Returns:
        [Q] float64 in [0, 1]; NaN for a query without relevant documents.

    Raises:
        ValueError: If lengths or id kinds differ, a ranking repeats a document, or k < 1.

    References:
        Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques, 2002.
    """
    _check_cutoff(k)
    discounts = 1.0 / np.log2(np.arange(2, k + 2))

    def gain(ranked: list[DocId], relevant: dict[DocId, float]) -> float:
        gains = np.array([relevant.get(doc, 0) for doc in ranked[:k]], dtype=np.float64)
        ideal = np.array(sorted(relevant.values(), reverse=True)[:k], dtype=np.float64)
        return float(gains @ discounts[: len(gains)] / (ideal @ discounts[: len(ideal)]))

    return _per_query(rankings, grades, gain)


def retrieval_metrics(rankings: RankedDocs, grades: Grades) -> dict[str, np.ndarray]:
    """Computes recall@1, recall@5, recall@20, mrr@10 and ndcg@10 of every query.

    Args:
        rankings: Q rankings, best first, or an integer array [Q, K] of corpus rows.
        grades: Q mappings from document id (or row) to grade, in the order of `rankings`.

    Returns:
        Metric name to [Q] float64; NaN for a query without relevant documents.

    Raises:
        ValueError: If lengths or id kinds differ, or a ranking repeats a document.
    """
    recalls = {f"recall@{k}": recall_at_k(rankings, grades, k=k) for k in (1, 5, 20)}
    return recalls | {
        "mrr@10": reciprocal_rank(rankings, grades, k=10),
        "ndcg@10": ndcg(rankings, grades, k=10),
    }


def _check_cutoff(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _per_query(
    rankings: RankedDocs,
    grades: Grades,
    metric: Callable[[list[DocId], dict[DocId, float]], float],
) -> np.ndarray:
    if len(rankings) != len(grades):
        raise ValueError(f"got {len(rankings)} rankings and grades for {len(grades)} queries")
    values = np.full(len(grades), np.nan)
    for query, (ranking, graded) in enumerate(zip(rankings, grades, strict=True)):
        refuse_string(ranking, f"ranking {query}")
        ranked = _unmasked(query, ranking)
        _check_same_kind(query, ranked, graded)
        relevant: dict[DocId, float] = {doc: grade for doc, grade in graded.items() if grade > 0}
        if relevant:
            values[query] = metric(ranked, relevant)
    return values


def _unmasked(query: int, ranking: Sequence[DocId] | np.ndarray) -> list[DocId]:
    docs = ranking.tolist() if isinstance(ranking, np.ndarray) else ranking
    ranked = [doc for doc in docs if doc != MASKED_ID]
    if len(set(ranked)) < len(ranked):
        repeated = next(doc for place, doc in enumerate(ranked) if doc in ranked[:place])
        raise ValueError(f"ranking {query} holds document {repeated!r} more than once")
    return ranked


def _check_same_kind(
    query: int, ranked: list[DocId], graded: Mapping[str, float] | Mapping[int, float]
):
    """Rows never equal ids, so a mixture would read as recall 0."""
    if not ranked or not graded:
        return
    ranked_id, graded_id = ranked[0], next(iter(graded))
    if isinstance(ranked_id, numbers.Integral) != isinstance(graded_id, numbers.Integral):
        raise ValueError(
            f"ranking {query} holds {ranked_id!r} but its grades are keyed by {graded_id!r}: "
            "pass document ids in both or corpus rows in both"
        )

"""Dense and lexical retrieval together: the weighted sum of their per-query z-scores.

With a dense score s and a lexical score t of the same query and document,

    score = w * (s - mean(s)) / std(s) + (1 - w) * (t - mean(t)) / std(t)

where mean and std run over the candidates: the union of the best `depth` of both. A candidate
that one side did not return gets the lowest score of that side's list; but if the lexical list
ended before `depth`, the candidate has no word of the query, and its lexical score is known: 0.

Another depth is another ranking: training, evaluation and serving take the same one.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax.index import base

WEIGHT_GRID = tuple(step / 10 for step in range(11))
USUAL_WEIGHT = 0.4
"""What retrievers want on most corpora, where nothing tells more."""
# In standard errors: 0 follows the luck of few questions, 1 keeps weights that are too low a mean.
_NOISE = 0.5


class HybridQueries(NamedTuple):
    """The same B queries as embeddings and as text."""

    embeddings: ArrayLike  # [B, D]
    texts: Sequence[str]  # B strings


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseWeight:
    """The weight chosen on held-out questions, with what every candidate weight reached.

    Attributes:
        weight: The chosen weight of the dense side, 0 to 1.
        grid: The weights tried.
        mrr: Mean reciprocal rank (at most rank 10) of the best gold document for each of them.
    """

    weight: float
    grid: tuple[float, ...]
    mrr: tuple[float, ...]


class HybridIndex:
    """Weighted sum of per-query z-scores of a dense and a lexical index over one corpus."""

    def __init__(
        self,
        dense: base.Index[ArrayLike],
        lexical: base.Index[Sequence[str]],
        *,
        dense_weight: float,
        depth: int = 1000,
    ) -> None:
        """Joins two indexes over the same documents.

        Args:
            dense: Searched with the embeddings.
            lexical: Searched with the texts.
            dense_weight: Weight of the dense side, 0 (lexical alone) to 1 (dense alone).
            depth: Candidates taken from each side (at least k are taken).

        Raises:
            ValueError: The indexes differ in size, the weight is outside [0, 1] or depth < 1.
        """
        if dense.size != lexical.size:
            raise ValueError(
                f"The dense index holds {dense.size} documents and the lexical one {lexical.size}; "
                "both must be built from the same corpus"
            )
        _check_weight(dense_weight)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._dense = dense
        self._lexical = lexical
        self._weight = dense_weight
        self._depth = depth

    @property
    def size(self) -> int:
        """Number of documents."""
        return self._dense.size

    @property
    def dense_weight(self) -> float:
        """Weight of the dense side."""
        return self._weight

    def with_dense(self, dense: base.Index[ArrayLike]) -> "HybridIndex":
        """Returns the same with another dense side.

        Raises:
            ValueError: It differs in size from the lexical side.
        """
        return HybridIndex(dense, self._lexical, dense_weight=self._weight, depth=self._depth)

    def depth_of(self, k: int) -> int:
        """Returns how many candidates a search for k results takes from each index.

        The scores, which are relative to the candidates, are the same for every k of equal depth.
        """
        return max(min(self._depth, self.size), k)

    def search(self, queries: HybridQueries, k: int) -> base.SearchResult:
        """Returns the k candidates of highest combined score for each query.

        Args:
            queries: B queries in both forms.
            k: Results per query.

        Returns:
            `[B, k]` ids, combined z-scores and mask, best first; ties by the lower id.

        Raises:
            ValueError: `k` is not positive, or the two forms differ in number.
        """
        base.check_k(k, size=self.size)
        dense, lexical = _search_both(self._dense, self._lexical, queries, self.depth_of(k))
        result = base.empty_result(len(dense.doc_ids), k)
        for row in range(len(dense.doc_ids)):
            doc_ids, dense_z, lexical_z = _candidates(dense, lexical, row)
            found, scores = _fuse(doc_ids, dense_z, lexical_z, self._weight, k)
            result.doc_ids[row, : len(found)] = found
            result.scores[row, : len(found)] = scores
            result.mask[row, : len(found)] = True
        return result


def choose_dense_weight(
    dense: base.Index[ArrayLike],
    lexical: base.Index[Sequence[str]],
    queries: HybridQueries,
    gold_doc_ids: Sequence[Collection[int]],
    *,
    grid: Sequence[float] = WEIGHT_GRID,
    depth: int = 1000,
) -> DenseWeight:
    """Chooses the weight of the dense side by mean reciprocal rank on held-out questions.

    Each index is searched once. On few questions the best weight is mostly luck: of those that
    are not worse than the best by more than half a standard error of the paired difference, the one
    nearest to `USUAL_WEIGHT` is taken.

    Args:
        dense: Searched with the embeddings.
        lexical: Searched with the texts.
        queries: B held-out questions, used for nothing else.
        gold_doc_ids: For each question the rows of its relevant documents.
        grid: Weights to try; 0 is the lexical index alone and 1 the dense one alone.
        depth: Candidates taken from each side, as in `HybridIndex`.

    Raises:
        ValueError: No questions, no grid, or numbers that do not match.
    """
    if not grid or not gold_doc_ids or len(gold_doc_ids) != len(queries.texts):
        raise ValueError(
            f"Choosing a weight needs weights and as many gold sets as questions, got {len(grid)} "
            f"weights, {len(gold_doc_ids)} gold sets and {len(queries.texts)} questions"
        )
    for weight in grid:
        _check_weight(weight)
    found = _search_both(dense, lexical, queries, min(depth, dense.size))
    reciprocal_ranks = np.zeros((len(gold_doc_ids), len(grid)))
    for row, gold in enumerate(gold_doc_ids):
        doc_ids, dense_z, lexical_z = _candidates(*found, row)
        for column, weight in enumerate(grid):
            best, _ = _fuse(doc_ids, dense_z, lexical_z, weight, 10)
            ranks = np.flatnonzero(np.isin(best, list(gold)))
            reciprocal_ranks[row, column] = 1 / (1 + ranks[0]) if ranks.size else 0.0
    distances = [abs(weight - USUAL_WEIGHT) for weight in grid]
    chosen, mrr = choose_near_usual(reciprocal_ranks, distances), reciprocal_ranks.mean(axis=0)
    return DenseWeight(weight=grid[chosen], grid=tuple(grid), mrr=tuple(mrr.tolist()))


def choose_near_usual(figures: NDArray[np.floating], distances: Sequence[float]) -> int:
    """Chooses a setting where the best one on few questions is mostly luck.

    Args:
        figures: `[Q, C]` of each question with each of C settings, higher is better.
        distances: Of the C settings from the usual one.

    Returns:
        Of the settings that are not worse than the best by more than half a standard error of the
        paired difference, the number of the one nearest to the usual one.
    """
    means = figures.mean(axis=0)
    missing = figures[:, [means.argmax()]] - figures
    noise = missing.std(axis=0, ddof=min(1, len(missing) - 1)) / np.sqrt(len(missing))
    good = np.flatnonzero(missing.mean(axis=0) <= _NOISE * noise).tolist()
    return min(good, key=lambda i: (distances[i], -means[i]))


def _check_weight(weight: float) -> None:
    """Refuses a weight outside [0, 1]."""
    if not 0 <= weight <= 1:
        raise ValueError(f"dense_weight must be between 0 and 1, got {weight}")


def _search_both(
    dense: base.Index[ArrayLike],
    lexical: base.Index[Sequence[str]],
    queries: HybridQueries,
    depth: int,
) -> tuple[base.SearchResult, base.SearchResult]:
    """Searches both indexes for the same queries."""
    embeddings = np.asarray(queries.embeddings)
    if len(embeddings) != len(queries.texts):
        raise ValueError(
            f"Got {len(embeddings)} query embeddings and {len(queries.texts)} query texts; "
            "they must be the same queries"
        )
    return dense.search(embeddings, depth), lexical.search(queries.texts, depth)


def _candidates(
    dense: base.SearchResult, lexical: base.SearchResult, row: int
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Returns the union of both lists of one query, ascending, and each side's z-scores of it."""
    (dense_ids, dense_scores), (lexical_ids, lexical_scores) = (
        (side.doc_ids[row][side.mask[row]], side.scores[row][side.mask[row]])
        for side in (dense, lexical)
    )
    candidates = np.union1d(dense_ids, lexical_ids)
    complete = len(lexical_ids) < lexical.doc_ids.shape[1]
    lexical_floor = 0.0 if complete else lexical_scores.min()
    return (
        candidates,
        _z_scores(candidates, dense_ids, dense_scores, dense_scores.min(initial=np.inf)),
        _z_scores(candidates, lexical_ids, lexical_scores, lexical_floor),
    )


def _z_scores(
    candidates: NDArray[np.int32],
    doc_ids: NDArray[np.int32],
    scores: NDArray[np.float32],
    missing: float,
) -> NDArray[np.float64]:
    """Returns one side's z-scores of all candidates; zero for a side that tells none apart."""
    filled = np.full(len(candidates), missing, np.float64)
    filled[np.searchsorted(candidates, doc_ids)] = scores
    spread = filled.std()
    return (filled - filled.mean()) / spread if spread > 0 else np.zeros(len(candidates))


def _fuse(
    doc_ids: NDArray[np.int32],
    dense_z: NDArray[np.float64],
    lexical_z: NDArray[np.float64],
    weight: float,
    k: int,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Returns ids and scores of the k best candidates, ties by the lower id."""
    scores = weight * dense_z + (1 - weight) * lexical_z
    # A stable sort of ascending ids leaves equal scores in the order of their ids.
    order = np.argsort(-scores, kind="stable")[:k]
    return doc_ids[order], scores[order]

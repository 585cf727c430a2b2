"""Encoding a part of the corpus: which documents are worth it first.

    counts = RetrievalCounts(len(documents))
    counts.add(result.doc_ids, result.mask)  # every step
    rows = select_rows(counts=counts.counts, drift=drift, age=age, budget=policy.budget(size))
    counts.forget(rows, exported_counts)     # once they are encoded again

N = documents, B = queries, K = results per query.
"""

import dataclasses
import threading

import numpy as np
from numpy.typing import ArrayLike, NDArray


class RetrievalCounts:
    """How often each document was retrieved since it was encoded last; safe between threads."""

    def __init__(self, size: int) -> None:
        """Starts at zero for `size` documents."""
        if size < 1:
            raise ValueError(f"Counts need at least 1 document, got {size}")
        self.counts: NDArray[np.int64] = np.zeros(size, np.int64)
        self._lock = threading.Lock()

    def add(self, doc_ids: ArrayLike, mask: ArrayLike) -> None:
        """Counts the documents of a search result.

        Args:
            doc_ids: `[B, K]` rows of the corpus.
            mask: `[B, K]`, True = a real result; the other slots are not counted.

        Raises:
            ValueError: The shapes differ, or a document is not of this corpus.
        """
        ids, real = np.asarray(doc_ids), np.asarray(mask, np.bool_)
        if ids.shape != real.shape:
            raise ValueError(f"doc_ids {ids.shape} and mask {real.shape} must have one shape")
        found = _check_rows(ids[real], len(self.counts))
        with self._lock:
            np.add.at(self.counts, found, 1)

    def forget(self, rows: ArrayLike, counts: ArrayLike) -> None:
        """Takes off what was counted of documents up to the moment they were encoded from.

        Args:
            rows: `[R]` documents.
            counts: `[N]` what `state` returned at that moment.

        Raises:
            ValueError: A document is not of this corpus.
        """
        chosen = _check_rows(np.asarray(rows), len(self.counts))
        with self._lock:
            self.counts[chosen] -= np.asarray(counts)[chosen]

    def state(self) -> NDArray[np.int64]:
        """Returns a copy of the counts `[N]`."""
        with self._lock:
            return self.counts.copy()


@dataclasses.dataclass(frozen=True)
class PartialPolicy:
    """How much of the corpus each refresh encodes.

    Attributes:
        fraction: Of the documents, in a refresh that is not full; above 0, at most 1.
        full_every: Every so many refreshes is full; 1: all of them.
    """

    fraction: float
    full_every: int

    def __post_init__(self) -> None:
        """Refuses a fraction that is none and less than a refresh."""
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"fraction must be above 0 and at most 1, got {self.fraction}; where no document "
                "is to be encoded, do not refresh"
            )
        if self.full_every < 1:
            raise ValueError(f"full_every must be at least 1, got {self.full_every}")

    def is_full(self, refresh: int) -> bool:
        """Tells whether a refresh encodes all documents.

        Args:
            refresh: Its number in the run; 0 is the initial index, which is always full.
        """
        return refresh % self.full_every == 0

    def budget(self, size: int) -> int:
        """Returns how many of `size` documents a refresh encodes that is not full, at least 1."""
        return max(1, round(self.fraction * size))


def select_rows(
    *, counts: ArrayLike, drift: ArrayLike, age: ArrayLike, budget: int
) -> NDArray[np.int64]:
    """Chooses the documents to encode again.

    Half of the budget (rounded up) goes to the documents retrieved most since they were encoded,
    a quarter (rounded down) to those whose embedding changed most, each where there are any with a
    count or a known change above 0; the rest goes to the oldest, so that every document gets its
    turn. Of equals the older comes first, of equally old ones the more retrieved, and at last the
    lower row: the choice depends on the arguments only.

    Args:
        counts: `[N]` retrievals since a document was encoded; see `RetrievalCounts`.
        drift: `[N]` last known change of its embedding; NaN = unknown.
        age: `[N]` steps since it was encoded.
        budget: Documents to choose, at most N.

    Returns:
        `[budget]` distinct rows, ascending.

    Raises:
        ValueError: The arrays are not of one length, counts or age are not whole, or the budget is
            not between 1 and N.
    """
    counts, drift, age = np.asarray(counts), np.asarray(drift), np.asarray(age)
    if counts.ndim != 1 or not counts.shape == drift.shape == age.shape:
        raise ValueError(
            f"counts {counts.shape}, drift {drift.shape} and age {age.shape} must each have one "
            "value for a document"
        )
    if counts.dtype.kind not in "iu" or age.dtype.kind not in "iu":
        raise ValueError(
            f"counts and age must be whole numbers, got {counts.dtype} and {age.dtype}"
        )
    size = len(counts)
    if not 1 <= budget <= size:
        raise ValueError(f"budget must be between 1 and the {size} documents, got {budget}")
    chosen = np.zeros(size, np.bool_)
    retrieved = np.flatnonzero(counts > 0)
    chosen[_largest(retrieved, (budget + 1) // 2, counts, age)] = True
    # NaN compares as False, so an unknown change counts as none.
    drifted = np.flatnonzero((drift > 0) & ~chosen)
    chosen[_largest(drifted, budget // 4, drift, age, counts)] = True
    left = budget - int(chosen.sum())
    chosen[_largest(np.flatnonzero(~chosen), left, age, counts)] = True
    return np.flatnonzero(chosen).astype(np.int64)


def _largest(rows: NDArray[np.intp], count: int, *keys: NDArray) -> NDArray[np.intp]:
    """Returns the `count` of ascending `rows` that are largest by the first key.

    Equals are decided by the next key, in the end by the lower row; in linear time.
    """
    if count >= len(rows):
        return rows
    if count == 0 or not keys:
        return rows[:count]
    values = keys[0][rows]
    edge = np.partition(values, len(values) - count)[len(values) - count]
    above = rows[values > edge]
    return np.concatenate([above, _largest(rows[values == edge], count - len(above), *keys[1:])])


def _check_rows(rows: NDArray, size: int) -> NDArray:
    """Returns rows of a corpus, or refuses the first that is not in it."""
    bad = rows[(rows < 0) | (rows >= size)]
    if bad.size:
        raise ValueError(f"Document {bad.flat[0]} is not one of the {size} documents")
    return rows

"""The search protocol, its result type and the checks every index shares.

B = queries, K = results per query, N = documents, D = embedding size.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax.index.store import StoredEmbeddings

_LOG = logging.getLogger(__name__)
_SHOWN_ROWS = 10
_UNIT_NORM_TOLERANCE = 0.01
_CHECKED_ROWS = 32_768

NO_DOC = -1
"""The document id of a masked result slot."""

Documents = NDArray[np.float32] | StoredEmbeddings

Queries_contra = TypeVar("Queries_contra", contravariant=True)


class SearchResult(NamedTuple):
    """The K best documents of each query; always exactly K columns, best first.

    Equal scores are ordered by the lower document id wherever the index computes exact scores.
    """

    doc_ids: NDArray[np.int32]  # [B, K] rows of the corpus; -1 in masked slots
    scores: NDArray[np.float32]  # [B, K] higher is better; -inf in masked slots
    mask: NDArray[np.bool_]  # [B, K] True = a real result

    def take(self, queries: NDArray[np.integer]) -> "SearchResult":
        """Returns the results of some queries, given by position."""
        return SearchResult(self.doc_ids[queries], self.scores[queries], self.mask[queries])

    def top(self, k: int) -> "SearchResult":
        """Returns the first k columns."""
        return SearchResult(self.doc_ids[:, :k], self.scores[:, :k], self.mask[:, :k])


class Index(Protocol[Queries_contra]):
    """Anything that finds documents: generic in what a query is (embeddings, texts, both)."""

    @property
    def size(self) -> int:
        """Number of documents that can be found."""
        ...

    def search(self, queries: Queries_contra, k: int) -> SearchResult:
        """Returns the k best documents of each query."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexSnapshot:
    """An index and where it came from; never changed after it is made.

    Attributes:
        index: What answers the queries. `Any`, since query types differ; see `Index`.
        version: Counts the builds of a run, from 0.
        encoder_step: Training step of the document encoder that made the embeddings.
        corpus_hash: Fingerprint of the corpus that was encoded.
        params_digest: Of the parameters that encoded it; "" where that is not known.
        built_at: When the build ended, in seconds since the epoch.
        recall: Fraction of the exact best documents that the index finds, measured at the build.
        overlap: Share of the top 10 of some real queries that the index before it found too; NaN
            where that was not measured.
        encode_seconds: What encoding the documents took.
        build_seconds: What building the index from the embeddings took.
        fresh_fraction: Share of the documents that this encoder step encoded; the others are as an
            earlier one left them.
        doc_embeddings: `rows [R] -> [R, D]`, the embeddings as they were indexed, to measure how
            far an encoder has moved and to encode only some documents again; None if not kept.
    """

    index: Any
    version: int
    encoder_step: int
    corpus_hash: str
    built_at: float
    params_digest: str = ""
    recall: float = 1.0
    overlap: float = math.nan
    encode_seconds: float = 0.0
    build_seconds: float = 0.0
    fresh_fraction: float = 1.0
    doc_embeddings: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None = None

    def staleness_steps(self, step: int) -> int:
        """Returns how many training steps the index lags behind the encoder at `step`."""
        return step - self.encoder_step


def check_embeddings(
    embeddings: ArrayLike, *, name: str, rows: Sequence[int] | NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Returns `embeddings` as a contiguous float32 matrix, or says what is wrong with them.

    Args:
        embeddings: `[N, D]` real numbers; 16- and 64-bit floats are converted.
        name: What to call them in a message, for example "document embeddings".
        rows: What the rows are called in a message, where they are a part of something longer.

    Returns:
        `[N, D]` float32, C-contiguous; the input itself where it is that already.

    Raises:
        ValueError: Not a matrix of numbers, no columns, or a value that is not finite (also one
            that overflows float32); the message names the rows.
    """
    array = np.asarray(embeddings)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must be a matrix [rows, size], got shape {array.shape}")
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name} must be numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    bad = bad_rows(array)
    if bad.size:
        shown = ", ".join(str(row if rows is None else rows[row]) for row in bad[:_SHOWN_ROWS])
        more = f" and {bad.size - _SHOWN_ROWS} more" if bad.size > _SHOWN_ROWS else ""
        raise ValueError(
            f"{name} hold NaN or infinite values in {bad.size} of {len(array)} rows (row {shown}"
            f"{more}); encode these rows again in float32 or remove them"
        )
    return array


def bad_rows(embeddings: NDArray[np.float32]) -> NDArray[np.intp]:
    """Returns the rows of `[N, D]` that hold a value that is not finite, in order."""
    # A sum is one pass without a temporary; only a bad (or overflowing) one needs the closer look.
    with np.errstate(over="ignore", invalid="ignore"):
        suspects = np.flatnonzero(~np.isfinite(embeddings.sum(axis=1)))
    return suspects[~np.isfinite(embeddings[suspects]).all(axis=1)]


def check_documents(embeddings: ArrayLike | StoredEmbeddings) -> Documents:
    """Returns document embeddings as `check_embeddings` does, and refuses an empty matrix.

    Those of a store are read a block at a time, and returned as they are.
    """
    name = "document embeddings"
    if not isinstance(embeddings, StoredEmbeddings):
        embeddings = check_embeddings(embeddings, name=name)
    else:
        for start in range(0, len(embeddings), _CHECKED_ROWS):
            rows = range(start, min(start + _CHECKED_ROWS, len(embeddings)))
            check_embeddings(embeddings[start : rows.stop], name=name, rows=rows)
    if not len(embeddings):
        raise ValueError("An index needs at least 1 document embedding, got 0")
    return embeddings


def check_query_embeddings(embeddings: ArrayLike, *, dim: int) -> NDArray[np.float32]:
    """Returns query embeddings `[B, D]` as float32, checked against the index.

    Raises:
        ValueError: As `check_embeddings`, or D differs from `dim` (the message has the query
            size, the index size and the number of queries).
    """
    array = np.asarray(embeddings)
    if array.ndim == 2 and array.shape[1] != dim:
        raise ValueError(
            f"Query embeddings have size {array.shape[1]} but the index was built with size {dim} "
            f"({len(array)} queries); encode queries and documents with the same model"
        )
    return check_embeddings(array, name="query embeddings")


def check_k(k: int, *, size: int) -> int:
    """Returns how many results an index of `size` documents can fill when asked for `k`.

    More than `size` is answered with masked slots, and a note in the log says so.

    Raises:
        ValueError: `k` is not a positive integer.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k <= 0:
        raise ValueError(f"k must be a positive integer, got {k!r}")
    if k > size:
        _note_masked_slots(int(k), size)
    return min(int(k), size)


def pad_result(doc_ids: NDArray[np.integer], scores: NDArray[np.floating], k: int) -> SearchResult:
    """Makes a `SearchResult` of exactly `k` columns.

    Args:
        doc_ids: `[B, M]` with M <= k; a negative id marks an empty slot.
        scores: `[B, M]`; NaN and -inf mark an empty slot too.
        k: Columns of the result.

    Returns:
        The result with id -1 and score -inf in every empty slot.
    """
    mask = (doc_ids >= 0) & np.isfinite(scores)
    result = empty_result(len(doc_ids), k)
    columns = doc_ids.shape[1]
    result.doc_ids[:, :columns] = np.where(mask, doc_ids, NO_DOC)
    result.scores[:, :columns] = np.where(mask, scores, -np.inf)
    result.mask[:, :columns] = mask
    return result


def empty_result(num_queries: int, k: int) -> SearchResult:
    """Returns a result of `[num_queries, k]` masked slots."""
    return SearchResult(
        doc_ids=np.full((num_queries, k), NO_DOC, np.int32),
        scores=np.full((num_queries, k), -np.inf, np.float32),
        mask=np.zeros((num_queries, k), np.bool_),
    )


def norm_range(embeddings: Documents, *, sample: int = 1000) -> tuple[float, float]:
    """Returns the smallest and largest norm of at most `sample` evenly spaced rows of `[N, D]`."""
    rows = np.unique(np.linspace(0, len(embeddings) - 1, min(sample, len(embeddings)), dtype=int))
    norms = np.linalg.norm(embeddings[rows], axis=1)
    return float(norms.min()), float(norms.max())


class NormCheck:
    """Warns, once, when queries are normalised and documents are not, or the other way round.

    That mixes up cosine and dot product: the scores then have neither one's scale.
    """

    def __init__(self, doc_norms: tuple[float, float]) -> None:
        """Takes the smallest and largest document norm, see `norm_range`."""
        self._docs = doc_norms
        self._done = False

    def check(self, query_embeddings: NDArray[np.float32]) -> None:
        """Compares the norms of the first queries `[B, D]` seen with those of the documents."""
        if self._done or not len(query_embeddings):
            return
        self._done = True
        queries = norm_range(query_embeddings)
        if _is_unit(queries) != _is_unit(self._docs):
            _LOG.warning(
                "Query norms are %.3g to %.3g and document norms %.3g to %.3g: one side is "
                "normalised and the other is not, so scores are neither cosines nor one model's "
                "dot products; normalise both or neither.",
                *queries,
                *self._docs,
            )


@functools.lru_cache(maxsize=256)
def _note_masked_slots(k: int, size: int) -> None:
    """Logs, once for each pair, that an index is smaller than the number of results asked for."""
    _LOG.warning(
        "Asked for %d results but the index holds %d documents; the last %d slots are masked.",
        k,
        size,
        k - size,
    )


def _is_unit(norms: tuple[float, float]) -> bool:
    """Tells whether a range of norms is that of normalised vectors."""
    return all(abs(norm - 1) < _UNIT_NORM_TOLERANCE for norm in norms)


def check_rows(rows: ArrayLike, size: int) -> NDArray[np.int64]:
    """Returns the positions of changed documents `[R]`, each once and inside the index."""
    positions = np.asarray(rows)
    if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
        raise ValueError(
            f"rows must be whole numbers [R], got {positions.dtype} of shape {positions.shape}"
        )
    positions = positions.astype(np.int64)
    # ScaNN would append what lies beyond the end and keep either one of two equal rows.
    outside = positions[(positions < 0) | (positions >= size)]
    if outside.size:
        raise ValueError(f"rows must be 0 to {size - 1}, got {outside[0]}")
    if len(np.unique(positions)) != len(positions):
        raise ValueError(f"rows must be different, got {len(positions)} with repetitions")
    return positions

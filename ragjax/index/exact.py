"""Exact maximum inner-product search on the default device: one jitted matmul and top-k.

index = ExactIndex(doc_embeddings)           # [N, D]
result = index.search(query_embeddings, 20)  # [B, D] -> [B, 20]
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from ragjax.index import base

# Query rows of one call are padded to one of these, so that few shapes are ever compiled.
_QUERY_ROWS = (8, 64, 256)
_DOC_ROWS = 32_768
_DOC_ROWS_MULTIPLE = 128


class ExactIndex:
    """The K documents of largest inner product, exactly, ties broken by the lower document id.

    The embeddings stay on one device as `[C, M, D]` blocks. Building a new index of the same size
    compiles nothing, so a refresh costs one copy.
    """

    def __init__(
        self,
        doc_embeddings: ArrayLike,
        *,
        doc_rows: int = _DOC_ROWS,
        device: jax.Device | None = None,
    ) -> None:
        """Checks the embeddings and copies them to the device.

        Args:
            doc_embeddings: `[N, D]`; row i is document i.
            doc_rows: documents scored at a time; bounds the score matrix to
                256 x `doc_rows` x 4 bytes.
            device: where to search; default: the first device.

        Raises:
            ValueError: the embeddings are no finite matrix, there are none, or `doc_rows` < 1.
        """
        if doc_rows < 1:
            raise ValueError(f"doc_rows must be at least 1, got {doc_rows}.")
        embeddings = base.check_documents(np.asarray(doc_embeddings))
        self._size, self._dim = embeddings.shape
        rounded = -(-self._size // _DOC_ROWS_MULTIPLE) * _DOC_ROWS_MULTIPLE
        rows = min(doc_rows, rounded)
        blocks = -(-self._size // rows)
        padded = np.zeros((blocks * rows, self._dim), np.float32)
        padded[: self._size] = embeddings
        self._device = device or jax.devices()[0]
        self._blocks = jax.device_put(padded.reshape(blocks, rows, self._dim), self._device)
        self._norms = base.NormCheck(base.norm_range(embeddings))

    @property
    def size(self) -> int:
        """Number of documents."""
        return self._size

    @property
    def dim(self) -> int:
        """Size of an embedding."""
        return self._dim

    def search(self, queries: ArrayLike, k: int) -> base.SearchResult:
        """Returns the k documents of largest inner product for each query.

        Args:
            queries: `[B, D]` query embeddings.
            k: results per query; slots beyond the number of documents are masked.

        Returns:
            `[B, k]` ids, inner products (float32) and mask, best first.

        Raises:
            ValueError: k is not positive, a query is not finite, or its size is not the index's.
        """
        found = base.check_k(k, size=self._size)
        embeddings = base.check_query_embeddings(np.asarray(queries), dim=self._dim)
        self._norms.check(embeddings)
        # k is static under jit: rounding it up keeps the number of compiled shapes small.
        static_k = min(1 << (found - 1).bit_length(), self._size)
        doc_ids = np.empty((len(embeddings), found), np.int32)
        scores = np.empty((len(embeddings), found), np.float32)
        for start in range(0, len(embeddings), _QUERY_ROWS[-1]):
            block = embeddings[start : start + _QUERY_ROWS[-1]]
            best_scores, best_ids = self._search_block(block, static_k)
            doc_ids[start : start + len(block)] = best_ids[:, :found]
            scores[start : start + len(block)] = best_scores[:, :found]
        return base.pad_result(doc_ids, scores, k)

    def _search_block(
        self, block: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Searches at most 256 queries, padded to a static number of rows."""
        rows = next(rows for rows in _QUERY_ROWS if rows >= len(block))
        padded = np.zeros((rows, self._dim), np.float32)
        padded[: len(block)] = block
        scores, ids = _top_k(
            jax.device_put(padded, self._device), self._blocks, np.int32(self._size), k
        )
        return np.asarray(scores)[: len(block)], np.asarray(ids)[: len(block)]


@functools.partial(jax.jit, static_argnums=3)
def _top_k(queries: Array, blocks: Array, size: Array, k: int) -> tuple[Array, Array]:
    """Scans the blocks of documents, keeping the best k so far.

    Args:
        queries: `[B, D]` float32.
        blocks: `[C, M, D]` float32; rows from `size` on are padding.
        size: number of documents, scalar int32.
        k: results per query.

    Returns:
        Scores `[B, k]` float32 and document ids `[B, k]` int32.
    """
    num_blocks, rows, _ = blocks.shape

    def best_of_block(number: Array, block: Array) -> tuple[Array, Array]:
        # Highest precision: accelerators would otherwise round float32 factors to fewer bits.
        scores = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)  # [B, M]
        ids = number * rows + jnp.arange(rows, dtype=jnp.int32)
        scores = jnp.where((ids < size)[None, :], scores, -jnp.inf)
        best, columns = jax.lax.top_k(scores, min(k, rows))
        return best, ids[columns]

    if num_blocks == 1:
        return best_of_block(jnp.int32(0), blocks[0])

    def merge(carry: tuple[Array, Array], item: tuple[Array, Array]) -> tuple[tuple, None]:
        scores, ids = best_of_block(*item)
        # The carry comes first and holds lower ids, and top_k prefers the first of equals.
        scores = jnp.concatenate([carry[0], scores], axis=1)
        ids = jnp.concatenate([carry[1], ids], axis=1)
        best, columns = jax.lax.top_k(scores, k)
        return (best, jnp.take_along_axis(ids, columns, axis=1)), None

    start = (
        jnp.full((len(queries), k), -jnp.inf, jnp.float32),
        jnp.full((len(queries), k), base.NO_DOC, jnp.int32),
    )
    numbers = jnp.arange(num_blocks, dtype=jnp.int32)
    return jax.lax.scan(merge, start, (numbers, blocks))[0]

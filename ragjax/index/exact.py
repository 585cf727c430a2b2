"""Exact maximum inner-product search, on one device or sharded over several.

    index = ExactIndex(doc_embeddings)           # [N, D]
    result = index.search(query_embeddings, 20)  # [B, D] -> [B, 20]

Inside a user's own `jit`, pass the blocks as an argument; a new index of the same size then
compiles nothing:

    step(params, index.blocks)  # calls exact_search(query_embeddings, blocks, index.size, 20)

B = queries, N = documents, D = embedding size, documents in C blocks of M rows.

References:
    Dettmers et al., "LLM.int8()", 2022, section 2.1 (absmax quantisation by rows).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from numpy.typing import NDArray

from ragjax.index import base
from ragjax.index.store import StoredEmbeddings

# Query rows of one call are padded to one of these, so that few shapes are ever compiled.
_QUERY_ROWS = (8, 64, 256)
_DOC_ROWS = 32_768
_DOC_ROWS_MULTIPLE = 128
_AXIS = "documents"
# Documents of 16 or 8 bits that are scored again in float32, for each one returned.
_AGAIN = 4

IndexDtype = Literal["float32", "bfloat16", "int8"]
"""How an exact index holds the documents on the devices."""

_SearchBlock = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.integer]]]


class ExactIndex:
    """The K documents of largest inner product, exactly, ties broken by the lower document id.

    The embeddings stay on the devices as `[C, M, D]` blocks. Building a new index of the same size
    compiles nothing, so a refresh costs one copy. In bfloat16 or int8, a half or a quarter of the
    memory, the best 4 K are found by rounded embeddings and scored again with those of float32.
    """

    def __init__(
        self,
        doc_embeddings: ArrayLike | StoredEmbeddings,
        *,
        doc_rows: int = _DOC_ROWS,
        device: jax.Device | None = None,
        devices: Sequence[jax.Device] | None = None,
        dtype: IndexDtype = "float32",
    ) -> None:
        """Checks the embeddings and copies them to the device or devices.

        Args:
            doc_embeddings: `[N, D]`; row i is document i. Those of a store, `EmbeddingStore.rows`,
                are read a block at a time. In another `dtype` than float32 it is
                kept, in the host's memory or on disk as it is, and read at each search.
            doc_rows: Documents scored at a time on a device; bounds the score matrix to
                256 x `doc_rows` x 4 bytes.
            device: Where to search; default: the first device.
            devices: Devices of this process that hold and search an equal part of the documents
                each, instead of `device`. The results are those of one device.
            dtype: Of the documents on the devices; "int8" has a scale for each.

        Raises:
            ValueError: The embeddings are no finite matrix, there are none, `doc_rows` < 1, no
                devices, or both `device` and `devices`.
        """
        if doc_rows < 1:
            raise ValueError(f"doc_rows must be at least 1, got {doc_rows}")
        if devices is not None and (device is not None or not len(devices)):
            raise ValueError(
                f"Give one device, or at least one in devices, got device={device} and "
                f"devices={devices}"
            )
        embeddings = base.check_documents(doc_embeddings)
        self._size, self._dim = embeddings.shape
        shards = len(devices) if devices else 1
        shard_rows = -(-self._size // shards)
        rounded = -(-shard_rows // _DOC_ROWS_MULTIPLE) * _DOC_ROWS_MULTIPLE
        rows = min(doc_rows, rounded)
        blocks = shards * -(-shard_rows // rows)
        self._mesh = None
        self._replicated = self._sharded = jax.sharding.SingleDeviceSharding(
            device or jax.local_devices()[0]
        )
        if devices:
            # Auto axes: the caller's own code need not name how anything is sharded.
            self._mesh = Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))
            self._sharded = NamedSharding(self._mesh, PartitionSpec(_AXIS))
            self._replicated = NamedSharding(self._mesh, PartitionSpec())
        self._embeddings = None if dtype == "float32" else embeddings
        scales = None if dtype != "int8" else _scales(embeddings)
        self._blocks = self._put(embeddings, (blocks, rows, self._dim), jnp.dtype(dtype), scales)
        self._scales = None if scales is None else self._put(scales, (blocks, rows), scales.dtype)
        self._norms = base.NormCheck(base.norm_range(embeddings))
        self._host_shards: list[NDArray[np.float32]] | None = None
        if dtype == "float32" and all(each.platform == "cpu" for each in self._blocks.devices()):
            # Views of the device's memory, taken here and not inside of a callback.
            self._host_shards = _to_host(self._blocks)

    @property
    def size(self) -> int:
        """Number of documents."""
        return self._size

    @property
    def dim(self) -> int:
        """Size of an embedding."""
        return self._dim

    @property
    def blocks(self) -> Array:
        """The documents `[C, M, D]` for `exact_search`, rows from `size` on being zero.

        Those of int8 are to be multiplied by `scales`. Never donate them to a jitted function: the
        index searches the same array.
        """
        return self._blocks

    @property
    def scales(self) -> Array | None:
        """Factor of each document `[C, M]` float32 in int8; None in other dtypes."""
        return self._scales

    def search(self, queries: ArrayLike, k: int) -> base.SearchResult:
        """Returns the k documents of largest inner product for each query.

        Args:
            queries: `[B, D]` query embeddings.
            k: Results per query; slots beyond the number of documents are masked.

        Returns:
            `[B, k]` ids, inner products (float32) and mask, best first.

        Raises:
            ValueError: `k` is not positive, a query is not finite, or its size is not the index's.
        """
        return self._search(queries, k, self._search_block)

    def search_on_host(self, queries: ArrayLike, k: int) -> base.SearchResult:
        """Searches as `search` does, with numpy alone, so also from a callback inside `jit`.

        A JAX computation started there can wait for the one that waits for the callback. On a CPU
        the device's own copy of the embeddings is read; the first call for an accelerator copies
        them to the host, where they stay.

        Args:
            queries: `[B, D]` query embeddings; an array of numpy.
            k: Results per query; slots beyond the number of documents are masked.

        Returns:
            As `search`, the scores equal up to rounding.

        Raises:
            ValueError: As `search`.
        """
        if self._embeddings is not None:
            starts = range(0, self._size, _DOC_ROWS)
            blocks = [self._embeddings[start : start + _DOC_ROWS] for start in starts]
        else:
            if self._host_shards is None:
                self._host_shards = _to_host(self._blocks)
            blocks = [block for shard in self._host_shards for block in shard]
        return self._search(
            queries, k, lambda part, k: search_blocks_on_host(part, blocks, self._size, k)
        )

    def _search(self, queries: ArrayLike, k: int, search_block: _SearchBlock) -> base.SearchResult:
        """Checks the queries, searches at most 256 at a time and pads the result to k columns."""
        found = base.check_k(k, size=self._size)
        embeddings = base.check_query_embeddings(np.asarray(queries), dim=self._dim)
        self._norms.check(embeddings)
        doc_ids = np.empty((len(embeddings), found), np.int32)
        scores = np.empty((len(embeddings), found), np.float32)
        for start in range(0, len(embeddings), _QUERY_ROWS[-1]):
            block = embeddings[start : start + _QUERY_ROWS[-1]]
            best_scores, best_ids = search_block(block, found)
            doc_ids[start : start + len(block)] = best_ids
            scores[start : start + len(block)] = best_scores
        return base.pad_result(doc_ids, scores, k)

    def _search_block(
        self, block: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Searches at most 256 queries on the devices, padded to a static number of rows."""
        rows = next(rows for rows in _QUERY_ROWS if rows >= len(block))
        padded = np.zeros((rows, self._dim), np.float32)
        padded[: len(block)] = block
        queries = jax.device_put(padded, self._replicated)
        size = np.int32(self._size)
        # k is static under jit: rounding it up keeps the number of compiled shapes small.
        depth = k if self._embeddings is None else _AGAIN * k
        static_k = min(1 << (depth - 1).bit_length(), self._size)
        documents = self._blocks, size, static_k
        if self._mesh is None:
            scores, ids = _top_k(queries, *documents, self._scales)
        else:
            scores, ids = _sharded_top_k(queries, *documents, self._mesh, self._scales)
        scores, ids = (np.asarray(array)[: len(block)] for array in (scores, ids))
        if self._embeddings is not None:
            scores, ids = _scored_again(block, self._embeddings, ids)
        return scores[:, :k], ids[:, :k]

    def _put(
        self,
        values: NDArray[Any] | StoredEmbeddings,
        shape: tuple[int, ...],
        dtype: Any,
        scales: NDArray[np.float32] | None = None,
    ) -> Array:
        """Fills an array of blocks of documents on the devices, one device after the other."""
        rows = shape[1]

        def part(index: Any) -> NDArray[Any]:
            first, end, _ = index[0].indices(shape[0])
            filled = np.zeros((end - first, *shape[1:]), dtype)
            for number in range(first, end):
                here = slice(number * rows, min((number + 1) * rows, self._size))
                block = values[here]
                if scales is not None:
                    block = np.rint(block / scales[here, None])
                filled[number - first, : len(block)] = block
            return filled

        return jax.make_array_from_callback(shape, self._sharded, part)


def exact_search(
    queries: Array, blocks: Array, size: ArrayLike, k: int, scales: Array | None = None
) -> tuple[Array, Array]:
    """Finds the k documents of largest inner product; a pure function for use inside `jit`.

    Scans the blocks of documents, keeping the best k so far, so the score matrix of all documents
    never exists. Equal scores are ordered by the lower document id.

    Args:
        queries: `[B, D]` float32.
        blocks: `[C, M, D]`, such as `ExactIndex.blocks` of an index on one device; rows from
            `size` on are padding. Float32 is multiplied as such, bfloat16 and int8 in bfloat16.
        size: Number of documents, scalar int32; may be traced.
        k: Results per query, static.
        scales: `[C, M]` float32, factors of the documents; None: 1.

    Returns:
        Scores `[B, k]` float32 and document ids `[B, k]` int32, best first; -inf and -1 in the
        slots beyond the number of documents.
    """
    num_blocks, rows, _ = blocks.shape

    exact = blocks.dtype == jnp.float32
    factors = queries if exact else queries.astype(jnp.bfloat16)

    def best_of_block(number: Array, block: Array, scale: Array | None) -> tuple[Array, Array]:
        # Highest precision: accelerators would otherwise round float32 factors to fewer bits.
        precision = jax.lax.Precision.HIGHEST if exact else None
        scores = jnp.matmul(
            factors, block.T.astype(factors.dtype), precision=precision,
            preferred_element_type=jnp.float32,
        )  # [B, M]  # fmt: skip
        scores = scores if scale is None else scores * scale[None, :]
        ids = number * rows + jnp.arange(rows, dtype=jnp.int32)
        real = ids < size
        scores = jnp.where(real[None, :], scores, -jnp.inf)
        best, columns = jax.lax.top_k(scores, min(k, rows))
        return best, jnp.where(real, ids, base.NO_DOC)[columns]

    if num_blocks == 1 and k <= rows:
        return best_of_block(jnp.int32(0), blocks[0], None if scales is None else scales[0])

    def merge(carry: tuple[Array, Array], item: tuple[Array, ...]) -> tuple[tuple, None]:
        scores, ids = best_of_block(*item)
        # The carry comes first and holds lower ids, and top_k prefers the first of equals.
        scores = jnp.concatenate([carry[0], scores], axis=1)
        ids = jnp.concatenate([carry[1], ids], axis=1)
        return _best_columns(scores, ids, k), None

    start = (
        jnp.full((len(queries), k), -jnp.inf, jnp.float32),
        jnp.full((len(queries), k), base.NO_DOC, jnp.int32),
    )
    numbers = jnp.arange(num_blocks, dtype=jnp.int32)
    parts: tuple[Any, ...] = (numbers, blocks, scales)
    return jax.lax.scan(merge, start, parts)[0]


_top_k = jax.jit(exact_search, static_argnums=3)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _sharded_top_k(
    queries: Array, blocks: Array, size: Array, k: int, mesh: Mesh, scales: Array | None = None
) -> tuple[Array, Array]:
    """Searches as `exact_search` does, every device its own blocks, and merges the S results."""

    def best_of_shard(
        queries: Array, blocks: Array, size: Array, scales: Array | None
    ) -> tuple[Array, Array]:
        first = jax.lax.axis_index(_AXIS) * (blocks.shape[0] * blocks.shape[1])
        scores, ids = exact_search(queries, blocks, size - first, k, scales)
        return scores, jnp.where(ids < 0, base.NO_DOC, ids + first)

    scores, ids = jax.shard_map(
        best_of_shard,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(_AXIS), PartitionSpec(), PartitionSpec(_AXIS)),
        out_specs=PartitionSpec(None, _AXIS),
        # The start of the scan is the same on every shard and its end is not.
        check_vma=False,
    )(queries, blocks, size, scales)  # [B, S * k], the shards in the order of their ids
    return _best_columns(scores, ids, k)


def _best_columns(scores: Array, ids: Array, k: int) -> tuple[Array, Array]:
    """Returns the k columns of largest score; of equal ones those that come first."""
    best, columns = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(ids, columns, axis=1)


def _scales(embeddings: base.Documents) -> NDArray[np.float32]:
    """Returns what the rows of int8 are to be multiplied by, `[N]`; a block of rows at a time."""
    starts = range(0, len(embeddings), _DOC_ROWS)
    most = [np.abs(embeddings[start : start + _DOC_ROWS]).max(axis=1) for start in starts]
    scales = np.concatenate(most).astype(np.float32) / 127
    return np.where(scales > 0, scales, np.float32(1))


def _scored_again(
    queries: NDArray[np.float32], embeddings: base.Documents, ids: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Returns the candidates `[B, K]` with their inner products in float32, best first."""
    ids = np.sort(ids, axis=1)  # equal scores are ordered by the lower id
    documents = embeddings[ids].astype(np.float32, copy=False)
    scores = np.matmul(documents, queries[:, :, None])[:, :, 0]
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _to_host(blocks: Array) -> list[NDArray[np.float32]]:
    """Returns the blocks of every shard in order; on a CPU views of the device's memory."""
    shards = sorted(blocks.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [np.asarray(shard.data) for shard in shards]


def search_blocks_on_host(
    queries: NDArray[np.float32], blocks: Iterable[NDArray[np.float32]], size: int, k: int
) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
    """Returns the best k scores and ids `[B, k]` of blocks `[M, D]` with numpy; k <= size."""
    scores = np.zeros((len(queries), 0), np.float32)
    ids = np.zeros((len(queries), 0), np.int64)
    first = 0
    for block in blocks:
        real = min(len(block), size - first)
        if real <= 0:
            break
        found = (queries @ block.T)[:, :real]
        found_ids = np.broadcast_to(np.arange(first, first + real), found.shape)
        # The best so far come first and hold lower ids, which a stable sort prefers.
        scores, ids = _best_on_host(
            np.concatenate([scores, found], axis=1), np.concatenate([ids, found_ids], axis=1), k
        )
        first += len(block)
    return scores, ids


def _best_on_host(
    scores: NDArray[np.float32], ids: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns the k columns of largest score; of equal ones those that come first."""
    columns = np.empty((len(scores), min(k, scores.shape[1])), np.int64)
    last = scores.shape[1] - columns.shape[1]
    thresholds = np.partition(scores, last, axis=1)[:, last]
    for row, threshold in enumerate(thresholds):
        # More than k of them where scores are equal.
        candidates = np.flatnonzero(scores[row] >= threshold)
        order = np.argsort(-scores[row, candidates], kind="stable")[: columns.shape[1]]
        columns[row] = candidates[order]
    return np.take_along_axis(scores, columns, axis=1), np.take_along_axis(ids, columns, axis=1)

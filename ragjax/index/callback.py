"""Search of the current index inside a user's own `jit`.

    search = make_jit_search(lambda: refresher.snapshot, k=8)

    @jax.jit
    def step(params, batch):
        found = search(query_encoder(params, batch))  # JitSearchResult

The compiled program calls back to Python, which searches whatever snapshot is current at that
moment: a new snapshot compiles nothing. B = queries, D = embedding size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import io_callback
from numpy.typing import NDArray

from ragjax.index import base

# XLA's CPU client copies host arrays below 100 KiB at once and larger ones in a pool of threads,
# which may all be waiting for this very callback: the program would never end.
_PIECE_VALUES = 24_576


class JitSearchResult(NamedTuple):
    """The k best documents of each query, all from one snapshot, best first."""

    doc_ids: Array  # [B, k] int32, rows of the corpus; -1 in masked slots
    scores: Array  # [B, k] float32, higher is better; -inf in masked slots
    mask: Array  # [B, k] bool, True = a real result
    version: Array  # [] int32, `IndexSnapshot.version` of the snapshot that was searched


def make_jit_search(
    current_snapshot: Callable[[], base.IndexSnapshot], *, k: int
) -> Callable[[Array], JitSearchResult]:
    """Makes a search of the current snapshot that can be called inside `jit`.

    Works under `jit`, `lax.scan` and `lax.cond`, and with queries sharded over a mesh, which are
    gathered to the first device and searched in one call. Under `vmap` and in `shard_map` every
    row or device makes a call of its own, so neighbours may see different versions. Not inside
    `jax.checkpoint`, which would have to search twice: search before it.

    The index must find query embeddings without running JAX itself, as that can wait for the
    program that waits for the search: `ScannIndex` does, and `ExactIndex` by the method
    `search_on_host`, which is preferred where an index has one. To search on the device instead,
    pass `ExactIndex.blocks` to `exact_search`.

    Args:
        current_snapshot: Returns the snapshot to search; called once for each search, from
            another thread.
        k: Results per query.

    Returns:
        A function from query embeddings `[B, D]` to a `JitSearchResult`. What the search raises,
        such as a `ValueError` for a query that is not finite, ends the program with a
        `JaxRuntimeError` that holds its message.

    Gradients:
        None: the queries are stopped, so a loss can only be differentiated through scores that
        it computes again from the ids.

    Raises:
        ValueError: `k` is not a positive integer; when called: the queries are no matrix.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k <= 0:
        raise ValueError(f"k must be a positive integer, got {k!r}")

    def search(queries: Array) -> JitSearchResult:
        """Returns the k best documents of query embeddings `[B, D]`."""
        if jnp.ndim(queries) != 2:
            raise ValueError(f"Queries must be [B, D], got shape {jnp.shape(queries)}")
        num_queries = len(queries)
        shapes = (
            jax.ShapeDtypeStruct((num_queries, k), jnp.int32),
            jax.ShapeDtypeStruct((num_queries, k), jnp.float32),
            jax.ShapeDtypeStruct((num_queries, k), jnp.bool_),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        found = call_host(lambda rows: _search(current_snapshot(), rows, k), shapes, queries)
        return JitSearchResult(*found)

    return search


def call_host(function: Callable[..., Any], shapes: Any, embeddings: Array, *more: Array) -> Any:
    """Calls a function of the host with embeddings, inside a user's own `jit`.

    Args:
        function: Of arrays of numpy: `embeddings` `[B, D]` float32, then `more`. It must not run
            JAX, which can wait for the program that waits for it. What it raises ends the program.
        shapes: Tree of `jax.ShapeDtypeStruct` of what it returns.
        embeddings: `[B, D]`; stopped, so without a gradient.
        *more: Small arrays, less than 100 KiB each.

    Returns:
        What the function returned.
    """
    shape = embeddings.shape
    values = jax.lax.stop_gradient(embeddings).astype(jnp.float32).reshape(-1)
    cuts = list(range(_PIECE_VALUES, values.size, _PIECE_VALUES))
    pieces = jnp.split(values, cuts)

    def call(*arrays: Array) -> Any:
        found = [np.asarray(array) for array in arrays]
        rows = np.concatenate(found[: len(pieces)]).reshape(shape)
        return function(rows, *found[len(pieces) :])

    return io_callback(call, shapes, *pieces, *more)


class HostIndex:
    """An index as a callback inside `jit` may search it: without running JAX."""

    def __init__(self, index: Any) -> None:
        """Takes the index."""
        self._search = getattr(index, "search_on_host", index.search)
        self.size: int = index.size

    def search(self, queries: Any, k: int) -> base.SearchResult:
        """Returns the k best documents of each query, `[B, k]`."""
        return self._search(queries, k)


def _search(
    snapshot: base.IndexSnapshot, queries: NDArray[np.float32], k: int
) -> tuple[NDArray, ...]:
    """Searches one snapshot on the host; returns the fields of a `JitSearchResult`."""
    found = HostIndex(snapshot.index).search(queries, k)
    return *found, np.array(snapshot.version, np.int32)

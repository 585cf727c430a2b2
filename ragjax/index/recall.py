"""How much of the exact result an approximate index returns."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax.index import base, exact

_DOC_ROWS = 65_536


class Rows(Protocol):
    """A matrix `[N, D]` float32 that is read in parts, such as an array."""

    def __len__(self) -> int:
        """Returns N."""
        ...

    def __getitem__(self, rows: Any, /) -> NDArray[np.float32]:
        """Returns the rows of a slice, or of an array of positions."""
        ...


def recall_against_exact(
    index: base.Index[ArrayLike],
    doc_embeddings: Rows,
    queries: ArrayLike | None = None,
    *,
    k: int = 10,
    num_probes: int = 100,
) -> float:
    """Returns the mean fraction of the exact best k that an index finds.

    Args:
        index: The index over `doc_embeddings`.
        doc_embeddings: `[N, D]`.
        queries: `[P, D]` real queries. Default: evenly spaced documents, whose own row is left
            out of both results, since any index finds it.
        k: Neighbours compared (fewer where the corpus is smaller).
        num_probes: Documents taken where no queries are given.

    Returns:
        A fraction; 1.0 where there is no neighbour to find.
    """
    size = len(doc_embeddings)
    if queries is None:
        probes = np.unique(np.linspace(0, size - 1, min(num_probes, size)).astype(np.int64))
        embeddings = doc_embeddings[probes]
        extra = 1
    else:
        probes = None
        embeddings = np.asarray(queries, np.float32)
        extra = 0
    wanted = min(k + extra, size)
    starts = range(0, size, _DOC_ROWS)
    blocks = (doc_embeddings[start : start + _DOC_ROWS] for start in starts)
    _, truth = exact.search_blocks_on_host(embeddings, blocks, size, wanted)
    found = index.search(embeddings, wanted)
    fractions = []
    for row in range(len(embeddings)):
        own = set() if probes is None else {int(probes[row])}
        expected = [doc for doc in truth[row].tolist() if doc not in own][:k]
        returned = set(found.doc_ids[row][found.mask[row]].tolist())
        if expected:
            fractions.append(sum(doc in returned for doc in expected) / len(expected))
    return float(np.mean(fractions)) if fractions else 1.0

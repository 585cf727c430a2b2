"""From a generation on disk to an index in memory. R rows, D embedding size."""

import numpy as np
from numpy.typing import NDArray

from ragjax.index import EmbeddingStore, ExactIndex, IndexSnapshot, ScannIndex
from ragjax.refresh.generations import EMBEDDINGS, INDEX, Generation


def load_snapshot(generation: Generation) -> IndexSnapshot:
    """Loads a verified generation to search it; it stays on disk as long as the snapshot lives.

    Raises:
        ValueError: its index is of a kind that this version does not know.
        ImportError: ScaNN does not work here; the message says why.
    """
    what = generation.description
    store = EmbeddingStore.open(generation.folder / EMBEDDINGS, verified=True)
    if what.kind == "exact":
        index: ExactIndex | ScannIndex = ExactIndex(store.read())
    elif what.kind == "scann":
        # The trainer waits for a search, so it may use every core; the build was capped.
        index = ScannIndex.load(generation.folder / INDEX, threads=0, verified=True)
    else:
        raise ValueError(f"{generation.folder} holds an index of unknown kind {what.kind!r}.")
    reader = _Reader(store, generation)
    return IndexSnapshot(
        index=index,
        version=generation.number,
        encoder_step=what.encoder_step,
        corpus_hash=what.corpus_fingerprint,
        built_at=what.built_at,
        recall=what.recall,
        fresh_fraction=what.encoded / what.size,
        encode_seconds=what.encode_seconds,
        build_seconds=what.build_seconds,
        doc_embeddings=reader,
    )


class _Reader:
    """Reads embeddings as they were indexed, holding the generation they lie in."""

    def __init__(self, store: EmbeddingStore, generation: Generation) -> None:
        self._store = store
        self._generation = generation
        self._shards: list[NDArray[np.floating] | None] = [None] * store.spec.num_shards

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns the embeddings `[R, D]` of documents, in the order asked for."""
        rows = np.asarray(rows, np.int64)
        embeddings = np.empty((len(rows), self._store.spec.dim), np.float32)
        shards, places = np.divmod(rows, self._store.spec.rows_per_shard)
        for shard in np.unique(shards):
            here = shards == shard
            if self._shards[shard] is None:
                self._shards[shard] = self._store.read_shard(int(shard))
            embeddings[here] = self._shards[shard][places[here]]
        return embeddings

"""From a generation on disk to an index in memory. R rows, D embedding size."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from ragjax.index import EmbeddingStore, ExactIndex, IndexSnapshot, ScannIndex
from ragjax.index.choose import exact_dtype
from ragjax.refresh.generations import EMBEDDINGS, INDEX, Generation


def load_snapshot(
    generation: Generation, devices: Sequence[jax.Device] | None = None
) -> IndexSnapshot:
    """Loads a verified generation to search it; it stays on disk as long as the snapshot lives.

    Args:
        generation: Held open by the caller.
        devices: Devices that share an exact index; None: the first one has it.

    Raises:
        ValueError: Its index is of a kind that this version does not know.
        ImportError: ScaNN does not work here; the message says why.
    """
    what = generation.description
    store = EmbeddingStore.open(generation.folder / EMBEDDINGS, verified=True)
    if what.kind == "exact":
        dtype = exact_dtype(store.spec.size, store.spec.dim, devices=devices)
        index: ExactIndex | ScannIndex = ExactIndex(store.rows(), devices=devices, dtype=dtype)
    elif what.kind == "scann":
        # The trainer waits for a search, so it may use every core; the build was capped.
        index = ScannIndex.load(generation.folder / INDEX, threads=0, verified=True)
    else:
        raise ValueError(f"{generation.folder} holds an index of unknown kind {what.kind!r}")
    return IndexSnapshot(
        index=index,
        version=generation.number,
        encoder_step=what.encoder_step,
        corpus_hash=what.corpus_fingerprint,
        params_digest=what.params_digest,
        built_at=what.built_at,
        recall=what.recall,
        fresh_fraction=what.encoded / what.size,
        encode_seconds=what.encode_seconds,
        build_seconds=what.build_seconds,
        doc_embeddings=functools.partial(_read_rows, generation, store),
    )


def _read_rows(
    generation: Generation, store: EmbeddingStore, rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Reads embeddings as they were indexed; what can call it holds the generation they lie in."""
    del generation
    return store.read_rows(rows)

"""The embeddings of documents as plain files, for programs that know nothing of ragjax.

embeddings.npy   [N, D] float32; similarity is the inner product
ids.jsonl        one {"_id": ...} per row, in the same order
index.json       sizes, and of which encoder and corpus the rows are
index.faiss      on demand: the same rows as an exact index of FAISS
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ragjax import storage
from ragjax.index.store import EmbeddingStore

EMBEDDINGS, IDS, DESCRIPTION, FAISS = "embeddings.npy", "ids.jsonl", "index.json", "index.faiss"


def write_index(
    folder: Path,
    store: EmbeddingStore,
    ids: Sequence[str],
    *,
    faiss: bool = False,
    on_rows: Callable[[int], Any] | None = None,
) -> dict[str, int]:
    """Writes a folder with the embeddings and the ids of their documents, whole or not at all.

    Every file is read back and compared with the store, bit for bit, before the folder has its
    name.

    Args:
        folder: Must not exist, or be empty.
        store: The embeddings.
        ids: Of the documents, one for each row.
        faiss: Whether an index of FAISS is written, too; it is held in memory.
        on_rows: Told how many rows are written, a part at a time.

    Returns:
        Bytes of every file.

    Raises:
        ImportError: `faiss` is wanted and not installed.
        ValueError: There are not as many ids as rows, or two are the same.
        OSError: The folder holds something, the disk is full, or a file reads back differently.
    """
    spec = store.spec
    if len(ids) != spec.size:
        raise ValueError(f"{len(ids)} ids for {spec.size} rows of {store.folder}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{store.folder}: two of its documents have the same id")
    index = flat_index(spec.dim) if faiss else None
    if folder.is_dir():
        folder.rmdir()  # an empty one gives way
    with storage.new_folder(folder.absolute()) as building:
        path = building / EMBEDDINGS
        with storage.whole_file(path, num_bytes=spec.size * spec.dim * 4) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (spec.size, spec.dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for shard in range(spec.num_shards):
                rows = np.ascontiguousarray(store.read_shard(shard), "<f4")
                file.write(rows.data)
                if index is not None:
                    index.add(rows)
                if on_rows is not None:
                    on_rows(len(rows))
        storage.write_jsonl(building / IDS, ({"_id": id} for id in ids))
        storage.write_json(building / DESCRIPTION, _description(store))
        if index is not None:
            import faiss as package

            with storage.named_if_full(building / FAISS, spec.size * spec.dim * 4):
                package.write_index(index, str(building / FAISS))
        _check(building, store, ids)
        sizes = {path.name: path.stat().st_size for path in sorted(building.iterdir())}
    return sizes


def flat_index(dim: int) -> Any:
    """Returns an empty exact index of FAISS by inner product.

    Raises:
        ImportError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("FAISS files need it: pip install 'ragjax[faiss]'") from error
    return faiss.IndexFlatIP(dim)


def _description(store: EmbeddingStore) -> dict[str, Any]:
    spec = store.spec
    return {
        "documents": spec.size,
        "dimensions": spec.dim,
        "dtype": "float32",
        "similarity": "inner product",
        "model_fingerprint": spec.model_fingerprint,
        "corpus_fingerprint": spec.corpus_fingerprint,
        "settings": dict(spec.settings),
    }


def _check(folder: Path, store: EmbeddingStore, ids: Sequence[str]) -> None:
    """Raises OSError where a file holds something else than the store and the ids."""
    written = np.load(folder / EMBEDDINGS, mmap_mode="r")
    index: Any = None
    if (folder / FAISS).is_file():
        import faiss

        index = faiss.read_index(str(folder / FAISS))
    for shard in range(store.spec.num_shards):
        rows = store.spec.rows(shard)
        expected = np.ascontiguousarray(store.read_shard(shard), "<f4").view("u4")
        found = {EMBEDDINGS: written[rows.start : rows.stop]}
        if index is not None:
            found[FAISS] = index.reconstruct_n(rows.start, len(rows))
        for name, values in found.items():
            if not np.array_equal(np.ascontiguousarray(values, "<f4").view("u4"), expected):
                raise OSError(f"{folder / name}: rows {rows.start} and later read back differently")
    if [row for _, row in storage.read_lines(folder / IDS)] != [{"_id": id} for id in ids]:
        raise OSError(f"{folder / IDS}: the ids read back differently")

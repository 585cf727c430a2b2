"""Document embeddings on disk: fixed-row .npy shards and a manifest, complete or absent.

Row i is document i; there are no ids, pickles or absolute paths inside. Stores are
written by `ragjax.index.shards`.
"""

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax import storage

FORMAT = 1
MANIFEST = "manifest.json"
_SPEC = "spec.json"
WHAT = "embedding store"
_DTYPES = ("float32", "float16")
_OPEN_SHARDS = 256
# CPython 3.11 can fail where two threads parse headers at the same time (python/cpython#106905).
_HEADERS = threading.Lock()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store holds; two stores with equal specs hold the same embeddings.

    Attributes:
        size: Number of documents N.
        dim: Size of an embedding D.
        model_fingerprint: Of the encoder's configuration, weights and tokenizer.
        corpus_fingerprint: Of the documents in their order.
        settings: What else changes an embedding, such as the longest length in tokens, the
            pooling or a prefix; JSON values, kept as they read back (a tuple becomes a list).
        dtype: Of the files, "float32" or "float16".
        rows_per_shard: Rows of every shard but the last.
    """

    size: int
    dim: int
    model_fingerprint: str
    corpus_fingerprint: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    rows_per_shard: int = 8192

    def __post_init__(self) -> None:
        """Refuses sizes that are not positive and dtypes that are not stored."""
        for name in ("size", "dim", "rows_per_shard"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        try:
            settings = json.loads(json.dumps(dict(self.settings)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"settings must be values that JSON has, got {self.settings!r}: {error}"
            ) from error
        object.__setattr__(self, "settings", settings)

    def differences(self, wanted: Mapping[str, Any]) -> str:
        """Names the fields, or entries of `settings`, that are not as wanted; "" if all are."""
        found = {**dataclasses.asdict(self), **self.settings}
        return "; ".join(
            f"{name} {found.get(name)!r}, expected {value!r}"
            for name, value in json.loads(json.dumps(dict(wanted))).items()
            if found.get(name) != value
        )

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.size // self.rows_per_shard)

    @property
    def num_bytes(self) -> int:
        """Bytes of all embeddings on disk, without the few of headers and manifest."""
        return self.size * self.dim * np.dtype(self.dtype).itemsize

    def rows(self, shard: int) -> range:
        """Returns the documents of a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.size))


class EmbeddingStore:
    """A complete, verified store, open for reading."""

    def __init__(self, folder: Path, spec: StoreSpec) -> None:
        """Wraps a verified folder; use `EmbeddingStore.open`."""
        self.folder = folder
        self.spec = spec

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        model_fingerprint: str | None = None,
        corpus_fingerprint: str | None = None,
        settings: Mapping[str, Any] | None = None,
        verified: bool = False,
    ) -> "EmbeddingStore":
        """Opens a store after every shard passed its checksum.

        Args:
            folder: Where it was published.
            model_fingerprint: The encoder that must have made it; None accepts any.
            corpus_fingerprint: The corpus that must have been encoded; None accepts any.
            settings: Entries that the settings of the store must have; None accepts any.
            verified: True = the caller has verified every file of this folder; the shards are
                not read again.

        Raises:
            FileNotFoundError: No complete store there.
            ValueError: A shard is missing or changed, something else lies there, or the store
                belongs to another encoder, corpus or settings.
        """
        path = Path(folder)
        manifest = storage.read_sealed(path / MANIFEST, what=WHAT, version=FORMAT)
        spec = read_spec(manifest, path / MANIFEST)
        expected = {shard_name(shard) for shard in range(spec.num_shards)}
        digests = manifest.get("sha256")
        if not isinstance(digests, dict) or set(digests) != expected:
            raise ValueError(f"{path / MANIFEST} does not list its {spec.num_shards} shards")
        if not verified:
            storage.verify_folder(path, digests, also=(MANIFEST,))
        wanted = {"model_fingerprint": model_fingerprint, "corpus_fingerprint": corpus_fingerprint}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        if problem := spec.differences({**wanted, **(settings or {})}):
            raise ValueError(
                f"the embeddings in {path} are not those of this encoder and corpus ({problem}); "
                "encode the corpus again into a new folder"
            )
        store = cls(path, spec)
        for shard in range(spec.num_shards):
            load_shard(path / shard_name(shard), spec, shard)
        return store

    def read(self) -> NDArray[np.float32]:
        """Returns all embeddings `[N, D]` in memory, as float32."""
        embeddings = np.empty((self.spec.size, self.spec.dim), np.float32)
        for shard in range(self.spec.num_shards):
            rows = self.spec.rows(shard)
            embeddings[rows.start : rows.stop] = self.read_shard(shard)
        return embeddings

    def rows(self) -> "StoredEmbeddings":
        """Returns all embeddings as a matrix whose rows are read when they are asked for."""
        return StoredEmbeddings(self)

    def linked(self, folder: str | os.PathLike[str]) -> "EmbeddingStore":
        """Publishes the same files in a second folder, without room of their own if possible.

        They are hard links, or copies where the file system has none. Nothing writes to a finished
        store, so either folder may be moved or removed without the other.

        Raises:
            FileExistsError: Something is there already.
            DiskFullError: There is no room for copies.
        """
        with storage.new_folder(Path(folder)) as building:
            for path in self.folder.iterdir():
                storage.link_or_copy(path, building / path.name)
        return EmbeddingStore(Path(folder), self.spec)

    def read_rows(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Returns the embeddings `[R, D]` of some documents, in the order asked for."""
        return self.rows()[np.asarray(rows, np.int64)]

    def read_shard(self, shard: int) -> NDArray[np.floating]:
        """Returns the embeddings of one shard `[rows, D]`, memory-mapped, in the stored dtype."""
        return load_shard(self.folder / shard_name(shard), self.spec, shard)


class StoredEmbeddings:
    """The embeddings `[N, D]` of a store, float32, for whoever reads a part of them at a time."""

    ndim = 2

    def __init__(self, store: EmbeddingStore) -> None:
        """Names the store; nothing is read yet."""
        self._store = store
        # Each holds a file open.
        self._shard = functools.lru_cache(_OPEN_SHARDS)(store.read_shard)

    @property
    def shape(self) -> tuple[int, int]:
        """N and D."""
        return self._store.spec.size, self._store.spec.dim

    def __len__(self) -> int:
        """Returns N."""
        return self._store.spec.size

    def __getitem__(self, rows: slice | ArrayLike) -> NDArray[np.float32]:
        """Returns some rows: `[R, D]` of a slice, `[..., D]` of an array of row numbers."""
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        shards, places = np.divmod(np.asarray(rows), self._store.spec.rows_per_shard)
        found = np.empty((*shards.shape, self.shape[1]), np.float32)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self._shard(int(shard))[places[here]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Returns all of them in memory."""
        return np.asarray(self._store.read(), dtype)


def shard_name(shard: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{shard:06d}.npy"


def spec_as_json(spec: StoreSpec) -> dict[str, Any]:
    """Returns a spec as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def read_spec(value: Mapping[str, Any], path: Path) -> StoreSpec:
    """Returns the spec in a manifest."""
    try:
        return StoreSpec(**value["spec"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no embedding store: {error}") from error


def load_shard(path: Path, spec: StoreSpec, shard: int) -> NDArray[np.floating]:
    """Maps a shard into memory and checks its shape and dtype."""
    with _HEADERS:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    shape = (len(spec.rows(shard)), spec.dim)
    if array.shape != shape or array.dtype != spec.dtype:
        raise ValueError(f"{path} holds {array.shape} {array.dtype}, expected {shape} {spec.dtype}")
    return array

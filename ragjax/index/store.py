"""Document embeddings on disk: fixed-row .npy shards and a manifest, complete or absent.

    writer = EmbeddingWriter.open(folder, spec)    # keeps the finished shards of a killed run
    for shard in writer.missing():
        writer.write(shard, embeddings_of(writer.rows(shard)))
    store = writer.publish()

A store is written as `<folder>.building` and renamed when every shard is there. Row i is document
i; there are no ids, pickles or absolute paths inside.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax.index import base, files

_FORMAT = 1
_MANIFEST = "manifest.json"
_SPEC = "spec.json"
_WHAT = "embedding store"
_DTYPES = ("float32", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store holds; two stores with equal specs hold the same embeddings.

    Attributes:
        size: number of documents N.
        dim: size of an embedding D.
        model_fingerprint: of the encoder's configuration, weights and tokenizer.
        corpus_fingerprint: of the documents in their order.
        settings: what else changes an embedding, such as the longest length in tokens, the
            pooling or a prefix; JSON values.
        dtype: of the files, "float32" or "float16".
        rows_per_shard: rows of every shard but the last.
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
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}.")

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
    ) -> "EmbeddingStore":
        """Opens a store after every shard passed its checksum.

        Args:
            folder: where it was published.
            model_fingerprint: the encoder that must have made it; None accepts any.
            corpus_fingerprint: the corpus that must have been encoded; None accepts any.

        Raises:
            FileNotFoundError: no complete store there.
            ValueError: a shard is missing or changed, something else lies there, or the store
                belongs to another encoder or corpus.
        """
        path = Path(folder)
        manifest = files.read_json(path / _MANIFEST, what=_WHAT)
        spec = _read_spec(manifest, path / _MANIFEST)
        expected = {_shard_name(shard) for shard in range(spec.num_shards)}
        digests = manifest.get("sha256")
        if not isinstance(digests, dict) or set(digests) != expected:
            raise ValueError(f"{path / _MANIFEST} does not list its {spec.num_shards} shards.")
        files.verify_folder(path, digests, also=(_MANIFEST,))
        for name, found, wanted in (
            ("encoder", spec.model_fingerprint, model_fingerprint),
            ("corpus", spec.corpus_fingerprint, corpus_fingerprint),
        ):
            if wanted is not None and found != wanted:
                raise ValueError(
                    f"The embeddings in {path} were made with another {name} (fingerprint "
                    f"{found}, expected {wanted}); encode the corpus again into a new folder."
                )
        store = cls(path, spec)
        for shard in range(spec.num_shards):
            _load_shard(path / _shard_name(shard), spec, shard)
        return store

    def read(self) -> NDArray[np.float32]:
        """Returns all embeddings `[N, D]` in memory, as float32."""
        embeddings = np.empty((self.spec.size, self.spec.dim), np.float32)
        for shard in range(self.spec.num_shards):
            rows = self.spec.rows(shard)
            embeddings[rows.start : rows.stop] = self.read_shard(shard)
        return embeddings

    def read_shard(self, shard: int) -> NDArray[np.floating]:
        """Returns the embeddings of one shard `[rows, D]`, memory-mapped, in the stored dtype."""
        return _load_shard(self.folder / _shard_name(shard), self.spec, shard)


class EmbeddingWriter:
    """Fills a store shard by shard; what a killed run finished is kept if it is undamaged."""

    def __init__(self, target: Path, building: Path, spec: StoreSpec) -> None:
        """Wraps a folder under construction; use `EmbeddingWriter.open`."""
        self.spec = spec
        self._target = target
        self._building = building
        self._digests: dict[int, str] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], spec: StoreSpec) -> "EmbeddingWriter":
        """Starts a store, or goes on with the one a killed run left.

        Args:
            folder: where the store will be published.
            spec: what it will hold.

        Raises:
            FileExistsError: a complete store is there already.
            ValueError: the unfinished store there was started with another spec; the message
                names what differs.
        """
        target = Path(folder)
        if target.exists():
            raise FileExistsError(f"{target} exists; open it, or choose another folder.")
        building = target.with_name(f"{target.name}.building")
        if building.is_symlink():
            raise ValueError(f"{building} is a symbolic link; remove it.")
        building.mkdir(parents=True, exist_ok=True)
        if (building / _SPEC).exists():
            started = _read_spec(files.read_json(building / _SPEC, what=_WHAT), building / _SPEC)
            _check_same(started, spec, building)
        else:
            files.write_json(building / _SPEC, {"format": _FORMAT, "spec": _as_json(spec)})
        writer = cls(target, building, spec)
        writer._find_finished()
        return writer

    def missing(self) -> list[int]:
        """Returns the shards still to be written, in order."""
        return [shard for shard in range(self.spec.num_shards) if shard not in self._digests]

    def rows(self, shard: int) -> range:
        """Returns the documents of a shard."""
        return self.spec.rows(shard)

    def write(self, shard: int, embeddings: ArrayLike) -> None:
        """Writes one shard; it is on disk when this returns.

        Args:
            shard: its number.
            embeddings: `[rows of the shard, D]`, cast to the stored dtype.

        Raises:
            ValueError: no such shard, another shape than the spec's, or values that are not
                finite (also: that overflow the stored dtype); the message names the documents.
        """
        if not 0 <= shard < self.spec.num_shards:
            raise ValueError(f"There is no shard {shard} of {self.spec.num_shards}.")
        rows = self.rows(shard)
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(embeddings, dtype=self.spec.dtype)
        if array.shape != (len(rows), self.spec.dim):
            raise ValueError(
                f"Shard {shard} must be {(len(rows), self.spec.dim)} [rows, size], got "
                f"{array.shape}."
            )
        base.check_embeddings(array, name=f"embeddings in shard {shard}", first_row=rows.start)
        path = self._building / _shard_name(shard)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        digest = files.sha256(partial)
        partial.rename(path)
        files.write_json(path.with_suffix(".json"), {"sha256": digest})
        self._digests[shard] = digest

    def publish(self) -> EmbeddingStore:
        """Writes the manifest and renames the folder to its final name.

        Raises:
            ValueError: shards are missing.
            FileExistsError: the final name was taken meanwhile.
        """
        if self.missing():
            raise ValueError(
                f"{len(self.missing())} of {self.spec.num_shards} shards are not written yet, "
                f"first {self.missing()[0]}."
            )
        digests = {_shard_name(shard): self._digests[shard] for shard in sorted(self._digests)}
        manifest = {"format": _FORMAT, "spec": _as_json(self.spec), "sha256": digests}
        files.write_json(self._building / _MANIFEST, manifest)
        for path in self._building.iterdir():
            if path.name not in digests and path.name != _MANIFEST:
                path.unlink()
        files.publish(self._building, self._target)
        return EmbeddingStore(self._target, self.spec)

    def _find_finished(self) -> None:
        """Keeps the shards on disk whose checksum still holds."""
        for shard in range(self.spec.num_shards):
            path = self._building / _shard_name(shard)
            note = path.with_suffix(".json")
            if path.is_symlink() or not path.is_file() or not note.is_file():
                continue
            try:
                digest = files.read_json(note, what=_WHAT).get("sha256")
            except ValueError:
                continue
            if digest == files.sha256(path):
                self._digests[shard] = str(digest)


def _shard_name(shard: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{shard:06d}.npy"


def _as_json(spec: StoreSpec) -> dict[str, Any]:
    """Returns a spec as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def _read_spec(value: Mapping[str, Any], path: Path) -> StoreSpec:
    """Returns the spec in a manifest."""
    if value.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format {value.get('format')!r}; this version reads {_FORMAT}."
        )
    try:
        return StoreSpec(**value["spec"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no embedding store: {error}.") from error


def _check_same(started: StoreSpec, spec: StoreSpec, building: Path) -> None:
    """Refuses to mix the embeddings of two specs."""
    old, new = _as_json(started), _as_json(spec)
    differing = [name for name in new if old[name] != new[name]]
    if differing:
        changes = "; ".join(f"{name}: {old[name]!r}, now {new[name]!r}" for name in differing)
        raise ValueError(
            f"{building} was started for other embeddings ({changes}); remove it or choose "
            "another folder."
        )


def _load_shard(path: Path, spec: StoreSpec, shard: int) -> NDArray[np.floating]:
    """Maps a shard into memory and checks its shape and dtype."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    shape = (len(spec.rows(shard)), spec.dim)
    if array.shape != shape or array.dtype != spec.dtype:
        raise ValueError(
            f"{path} holds {array.shape} {array.dtype}, expected {shape} {spec.dtype}."
        )
    return array

"""Document embeddings on disk: fixed-row .npy shards and a manifest, complete or absent.

    writer = EmbeddingWriter.open(folder, spec)    # keeps the finished shards of a killed run
    for shard in writer.missing():
        writer.write(shard, embeddings_of(writer.rows(shard)))
    store = writer.publish()

A store is written as `<folder>.building` and renamed when every shard is there. Row i is document
i; there are no ids, pickles or absolute paths inside.

Other processes may help: the one that publishes has the `EmbeddingWriter`, the others a
`ShardWriter` each. A shard gets its name by a hard link, which fails where the name is taken: the
first one stays, and nothing that was counted as finished ever changes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax import storage
from ragjax.index import base

_FORMAT = 1
_MANIFEST = "manifest.json"
_SPEC = "spec.json"
_WHAT = "embedding store"
_DTYPES = ("float32", "float16")
_ATTEMPTS = 5


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
        manifest = storage.read_json(path / _MANIFEST, what=_WHAT, version=_FORMAT)
        spec = _read_spec(manifest, path / _MANIFEST)
        expected = {_shard_name(shard) for shard in range(spec.num_shards)}
        digests = manifest.get("sha256")
        if not isinstance(digests, dict) or set(digests) != expected:
            raise ValueError(f"{path / _MANIFEST} does not list its {spec.num_shards} shards")
        if not verified:
            storage.verify_folder(path, digests, also=(_MANIFEST,))
        wanted = {"model_fingerprint": model_fingerprint, "corpus_fingerprint": corpus_fingerprint}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        if problem := spec.differences({**wanted, **(settings or {})}):
            raise ValueError(
                f"the embeddings in {path} are not those of this encoder and corpus ({problem}); "
                "encode the corpus again into a new folder"
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
        shards, places = np.divmod(np.asarray(rows, np.int64), self.spec.rows_per_shard)
        embeddings = np.empty((len(shards), self.spec.dim), np.float32)
        for shard in np.unique(shards):
            here = shards == shard
            embeddings[here] = self.read_shard(int(shard))[places[here]]
        return embeddings

    def read_shard(self, shard: int) -> NDArray[np.floating]:
        """Returns the embeddings of one shard `[rows, D]`, memory-mapped, in the stored dtype."""
        return _load_shard(self.folder / _shard_name(shard), self.spec, shard)


class ShardWriter:
    """Writes shards of a store that another process started and will publish."""

    def __init__(self, target: Path, building: Path, spec: StoreSpec) -> None:
        """Wraps a folder under construction; use `open`."""
        self.spec = spec
        self._target = target
        self._building = building
        # Named after the spec: one who still writes for a store that was since removed and
        # started anew for other embeddings finds this folder gone, and cannot mix the two.
        self._partials = building / f"partial-{_spec_digest(spec)}"

    @classmethod
    def open(cls, folder: str | os.PathLike[str], spec: StoreSpec) -> "ShardWriter":
        """Joins a store under construction.

        Args:
            folder: Where the store will be published.
            spec: What it will hold.

        Raises:
            FileNotFoundError: No such store is under construction (any more).
            ValueError: It was started with another spec; the message names what differs.
        """
        target = Path(folder)
        building = _building_folder(target)
        _check_same(building, spec)
        return cls(target, building, spec)

    def missing(self) -> list[int]:
        """Returns the shards that nobody has finished, in order, from one listing."""
        names = {entry.name for entry in os.scandir(self._building)}
        return [
            shard
            for shard in range(self.spec.num_shards)
            if not {_shard_name(shard), _note_name(shard)} <= names
        ]

    def rows(self, shard: int) -> range:
        """Returns the documents of a shard."""
        return self.spec.rows(shard)

    def write(self, shard: int, embeddings: ArrayLike) -> None:
        """Writes one shard, unless another process was faster; it is on disk when this returns.

        Args:
            shard: Its number.
            embeddings: `[rows of the shard, D]`, cast to the stored dtype.

        Raises:
            ValueError: No such shard, another shape than the spec's, or values that are not
                finite (also: that overflow the stored dtype); the message names the documents.
            FileNotFoundError: The store was published or removed meanwhile.
            DiskFullError: There is no room; nothing of the shard is left.
        """
        array = self._checked(shard, embeddings)
        path = self._building / _shard_name(shard)
        partial = self._partials / storage.unique_name(path.name)
        try:
            with storage.whole_file(partial, num_bytes=array.nbytes) as file:
                # Not np.save: a full disk reaches us as an error without a number from there.
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(file, header)
                file.write(array.data)
            digest = storage.sha256(partial)
            for _ in range(_ATTEMPTS):
                if storage.link_first(partial, path):
                    storage.sync_folder(self._building)
                    self._write_note(shard, digest)
                    return self._finished(shard, digest)
                with contextlib.suppress(FileNotFoundError):  # removed between two looks
                    if found := self._adopt(shard, digest):
                        return self._finished(shard, found)
        finally:
            partial.unlink(missing_ok=True)

    def _checked(self, shard: int, embeddings: ArrayLike) -> NDArray[np.floating]:
        """Returns the embeddings of a shard as they are stored."""
        if not 0 <= shard < self.spec.num_shards:
            raise ValueError(f"There is no shard {shard} of {self.spec.num_shards}")
        rows = self.rows(shard)
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(embeddings, dtype=self.spec.dtype)
        if array.shape != (len(rows), self.spec.dim):
            raise ValueError(
                f"Shard {shard} must be {(len(rows), self.spec.dim)} [rows, size], got "
                f"{array.shape}"
            )
        base.check_embeddings(array, name=f"embeddings in shard {shard}", rows=rows)
        return array

    def _adopt(self, shard: int, digest: str) -> str | None:
        """Returns the digest of the shard that is there already, with its note; None: damaged."""
        path = self._building / _shard_name(shard)
        noted = self._noted(shard)
        found = storage.sha256(path)
        if noted != found:
            # Without a note its writer died, or is about to write it: what has the name is whole.
            if found != digest and (noted is not None or not _is_sound(path, self.spec, shard)):
                return None
            self._write_note(shard, found)
        return found

    def _noted(self, shard: int) -> str | None:
        """Returns the digest in the note of a shard, "" if it is damaged, None without a note."""
        try:
            note = storage.read_json(self._building / _note_name(shard), what=_WHAT)
        except FileNotFoundError:
            return None
        except ValueError:
            return ""
        return str(note.get("sha256"))

    def _write_note(self, shard: int, digest: str) -> None:
        """Notes the digest of the bytes that are there."""
        partial = self._partials / storage.unique_name(_note_name(shard))
        text = json.dumps({"sha256": digest}).encode()
        with storage.whole_file(partial, num_bytes=len(text)) as file:
            file.write(text)
        partial.rename(self._building / _note_name(shard))
        storage.sync_folder(self._building)

    def _finished(self, shard: int, digest: str) -> None:
        """Keeps what was learnt about a shard that is there."""


class EmbeddingWriter(ShardWriter):
    """Fills a store and publishes it; what a killed run finished is kept if it is undamaged."""

    def __init__(self, target: Path, building: Path, spec: StoreSpec) -> None:
        """Wraps a folder under construction; use `EmbeddingWriter.open`."""
        super().__init__(target, building, spec)
        self._digests: dict[int, str] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], spec: StoreSpec) -> "EmbeddingWriter":
        """Starts a store, or goes on with the one a killed run left.

        Args:
            folder: Where the store will be published.
            spec: What it will hold.

        Raises:
            FileExistsError: A complete store is there already.
            ValueError: The unfinished store there was started with another spec; the message
                names what differs.
        """
        target = Path(folder)
        if target.exists():
            raise FileExistsError(f"{target} exists; open it, or choose another folder")
        building = _building_folder(target)
        building.mkdir(parents=True, exist_ok=True)
        _undo_publish(building)
        writer = cls(target, building, spec)
        if (building / _SPEC).exists():
            _check_same(building, spec)
            writer._partials.mkdir(exist_ok=True)
        else:
            writer._partials.mkdir(exist_ok=True)
            storage.write_json(building / _SPEC, {"format": _FORMAT, "spec": _as_json(spec)})
        writer._remove_discarded()
        writer.rescan()
        return writer

    def missing(self) -> list[int]:
        """Returns the shards still to be written, in order, as of the last `rescan` or `write`."""
        return [shard for shard in range(self.spec.num_shards) if shard not in self._digests]

    def rescan(self) -> list[int]:
        """Counts the shards that other processes finished since; returns those still missing.

        Each is read once, for its checksum; one that is damaged is removed.
        """
        names = {entry.name for entry in os.scandir(self._building)}
        for shard in self.missing():
            name, note = _shard_name(shard), _note_name(shard)
            path = self._building / name
            if not {name, note} <= names:
                continue
            noted = self._noted(shard)
            if noted and not path.is_symlink() and noted == storage.sha256(path):
                self._digests[shard] = noted
            else:
                self._remove(shard)
        return self.missing()

    def publish(self) -> EmbeddingStore:
        """Writes the manifest and renames the folder to its final name.

        Raises:
            ValueError: Shards are missing.
            FileExistsError: The final name was taken meanwhile.
        """
        if self.missing():
            raise ValueError(
                f"{len(self.missing())} of {self.spec.num_shards} shards are not written yet, "
                f"first {self.missing()[0]}"
            )
        digests = {_shard_name(shard): self._digests[shard] for shard in sorted(self._digests)}
        manifest = {"format": _FORMAT, "spec": _as_json(self.spec), "sha256": digests}
        # Every file of another process enters through this folder: with its name gone, nothing
        # can appear between the last look and the rename.
        discarded = self._target.with_name(storage.unique_name(f"{self._target.name}.discarded"))
        self._partials.rename(discarded)
        storage.write_json(self._building / _MANIFEST, manifest)
        for path in self._building.iterdir():
            if path.name not in digests and path.name != _MANIFEST:
                path.unlink()
        storage.publish(self._building, self._target)
        self._remove_discarded()
        return EmbeddingStore(self._target, self.spec)

    def _adopt(self, shard: int, digest: str) -> str | None:
        """Makes room for the new shard where the old one is damaged."""
        found = super()._adopt(shard, digest)
        if found is None:
            self._remove(shard)
        return found

    def _finished(self, shard: int, digest: str) -> None:
        """Counts a shard that this process wrote."""
        self._digests[shard] = digest

    def _remove(self, shard: int) -> None:
        """Removes a shard that was not counted as finished."""
        for name in (_note_name(shard), _shard_name(shard)):
            (self._building / name).unlink(missing_ok=True)

    def _remove_discarded(self) -> None:
        """Removes what writers left unfinished in stores that were published here."""
        for path in self._target.parent.iterdir():
            if path.name.startswith(f"{self._target.name}.discarded."):
                shutil.rmtree(path, ignore_errors=True)


def _building_folder(target: Path) -> Path:
    """Returns the folder of a store under construction."""
    building = target.with_name(f"{target.name}.building")
    if building.is_symlink():
        raise ValueError(f"{building} is a symbolic link; remove it")
    return building


def _undo_publish(building: Path) -> None:
    """Gives a store killed just before its last rename the notes back, so no shard is redone."""
    path = building / _MANIFEST
    try:
        manifest = storage.read_json(path, what=_WHAT, version=_FORMAT)
        spec = _read_spec(manifest, path)
        for shard in range(spec.num_shards):
            digest = manifest["sha256"][_shard_name(shard)]
            storage.write_json(building / _note_name(shard), {"sha256": digest})
        storage.write_json(building / _SPEC, {"format": _FORMAT, "spec": _as_json(spec)})
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        pass  # damaged: the notes that are left still hold
    path.unlink()


def _is_sound(path: Path, spec: StoreSpec, shard: int) -> bool:
    """Tells whether a shard has its shape and finite values."""
    try:
        base.check_embeddings(_load_shard(path, spec, shard), name="embeddings")
    except (ValueError, EOFError):
        return False
    return True


def _shard_name(shard: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{shard:06d}.npy"


def _note_name(shard: int) -> str:
    """Returns the file name of the note with the digest of a shard."""
    return f"shard-{shard:06d}.json"


def _spec_digest(spec: StoreSpec) -> str:
    """Returns a short digest of a spec."""
    text = json.dumps(_as_json(spec), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_json(spec: StoreSpec) -> dict[str, Any]:
    """Returns a spec as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def _read_spec(value: Mapping[str, Any], path: Path) -> StoreSpec:
    """Returns the spec in a manifest."""
    try:
        return StoreSpec(**value["spec"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no embedding store: {error}") from error


def _check_same(building: Path, spec: StoreSpec) -> None:
    """Refuses to mix the embeddings of two specs."""
    path = building / _SPEC
    started = _read_spec(storage.read_json(path, what=_WHAT, version=_FORMAT), path)
    if problem := started.differences(dataclasses.asdict(spec)):
        raise ValueError(
            f"{building} was started for other embeddings ({problem}); remove it or choose another"
            " folder"
        )


def _load_shard(path: Path, spec: StoreSpec, shard: int) -> NDArray[np.floating]:
    """Maps a shard into memory and checks its shape and dtype."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    shape = (len(spec.rows(shard)), spec.dim)
    if array.shape != shape or array.dtype != spec.dtype:
        raise ValueError(f"{path} holds {array.shape} {array.dtype}, expected {shape} {spec.dtype}")
    return array

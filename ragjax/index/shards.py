"""Writes document embeddings to disk shard by shard: a store is complete or absent.

    writer = EmbeddingWriter.open(folder, spec)    # keeps the finished shards of a killed run
    for shard in writer.missing():
        writer.write(shard, embeddings_of(writer.rows(shard)))
    store = writer.publish()

A store is written as `<folder>.building` and renamed when every shard is there. Row i is document
i; there are no ids, pickles or absolute paths inside.

Other processes may help: the one that publishes has the `EmbeddingWriter`, the others a
`ShardWriter` each. Where no process is the first, each has a `ShardWriter` by `join`, and the one
whose `claim` comes first publishes. A shard gets its name by a hard link, which fails where the
name is taken: the first one stays, and nothing that was counted as finished ever changes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax import storage
from ragjax.index import base
from ragjax.index.store import (
    FORMAT,
    MANIFEST,
    WHAT,
    EmbeddingStore,
    StoreSpec,
    load_shard,
    read_spec,
    shard_name,
    spec_as_json,
)

_SPEC = "spec.json"
_ATTEMPTS = 5


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

    @classmethod
    def join(cls, folder: str | os.PathLike[str], spec: StoreSpec) -> "ShardWriter":
        """Joins a store as `open` does, or starts it where no process has.

        Raises:
            FileNotFoundError: It is being published, or was removed.
            ValueError: It was started with another spec; the message names what differs.
        """
        target = Path(folder)
        building = _building_folder(target)
        if not building.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_name(_discarded(target))
            storage.write_sealed(fresh / _SPEC, {"format": FORMAT, "spec": spec_as_json(spec)})
            cls(target, fresh, spec)._partials.mkdir()
            try:
                fresh.rename(building)
            except OSError:  # another process was faster
                shutil.rmtree(fresh)
                if not building.exists():
                    raise
        return cls.open(folder, spec)

    def claim(self, name: str) -> str:
        """Returns the name of the process that publishes: of the first one that asked.

        Args:
            name: Of this process; the same after a restart, and of no other that runs.

        Raises:
            FileNotFoundError: It was published or removed meanwhile.
        """
        partial = self._partials / storage.unique_name("publisher")
        try:
            storage.write_bytes(partial, name.encode())
            storage.link_first(partial, _claim_of(self._target))
        finally:
            partial.unlink(missing_ok=True)
        return _claim_of(self._target).read_text()

    def missing(self) -> list[int]:
        """Returns the shards that nobody has finished, in order, from one listing."""
        names = {entry.name for entry in os.scandir(self._building)}
        shards = range(self.spec.num_shards)
        missing = [n for n in shards if not {shard_name(n), _note_name(n)} <= names]
        # One that publishes removes the notes once the manifest is there.
        return [] if (self._building / MANIFEST).exists() else missing

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
        array = checked_shard(self.spec, shard, embeddings)
        path = self._building / shard_name(shard)
        partial = self._partials / storage.unique_name(path.name)
        try:
            storage.write_array(partial, array)
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

    def _adopt(self, shard: int, digest: str) -> str | None:
        """Returns the digest of the shard that is there already, with its note; None: damaged."""
        path = self._building / shard_name(shard)
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
            note = storage.read_sealed(self._building / _note_name(shard), what=WHAT)
        except FileNotFoundError:
            return None
        except ValueError:
            return ""
        return str(note.get("sha256"))

    def _write_note(self, shard: int, digest: str) -> None:
        """Notes the digest of the bytes that are there."""
        partial = self._partials / storage.unique_name(_note_name(shard))
        text = json.dumps(storage.sealed({"sha256": digest})).encode()
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
            storage.write_sealed(building / _SPEC, {"format": FORMAT, "spec": spec_as_json(spec)})
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
            name, note = shard_name(shard), _note_name(shard)
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
        digests = {shard_name(shard): self._digests[shard] for shard in sorted(self._digests)}
        manifest = {"format": FORMAT, "spec": spec_as_json(self.spec), "sha256": digests}
        # Every file of another process enters through this folder: with its name gone, nothing
        # can appear between the last look and the rename.
        self._partials.rename(self._target.with_name(_discarded(self._target)))
        storage.write_sealed(self._building / MANIFEST, manifest)
        for path in self._building.iterdir():
            if path.name not in digests and path.name != MANIFEST:
                path.unlink()
        storage.publish(self._building, self._target)
        _claim_of(self._target).unlink(missing_ok=True)
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
        for name in (_note_name(shard), shard_name(shard)):
            (self._building / name).unlink(missing_ok=True)

    def _remove_discarded(self) -> None:
        """Removes what writers left unfinished in stores that were published here."""
        for path in self._target.parent.iterdir():
            if path.name.startswith(f"{self._target.name}.discarded."):
                shutil.rmtree(path, ignore_errors=True)


def checked_shard(spec: StoreSpec, shard: int, embeddings: ArrayLike) -> NDArray[np.floating]:
    """Returns the embeddings of a shard as they are stored; raises as `ShardWriter.write`."""
    if not 0 <= shard < spec.num_shards:
        raise ValueError(f"There is no shard {shard} of {spec.num_shards}")
    rows = spec.rows(shard)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(embeddings, dtype=spec.dtype)
    if array.shape != (len(rows), spec.dim):
        raise ValueError(
            f"Shard {shard} must be {(len(rows), spec.dim)} [rows, size], got {array.shape}"
        )
    base.check_embeddings(array, name=f"embeddings in shard {shard}", rows=rows)
    return array


def _building_folder(target: Path) -> Path:
    """Returns the folder of a store under construction."""
    building = target.with_name(f"{target.name}.building")
    if building.is_symlink():
        raise ValueError(f"{building} is a symbolic link; remove it")
    return building


def publisher_of(folder: str | os.PathLike[str]) -> str | None:
    """Returns the name of the process that publishes a store; None: none has claimed it yet."""
    try:
        return _claim_of(Path(folder)).read_text()
    except FileNotFoundError:
        return None


def _claim_of(target: Path) -> Path:
    """Returns where it stands who publishes a store: beside it, as long as that takes."""
    return target.with_name(f"{target.name}.publisher")


def _discarded(target: Path) -> str:
    """Returns a name beside a store for what is removed when a store is published there."""
    return storage.unique_name(f"{target.name}.discarded")


def _undo_publish(building: Path) -> None:
    """Gives a store killed just before its last rename the notes back, so no shard is redone."""
    path = building / MANIFEST
    try:
        manifest = storage.read_sealed(path, what=WHAT, version=FORMAT)
        spec = read_spec(manifest, path)
        for shard in range(spec.num_shards):
            digest = manifest["sha256"][shard_name(shard)]
            storage.write_sealed(building / _note_name(shard), {"sha256": digest})
        storage.write_sealed(building / _SPEC, {"format": FORMAT, "spec": spec_as_json(spec)})
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        pass  # damaged: the notes that are left still hold
    path.unlink()


def _is_sound(path: Path, spec: StoreSpec, shard: int) -> bool:
    """Tells whether a shard has its shape and finite values."""
    try:
        base.check_embeddings(load_shard(path, spec, shard), name="embeddings")
    except (ValueError, EOFError):
        return False
    return True


def _note_name(shard: int) -> str:
    """Returns the file name of the note with the digest of a shard."""
    return f"shard-{shard:06d}.json"


def _spec_digest(spec: StoreSpec) -> str:
    """Returns a short digest of a spec."""
    text = json.dumps(spec_as_json(spec), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_same(building: Path, spec: StoreSpec) -> None:
    """Refuses to mix the embeddings of two specs."""
    path = building / _SPEC
    started = read_spec(storage.read_sealed(path, what=WHAT, version=FORMAT), path)
    if problem := started.differences(dataclasses.asdict(spec)):
        raise ValueError(
            f"{building} was started for other embeddings ({problem}); remove it or choose another"
            " folder"
        )


def write_store(folder: Path, spec: StoreSpec, embeddings: NDArray[np.float32]) -> EmbeddingStore:
    """Writes embeddings `[N, D]` that are at hand."""
    writer = EmbeddingWriter.open(folder, spec)
    for shard in writer.missing():
        rows = writer.rows(shard)
        writer.write(shard, embeddings[rows.start : rows.stop])
    return writer.publish()

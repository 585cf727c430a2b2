"""Generations: complete, verified states of the index on disk, numbered and never changed.

    store = GenerationStore(folder, keep=3)
    number = store.publish(building, description)   # one rename; complete or absent
    with store.open(number) as generation: ...      # every checksum holds; kept while it is open

A generation is a folder `generations/000012` with `manifest.json`, the embeddings it was built
from and, for ScaNN, the index. Whoever reads it holds a shared lock on its manifest, which the
kernel gives back however the reader ends; removing an old generation takes the exclusive one.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import os
import re
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ragjax import storage

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_MANIFEST = "manifest.json"
_WHAT = "index generation"
_LIBRARIES = ("jax", "numpy", "scann")
_NAME = re.compile(r"[0-9]{6,}")
EMBEDDINGS = "embeddings"
INDEX = "index"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What a generation is, apart from its files.

    Attributes:
        encoder_step: Training step of the parameters that encoded it.
        params_digest: Sha256 of those parameters.
        corpus_fingerprint: Of the documents.
        model_fingerprint: Of everything but the weights that decides an embedding.
        size: Number of documents N.
        dim: Size of an embedding D.
        kind: Of the index, "exact" or "scann".
        recall: Against exact search, measured at the build; 1 for an exact index.
        encode_seconds: Wall-clock time of encoding.
        build_seconds: Wall-clock time from embeddings to a searchable index on disk.
        base: The generation whose embeddings the documents that were not encoded again keep; -1
            where all were.
        encoded: Documents encoded for this generation.
        built_at: When the build ended, in seconds since the epoch; for people only.
        versions: Of the libraries that made it.
    """

    encoder_step: int
    params_digest: str
    corpus_fingerprint: str
    model_fingerprint: str
    size: int
    dim: int
    kind: str
    recall: float
    encode_seconds: float
    build_seconds: float
    base: int
    encoded: int
    built_at: float
    versions: Mapping[str, str]


class MismatchError(ValueError):
    """A whole generation that was made from something else than expected."""


class Generation:
    """A verified generation, kept on disk until it is released (or this object is gone)."""

    def __init__(self, number: int, folder: Path, description: Description, lock: int) -> None:
        """Takes over a verified folder and its lock; use `GenerationStore.open`."""
        self.number = number
        self.folder = folder
        self.description = description
        # Also runs when the last snapshot that reads it is gone, or the interpreter ends.
        self._close = weakref.finalize(self, os.close, lock)

    def release(self) -> None:
        """Lets the generation be removed when newer ones have taken its place."""
        self._close()

    def __enter__(self) -> Self:
        """Returns the generation."""
        return self

    def __exit__(self, *error: object) -> None:
        """Releases it."""
        self.release()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What a generation must have been made from; "" accepts anything.

    Attributes:
        corpus_fingerprint: Of the documents.
        model_fingerprint: Of the encoder without its weights.
        params_digest: Of the weights.
        kind: Of the index, "exact" or "scann".
        whole: True = every document was encoded for it, none kept from an earlier one.
    """

    corpus_fingerprint: str = ""
    model_fingerprint: str = ""
    params_digest: str = ""
    kind: str = ""
    whole: bool = False

    def problem(self, description: Description) -> str | None:
        """Says in one sentence what does not fit; None if everything does."""
        for field, what, remedy in (
            ("corpus_fingerprint", "another corpus", "the documents changed since: encode again"),
            ("model_fingerprint", "another encoder or tokenizer", "encode again with this one"),
            ("params_digest", "other encoder parameters", "encode again with these"),
            ("kind", "embeddings for another kind of index", "build it again"),
        ):
            wanted, found = getattr(self, field), getattr(description, field)
            if wanted and wanted != found:
                return f"it was made from {what} (fingerprint {found}, expected {wanted}); {remedy}"
        if self.whole and description.base >= 0:
            return (
                f"only {description.encoded} of its {description.size} documents were encoded for "
                f"it, the others are those of generation {description.base}; encode all again"
            )
        return None


class GenerationStore:
    """The generations below one folder; several processes may read, one publishes."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        keep: int = 3,
        report: Callable[[str], None] = _LOG.warning,
    ) -> None:
        """Opens the folder, which a reader need not be able to write.

        Args:
            root: Has the folder `generations`.
            keep: Generations kept beside those that somebody reads, at least 3, so that a reader
                who has looked up the newest finds it still there.
            report: Called with one sentence for each generation that is passed over.

        Raises:
            ValueError: `keep` is less than 3.
        """
        if keep < 3:
            raise ValueError(f"keep must be at least 3 generations, got {keep}")
        self.root = Path(root)
        self._keep = keep
        self._report = report
        self._told: set[str] = set()

    @property
    def _folder(self) -> Path:
        return self.root / "generations"

    def path(self, number: int) -> Path:
        """Returns the folder of a generation, which need not exist."""
        return self._folder / f"{number:06d}"

    def numbers(self) -> list[int]:
        """Returns the numbers of the published generations, oldest first, whole or damaged."""
        if not self._folder.is_dir():
            return []
        found = []
        for path in self._folder.iterdir():
            if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                found.append(int(path.name))
            elif os.path.lexists(path):  # else it was removed since the folder was listed
                self._tell(f"{path} is no generation and is ignored; remove it.")
        return sorted(found)

    def open(self, number: int, *, expected: Expected | None = None) -> Generation:
        """Opens a generation after every file passed its checksum.

        Raises:
            FileNotFoundError: There is no such generation (any more).
            ValueError: A file is missing, changed, a link or not listed, or the generation was
                made from something else; the message has what was found and what was expected.
        """
        lock = self._lock(number, fcntl.LOCK_SH)
        try:
            folder = self.path(number)
            manifest = storage.read_sealed(folder / _MANIFEST, what=_WHAT, version=_FORMAT)
            description = _read_description(manifest, folder / _MANIFEST, number)
            problem = (expected or Expected()).problem(description)
            if problem:
                raise MismatchError(f"Generation {number} in {folder} is refused: {problem}")
            storage.verify_folder(folder, manifest.get("sha256"), also=(_MANIFEST,))
        except BaseException:
            os.close(lock)
            raise
        return Generation(number, folder, description, lock)

    def newest(
        self,
        *,
        expected: Expected | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Generation | None:
        """Opens the newest generation that is whole and fits; what is damaged is reported.

        Args:
            expected: What it must have been made from.
            numbers: Of the generations looked at, oldest first; None: all.

        Returns:
            The generation, or None if there is none.
        """
        for number in reversed(self.numbers() if numbers is None else numbers):
            try:
                return self.open(number, expected=expected)
            except FileNotFoundError as error:
                # Removed between the look-up and the lock: a newer one was there, so go on.
                if self.path(number).is_dir():
                    self._tell(f"generation {number} is passed over: {error}")
            except ValueError as error:
                if not isinstance(error, MismatchError):
                    self._tell(f"generation {number} is passed over: {error}")
        return None

    def descriptions(self) -> dict[int, Description]:
        """Returns what the manifests say of the published generations, whose files may be damaged.

        Generations whose manifest cannot be read are left out.
        """
        found = {}
        for number in self.numbers():
            path = self.path(number) / _MANIFEST
            with contextlib.suppress(OSError, ValueError):  # damaged or just removed
                manifest = storage.read_sealed(path, what=_WHAT, version=_FORMAT)
                found[number] = _read_description(manifest, path, number)
        return found

    def publish(self, building: Path, description: Description) -> int:
        """Writes the manifest, renames the folder to the next number and returns that number.

        Everything is on disk before the rename, so what has a number is whole even after a loss
        of power.

        Args:
            building: A folder on the same file system with the embeddings and the index.
            description: What it is.
        """
        numbers = self.numbers()
        number = numbers[-1] + 1 if numbers else 0
        # One of an attempt that failed later is no file of the generation.
        for name in (_MANIFEST, f"{_MANIFEST}.tmp"):
            (building / name).unlink(missing_ok=True)
        manifest = {
            "format": _FORMAT,
            "number": number,
            "description": json.loads(json.dumps(dataclasses.asdict(description))),
            "sha256": storage.walk_digests(building, known=_known_digests(building)),
        }
        storage.write_sealed(building / _MANIFEST, manifest)
        self._folder.mkdir(parents=True, exist_ok=True)
        storage.publish(building, self.path(number))
        return number

    def collect(self, *, pinned: frozenset[int] = frozenset()) -> list[int]:
        """Removes generations that are old, not pinned and not read; returns their numbers.

        Args:
            pinned: Numbers to keep, such as those that checkpoints name.
        """
        removed = []
        for number in self.numbers()[: -self._keep]:
            if number in pinned:
                continue
            try:
                lock = self._lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, FileNotFoundError):
                continue  # somebody reads it, or it holds no manifest: not ours to remove
            try:
                # Renamed first: a reader never sees a folder that is being emptied.
                trash = self.root / f".trash-{number:06d}"
                shutil.rmtree(trash, ignore_errors=True)
                self.path(number).rename(trash)
                shutil.rmtree(trash, ignore_errors=True)
                removed.append(number)
            finally:
                os.close(lock)
        return removed

    def clean(self) -> None:
        """Removes what a killed removal left behind; for the publisher, at its start."""
        for path in self.root.glob(".trash-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _lock(self, number: int, kind: int) -> int:
        """Takes the lock of a generation, its manifest, and returns the file descriptor."""
        path = self.path(number) / _MANIFEST
        try:
            # Not through a link, and for reading only: a reader may have no right to write.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"There is no complete generation {number}: {path} is missing; there are: "
                f"{', '.join(map(str, self.numbers())) or 'none'}"
            ) from None
        except OSError as error:
            raise ValueError(f"{path} cannot be opened ({error}); plain files only") from error
        try:
            fcntl.flock(descriptor, kind)
            # It may have been removed between opening and locking.
            if not path.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise FileNotFoundError(f"Generation {number} in {self._folder} was removed")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _tell(self, sentence: str) -> None:
        """Reports a sentence, once."""
        if sentence not in self._told:
            self._told.add(sentence)
            self._report(sentence)


def _read_description(manifest: Mapping[str, Any], path: Path, number: int) -> Description:
    """Returns the description in a manifest."""
    if manifest.get("number") != number:
        raise ValueError(f"{path} says it is generation {manifest.get('number')!r}")
    try:
        return Description(**manifest["description"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no index generation: {error}") from error


def _known_digests(building: Path) -> dict[str, str]:
    """Returns the digests that the parts of a generation computed when they were written."""
    known: dict[str, str] = {}
    for part, name in ((EMBEDDINGS, "manifest.json"), (INDEX, "ragjax.json")):
        path = building / part / name
        if path.is_file():
            digests = storage.read_sealed(path, what=part).get("sha256", {})
            known |= {f"{part}/{file}": digest for file, digest in digests.items()}
    return known


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that decide what a generation holds."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

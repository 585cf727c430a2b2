"""Prepares a corpus once: tables in, a folder of memory-mappable files out.

A prepared folder holds the passages as JSON lines in their order, the place of each, and the
sorted hashes of the ids. N is the number of passages.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import orjson

from ragjax.data.jsonl import BadRowPolicy, DataError, Flaw, ReadProgress, RejectedRows
from ragjax.data.tables import (
    Part,
    PassageReader,
    Source,
    UnreachableError,
    combined,
    shown_columns,
)
from ragjax.storage import (
    read_sealed,
    unique_name,
    verify_folder,
    walk_digests,
    whole_file,
    write_array,
    write_sealed,
)

_LOG = logging.getLogger(__name__)
_FORMAT = 3  # raise it when the files below change
ROWS = "passages.jsonl"
OFFSETS = "offsets.npy"  # int64 [N + 1], bytes
HASHES = "id_hashes.npy"  # uint64 [N], sorted
HASH_ROWS = "id_rows.npy"  # int64 [N], the row of each hash
MANIFEST = "manifest.json"
_WHAT = "prepared corpus"
REJECTED = "rejected.jsonl"
_ROWS_AT_ONCE = 512  # written
_SOURCE = "{source}"  # in notes that are kept
# Whitespace and the characters that show nothing.
_BLANK = re.compile(r"[\s\u00ad\u200b-\u200f\u2060\ufeff]*\Z")


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """What became of the rows of the source file.

    Attributes:
        kept: Passages in the corpus.
        blank: Rows skipped because neither their title nor their text shows anything.
        rejected: Bad rows skipped under on_bad_row="skip".
        rejected_path: JSON lines with the bad rows and reasons, if any.
        first_rejection: The first reason, if any.
        reading: Sentences on how the source was read, where it is not as BEIR has it.
    """

    kept: int
    blank: int
    rejected: int
    rejected_path: Path | None
    first_rejection: str | None
    reading: tuple[str, ...] = ()

    def named(self, source: str) -> Self:
        """Returns the report with the name of the source in `reading`."""
        told = tuple(note.replace(_SOURCE, source) for note in self.reading)
        return dataclasses.replace(self, reading=told)

    def notes(self) -> tuple[str, ...]:
        """Returns how the source was read, and a sentence for each kind of skipped row."""
        notes = [*self.reading]
        if self.blank:
            notes.append(Flaw(f"{self.blank} passages without text or title are skipped"))
        if self.rejected:
            where = f", see {self.rejected_path}" if self.rejected_path else ""
            notes.append(
                f"{self.rejected} bad corpus rows are skipped{where}; the first: "
                f"{self.first_rejection}"
            )
        return tuple(notes)


class CorpusOptions(NamedTuple):
    """How a source is read."""

    fields: dict[str, str]  # names that the user gave, of `ragjax.data.fields`
    on_bad_row: BadRowPolicy
    max_chars: int  # of the longest text


def prepared_folder(
    source: Source, cache: Path, options: CorpusOptions, progress: ReadProgress | None
) -> Path:
    """Returns the folder of the source's present content, reading the source if need be.

    Folders are named by content and never change once they have their name; a small file says
    which one belongs to a source, so processes that start together cannot disturb each other.
    """
    cache.mkdir(parents=True, exist_ok=True)
    pointer = cache / f"corpus-{_digest([source.key, *options])[:16]}.json"
    known_name, known_stamp = _read_pointer(pointer)
    is_known = known_name != "" and (cache / known_name).is_dir()
    try:
        stamp = source.stamp()
    except UnreachableError as error:
        if not is_known or _problem(cache / known_name):
            raise
        _LOG.warning("The corpus is read as it was prepared before: %s", error)
        return cache / known_name
    if is_known:
        if problem := _problem(cache / known_name):
            _LOG.warning("The prepared corpus is made again from %s: %s", source.name, problem)
        elif known_stamp == stamp:
            return cache / known_name
        elif known_name == _folder_name(source.digest(), options):
            write_sealed(pointer, {"folder": known_name, "stamp": stamp}, shared=True)
            return cache / known_name
    building = cache / unique_name("building")
    building.mkdir()
    try:
        name = _build(source, building, options, progress)
        if source.stamp() != stamp:
            raise DataError(
                f"{source.name} changed while it was read; start again when it is complete"
            )
        _publish(building, cache / name)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    write_sealed(pointer, {"folder": name, "stamp": stamp}, shared=True)
    return cache / name


def _build(
    source: Source, folder: Path, options: CorpusOptions, progress: ReadProgress | None
) -> str:
    """Reads the source into `folder`; returns the folder's final name."""
    reader = PassageReader(options.fields, options.max_chars)
    # An escaped character takes up to 12 bytes of JSON.
    parts = list(source.parts(12 * options.max_chars + (1 << 16), progress))
    blank = 0
    rejected = RejectedRows(folder / REJECTED, options.on_bad_row)
    with rejected, whole_file(folder / ROWS) as out:
        table = _PassageTable(out)
        for part in parts:
            table.begin(part)
            # Bytes of a name that are no UTF-8 become escapes.
            name = os.fsencode(part.path.name).decode("utf-8", "backslashreplace")
            prefix = f"{name}:" if len(parts) > 1 else f"{part.unit}-"
            for row in part.rows(rejected):
                try:
                    passage = reader.read(row, prefix)
                    raw = reader.encoded(passage)
                except DataError as error:
                    rejected.add(part.path, row.line, str(error), row.raw)
                    continue
                if _BLANK.match(passage.text) and _BLANK.match(passage.title):
                    blank += 1
                else:
                    table.append(passage.id, raw, row.line)
        table.flush()
    report = CorpusReport(
        kept=len(table.lines),
        blank=blank,
        rejected=rejected.count,
        rejected_path=None,
        first_rejection=rejected.first_reason,
        # Another source with the same content has the folder, too.
        reading=tuple(
            note.replace(source.name, _SOURCE)
            for note in (*_told_once(source, parts), *reader.notes(source.name))
        ),
    )
    if not report.kept:
        reasons = "; ".join(report.named(source.name).notes()) or "the file is empty"
        raise DataError(f"{source.name}: 0 passages ({reasons})")
    table.save(source, folder)
    fingerprint = table.fingerprint.hexdigest()  # of the bytes of ROWS
    manifest = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "source": source.name,
        "report": {key: value for key, value in asdict(report).items() if key != "rejected_path"},
        "sha256": walk_digests(folder, known={ROWS: fingerprint}),
    }
    write_sealed(folder / MANIFEST, manifest)
    return _folder_name(combined([(part.path.name, part.sha256) for part in parts]), options)


def _told_once(source: Source, parts: Sequence[Part]) -> list[str]:
    """Returns the notes of the parts, those that many have as one of the whole."""
    told = [note.replace(str(part.path), source.name) for part in parts for note in part.notes]
    if len(parts) > 1:
        names = shown_columns([part.path.name for part in parts])
        told.insert(0, f"{source.name}: {len(parts)} files, in this order: {names}")
    return list(dict.fromkeys(told))


class _PassageTable:
    """Writes passages and keeps 24 bytes of each."""

    def __init__(self, out: BinaryIO):
        self._out = out
        self.fingerprint = hashlib.sha256()
        self.lines = array("q")  # of its part, from 1
        self._parts: list[tuple[int, Part]] = []  # each with the row that it begins with
        self._offsets = array("q", [0])
        self._size = 0
        self._hashes = bytearray()
        self._pending: list[bytes] = []

    def begin(self, part: Part) -> None:
        self._parts.append((len(self.lines), part))

    def append(self, id: str, raw: bytes, line: int) -> None:
        self._size += len(raw)
        self.lines.append(line)
        self._offsets.append(self._size)
        self._hashes += id_digest(id)
        self._pending.append(raw)
        if len(self._pending) == _ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        raw = b"".join(self._pending)
        self._out.write(raw)
        self.fingerprint.update(raw)
        self._pending.clear()

    def save(self, source: Source, folder: Path) -> None:
        hashes = np.frombuffer(self._hashes, "<u8").astype(np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        equal = np.flatnonzero(hashes[1:] == hashes[:-1])
        if len(equal):
            self._refuse_duplicates(source, folder, order[equal], order[equal + 1])
        write_array(folder / OFFSETS, np.asarray(self._offsets, np.int64))
        write_array(folder / HASHES, hashes)
        write_array(folder / HASH_ROWS, order.astype(np.int64))

    def _place(self, row: int) -> str:
        """Returns where a passage stands, in words."""
        part = next(part for start, part in reversed(self._parts) if start <= row)
        where = f" of {part.path.name}" if len(self._parts) > 1 else ""
        return f"{part.unit} {self.lines[row]}{where}"

    def _refuse_duplicates(
        self, source: Source, folder: Path, first_rows: np.ndarray, second_rows: np.ndarray
    ) -> None:
        with open(folder / ROWS, "rb") as file:

            def id_of(row: int) -> str:
                file.seek(self._offsets[row])
                return orjson.loads(file.read(self._offsets[row + 1] - self._offsets[row]))["id"]

            for place in np.argsort(second_rows, kind="stable"):
                first, second = int(first_rows[place]), int(second_rows[place])
                doc_id = id_of(second)
                if id_of(first) != doc_id:  # two ids with one hash
                    continue
                count = len(second_rows)
                others = f" ({count} repeated ids in all)" if count > 1 else ""
                raise DataError(
                    f"{source.name}: the id {doc_id!r} stands in {self._place(first)} and again in"
                    f" {self._place(second)}{others}; ids are compared as text, so the number 1"
                    ' equals "1"; make them unique'
                )


def _publish(building: Path, folder: Path) -> None:
    try:
        os.rename(building, folder)  # fails where there is one: nothing is looked at beforehand
    except OSError:
        if _problem(folder) is None:  # another process was first
            return
        damaged = building.with_name(unique_name("building"))
        os.rename(folder, damaged)
        shutil.rmtree(damaged)
        os.rename(building, folder)


def _read_pointer(pointer: Path) -> tuple[str, list[int | str]]:
    try:
        known = read_sealed(pointer, what=_WHAT)
        return known["folder"], known["stamp"]
    except (OSError, ValueError, KeyError):
        return "", []


def _problem(folder: Path) -> str | None:
    """Says why a folder is not a whole prepared corpus; None if all its files are unchanged."""
    try:
        manifest = read_sealed(folder / MANIFEST, what=_WHAT, version=_FORMAT)
        verify_folder(folder, manifest.get("sha256"), also=(MANIFEST,))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _folder_name(source_sha256: str, options: CorpusOptions) -> str:
    return f"corpus-{_digest([source_sha256, _FORMAT, *options])[:16]}"


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def hash_id(doc_id: str) -> np.uint64:
    """Returns a 64-bit hash of an id, the same in every process."""
    return np.uint64(int.from_bytes(id_digest(doc_id), "little"))


def id_digest(doc_id: str) -> bytes:
    """Returns the eight bytes of `hash_id`, the lowest first."""
    return hashlib.blake2b(doc_id.encode("utf-8"), digest_size=8).digest()

"""Prepares a corpus once: JSON lines in, a folder of memory-mappable files out.

A prepared folder holds the passages as JSON lines in their order, the place of each, and the
sorted hashes of the ids. N is the number of passages.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ragjax.data.fields import missing_field
from ragjax.data.jsonl import (
    BadRowPolicy,
    DataError,
    ReadProgress,
    RejectedRows,
    SourceFile,
    id_field,
    plain_or_gzipped,
    read_jsonl,
    require_path,
    string_field,
)
from ragjax.storage import (
    read_sealed,
    sha256,
    unique_name,
    verify_folder,
    walk_digests,
    whole_file,
    write_array,
    write_sealed,
)

_LOG = logging.getLogger(__name__)
_FORMAT = 2  # raise it when the files below change
ROWS = "passages.jsonl"
OFFSETS = "offsets.npy"  # int64 [N + 1], bytes
HASHES = "id_hashes.npy"  # uint64 [N], sorted
HASH_ROWS = "id_rows.npy"  # int64 [N], the row of each hash
MANIFEST = "manifest.json"
_WHAT = "prepared corpus"
REJECTED = "rejected.jsonl"
# Whitespace and the characters that show nothing.
_BLANK = re.compile(r"[\s\u00ad\u200b-\u200f\u2060\ufeff]*\Z")


class Passage(NamedTuple):
    """One unit of retrieval; the text is exactly as in the file."""

    id: str
    title: str  # "" if the file has none
    text: str


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """What became of the rows of the source file.

    Attributes:
        kept: Passages in the corpus.
        blank: Rows skipped because neither their title nor their text shows anything.
        rejected: Bad rows skipped under on_bad_row="skip".
        rejected_path: JSON lines with the bad rows and reasons, if any.
        first_rejection: The first reason, if any.
    """

    kept: int
    blank: int
    rejected: int
    rejected_path: Path | None
    first_rejection: str | None

    def notes(self) -> tuple[str, ...]:
        """Returns a sentence for each kind of skipped row."""
        notes = []
        if self.blank:
            notes.append(f"{self.blank} passages without text or title are skipped")
        if self.rejected:
            where = f", see {self.rejected_path}" if self.rejected_path else ""
            notes.append(
                f"{self.rejected} bad corpus rows are skipped{where}; the first: "
                f"{self.first_rejection}"
            )
        return tuple(notes)


class CorpusOptions(NamedTuple):
    """How a source file is read: field names, what to do with bad rows, the longest text."""

    id: str
    title: str
    text: str
    on_bad_row: BadRowPolicy
    max_chars: int


def source_file(path: Path) -> Path:
    """Returns the file itself, or the corpus file of a folder."""
    require_path(path)
    if not path.is_dir():
        return path
    return plain_or_gzipped(path, "corpus.jsonl")


def prepared_folder(
    source: Path, cache: Path, options: CorpusOptions, progress: ReadProgress | None
) -> Path:
    """Returns the folder of the source's present content, reading the source if need be.

    Folders are named by content and never change once they have their name; a small file says
    which one belongs to a path, so processes that start together cannot disturb each other.
    """
    cache.mkdir(parents=True, exist_ok=True)
    pointer = cache / f"corpus-{_digest([str(source.resolve()), *options])[:16]}.json"
    stamp = _stamp(source)
    known_name, known_stamp = _read_pointer(pointer)
    if known_name and (cache / known_name).is_dir():
        if problem := _problem(cache / known_name):
            _LOG.warning("The prepared corpus is made again from %s: %s", source, problem)
        elif known_stamp == stamp:
            return cache / known_name
        elif known_name == _folder_name(sha256(source), options):
            write_sealed(pointer, {"folder": known_name, "stamp": stamp}, shared=True)
            return cache / known_name
    building = cache / unique_name("building")
    building.mkdir()
    try:
        name = _build(source, building, options, progress)
        if _stamp(source) != stamp:
            raise DataError(f"{source} changed while it was read; start again when it is complete")
        _publish(building, cache / name)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    write_sealed(pointer, {"folder": name, "stamp": stamp}, shared=True)
    return cache / name


def _build(
    source: Path, folder: Path, options: CorpusOptions, progress: ReadProgress | None
) -> str:
    """Reads the source into `folder`; returns the folder's final name."""
    # An escaped character takes up to 12 bytes of JSON.
    reader = SourceFile(
        source, max_line_bytes=12 * options.max_chars + (1 << 16), progress=progress
    )
    blank = 0
    rejected = RejectedRows(folder / REJECTED, options.on_bad_row)
    with rejected, whole_file(folder / ROWS) as out:
        table = _PassageTable(out)
        for row in read_jsonl(reader, rejected):
            try:
                passage = _parse_passage(row.record, options)
            except DataError as error:
                rejected.add(source, row.line, str(error), row.raw)
                continue
            if _BLANK.match(passage.title + passage.text):
                blank += 1
            else:
                table.append(passage, row.line)
    report = CorpusReport(
        kept=len(table.lines),
        blank=blank,
        rejected=rejected.count,
        rejected_path=None,
        first_rejection=rejected.first_reason,
    )
    if not report.kept:
        reasons = "; ".join(report.notes()) or "the file is empty"
        raise DataError(f"{source}: 0 passages ({reasons})")
    table.save(source, folder)
    fingerprint = table.fingerprint.hexdigest()  # of the bytes of ROWS
    manifest = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "source": str(source),
        "report": {key: value for key, value in asdict(report).items() if key != "rejected_path"},
        "sha256": walk_digests(folder, known={ROWS: fingerprint}),
    }
    write_sealed(folder / MANIFEST, manifest)
    return _folder_name(reader.sha256, options)


class _PassageTable:
    """Writes passages and keeps 24 bytes of each."""

    def __init__(self, out: BinaryIO):
        self._out = out
        self.fingerprint = hashlib.sha256()
        self.lines = array("q")  # in the source file, from 1
        self._offsets = array("q", [0])
        self._hashes = array("Q")

    def append(self, passage: Passage, line: int) -> None:
        raw = _ENCODER.encode(passage._asdict()).encode("utf-8") + b"\n"
        self._out.write(raw)
        self.fingerprint.update(raw)
        self.lines.append(line)
        self._offsets.append(self._offsets[-1] + len(raw))
        self._hashes.append(int(hash_id(passage.id)))

    def save(self, source: Path, folder: Path) -> None:
        hashes = np.asarray(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        equal = np.flatnonzero(hashes[1:] == hashes[:-1])
        if len(equal):
            self._refuse_duplicates(source, folder, order[equal], order[equal + 1])
        write_array(folder / OFFSETS, np.asarray(self._offsets, np.int64))
        write_array(folder / HASHES, hashes)
        write_array(folder / HASH_ROWS, order.astype(np.int64))

    def _refuse_duplicates(
        self, source: Path, folder: Path, first_rows: np.ndarray, second_rows: np.ndarray
    ) -> None:
        with open(folder / ROWS, "rb") as file:

            def id_of(row: int) -> str:
                file.seek(self._offsets[row])
                return json.loads(file.read(self._offsets[row + 1] - self._offsets[row]))["id"]

            for place in np.argsort(second_rows, kind="stable"):
                first, second = int(first_rows[place]), int(second_rows[place])
                doc_id = id_of(second)
                if id_of(first) != doc_id:  # two ids with one hash
                    continue
                count = len(second_rows)
                others = f" ({count} repeated ids in all)" if count > 1 else ""
                raise DataError(
                    f"{source}: the id {doc_id!r} stands in line {self.lines[first]} and again in "
                    f"line {self.lines[second]}{others}; ids are compared as text, so the number "
                    '1 equals "1"; make them unique'
                )


def _parse_passage(record: dict[str, Any], options: CorpusOptions) -> Passage:
    if options.id not in record or options.text not in record:
        raise missing_field(record, {"id": options.id, "text": options.text})
    text = string_field(record, options.text)
    if len(text) > options.max_chars:
        raise DataError(
            f"the text has {len(text)} characters, above max_chars = {options.max_chars}; cut it "
            "into passages, or open the corpus with a larger max_chars"
        )
    has_title = record.get(options.title) is not None
    title = string_field(record, options.title) if has_title else ""
    return Passage(id_field(record, options.id), title, text)


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


def _read_pointer(pointer: Path) -> tuple[str | None, list[int] | None]:
    try:
        known = read_sealed(pointer, what=_WHAT)
        return known["folder"], known["stamp"]
    except (OSError, ValueError, KeyError):
        return None, None


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


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def hash_id(doc_id: str) -> np.uint64:
    """Returns a 64-bit hash of an id, the same in every process."""
    digest = hashlib.blake2b(doc_id.encode("utf-8"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

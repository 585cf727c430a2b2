"""A corpus of passages: read once from JSON lines, then memory-mapped from a cache.

    corpus = Corpus.open("data/", cache="runs/cache")
    corpus[3].text, corpus.row_of("doc-17"), len(corpus)

N is the number of passages; a row is a position in [0, N), in file order.
"""

import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragjax.data.fields import missing_field, resolve_fields
from ragjax.data.jsonl import (
    BadRowPolicy,
    DataError,
    Progress,
    RejectedRows,
    SourceFile,
    id_field,
    read_jsonl,
    require_path,
    string_field,
)

DEFAULT_MAX_CHARS = 1_000_000
_FORMAT = 1  # raise it when the files below change
_ROWS = "passages.jsonl"
_OFFSETS = "offsets.npy"  # int64 [N + 1], bytes
_HASHES = "id_hashes.npy"  # uint64 [N], sorted
_HASH_ROWS = "id_rows.npy"  # int64 [N], the row of each hash
_TABLES = (_ROWS, _OFFSETS, _HASHES, _HASH_ROWS)
_MANIFEST = "manifest.json"
_REJECTED = "rejected.jsonl"
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
        blank: Rows skipped because their text shows nothing.
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
            notes.append(f"{self.blank} passages without text are skipped")
        if self.rejected:
            where = f", see {self.rejected_path}" if self.rejected_path else ""
            notes.append(
                f"{self.rejected} bad corpus rows are skipped{where}; the first: "
                f"{self.first_rejection}"
            )
        return tuple(notes)


class Corpus:
    """Passages by row or id, read from disk when asked for; safe to share between threads.

    Attributes:
        fingerprint: sha256 (hex) over ids, titles and texts in order; the same for the plain and
            the compressed file, and whatever the field names.
        report: What became of the rows of the source file.
    """

    def __init__(self, folder: Path):
        """Maps a complete cache folder; use `Corpus.open`."""
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        self.fingerprint: str = manifest["fingerprint"]
        report = manifest["report"]
        rejected_path = folder / _REJECTED if report["rejected"] else None
        self.report = CorpusReport(**report, rejected_path=rejected_path)
        self._offsets = np.load(folder / _OFFSETS, mmap_mode="r")
        self._hashes = np.load(folder / _HASHES, mmap_mode="r")
        self._hash_rows = np.load(folder / _HASH_ROWS, mmap_mode="r")
        with open(folder / _ROWS, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        cache: str | os.PathLike[str],
        fields: Mapping[str, str] | None = None,
        on_bad_row: BadRowPolicy = "stop",
        max_chars: int = DEFAULT_MAX_CHARS,
        progress: Progress | None = None,
    ) -> "Corpus":
        """Opens a JSON-lines file of passages, plain or gzip.

        The first opening reads the file once, in bounded memory, into a folder below `cache`. A
        later one maps that folder: at once while size and times of the source file are the same,
        else after comparing its sha256. A changed file is read again.

        Args:
            path: The file, or a folder with `corpus.jsonl` or `corpus.jsonl.gz`.
            cache: Folder for the prepared copy, about as large as the uncompressed file.
            fields: Names in the file for "id", "title" and "text" (default "_id", "title", "text").
            on_bad_row: "stop" raises at the first bad row; "skip" counts bad rows and writes them
                to `rejected.jsonl` in the cache. Duplicate ids always stop.
            max_chars: Longest text, in characters; a longer one is a bad row.
            progress: Called with (bytes read, bytes in all) while the file is read.

        Raises:
            FileNotFoundError: The path does not exist; the message suggests the nearest name.
            DataError: Bad rows, duplicate ids, or no passages.
        """
        names = resolve_fields(fields)
        options = _Options(names["id"], names["title"], names["text"], on_bad_row, max_chars)
        source = _source_file(Path(path))
        return cls(_prepared_folder(source, Path(cache), options, progress))

    def __len__(self) -> int:
        """Returns N."""
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Passage:
        """Returns one passage.

        Raises:
            IndexError: The row is not in [0, N); negative rows mark masked search results.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in [0, {len(self)})")
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        return Passage(**json.loads(str(self._bytes[start:end], "utf-8")))

    def __iter__(self) -> Iterator[Passage]:
        """Yields the passages in order."""
        for row in range(len(self)):
            yield self[row]

    def id_of(self, row: int) -> str:
        """Returns the id of a row."""
        return self[row].id

    def row_of(self, doc_id: str) -> int:
        """Returns the row of an id.

        Raises:
            KeyError: No passage has this id.
        """
        row = self._find(doc_id)
        if row is None:
            raise KeyError(f"no passage has the id {doc_id!r}")
        return row

    def __contains__(self, doc_id: object) -> bool:
        """Tells whether a passage has this id."""
        return isinstance(doc_id, str) and self._find(doc_id) is not None

    def _find(self, doc_id: str) -> int | None:
        # Sorted hashes take 16 bytes a passage; a dict of a million ids takes over 100.
        hashed = _hash_id(doc_id)
        place = int(np.searchsorted(self._hashes, hashed))
        while place < len(self._hashes) and self._hashes[place] == hashed:
            row = int(self._hash_rows[place])
            if self.id_of(row) == doc_id:
                return row
            place += 1
        return None


class _Options(NamedTuple):
    id: str
    title: str
    text: str
    on_bad_row: BadRowPolicy
    max_chars: int


def _source_file(path: Path) -> Path:
    require_path(path)
    if not path.is_dir():
        return path
    found = [path / name for name in ("corpus.jsonl", "corpus.jsonl.gz")]
    found = [file for file in found if file.is_file()]
    if len(found) == 2:
        raise DataError(f"{path} holds corpus.jsonl and corpus.jsonl.gz; remove one of them")
    return found[0] if found else require_path(path / "corpus.jsonl")


def _prepared_folder(
    source: Path, cache: Path, options: _Options, progress: Progress | None
) -> Path:
    """Returns the folder of the source's present content, reading the source if need be.

    Folders are named by content and never change once they have their name; a small file says
    which one belongs to a path, so processes that start together cannot disturb each other.
    """
    cache.mkdir(parents=True, exist_ok=True)
    pointer = cache / f"corpus-{_digest([str(source.resolve()), *options])[:16]}.json"
    stamp = _stamp(source)
    known_name, known_stamp = _read_pointer(pointer)
    if known_name and _is_complete(cache / known_name):
        if known_stamp == stamp:
            return cache / known_name
        if known_name == _folder_name(_sha256(source), options):
            _write_json(pointer, {"folder": known_name, "stamp": stamp})
            return cache / known_name
    building = cache / f"building-{os.getpid()}-{secrets.token_hex(4)}"
    building.mkdir()
    try:
        name = _build(source, building, options, progress)
        if _stamp(source) != stamp:
            raise DataError(f"{source} changed while it was read; start again when it is complete")
        _publish(building, cache / name)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _write_json(pointer, {"folder": name, "stamp": stamp})
    return cache / name


def _build(source: Path, folder: Path, options: _Options, progress: Progress | None) -> str:
    """Reads the source into `folder`; returns the folder's final name."""
    # An escaped character takes up to 12 bytes of JSON.
    reader = SourceFile(
        source, max_line_bytes=12 * options.max_chars + (1 << 16), progress=progress
    )
    offsets, hashes, lines = array("q", [0]), array("Q"), array("q")
    fingerprint = hashlib.sha256()
    blank = 0
    rejected = RejectedRows(folder / _REJECTED, options.on_bad_row)
    with rejected, open(folder / _ROWS, "wb", buffering=1 << 20) as out:
        for row in read_jsonl(reader, rejected):
            try:
                passage = _parse_passage(row.record, options)
            except DataError as error:
                rejected.add(source, row.line, str(error), row.raw)
                continue
            if _BLANK.match(passage.text):
                blank += 1
                continue
            line = _ENCODER.encode(passage._asdict()).encode("utf-8") + b"\n"
            out.write(line)
            fingerprint.update(line)
            offsets.append(offsets[-1] + len(line))
            hashes.append(int(_hash_id(passage.id)))
            lines.append(row.line)
        out.flush()
        os.fsync(out.fileno())
    report = CorpusReport(
        kept=len(lines),
        blank=blank,
        rejected=rejected.count,
        rejected_path=None,
        first_rejection=rejected.first_reason,
    )
    if not lines:
        reasons = "; ".join(report.notes()) or "the file is empty"
        raise DataError(f"{source}: 0 passages ({reasons})")
    _write_tables(source, folder, offsets, hashes, lines)
    manifest = {
        "format": _FORMAT,
        "fingerprint": fingerprint.hexdigest(),
        "source": str(source),
        "report": {key: value for key, value in asdict(report).items() if key != "rejected_path"},
        "bytes": {name: (folder / name).stat().st_size for name in _TABLES},
    }
    _write_json(folder / _MANIFEST, manifest)
    return _folder_name(reader.sha256, options)


def _parse_passage(record: dict[str, Any], options: _Options) -> Passage:
    if options.id not in record or options.text not in record:
        raise missing_field(record, {"id": options.id, "text": options.text})
    text = string_field(record, options.text)
    if len(text) > options.max_chars:
        raise DataError(
            f"the text has {len(text)} characters, above max_chars = {options.max_chars}; cut it "
            "into passages, or raise --max-chars"
        )
    has_title = record.get(options.title) is not None
    title = string_field(record, options.title) if has_title else ""
    return Passage(id_field(record, options.id), title, text)


def _write_tables(source: Path, folder: Path, offsets: array, hashes: array, lines: array) -> None:
    hash_array = np.asarray(hashes, np.uint64)
    order = np.argsort(hash_array, kind="stable")
    hash_array = hash_array[order]
    equal = np.flatnonzero(hash_array[1:] == hash_array[:-1])
    if len(equal):
        _refuse_duplicates(source, folder, offsets, lines, order[equal], order[equal + 1])
    np.save(folder / _OFFSETS, np.asarray(offsets, np.int64))
    np.save(folder / _HASHES, hash_array)
    np.save(folder / _HASH_ROWS, order.astype(np.int64))


def _refuse_duplicates(
    source: Path,
    folder: Path,
    offsets: array,
    lines: array,
    first_rows: np.ndarray,
    second_rows: np.ndarray,
) -> None:
    with open(folder / _ROWS, "rb") as file:

        def id_of(row: int) -> str:
            file.seek(offsets[row])
            return json.loads(file.read(offsets[row + 1] - offsets[row]))["id"]

        for place in np.argsort(second_rows, kind="stable"):
            first, second = int(first_rows[place]), int(second_rows[place])
            doc_id = id_of(second)
            if id_of(first) != doc_id:  # two ids with one hash
                continue
            others = f" ({len(second_rows)} repeated ids in all)" if len(second_rows) > 1 else ""
            raise DataError(
                f"{source}: the id {doc_id!r} stands in line {lines[first]} and again in line "
                f"{lines[second]}{others}; ids are compared as text, so the number 1 equals "
                '"1"; make them unique'
            )


def _publish(building: Path, folder: Path) -> None:
    if _is_complete(folder):  # another process was first
        return
    if folder.exists():
        shutil.rmtree(folder)
    try:
        os.rename(building, folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _read_pointer(pointer: Path) -> tuple[str | None, list[int] | None]:
    try:
        known = json.loads(pointer.read_text(encoding="utf-8"))
        return known["folder"], known["stamp"]
    except (OSError, ValueError, KeyError):
        return None, None


def _is_complete(folder: Path) -> bool:
    """Tells whether the folder holds all its files in full length."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = manifest["bytes"]
        return manifest["format"] == _FORMAT and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _folder_name(source_sha256: str, options: _Options) -> str:
    return f"corpus-{_digest([source_sha256, _FORMAT, *options])[:16]}"


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def _hash_id(doc_id: str) -> np.uint64:
    digest = hashlib.blake2b(doc_id.encode("utf-8"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

"""One reader for every kind of table; the kind is told by the first bytes of the file.

with RejectedRows(bad_rows, "stop") as rejected:
    for row in read_rows(Path("corpus.parquet"), rejected):
        print(row.line, row.record)
"""

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ragjax.data.jsonl import (
    DEFAULT_MAX_LINE_BYTES,
    DataError,
    JsonRow,
    ReadProgress,
    RejectedRows,
    SourceFile,
    read_jsonl,
    require_path,
)
from ragjax.data.tables.columns import ARROW_MAGICS, PARQUET_MAGIC, arrow_rows, parquet_rows
from ragjax.data.tables.delimited import delimited_rows
from ragjax.data.tables.json_array import array_rows
from ragjax.data.tables.row import TableRow, shown_columns
from ragjax.storage import sha256

__all__ = ["Row", "TableFile", "read_rows", "shown_columns"]

Row = JsonRow | TableRow

_HEAD_BYTES = 1 << 16
_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_JSON_ENDINGS = frozenset({".json", ".jsonl", ".ndjson"})
_TABLE_ENDINGS = frozenset({".csv", ".tsv", ".tab", ".psv", ".txt"})
# What no reader here takes, and what to do about it.
_REFUSED: Mapping[bytes, str] = {
    b"PK\x03\x04": "a zip archive (or a workbook); unpack it, or save it as CSV",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it, or compress it with gzip",
    b"BZh": "compressed by bzip2; unpack it, or compress it with gzip",
    b"SQLite format 3": "an SQLite database; write its table as CSV",
    b"%PDF": "a PDF document, not a table of passages",
    b"\x80\x04": "a Python pickle, which can run code when read; write JSON lines or Parquet",
    b"\x80\x05": "a Python pickle, which can run code when read; write JSON lines or Parquet",
}
_COLUMNAR = {"Parquet": parquet_rows, "Arrow": arrow_rows}
_TEXT: Mapping[str, Callable[..., Iterator[Row]]] = {
    "JSON lines": lambda source, rejected, notes: read_jsonl(source, rejected),
    "JSON array": array_rows,
    "delimited text": delimited_rows,
}


class TableFile:
    """A file of rows of any kind, read once from start to end in bounded memory.

    Attributes:
        path: The file.
        kind: "JSON lines", "JSON array", "delimited text", "Parquet" or "Arrow".
        unit: What `Row.line` counts, "line" or "row".
        notes: Sentences on how the file was read, complete after its last row.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_row_bytes: int = DEFAULT_MAX_LINE_BYTES,
        progress: ReadProgress | None = None,
    ):
        """Looks at the first bytes.

        Args:
            path: Text is UTF-8, plain or gzip.
            max_row_bytes: Longest row of text; a longer one is a bad row.
            progress: Called with (bytes read, bytes in all).

        Raises:
            FileNotFoundError: No such file; the message suggests the nearest name.
            DataError: A kind of file that is not read; the message says what to make of it.
        """
        if not require_path(path).is_file():
            raise DataError(f"{path} is not a file; expected a table of rows")
        self.path = path
        self.kind = _kind(path)
        self.unit = "line" if self.kind in ("JSON lines", "delimited text") else "row"
        self.notes: list[str] = []
        self._progress = progress
        self._source = SourceFile(path, max_line_bytes=max_row_bytes, progress=progress)

    @property
    def sha256(self) -> str:
        """Hex digest of the file; of text, of the bytes read so far."""
        return sha256(self.path) if self.kind in _COLUMNAR else self._source.sha256

    def rows(self, rejected: RejectedRows) -> Iterator[Row]:
        """Yields the rows; bad ones go to `rejected`.

        Raises:
            DataError: A damaged file, or a bad row when the policy is "stop".
            ImportError: Parquet or Arrow without pyarrow.
        """
        if self.kind in _COLUMNAR:
            read = _COLUMNAR[self.kind]
            return read(self.path, rejected, self.notes, self._progress)
        return _TEXT[self.kind](self._source, rejected, self.notes)


def read_rows(
    path: Path,
    rejected: RejectedRows,
    *,
    notes: list[str] | None = None,
    max_row_bytes: int = DEFAULT_MAX_LINE_BYTES,
    progress: ReadProgress | None = None,
) -> Iterator[Row]:
    """Yields the rows of a file of JSON lines, a JSON array, CSV, TSV, Parquet or Arrow.

    Args:
        path: The file; its kind is told by its first bytes, and text may be gzip.
        rejected: Receives the bad rows.
        notes: Told how the file was read where that is not plain: separator, quotes, header,
            columns left out.
        max_row_bytes: Longest row of text; a longer one is a bad row.
        progress: Called with (bytes read, bytes in all).

    Raises:
        FileNotFoundError: No such file; the message suggests the nearest name.
        DataError: A damaged or unknown file, or a bad row when the policy is "stop".
        ImportError: Parquet or Arrow without pyarrow.
    """
    table = TableFile(path, max_row_bytes=max_row_bytes, progress=progress)
    yield from table.rows(rejected)
    if notes is not None:
        notes += table.notes


def _kind(path: Path) -> str:
    head, is_gzip = _head(path)
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}")
    columnar = "Parquet" if head.startswith(PARQUET_MAGIC) else ""
    if head.startswith(ARROW_MAGICS):
        columnar = "Arrow"
    if columnar:
        if is_gzip:
            raise DataError(f"{path} is {columnar} within gzip; unpack it with gunzip")
        return columnar
    first = head.removeprefix(_UTF8_BOM).lstrip()[:1]
    endings = {ending.lower() for ending in path.suffixes}
    # Prose and numbers are no JSON, whatever the name; a broken first line of JSON lines is.
    if first == b"[" and not endings & _TABLE_ENDINGS:
        return "JSON array"
    if first in (b"{", b"") or endings & _JSON_ENDINGS:
        return "JSON lines"
    return "delimited text"


def _head(path: Path) -> tuple[bytes, bool]:
    """Returns the first bytes, uncompressed, and whether they were compressed by gzip."""
    with open(path, "rb") as file:
        raw = file.read(_HEAD_BYTES)
    if not raw.startswith(_GZIP_MAGIC):
        return raw, False
    head = b""
    # A damaged file is refused when it is read, with what is wrong.
    with contextlib.suppress(OSError, EOFError, zlib.error):
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as stream:
            while len(head) < _HEAD_BYTES and (more := stream.read1(_HEAD_BYTES)):
                head += more
    return head, True

"""CSV and TSV: separator, quotes and header are found in the first rows of the file, and said.

Rows are those of RFC 4180: a cell in quotes may hold separators, line ends and doubled quotes. A
TSV whose cells only happen to begin with a quote is taken as it stands.
"""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ragjax.data.fields import KNOWN_NAMES, plain_name
from ragjax.data.jsonl import DataError, Line, RejectedRows, SourceFile, not_utf8
from ragjax.data.tables.row import TableRow, shown_columns

_SAMPLE_LINES, _SAMPLE_BYTES = 500, 1 << 18
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
# Of the rows of the sample, those with as many cells as the first.
_LEAST_REGULAR = 0.5
_IDENTIFIER = re.compile(r"[^\W\d][\w.-]{0,63}")
_LONGEST_CELL = 2**31 - 1  # characters; the limit of a row's bytes is lower


class _Form(NamedTuple):
    """How the cells of a file are written."""

    separator: str
    quoted: bool
    first: list[str]  # the cells of the first row


def delimited_rows(
    source: SourceFile, rejected: RejectedRows, notes: list[str]
) -> Iterator[TableRow]:
    """Yields the rows of a CSV or TSV file by the names of the columns.

    Without a header the columns are `column1`, `column2`, ...

    Raises:
        DataError: No separator gives rows of one length, a column stands twice in the header, a
            quote is not closed; or a bad row when the policy is "stop".
    """
    lines = source.raw_lines()
    sample = _sample(lines)
    if not sample:
        return
    # For the whole process; rows are bounded here by their bytes.
    csv.field_size_limit(_LONGEST_CELL)
    form = _form(source, sample)
    columns, has_header = _columns(source, form.first)
    notes.append(
        f"{source.path}: cells separated by {_SEPARATORS[form.separator]}"
        f"{', in quotes where needed' if form.quoted else ''};"
        f" {'columns' if has_header else 'no header, columns named'}: {shown_columns(columns)}"
    )
    rows = _quoted if form.quoted else _plain
    cells = rows(_Texts(source, itertools.chain(sample, lines), rejected), form.separator)
    for line, values in itertools.islice(cells, int(has_header), None):
        record = dict(zip(columns, values, strict=False))
        if len(values) == len(columns):
            yield TableRow(line, record)
        else:
            reason = (
                f"{len(values)} cells, but {len(columns)} columns; a cell that holds"
                f" {_SEPARATORS[form.separator]} or line ends has to stand in quotes"
            )
            rejected.add(source.path, line, reason, TableRow(line, record).raw)


class _Texts:
    """The lines of a file as text; those that are none are rejected between rows.

    Attributes:
        start: The number of the line in which the present row began; set `begins` before a row.
        begins: Whether the next line begins a row.
    """

    def __init__(self, source: SourceFile, lines: Iterable[Line], rejected: RejectedRows):
        self.source, self.rejected = source, rejected
        self.start, self.begins = 0, True
        self._lines = iter(lines)
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for line in self._lines:
            if self.begins and line.raw.isspace():
                continue
            text, reason = "", ""
            if line.size > len(line.raw):
                reason = f"the line has {line.size} bytes, above the limit set by max_chars"
            else:
                try:
                    text = line.raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    reason = not_utf8(error)
            self._size = line.size + (0 if self.begins else self._size)
            if not self.begins and (reason or self._size > self.source.max_line_bytes):
                raise DataError(
                    f"{self.source.path}:{self.start}: a quote opens in this row and is not closed"
                    f" before line {line.number} ({reason or 'the row is too long'}); double the"
                    " quotes within a cell"
                )
            if reason:
                self.rejected.add(self.source.path, line.number, reason, line.raw)
                continue
            if self.begins:
                self.start, self.begins = line.number, False
            return text
        raise StopIteration


def _quoted(texts: _Texts, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(texts, delimiter=separator, strict=True)
    while True:
        texts.begins = True
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"broken row: {error}; double the quotes within a cell"
            texts.rejected.add(texts.source.path, texts.start, reason)
            continue
        yield texts.start, cells


def _plain(texts: _Texts, separator: str) -> Iterator[tuple[int, list[str]]]:
    for text in texts:
        texts.begins = True
        yield texts.start, text.rstrip("\r\n").split(separator)


def _sample(lines: Iterator[Line]) -> list[Line]:
    """Returns the first lines, from the first that is not blank."""
    taken: list[Line] = []
    size = 0
    for line in lines:
        if taken or not line.raw.isspace():
            taken.append(line)
        size += len(line.raw)
        if len(taken) >= _SAMPLE_LINES or size >= _SAMPLE_BYTES:
            break
    return taken


def _form(source: SourceFile, sample: Sequence[Line]) -> _Form:
    """Returns the separator that cuts most rows of the sample into as many cells as the first."""
    if sample[0].size > len(sample[0].raw):
        raise DataError(f"{source.path}:{sample[0].number}: the first line has no end; no table")
    try:
        sample[0].raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source.path}:{sample[0].number}: {not_utf8(error)}") from error
    texts = [line.raw.decode("utf-8", "replace") for line in sample if not line.raw.isspace()]
    best, best_share = None, _LEAST_REGULAR
    for separator in _SEPARATORS:
        rows, broken = _parsed(texts, separator)
        plain = [text.rstrip("\r\n").split(separator) for text in texts]
        # Only quotes tell commas in a text from others; tabs are rare there, and quotes are not.
        num_quoted = sum(map(_is_quoted, itertools.chain(*plain)))
        quoted = separator != "\t" or num_quoted > 10 * broken
        if not quoted:
            rows, broken = plain, 0
        if rows and len(rows[0]) > 1:
            share = sum(len(row) == len(rows[0]) for row in rows) / (len(rows) + broken)
            if share > best_share:
                best, best_share = _Form(separator, quoted, rows[0]), share
    if best is None and texts and plain_name(only := texts[0].strip().strip('"')) in KNOWN_NAMES:
        best = _Form(",", True, [only])
    if best is None:
        raise DataError(
            f"{source.path} is neither JSON nor a table: no separator of {_names()} cuts its first"
            " lines into rows of the same number of cells"
        )
    return best


def _parsed(texts: Sequence[str], separator: str) -> tuple[list[list[str]], int]:
    """Returns the rows of the sample, none if the first is broken, and how many are broken."""
    reader = csv.reader(texts, delimiter=separator, strict=True)
    rows: list[list[str]] = []
    broken = 0
    while True:
        try:
            rows.append(next(reader))
        except StopIteration:
            return rows, broken
        except csv.Error as error:
            if not rows:
                return [], 1
            # The last row may go on behind the sample.
            broken += "unexpected end" not in str(error)


def _is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def _names() -> str:
    *most, last = _SEPARATORS.values()
    return f"{', '.join(most)} and {last}"


def _columns(source: SourceFile, cells: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """Returns the names of the columns, and whether the first row has them."""
    names = [cell.strip() for cell in cells]
    given = [name for name in names if name]
    has_header = any(plain_name(name) in KNOWN_NAMES for name in given) or (
        bool(given) and all(map(_IDENTIFIER.fullmatch, given))
    )
    if has_header and len(set(given)) < len(given):
        twice = next(name for name in given if given.count(name) > 1)
        raise DataError(f"{source.path}:1: the column {twice!r} stands twice in the header")
    # The first column of a table written by pandas has no name.
    numbered = [f"column{place}" for place in range(1, len(names) + 1)]
    if not has_header:
        return tuple(numbered), False
    return tuple(name or other for name, other in zip(names, numbered, strict=True)), True

"""A file that is one JSON array of objects, read an object at a time."""

import codecs
import json
from collections.abc import Iterator

from ragjax.data.jsonl import DECODER, DataError, RejectedRows, SourceFile
from ragjax.data.tables.row import TableRow

_SPACES = frozenset(" \t\r\n")
_CHUNK = 1 << 20  # characters, about; an object cut by its end is parsed again with the next


def array_rows(source: SourceFile, rejected: RejectedRows, notes: list[str]) -> Iterator[TableRow]:
    """Yields the objects of an array, counted from 1; other elements go to `rejected`.

    Raises:
        DataError: Broken JSON: where the next object begins is not known then.
    """
    notes.append(f"{source.path}: a JSON array of objects")
    text = _Text(source)
    text.expect("[")
    number = 0
    while not text.ends_with("]", first=number == 0):
        number += 1
        value = text.value(number)
        if isinstance(value, dict):
            yield TableRow(number, value)
        else:
            reason = f"expected a JSON object, got {type(value).__name__}"
            rejected.add(source.path, number, reason, json.dumps(value).encode("utf-8", "replace"))
    if text.peek():
        raise DataError(f"{source.path}: text behind the end of the array; take it out")


class _Text:
    """The text of a file from a place on, as much of it as an element needs."""

    def __init__(self, source: SourceFile):
        self._path, self._limit = source.path, source.max_line_bytes
        self._chunks = source.chunks(_CHUNK)
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._place, self._is_whole = "", 0, False

    def expect(self, letter: str) -> None:
        if self.peek() != letter:
            raise DataError(f"{self._path}: expected {letter!r}")
        self._place += 1

    def peek(self) -> str:
        """Returns the next letter that is no white space, "" at the end."""
        while True:
            while self._text[self._place : self._place + 1] in _SPACES:
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def ends_with(self, letter: str, *, first: bool) -> bool:
        """Passes the end of the array, or what stands before its next element."""
        found = self.peek()
        if found == letter:
            self._place += 1
            return True
        if not first:
            if found != ",":
                raise DataError(
                    f"{self._path}: expected ',' or {letter!r} behind an element{self._cut()}"
                )
            self._place += 1
        return False

    def value(self, number: int) -> object:
        """Returns the next element, which has this number."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._place)
                if end < len(self._text) or self._is_whole:  # else a number may go on
                    self._place = end
                    return value
            except json.JSONDecodeError as error:
                if self._is_whole or len(self._text) - self._place > self._limit:
                    raise DataError(
                        f"{self._path}:{number}: broken JSON in this element of the array:"
                        f" {error.msg}{self._cut()}"
                    ) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._path}:{number}: not usable JSON: {error}") from error
            self._more()

    def _more(self) -> bool:
        """Reads on, at least as much as is there; False at the end of the file."""
        parts = [self._text[self._place :]]
        # Doubled, so that a long element is parsed a few times, not once for each chunk.
        wanted, added = max(len(parts[0]), 1), 0
        while added < wanted and not self._is_whole:
            raw = next(self._chunks, b"")
            self._is_whole = not raw
            try:
                parts.append(self._decode(raw, final=self._is_whole))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self._path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); convert"
                    " the file, for example with iconv -f latin1 -t utf-8"
                ) from error
            added += len(parts[-1])
        self._text, self._place = "".join(parts), 0
        return added > 0

    def _cut(self) -> str:
        return "; the file ends here: is it cut off?" if self._is_whole else ""

"""Elements of a long JSON array, one after the other: files of any size in bounded memory."""

import re
from collections.abc import Iterator

from ragjax.data.jsonl import DataError, Line, SourceFile

MAX_ITEM_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
_EXCERPT_BYTES = 1000
_IN_ARRAY = 2  # brackets that are open in the array, outside its elements
_KEY_BYTES = 256  # kept before the array, to see what it is called
# A whole string, or a mark outside of strings; possessive, so that a string without an end costs
# one pass.
_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["{}\[\]]', re.DOTALL)
_IN_STRING = re.compile(rb'["\\]')


def array_items(source: SourceFile, key: str, *, max_bytes: int = MAX_ITEM_BYTES) -> Iterator[Line]:
    """Yields the objects of an array as they are written, with the line where each begins.

    Args:
        source: A file that is one JSON object.
        key: Of the object, whose value is the array.
        max_bytes: Of an element; only the first bytes of a larger one are kept, see `Line.size`.

    Raises:
        DataError: There is no such array, or it does not end.
    """
    state = _Scan(key, max_bytes)
    for block in source.chunks(_BLOCK_BYTES):
        yield from state.feed(block)
        if state.ended:
            return
    if state.began:
        raise DataError(
            f"{source.path}:{state.line}: the list {key!r} ends in the middle; the file was cut"
            " off: copy it again"
        )
    raise DataError(f"{source.path}: there is no list {key!r} in it")


class _Scan:
    """How far an array was read; strings and depths are followed, nothing else is looked at."""

    def __init__(self, key: str, max_bytes: int) -> None:
        self.began = self.ended = False
        self.line = 1  # where the element begins, once it has
        self._opening = re.compile(rf'"{key}"\s*:\s*\Z'.encode())
        self._depth = 0
        self._quoted = self._escaped = False
        self._before = b""
        self._item, self._size, self._max = bytearray(), 0, max_bytes
        self._newlines = 0

    def feed(self, block: bytes) -> Iterator[Line]:
        taken = place = 0
        while (place := self._to_mark(block, place)) >= 0:
            mark = block[place - 1 : place]
            if mark in b"{[":
                self._depth += 1
                if not self.began and self._depth == _IN_ARRAY and mark == b"[":
                    before = (self._before + block[: place - 1])[-_KEY_BYTES:]
                    if self._opening.search(before):
                        self.began = True
                        self._newlines += block.count(b"\n", 0, place)
                        taken = place
                continue
            self._depth -= 1
            if self.began and self._depth <= _IN_ARRAY:
                self._take(block[taken:place])
                taken = place
                if self._depth < _IN_ARRAY:
                    self.ended = True
                    self._item[-1:] = b""  # the bracket of the array
                if self._item.strip(b" \t\r\n,"):
                    yield self._line()
                self._item, self._size = bytearray(), 0
                if self.ended:
                    return
        if self.began:
            self._take(block[taken:])
        else:
            self._before = (self._before + block)[-_KEY_BYTES:]
            self._newlines += block.count(b"\n")

    def _to_mark(self, block: bytes, place: int) -> int:
        """Returns the place behind the next bracket outside of strings, -1 if there is none."""
        while True:
            if self._escaped:
                if place >= len(block):
                    return -1
                self._escaped, place = False, place + 1
            found = (_IN_STRING if self._quoted else _MARK).search(block, place)
            if found is None:
                return -1
            place = found.end()
            if self._quoted:
                self._escaped = found.group() == b"\\"
                self._quoted = self._escaped
            elif found.group() == b'"':
                self._quoted = True
            elif not found.group().startswith(b'"'):
                return place

    def _take(self, part: bytes) -> None:
        """Adds bytes to the element, or counts them where it is too large."""
        if not self._item.strip(b" \t\r\n,"):
            # Where it begins: the line of its first byte.
            start = len(part) - len(part.lstrip(b" \t\r\n,"))
            self.line = 1 + self._newlines + part.count(b"\n", 0, start)
            self._item, self._size = bytearray(), 0
            self._newlines += part.count(b"\n", 0, start)
            part = part[start:]
        self._newlines += part.count(b"\n")
        self._size += len(part)
        if self._size <= self._max:
            self._item += part
        else:
            self._item = bytearray((self._item + part)[:_EXCERPT_BYTES])

    def _line(self) -> Line:
        raw = bytes(self._item).strip(b" \t\r\n,")
        return Line(self.line, raw, self._size if self._size > self._max else len(raw))

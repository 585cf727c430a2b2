"""Append-only files of JSON objects, one a line; what a killed process tore off is dropped."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.storage.files import named_if_full, replacing

_LOG = logging.getLogger(__name__)


class LogLine(NamedTuple):
    """One complete line of a file of JSON objects."""

    number: int  # from 1
    row: dict[str, Any] | None  # None where the line holds no JSON object


def read_lines(path: Path) -> Iterator[LogLine]:
    """Yields the complete lines of a file that are not blank; a last line without end is torn.

    Raises:
        FileNotFoundError: No such file.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield LogLine(number, _parse(line))


class JsonLog:
    """A file that rows are appended to; one process at a time writes it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Names the file, which the first row creates."""
        self.path = Path(path)
        self._is_whole = False

    def append(self, rows: Iterable[Mapping[str, Any]], *, sync: bool = False) -> None:
        """Appends rows behind the last complete line.

        Args:
            rows: JSON objects.
            sync: True = the rows are on disk when this returns.

        Raises:
            DiskFullError: There is no room; the part that was written is dropped by the next call.
        """
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if not self._is_whole:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        self._is_whole = False
        with named_if_full(self.path, len(lines)), open(self.path, "ab") as file:
            file.write(lines)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        self._is_whole = True

    def keep(self, is_wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Removes the rows that are not wanted, and lines that are none, which are logged."""
        if not self.path.exists():
            return
        lines = list(read_lines(self.path))
        if damaged := [number for number, row in lines if row is None]:
            _LOG.warning(
                "%s: %d lines hold no JSON object (the first is line %d) and are left out",
                self.path, len(damaged), damaged[0],
            )  # fmt: skip
        kept = [row for _, row in lines if row is not None and is_wanted(row)]
        with replacing(self.path) as file:
            file.writelines(f"{json.dumps(row)}\n".encode() for row in kept)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None

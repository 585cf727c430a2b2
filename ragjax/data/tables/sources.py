"""What a table is read from, whichever place it lies in; its content has one name."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from ragjax.data.jsonl import DEFAULT_MAX_LINE_BYTES, ReadProgress, RejectedRows
from ragjax.data.tables.hub import HubSource, is_hub_id
from ragjax.data.tables.places import table_files
from ragjax.data.tables.rows import Row, TableFile
from ragjax.storage import sha256

# Tables beside the passages.
OTHERS = ("queries", "questions", "qrels")


def corpus_source(path: Path) -> "Source":
    """Returns what passages are read from: a file, a folder, or a data set of the hub.

    Raises:
        FileNotFoundError: There is no corpus; the message suggests the nearest name.
        DataError: There are several, or a saved folder is damaged.
    """
    if is_hub_id(path):
        return HubSource(path, "corpus")
    return FileSource(path, table_files(path, "corpus", others=OTHERS))


class Part(Protocol):
    """One of the tables that make up a source; see `TableFile`."""

    path: Path
    unit: str
    notes: list[str]

    @property
    def sha256(self) -> str:
        """Hex digest of what was read."""
        ...

    def rows(self, rejected: RejectedRows) -> Iterator[Row]:
        """Yields the rows."""
        ...


class Source(Protocol):
    """Tables that are one, in their order.

    Attributes:
        name: What to call it in messages.
        key: Tells its place, in this machine, from others.
    """

    name: str
    key: str

    def stamp(self) -> list[int | str]:
        """Returns what changes with the content, or without; looked up at once."""
        ...

    def digest(self) -> str:
        """Returns `combined` of the names and digests of the parts."""
        ...

    def parts(
        self, max_row_bytes: int = DEFAULT_MAX_LINE_BYTES, progress: ReadProgress | None = None
    ) -> Iterator[Part]:
        """Yields the tables."""
        ...


def combined(parts: Sequence[tuple[str, str]]) -> str:
    """Returns the digest of one part itself, or that of the names and digests of several."""
    if len(parts) == 1:
        return parts[0][1]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class FileSource:
    """One file, or several in their order."""

    def __init__(self, path: Path, files: Sequence[Path]):
        """Takes the path that the user gave, and what lies there."""
        self.files = tuple(files)
        whole = self.files[0] if len(self.files) == 1 else path
        self.name, self.key = str(whole), str(whole.resolve())

    def stamp(self) -> list[int | str]:
        """Returns name, size and times of each file."""
        stats = [(file.name, file.stat()) for file in self.files]
        return [n for name, s in stats for n in (name, s.st_size, s.st_mtime_ns, s.st_ctime_ns)]

    def digest(self) -> str:
        """Returns `combined` of the names and digests of the files."""
        return combined([(file.name, sha256(file)) for file in self.files])

    def parts(
        self, max_row_bytes: int = DEFAULT_MAX_LINE_BYTES, progress: ReadProgress | None = None
    ) -> Iterator[TableFile]:
        """Yields the files as tables; progress counts the bytes of all."""
        sizes = [file.stat().st_size for file in self.files]
        for place, file in enumerate(self.files):
            before, total = sum(sizes[:place]), sum(sizes)

            def report(done: int, _: int, before: int = before, total: int = total) -> None:
                if progress:
                    progress(before + done, total)

            yield TableFile(file, max_row_bytes=max_row_bytes, progress=progress and report)

"""A corpus of passages: read once from JSON lines, then memory-mapped from a cache.

    corpus = Corpus.open("data/", cache="runs/cache")
    corpus[3].text, corpus.row_of("doc-17"), len(corpus)

N is the number of passages; a row is a position in [0, N), in file order.
"""

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ragjax.data.corpus_cache import (
    HASH_ROWS,
    HASHES,
    MANIFEST,
    OFFSETS,
    REJECTED,
    ROWS,
    CorpusOptions,
    CorpusReport,
    Passage,
    hash_id,
    prepared_folder,
    source_file,
)
from ragjax.data.fields import resolve_fields
from ragjax.data.jsonl import BadRowPolicy, ReadProgress
from ragjax.storage import read_sealed

DEFAULT_MAX_CHARS = 1_000_000


class Corpus:
    """Passages by row or id, read from disk when asked for; safe to share between threads.

    Attributes:
        fingerprint: Sha256 (hex) over ids, titles and texts in order; the same for the plain and
            the compressed file, and whatever the field names.
        report: What became of the rows of the source file.
        cache: Folder that holds what is made of passages once.
    """

    def __init__(self, folder: Path):
        """Maps a whole cache folder; use `Corpus.open`."""
        self.cache = folder.parent
        manifest = read_sealed(folder / MANIFEST, what="prepared corpus")
        self.fingerprint: str = manifest["fingerprint"]
        report = manifest["report"]
        rejected_path = folder / REJECTED if report["rejected"] else None
        self.report = CorpusReport(**report, rejected_path=rejected_path)
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
        self._hashes = np.load(folder / HASHES, mmap_mode="r")
        self._hash_rows = np.load(folder / HASH_ROWS, mmap_mode="r")
        with open(folder / ROWS, "rb") as file:
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
        progress: ReadProgress | None = None,
    ) -> "Corpus":
        """Opens a JSON-lines file of passages, plain or gzip.

        The first opening reads the file once, in bounded memory, into a folder below `cache`. A
        later one maps that folder, whose files must have their checksums (else it is made again,
        with a warning): at once while size and times of the source file are the same, else after
        comparing its sha256. A changed file is read again.

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
        options = CorpusOptions(names["id"], names["title"], names["text"], on_bad_row, max_chars)
        source = source_file(Path(path))
        return cls(prepared_folder(source, Path(cache), options, progress))

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
        hashed = hash_id(doc_id)
        place = int(np.searchsorted(self._hashes, hashed))
        while place < len(self._hashes) and self._hashes[place] == hashed:
            row = int(self._hash_rows[place])
            if self.id_of(row) == doc_id:
                return row
            place += 1
        return None

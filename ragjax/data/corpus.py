"""A corpus of passages: read once from a table, then memory-mapped from a cache.

    corpus = Corpus.open("data/", cache="runs/cache")
    corpus[3].text, corpus.row_of("doc-17"), len(corpus)

N is the number of passages; a row is a position in [0, N), in file order.
"""

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import orjson

from ragjax.data.corpus_cache import (
    HASH_ROWS,
    HASHES,
    MANIFEST,
    OFFSETS,
    REJECTED,
    ROWS,
    CorpusOptions,
    CorpusReport,
    hash_id,
    prepared_folder,
)
from ragjax.data.fields import check_fields
from ragjax.data.jsonl import BadRowPolicy, ReadProgress
from ragjax.data.tables import Passage, corpus_source
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

    def __init__(self, folder: Path, source: str):
        """Maps a whole cache folder, made of this source; use `Corpus.open`."""
        self.cache = folder.parent
        manifest = read_sealed(folder / MANIFEST, what="prepared corpus")
        self.fingerprint: str = manifest["fingerprint"]
        report = manifest["report"] | {"reading": tuple(manifest["report"]["reading"])}
        rejected_path = folder / REJECTED if report["rejected"] else None
        self.report = CorpusReport(**report, rejected_path=rejected_path).named(source)
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
        """Opens a table of passages: JSON lines, a JSON array, CSV, TSV, Parquet or Arrow.

        The first opening reads the table once, in bounded memory, into a folder below `cache`. A
        later one maps that folder, whose files must have their checksums (else it is made again,
        with a warning): at once while size and times of the source files are the same, else after
        comparing their sha256. A changed file is read again.

        Fields are called as in BEIR, or as `fields` says, or else by the one usual other name that
        is there. Where there are no ids, passages are called by their place. The source of a
        passage is its `source`, `metadata.source` or `url`, if that is a text.

        Args:
            path: A file of any of these kinds, told by its content; text may be gzip. Or a folder
                with one called `corpus`, with Parquet shards, or saved by `datasets`. Or the id of
                a data set of the Hugging Face hub, `org/name[:subset[:split]]`, where no such file
                is.
            cache: Folder for the prepared copy, about as large as the uncompressed text.
            fields: Names in the file for "id", "title", "text" and "source".
            on_bad_row: "stop" raises at the first bad row; "skip" counts bad rows and writes them
                to `rejected.jsonl` in the cache. Duplicate ids always stop.
            max_chars: Longest text, in characters; a longer one is a bad row.
            progress: Called with (bytes read, bytes in all) while the file is read.

        Raises:
            FileNotFoundError: The path does not exist; the message suggests the nearest name.
            DataError: Bad rows, duplicate ids, no passages, or a file that is no table.
            ImportError: What a kind of file needs is missing; the message says how to install it.
        """
        given = check_fields(fields)
        own = {name: given[name] for name in Passage._fields if name in given}
        options = CorpusOptions(own, on_bad_row, max_chars)
        source = corpus_source(Path(path))
        return cls(prepared_folder(source, Path(cache), options, progress), source.name)

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
        return Passage(**orjson.loads(self._bytes[start:end]))

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

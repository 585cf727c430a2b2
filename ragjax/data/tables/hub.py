"""Data sets of the Hugging Face hub, as `datasets` streams them."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ragjax.data.jsonl import DEFAULT_MAX_LINE_BYTES, DataError, ReadProgress, RejectedRows
from ragjax.data.tables.columns import batch_rows, kept_columns
from ragjax.data.tables.row import TableRow, shown_columns

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}", re.ASCII)
_BATCH_ROWS = 1024


class UnreachableError(DataError):
    """The hub does not answer, or has no such data set."""


def is_hub_id(path: Path) -> bool:
    """Tells whether a path has the form `org/name[:subset[:split]]` and leads nowhere.

    Where `org` is a folder, a file in it is meant.
    """
    return bool(_ID.fullmatch(str(path))) and not path.exists() and not path.parent.is_dir()


class HubSource:
    """A table of a data set of the hub: a subset and a split of it, at its newest revision.

    Attributes:
        name: The id.
        key: The same.
        unit: What rows are counted in.
        notes: What was read, complete after the last row.
    """

    unit = "row"

    def __init__(self, path: Path, table: str):
        """Takes `org/name[:subset[:split]]`.

        Args:
            path: The id.
            table: Name of the subset, or of the split, that is taken where there are several.
        """
        self.name = self.key = str(path)
        self.path = path
        self.notes: list[str] = []
        self._id, self._subset, self._split, *_ = [*str(path).split(":"), "", ""]
        self._table = table
        self._revision: str | None = None

    def stamp(self) -> list[int | str]:
        """Returns the revision.

        Raises:
            UnreachableError: The hub does not answer, or has no such data set.
        """
        if self._revision is None:
            self._revision = _revision(self._id)
        return [self._revision]

    def digest(self) -> str:
        """Returns a digest of id and revision."""
        return hashlib.sha256(f"{self.name}@{self.stamp()[0]}".encode()).hexdigest()

    @property
    def sha256(self) -> str:
        """The same, since this is the only part."""
        return self.digest()

    def parts(
        self, max_row_bytes: int = DEFAULT_MAX_LINE_BYTES, progress: ReadProgress | None = None
    ) -> "Iterator[HubSource]":
        """Yields itself; of the progress nothing is known."""
        yield self

    def rows(self, rejected: RejectedRows) -> Iterator[TableRow]:
        """Yields the rows, counted from 1.

        Raises:
            DataError: The hub cannot be reached, or has no such data set, subset or split; or
                several, none of which is called as the table.
            ImportError: `datasets` is missing.
        """
        datasets, arrow = _packages(self.name)
        options = {"revision": str(self.stamp()[0])}
        try:
            subsets = datasets.get_dataset_config_names(self._id, **options)
            subset = self._chosen("subset", self._subset, subsets)
            splits = datasets.get_dataset_split_names(self._id, subset, **options)
            split = self._chosen("split", self._split, splits)
            kind = f"subset {subset}, split {split}, revision {options['revision']},"
            table = datasets.load_dataset(self._id, subset, split=split, streaming=True, **options)
            count, names = 0, []
            for batch in table.with_format("arrow").iter(batch_size=_BATCH_ROWS):
                names = names or kept_columns(arrow, self.path, batch.schema, self.notes, kind)
                for part in batch.select(names).to_batches():
                    yield from batch_rows(part, count, self.path, rejected)
                    count += len(part)
        except DataError:
            raise
        except Exception as error:  # any of datasets, huggingface_hub, fsspec, pyarrow, httpx
            raise _unreachable(self.name, error) from error

    def _chosen(self, what: str, asked: str, known: Sequence[str]) -> str:
        names = [asked] if asked else [self._table] if self._table in known else list(known)
        if len(names) == 1 and names[0] in known:
            return names[0]
        form = f"{self._id}:SUBSET" + (":SPLIT" if what == "split" else "")
        raise DataError(
            f"{self.name}: {'no' if asked else 'which'} {what}{f' {asked!r}' if asked else ''};"
            f" there are {shown_columns(known)}; name one, as {form}"
        )


def _revision(id: str) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(id, timeout=30).sha)
    except Exception as error:  # any of huggingface_hub, httpx, or the system
        raise _unreachable(id, error) from error


def _unreachable(name: str, error: Exception) -> UnreachableError:
    said = str(error).strip().partition("\n")[0][:200]
    return UnreachableError(
        f"{name}: there is no such file or folder, and as a data set of the Hugging Face hub it"
        f" cannot be read ({type(error).__name__}: {said}); check the name and the network, or save"
        " it where there is one (datasets.load_dataset(...).save_to_disk(FOLDER)) and give that"
        " folder"
    )


def _packages(name: str) -> tuple[Any, Any]:
    """Returns `datasets` and `pyarrow`."""
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise ImportError(
            f"{name}: there is no such file or folder; data sets of the Hugging Face hub need"
            ' `datasets`: pip install "ragjax[datasets]"'
        ) from error
    return datasets, pyarrow

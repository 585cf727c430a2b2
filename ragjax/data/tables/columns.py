"""Parquet and Arrow files, a batch of rows at a time, through pyarrow."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ragjax.data.jsonl import DataError, ReadProgress, RejectedRows
from ragjax.data.tables.row import TableRow, shown_columns

PARQUET_MAGIC = b"PAR1"
# A file of record batches, and a stream of them, as `datasets` saves.
ARROW_MAGICS = (b"ARROW1\x00\x00", b"\xff\xff\xff\xff")
_BATCH_ROWS = 1024
_BUFFER = 1 << 20  # bytes read at a time of each column


def parquet_rows(
    path: Path, rejected: RejectedRows, notes: list[str], progress: ReadProgress | None = None
) -> Iterator[TableRow]:
    """Yields the rows of a Parquet file, counted from 1; embeddings are left out.

    Raises:
        DataError: A damaged file, or one of a kind that pyarrow does not read.
        ImportError: pyarrow is missing.
    """
    arrow = _pyarrow(path)
    from pyarrow import parquet

    with _named(arrow, path):
        # Buffered, so that no column of a row group is in memory as a whole.
        with parquet.ParquetFile(
            path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
        ) as file:
            names = kept_columns(arrow, path, file.schema_arrow, notes, "Parquet")
            total = path.stat().st_size
            batches = file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False)
            for batch, count in _counted(batches):
                yield from batch_rows(batch, count, path, rejected)
                if progress:
                    done = (count + len(batch)) / max(file.metadata.num_rows, 1)
                    progress(int(total * done), total)


def arrow_rows(
    path: Path, rejected: RejectedRows, notes: list[str], progress: ReadProgress | None = None
) -> Iterator[TableRow]:
    """Yields the rows of an Arrow file or stream, counted from 1; embeddings are left out.

    Raises:
        DataError: A damaged file, or one of a kind that pyarrow does not read.
        ImportError: pyarrow is missing.
    """
    arrow = _pyarrow(path)
    with _named(arrow, path), contextlib.closing(arrow.OSFile(str(path))) as file:
        is_file = file.read(8) == ARROW_MAGICS[0]
        file.seek(0)
        reader = arrow.ipc.open_file(file) if is_file else arrow.ipc.open_stream(file)
        names = kept_columns(arrow, path, reader.schema, notes, "Arrow")
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for number, (whole, start) in enumerate(_counted(batches), 1):
            # Offsets of a damaged file would read past the end of a buffer.
            whole.validate(full=True)
            batch = whole.select(names)
            for first in range(0, len(batch), _BATCH_ROWS):
                part = batch.slice(first, _BATCH_ROWS)
                yield from batch_rows(part, start + first, path, rejected)
            if progress:
                size = file.size()
                # The batches of a file are read at their places, and leave its position alone.
                done = size * number // reader.num_record_batches if is_file else file.tell()
                progress(done, size)


def batch_rows(batch: Any, start: int, path: Path, rejected: RejectedRows) -> Iterator[TableRow]:
    """Yields the rows of a record batch, of which `start` rows came before."""
    names = batch.schema.names
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except UnicodeDecodeError:
        if len(batch) > 1:  # the other rows are whole
            for place in range(len(batch)):
                yield from batch_rows(batch.slice(place, 1), start + place, path, rejected)
        else:
            rejected.add(path, start + 1, "text that is not UTF-8; convert the table")
        return
    for line, values in enumerate(zip(*columns, strict=True), start + 1):
        yield TableRow(line, dict(zip(names, values, strict=True)))


def kept_columns(arrow: Any, path: Path, schema: Any, notes: list[str], kind: str) -> list[str]:
    """Returns the columns that are read: all but lists of floats, which are long and no text.

    Args:
        arrow: The package.
        path: Of the table.
        schema: Of the table.
        notes: Told the names.
        kind: Of the table, for the note.

    Raises:
        DataError: Two columns have the same name.
    """
    names = schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: the column {twice!r} stands twice")
    types = arrow.types
    numbers = [
        field.name
        for field in schema
        if (
            types.is_list(field.type)
            or types.is_large_list(field.type)
            or types.is_fixed_size_list(field.type)
        )
        and types.is_floating(field.type.value_type)
    ]
    kept = [name for name in names if name not in numbers]
    left_out = f"; left out, as embeddings: {shown_columns(numbers)}" if numbers else ""
    notes.append(f"{path}: {kind} with the columns {shown_columns(kept) or '(none)'}{left_out}")
    return kept


def _counted(batches: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """Yields each batch with the number of rows before it."""
    count = 0
    for batch in batches:
        yield batch, count
        count += len(batch)


@contextlib.contextmanager
def _named(arrow: Any, path: Path) -> Iterator[None]:
    """Raises what pyarrow does not like as DataError, with the file's name."""
    try:
        yield
    except DataError:
        raise
    except (arrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = str(error).split("\n")[0][:200]
        raise DataError(
            f"{path}: damaged, or of a kind that pyarrow does not read ({reason}); write or copy"
            " it again"
        ) from error


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc  # an attribute from now on
    except ImportError as error:
        raise ImportError(
            f'{path}: Parquet and Arrow need pyarrow: pip install "ragjax[parquet]"'
        ) from error
    return pyarrow

"""Where the tables of a data set lie: a file, a folder in one of several layouts."""

import json
from collections.abc import Sequence
from pathlib import Path

from ragjax.data.jsonl import DataError, require_path
from ragjax.data.tables.row import shown_columns

# Of the file of a table in a folder; `.gz` may follow.
ENDINGS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_SHARDS = ".parquet"
# What `datasets` writes to a folder beside its tables.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
SAVED_FILES = frozenset({_SAVED, _SAVED_SPLITS, "dataset_info.json"})
_MAX_STATE_BYTES = 1 << 24


def table_files(path: Path, name: str, *, others: Sequence[str] = ()) -> tuple[Path, ...]:
    """Returns the files that make up a table, in their order; see `find_tables`.

    Args:
        path: A file, which is the table; or a folder.
        name: Of the table in a folder, such as "corpus".
        others: Names of other tables in it; shards that begin with these are not read.

    Raises:
        FileNotFoundError: There is none; the message suggests the nearest name.
        DataError: There are several, or a saved folder is damaged.
    """
    if not require_path(path).is_dir():
        return (path,)
    if found := find_tables(path, name, others=others):
        return found
    require_path(path / f"{name}.jsonl")
    raise DataError(f"{path} holds no {name}")


def find_tables(folder: Path, name: str, *, others: Sequence[str] = ()) -> tuple[Path, ...]:
    """Returns the files of a table in a folder, () where there is none.

    It is one `NAME.jsonl`, `.csv`, `.tsv`, `.parquet`, ... (plain or gzip); or what `datasets`
    saved there; or Parquet files, by name, those called NAME... if there are such. The same may
    lie in a folder `NAME` or `data`.

    Raises:
        DataError: There are several, or a saved folder is damaged.
    """
    for inner in (folder, folder / name, folder / "data"):
        if inner.is_dir() and (
            found := _one_file(inner, name)
            or saved_files(inner, name)
            or _shards(inner, name, others)
        ):
            return found
    return ()


def saved_files(folder: Path, name: str) -> tuple[Path, ...]:
    """Returns the Arrow files of a folder saved by `datasets`; () where it is none.

    Args:
        folder: That may be one.
        name: Of the split that is meant where there are several.

    Raises:
        DataError: There are several, none of this name; or the folder is damaged.
    """
    if (folder / _SAVED_SPLITS).is_file():
        splits = _listed(folder / _SAVED_SPLITS, "splits")
        chosen = name if name in splits else splits[0]
        if len(splits) > 1 and chosen != name:
            raise DataError(
                f"{folder} holds the splits {shown_columns(splits)}; name the one to read, for"
                f" example {folder / chosen}"
            )
        return saved_files(require_path(folder / chosen), name)
    if not (folder / _SAVED).is_file():
        return ()
    names = _listed(folder / _SAVED, "_data_files")
    return tuple(require_path(folder / one) for one in names)


def table_stem(file: Path) -> str:
    """Returns the name of a file without its ending; "" where it has none of a table."""
    name = file.name[: -len(".gz")] if file.name.lower().endswith(".gz") else file.name
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), None)
    return name[: -len(ending)] if ending else ""


def _one_file(folder: Path, name: str) -> tuple[Path, ...]:
    names = [f"{name}{ending}{packed}" for ending in ENDINGS for packed in ("", ".gz")]
    there = [folder / one for one in names if (folder / one).is_file()]
    # Beside BEIR's own file others may lie, for other programs.
    found = [path for path in there if path.name.startswith(f"{name}.jsonl")] or there
    if len(found) > 1:
        shown = " and ".join(path.name for path in found)
        raise DataError(f"{folder} holds {shown}; remove one of them")
    return tuple(found)


def _listed(path: Path, key: str) -> list[str]:
    """Returns the names of files or folders that a small JSON file lists."""
    try:
        with open(path, "rb") as file:
            listed = json.loads(file.read(_MAX_STATE_BYTES))[key]
        names = [one["filename"] if isinstance(one, dict) else one for one in listed]
        # What lies elsewhere is none of its parts.
        if not names or not all(name == Path(name).name for name in names):
            raise ValueError(f"{key} lists no names of files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); save the data set again") from error
    return names


def _shards(folder: Path, name: str, others: Sequence[str]) -> tuple[Path, ...]:
    files = sorted(p for p in folder.glob(f"*{_SHARDS}") if p.is_file() and p.name[0] != ".")
    own = [path for path in files if path.name.startswith(name)]
    return tuple(own or (path for path in files if not path.name.startswith(tuple(others))))

"""The files of a folder that documents are read from."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ragjax.data.documents.worker import READERS

TEXTS = (".md", ".markdown", ".txt", ".rst")
SUFFIXES = (*TEXTS, *READERS)
_TABLES = (".csv", ".tsv", ".parquet", ".arrow")
READ = (
    f"documents are read from {', '.join(SUFFIXES)} files (convert others, for example with"
    " pandoc), passages from corpus.jsonl"
)
_SHOWN = 3  # names in a note


def holds_data_set(path: Path) -> bool:
    """Tells whether a folder or file has passages as a table, or parts of such a data set.

    A data set without its corpus is a mistake, whatever README stands beside it.
    """
    if not path.is_dir():
        return ".json" in path.name or path.suffix in ("", ".gz", *_TABLES)
    names = {file.name for file in path.iterdir() if file.is_file() and file.suffix not in SUFFIXES}
    parts = {name.partition(".")[0] for name in names}
    return (
        any(".jsonl" in name or name.endswith(".parquet") for name in names)
        or not names.isdisjoint({"state.json", "dataset_dict.json"})  # saved by `datasets`
        or not parts.isdisjoint({"corpus", "queries"})
        or (path / "qrels").is_dir()
    )


def holds_documents(path: Path) -> bool:
    """Tells whether a folder or file is there that documents are read from."""
    return path.exists() and not holds_data_set(path)


class Found(NamedTuple):
    """What lies below a folder."""

    files: list[Path]
    left_out: dict[str, list[str]]  # why -> names below the folder


def find_files(folder: Path) -> Found:
    """Returns the files below a folder, links followed; each is read under one name."""
    found = Found([], {})
    seen: set[str] = set()
    places = [folder]  # the folder, then the links in it

    def leave(path: Path, why: str) -> None:
        found.left_out.setdefault(why, []).append(name_below(path, folder))

    def take(path: Path) -> None:
        if not path.is_file():
            leave(path, "broken links" if path.is_symlink() else "not plain files")
        elif path.suffix.lower() in SUFFIXES:
            found.files.append(path)
        else:
            leave(path, path.suffix.lower() or "without an ending")

    def is_new(path: Path) -> bool:
        real = os.path.realpath(path)
        if is_known := real in seen:
            leave(path, "read under another name")
        seen.add(real)
        return not is_known

    # What is linked comes last, so that a file's own name is the one it is read under.
    for place in places:
        if not place.is_dir():
            if is_new(place):
                take(place)
            continue
        for top, names, files in os.walk(place, onerror=_raise):
            if not is_new(Path(top)):
                names.clear()
                continue
            for path in (Path(top, name) for name in sorted(names + files)):
                if path.name.startswith("."):
                    leave(path, "hidden")
                elif path.is_symlink():
                    places.append(path)
                elif path.name in files and is_new(path):
                    take(path)
            names[:] = sorted(name for name in names if not name.startswith("."))
    return Found(sorted(found.files), found.left_out)


def _raise(error: OSError) -> None:
    raise error


def name_below(path: Path, folder: Path) -> str:
    """Returns a path below a folder as text; bytes of it that are no UTF-8 become escapes."""
    below = path.relative_to(folder if path != folder else folder.parent)
    return os.fsencode(below.as_posix()).decode("utf-8", "backslashreplace")


def some(names: Sequence[str]) -> str:
    """Returns the first names of several."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def listed(left_out: Mapping[str, Sequence[str]]) -> str:
    """Returns how many files were left out for which reason, with a few names each."""
    kinds = sorted(left_out.items(), key=lambda kind: (-len(kind[1]), kind[0]))
    return ", ".join(f"{len(names):,} {why} ({some(names)})" for why, names in kinds)

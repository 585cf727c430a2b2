"""The files of a folder that documents are read from."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ragjax.data.documents.worker import READERS
from ragjax.data.tables import ENDINGS, OTHERS, find_tables, table_stem

TEXTS = (".md", ".markdown", ".txt", ".rst")
SUFFIXES = (*TEXTS, *READERS)
_TABLES = frozenset({*ENDINGS, ".tab", ".psv"})
# Beside a data set; they are not what it is about.
_ABOUT = frozenset({"readme", "license"})
READ = (
    f"documents are read from {', '.join(SUFFIXES)} files (convert others, for example with"
    " pandoc), passages from corpus.jsonl"
)
_SHOWN = 3  # names in a note


def holds_data_set(path: Path) -> bool:
    """Tells whether a folder or file has passages as a table, or is a data set that lacks them.

    Questions and judgements may stand beside documents; but where there is only a README, it is
    the corpus that is missing.
    """
    if not path.is_dir():
        ending = path.suffix.lower()
        endings = {ending.lower() for ending in path.suffixes}
        is_table = ending in ("", ".gz") or not endings.isdisjoint(_TABLES)
        return is_table and ending not in SUFFIXES
    files = [file for file in path.iterdir() if file.suffix.lower() not in SUFFIXES]
    names = {file.name.lower() for file in files if file.is_file()}
    stems = {table_stem(file).lower() for file in files if file.is_file()}
    if (
        any((".jsonl" in n or n.endswith(".parquet")) and not n.startswith(OTHERS) for n in names)
        or not names.isdisjoint({"state.json", "dataset_dict.json"})  # saved by `datasets`
        or "corpus" in stems
        or find_tables(path, "corpus", others=OTHERS)
    ):
        return True
    if stems.isdisjoint(OTHERS) and not (path / "qrels").is_dir():
        return False
    documents = find_files(path).files
    return all(file.parent == path and file.stem.lower() in _ABOUT for file in documents)


def holds_documents(path: Path) -> bool:
    """Tells whether a folder or file is there that documents are read from."""
    return path.exists() and not holds_data_set(path)


class Found(NamedTuple):
    """What lies below a folder."""

    files: list[Path]
    left_out: dict[str, list[str]]  # why -> names below the folder


def find_files(folder: Path, apart: Collection[Path] = ()) -> Found:
    """Returns the files below a folder, links followed; each is read under one name.

    Args:
        folder: Or one file.
        apart: Files and folders in it that are no documents.
    """
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
                if path in apart:
                    continue
                if path.name.startswith("."):
                    leave(path, "hidden")
                elif path.is_symlink():
                    places.append(path)
                elif path.name in files and is_new(path):
                    take(path)
            names[:] = sorted(
                name for name in names if not (name.startswith(".") or Path(top, name) in apart)
            )
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
    return "; ".join(f"{why}: {len(names):,} ({some(names)})" for why, names in kinds)

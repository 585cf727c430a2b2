"""The existing name that a user may have meant."""

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Returns the known name most like one that is not known, None if none is like it.

    Args:
        name: What was given.
        known: What could have been meant.
        cutoff: Least likeness, from 0 to 1.
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def nearest_path(path: Path, *, having: str = "") -> Path | None:
    """Returns the existing path most like one that does not exist, None if none is like it.

    Only the first part that is missing is compared, with the names beside it.

    Args:
        path: What was given.
        having: Part of each name that could have been meant, such as an ending.
    """
    while not path.parent.is_dir():
        path = path.parent
    # What all of them have says nothing about likeness.
    names = {
        entry.name.replace(having, ""): entry.name
        for entry in sorted(path.parent.iterdir())
        if having in entry.name
    }
    near = nearest_name(path.name.replace(having, ""), names, cutoff=0.5)
    return path.parent / names[near] if near is not None else None

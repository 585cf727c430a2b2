"""Folders that are complete or absent: checksums, publishing by rename, and safe opening."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, on disk when this returns, never seen half written."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """Reads a JSON object that is not reached through a link.

    Args:
        path: the file.
        what: what its folder should hold, for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is a link or no JSON object.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; {what} folders hold plain files only.")
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no complete {what}: {path.name} is missing.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the {what} is damaged.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def verify_folder(folder: Path, digests: Any, *, also: tuple[str, ...]) -> None:
    """Checks that a folder holds exactly the listed files and that none has changed.

    Args:
        folder: the folder.
        digests: file name to SHA-256 in hex, as read from the manifest.
        also: names that belong there and have no checksum.

    Raises:
        ValueError: a name leaves the folder, a link, a file too many or missing, or a checksum
            that differs; the message has the file and both checksums.
    """
    if not isinstance(digests, dict) or not digests:
        raise ValueError(f"The manifest in {folder} lists no files with checksums.")
    for name in digests:
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
            raise ValueError(
                f"The manifest in {folder} names {name!r}, which is no plain file name."
            )
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is no plain file; remove it to open this folder.")
        if path.name not in digests and path.name not in also:
            raise ValueError(f"{path} is not in the manifest; remove it to open this folder.")
    for name, expected in digests.items():
        path = folder / name
        if not path.exists():
            raise ValueError(f"{path} is missing; build this folder again.")
        found = sha256(path)
        if found != expected:
            raise ValueError(
                f"{path} is damaged: expected SHA-256 {expected}, got {found}; build it again."
            )


def publish(building: Path, target: Path) -> None:
    """Renames a finished folder to its final name, its contents on disk first.

    Raises:
        FileExistsError: the final name is taken.
    """
    for path in building.iterdir():
        sync_file(path)
    sync_folder(building)
    if target.exists():
        raise FileExistsError(f"{target} exists; it is never written over.")
    building.rename(target)
    sync_folder(target.parent)


def sync_file(path: Path) -> None:
    """Waits until a file's contents are on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries are on disk, where the system can tell."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

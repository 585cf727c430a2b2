"""Folders that are complete or absent: checksums, publishing by rename, and safe opening."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ragjax.index.writing import whole_file

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
    text = json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
    with whole_file(partial, num_bytes=len(text)) as file:
        file.write(text)
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
        digests: file name to SHA-256 in hex, as read from the manifest. A name may lead into
            sub-folders, as "embeddings/shard-000000.npy" does.
        also: names that belong there and have no checksum.

    Raises:
        ValueError: a name leaves the folder, a link, a file or folder too many or missing, or a
            checksum that differs; the message has the file and both checksums.
    """
    check_listing(folder, digests, also=also)
    for name, expected in digests.items():
        path = folder / name
        found = sha256(path)
        if found != expected:
            raise ValueError(
                f"{path} is damaged: expected SHA-256 {expected}, got {found}; build it again."
            )


def check_listing(folder: Path, digests: Any, *, also: tuple[str, ...]) -> None:
    """Checks as `verify_folder` does, but reads no file: their contents may have changed.

    Args:
        folder: the folder.
        digests: file name to SHA-256 in hex, as read from the manifest.
        also: names that belong there and have no checksum.

    Raises:
        ValueError: a name leaves the folder, a link, or a file or folder too many or missing.
    """
    if not isinstance(digests, dict) or not digests:
        raise ValueError(f"The manifest in {folder} lists no files with checksums.")
    for name in digests:
        if not _stays_inside(name):
            raise ValueError(
                f"The manifest in {folder} names {name!r}, which is no plain file name."
            )
    listed = {*digests, *also}
    folders = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if name not in (folders if path.is_dir() else listed):
            raise ValueError(f"{path} is not in the manifest; remove it to open this folder.")
    for name in digests:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; build this folder again.")


def walk_digests(folder: Path, *, known: Mapping[str, str]) -> dict[str, str]:
    """Returns the SHA-256 in hex of every file below a folder, by its name in the folder.

    Args:
        folder: the folder.
        known: digests computed already, by the same names; these files are not read again.

    Raises:
        ValueError: a link, or a known name that is no file there.
    """
    names = [path.relative_to(folder).as_posix() for path in _walk(folder) if not path.is_dir()]
    unknown = sorted(set(known) - set(names))
    if unknown:
        raise ValueError(f"{folder} holds no file {unknown[0]!r} though its digest is known.")
    return {name: known.get(name) or sha256(folder / name) for name in names}


def publish(building: Path, target: Path) -> None:
    """Renames a finished folder to its final name, everything below it on disk first.

    Raises:
        FileExistsError: the final name is taken.
        ValueError: a link or a device is in the folder.
    """
    for path in _walk(building):
        if path.is_dir():
            sync_folder(path)
        else:
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


def _stays_inside(name: Any) -> bool:
    """Tells whether a manifest's name is one spelling of a file inside its folder."""
    return (
        isinstance(name, str)
        and "\\" not in name
        and not PureWindowsPath(name).drive
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def _walk(folder: Path) -> Iterator[Path]:
    """Yields every file and folder below one, in order; refuses links and devices."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is no plain file; remove it to open this folder.")
        yield path
        if path.is_dir():
            yield from _walk(path)

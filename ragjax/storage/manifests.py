"""Folders that are complete or absent: checksums, publishing by rename, and safe opening.

One rule holds for everything that is written to be read back: each file has its SHA-256 in a
manifest, and a manifest, like a line of a cache, has a checksum of itself.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ragjax.storage.files import sha256, sync_file, sync_folder, unique_name, write_json

_LOG = logging.getLogger(__name__)
_CHECKSUM = "checksum"
_MANIFEST = "manifest.json"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with a checksum of itself as its last field."""
    return {**value, _CHECKSUM: _checksum(json.loads(json.dumps(value)))}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns a JSON object without its checksum; None where it has none or has changed."""
    content = {name: field for name, field in value.items() if name != _CHECKSUM}
    return content if value.get(_CHECKSUM) == _checksum(content) else None


def write_sealed(path: Path, value: Mapping[str, Any], *, shared: bool = False) -> None:
    """Writes a JSON object for `read_sealed`.

    Args:
        path: The file; missing folders are made.
        value: What it will hold; NaN and infinity are refused.
        shared: True = other processes may write the same file at the same time.
    """
    write_json(path, sealed(value), shared=shared)


def read_sealed(path: Path, *, what: str, version: int | None = None) -> dict[str, Any]:
    """Reads a JSON object that `write_sealed` wrote and that is not reached through a link.

    Args:
        path: The file.
        what: What its folder should hold, for the message.
        version: What its field "format" must be; None accepts any, and none.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is a link, no JSON object, of another version, or has changed since it was
            written.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; {what} folders hold plain files only")
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no complete {what}: {path.name} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the {what} is damaged") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    if version is not None and value.get("format") != version:
        raise ValueError(
            f"{path} has format {value.get('format')!r}; this version reads {version}: use the same"
            f" version for all, or make the {what} again"
        )
    if (content := unsealed(value)) is None:
        raise ValueError(
            f"{path} is damaged: its checksum is {value.get(_CHECKSUM, 'missing')}, of its content"
            f" it would be {sealed(value)[_CHECKSUM]}; make the {what} again"
        )
    return content


def verify_folder(folder: Path, digests: Any, *, also: tuple[str, ...]) -> None:
    """Checks that a folder holds exactly the listed files and that none has changed.

    Args:
        folder: The folder.
        digests: File name to SHA-256 in hex, as read from the manifest. A name may lead into
            sub-folders, as "embeddings/shard-000000.npy" does.
        also: Names that belong there and have no checksum.

    Raises:
        ValueError: A name leaves the folder, a link, a file or folder too many or missing, or a
            checksum that differs; the message has the file and both checksums.
    """
    check_listing(folder, digests, also=also)
    for name, expected in digests.items():
        path = folder / name
        found = sha256(path)
        if found != expected:
            raise ValueError(
                f"{path} is damaged: expected SHA-256 {expected}, got {found}; build it again"
            )


def check_listing(folder: Path, digests: Any, *, also: tuple[str, ...]) -> None:
    """Checks as `verify_folder` does, but reads no file: their contents may have changed.

    Args:
        folder: The folder.
        digests: File name to SHA-256 in hex, as read from the manifest.
        also: Names that belong there and have no checksum.

    Raises:
        ValueError: A name leaves the folder, a link, or a file or folder too many or missing.
    """
    if not isinstance(digests, dict) or not digests:
        raise ValueError(f"The manifest in {folder} lists no files with checksums")
    for name in digests:
        if not _stays_inside(name):
            raise ValueError(
                f"The manifest in {folder} names {name!r}, which is no plain file name"
            )
    listed = {*digests, *also}
    folders = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if name not in (folders if path.is_dir() else listed):
            raise ValueError(f"{path} is not in the manifest; remove it to open this folder")
    for name in digests:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; build this folder again")


def walk_digests(folder: Path, *, known: Mapping[str, str]) -> dict[str, str]:
    """Returns the SHA-256 in hex of every file below a folder, by its name in the folder.

    Args:
        folder: The folder.
        known: Digests computed already, by the same names; these files are not read again.

    Raises:
        ValueError: A link, or a known name that is no file there.
    """
    names = [path.relative_to(folder).as_posix() for path in _walk(folder) if not path.is_dir()]
    unknown = sorted(set(known) - set(names))
    if unknown:
        raise ValueError(f"{folder} holds no file {unknown[0]!r} though its digest is known")
    return {name: known.get(name) or sha256(folder / name) for name in names}


def publish(building: Path, target: Path) -> None:
    """Renames a finished folder to its final name, everything below it on disk first.

    Raises:
        FileExistsError: The final name is taken.
        ValueError: A link or a device is in the folder.
    """
    for path in _walk(building):
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    sync_folder(building)
    if target.exists():
        raise FileExistsError(f"{target} exists; it is never written over")
    building.rename(target)
    sync_folder(target.parent)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Makes a folder to fill; it is published as `target` after the block, or gone if that fails.

    Raises:
        FileExistsError: The final name is taken.
    """
    building = target.with_name(f".{unique_name(target.name)}.tmp")
    building.mkdir(parents=True)
    try:
        yield building
        publish(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def kept_folder(target: Path, make: Callable[[Path], None], *, what: str, version: int) -> Path:
    """Returns a folder that can be made again: as it is, if each file is whole, else made anew.

    Processes that make it at the same time do not disturb each other; the first one's stays.

    Args:
        target: The folder, named after everything that its contents depend on.
        make: Fills a new folder.
        what: What it holds, for messages.
        version: Of the format; another one is made again.
    """
    if target.exists():
        try:
            manifest = read_sealed(target / _MANIFEST, what=what, version=version)
            verify_folder(target, manifest.get("sha256"), also=(_MANIFEST,))
            return target
        except (OSError, ValueError) as error:
            _LOG.warning("The %s is made again: %s", what, error)
            shutil.rmtree(target)
    with contextlib.suppress(FileExistsError), new_folder(target) as building:
        make(building)
        digests = walk_digests(building, known={})
        write_sealed(building / _MANIFEST, {"format": version, "sha256": digests})
    return target


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in content.items() if k != _CHECKSUM}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
            raise ValueError(f"{path} is no plain file; remove it to open this folder")
        yield path
        if path.is_dir():
            yield from _walk(path)

"""Files that are complete or absent: written beside their name, synced, renamed."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

# What file systems without hard links answer (FAT, some FUSE and network ones).
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class DiskFullError(OSError):
    """There is no room for a file; its message names the file and the bytes it needs."""

    NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def named_if_full(path: Path, num_bytes: int) -> Iterator[None]:
    """Turns the error of a full disk in the block into one that names the file.

    Args:
        path: The file that is written.
        num_bytes: What will be written, for the message; 0 where that is not known.

    Raises:
        DiskFullError: The disk, a quota or a limit on the size of a file has no room for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DiskFullError.NUMBERS:
            raise
        needed = f"{num_bytes:,} bytes are needed; " if num_bytes else ""
        raise DiskFullError(
            error.errno,
            f"{os.strerror(error.errno)}: {needed}make room and start again, finished files are "
            "kept",
            str(path),
        ) from error


@contextlib.contextmanager
def whole_file(path: Path, *, num_bytes: int = 0) -> Iterator[BinaryIO]:
    """Opens a file to write; it is on disk after the block, and gone if the block fails.

    Args:
        path: The file, under a name that nobody reads yet.
        num_bytes: What will be written, for the message; 0 where that is not known.

    Raises:
        DiskFullError: The disk, a quota or a limit on the size of a file has no room for it.
    """
    try:
        with named_if_full(path, num_bytes), path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing(path: Path, *, num_bytes: int = 0, shared: bool = False) -> Iterator[BinaryIO]:
    """Opens a file to write that takes the place of `path` once the block has ended.

    Args:
        path: The file, whose folder exists.
        num_bytes: What will be written, for the message of a full disk.
        shared: True = other processes may write the same file at the same time.

    Raises:
        DiskFullError: There is no room; the old file stays.
    """
    beside = path.with_name(f"{unique_name(path.name) if shared else path.name}.tmp")
    with whole_file(beside, num_bytes=num_bytes) as file:
        yield file
    os.replace(beside, path)
    sync_folder(path.parent)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Writes UTF-8 text; lone surrogates, which no UTF-8 file can hold, become escapes.

    Args:
        path: The file; missing folders are made.
        text: What it will hold.
        shared: True = other processes may write the same file at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode("utf-8", "backslashreplace")
    with replacing(path, num_bytes=len(content), shared=shared) as file:
        file.write(content)


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    """Writes an indented JSON value as `write_text` does; refuses NaN and infinity."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n", shared=shared)


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes objects as UTF-8 JSON lines, one at a time."""
    with replacing(path, shared=True) as file:
        for record in records:
            line = json.dumps(record, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def unique_name(name: str) -> str:
    """Returns a file name that no other process or thread uses."""
    return f"{name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def link_first(source: Path, target: Path) -> bool:
    """Gives a file a second name; False where that name is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():
            return False
        source.rename(target)
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a finished file a second name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (*_NO_LINKS, errno.EXDEV):
            raise
        with named_if_full(target, source.stat().st_size):
            shutil.copyfile(source, target)

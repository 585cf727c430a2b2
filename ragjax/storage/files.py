"""Files that are complete or absent: written beside their name, synced, renamed."""

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

# What file systems without hard links answer (FAT, some FUSE and network ones).
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class DiskFullError(OSError):
    """There is no room for a file; its message names it, the bytes it needs and those free."""

    NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def named_if_full(path: Path, num_bytes: int) -> Iterator[None]:
    """Turns the error of a full disk in the block, whoever raises it, into one that names the file.

    Args:
        path: The file or folder that is written.
        num_bytes: What will be written, for the message; 0 where that is not known.

    Raises:
        DiskFullError: The disk, a quota or a limit on the size of a file has no room for it; the
            message has the bytes that are needed and those that are free.
    """
    try:
        yield
    except Exception as error:
        number = _full_disk(error)
        if number is None or isinstance(error, DiskFullError):
            raise
        raise DiskFullError(number, _no_room(number, path, num_bytes), str(path)) from error


def _full_disk(error: Exception) -> int | None:
    """Returns the number of an error that means a full disk; libraries put it in their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DiskFullError.NUMBERS else None
    text = str(error)
    return next(
        (
            number
            for number in DiskFullError.NUMBERS
            if os.strerror(number) in text or f"os error {number})" in text
        ),
        None,
    )


def _no_room(number: int, path: Path, num_bytes: int) -> str:
    written = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    needed = f"{num_bytes:,}" if num_bytes else f"more than {written:,}"
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    # What the unfinished file takes is free again once it is removed.
    free = shutil.disk_usage(existing).free + written
    return (
        f"{os.strerror(number)}: {needed} bytes are needed, {free:,} are free; make room and start"
        " again, finished files are kept"
    )


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
    try:
        with whole_file(beside, num_bytes=num_bytes) as file:
            yield file
    except DiskFullError as error:
        if error.filename == str(beside):
            error.filename = str(path)
        raise
    os.replace(beside, path)
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, complete or not at all."""
    with replacing(path, num_bytes=len(content)) as file:
        file.write(content)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Writes an array as `.npy` under a name that nobody reads yet; refuses Python objects."""
    array = np.asarray(array, order="C")
    if array.dtype.hasobject:
        raise ValueError(f"{path}: an array of Python objects is not written")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    with whole_file(path, num_bytes=header.tell() + array.nbytes) as file:
        # Not np.save: a full disk reaches us as an error without a number from there.
        file.write(header.getbuffer())
        file.write(array.data)


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
    with named_if_full(path, path.stat().st_size), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries are on disk, where the system can tell."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with named_if_full(folder, 0):
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

"""Writing files that other processes may write at the same time, and disks that are full."""

import contextlib
import errno
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# What file systems without hard links answer (FAT, some FUSE and network ones).
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class DiskFullError(OSError):
    """There is no room for a file; its message names the file and the bytes it needs."""

    NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole_file(path: Path, *, num_bytes: int) -> Iterator[BinaryIO]:
    """Opens a file to write; it is on disk after the block, and gone if the block fails.

    Args:
        path: the file, under a name that nobody reads yet.
        num_bytes: what will be written, for the message.

    Raises:
        DiskFullError: the disk, a quota or a limit on the size of a file has no room for it.
    """
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DiskFullError.NUMBERS:
            raise DiskFullError(
                error.errno,
                f"{os.strerror(error.errno)}: {num_bytes:,} bytes are needed; make room and start "
                "again, finished files are kept",
                str(path),
            ) from error
        raise


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

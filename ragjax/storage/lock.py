"""One writer for each folder: a run, or the generations of an index."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Self


class RunLock:
    """Holds a run folder for this process; a second process is told who has it.

    The kernel frees the lock when its holder ends, however it ends, so a lock left by a killed run
    or a power loss is simply taken.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        name: str = "run.lock",
        remedy: str = "use another --output folder",
    ):
        """Names the folder; nothing is taken until `with` is entered.

        Args:
            folder: What one process at a time may write.
            name: Of the file that is locked.
            remedy: What else than waiting the user can do, for the message.
        """
        self._path = Path(folder) / name
        self._remedy = remedy
        self._file: int | None = None

    def __enter__(self) -> Self:
        """Takes the lock.

        Raises:
            ValueError: If another process holds it; the message says which and since when.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 4096).decode("utf-8", "replace")
            os.close(descriptor)
            raise ValueError(
                f"{self._path.parent} is locked by {_describe(holder)}; wait for it to end, or"
                f" {self._remedy}"
            ) from error
        os.ftruncate(descriptor, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": started}
        os.write(descriptor, json.dumps(note).encode())
        self._file = descriptor
        return self

    def __exit__(self, *error: object) -> None:
        """Gives the lock back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be written, before anything expensive."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # another process may try the same at this moment
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder} cannot be written ({error.strerror}); give a folder on a disk with room "
            "that this user may write",
        ) from error


def _describe(holder: str) -> str:
    try:
        note = json.loads(holder)
        return f"process {note['pid']} on host {note['host']} since {note['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

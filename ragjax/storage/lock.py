"""One writer for each folder: a run, or the generations of an index."""

import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Self

from ragjax.storage.files import named_if_full

_HELD: "weakref.WeakValueDictionary[Path, RunLock]" = weakref.WeakValueDictionary()


class RunLock:
    """Holds a run folder for this process; a second process is told who has it.

    The kernel frees the lock when its holder ends, however it ends, so a lock left by a killed run
    or a power loss is simply taken.
    """

    _file: int | None = None

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        name: str = "run.lock",
        remedy: str = "use another folder",
        give_back: Callable[[], object] | None = None,
    ):
        """Names the folder; nothing is taken until `with` is entered.

        Args:
            folder: What one process at a time may write.
            name: Of the file that is locked.
            remedy: What else than waiting the user can do, for the message.
            give_back: Ends the holder, for this same process where it takes the folder once more (a
                cell of a notebook that is run again); None: it is refused as any other.
        """
        self._path = Path(folder) / name
        self._remedy, self._give_back = remedy, give_back

    def __enter__(self) -> Self:
        """Takes the lock.

        Raises:
            ValueError: If it is held; the message says by which process and since when.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": started}
        with named_if_full(self._path, 0):
            os.write(descriptor, json.dumps(note).encode())
        self._file = descriptor
        _HELD[self._path.resolve()] = self
        return self

    def _lock(self, descriptor: int) -> None:
        """Locks the open file, if need be after an earlier holder in this process gave it back."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0).decode("utf-8", "replace")
            # A forked process has the table too, but not the right to end its parent's holder.
            itself = _describe(holder).startswith(f"{_this_process()} since")
            earlier = _HELD.pop(self._path.resolve(), None) if itself else None
            if earlier is not None and earlier._give_back is not None:
                earlier._give_back()
                return self._lock(descriptor)
            wait = "end the call that holds it" if itself else "wait for it to end"
            whose = ", which is this one" if itself else ""
            raise ValueError(
                f"{self._path.parent} is locked by {_describe(holder)}{whose}; {wait}, or"
                f" {self._remedy}"
            ) from error

    def __del__(self) -> None:
        """Gives back what nobody can give back any more."""
        self.__exit__()

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


def _this_process() -> str:
    return f"process {os.getpid()} on host {socket.gethostname()}"


def _describe(holder: str) -> str:
    try:
        note = json.loads(holder)
        return f"process {note['pid']} on host {note['host']} since {note['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

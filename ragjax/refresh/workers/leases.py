"""Who works on what, among processes that share nothing but a folder and trust no clock.

A holder shows that it lives by a counter in its file. Others call it dead when the counter has not
changed for some seconds of *their own* monotonic clock: wall clocks and the times of files, which
differ between hosts and may jump, decide nothing.
"""

import contextlib
import functools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ragjax import storage
from ragjax.storage import link_first, unique_name


class Holder(NamedTuple):
    """A process."""

    host: str
    pid: int
    machine: str  # equal where process ids mean the same: one boot of one machine, one container

    def is_gone(self) -> bool:
        """Tells whether this is known to be a process of this machine that has ended."""
        if self.machine != machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def __str__(self) -> str:
        """Names it for a message."""
        return f"process {self.pid} on host {self.host}"


def this_process() -> Holder:
    """Returns the holder that this process is."""
    return Holder(socket.gethostname(), os.getpid(), machine())


@functools.cache
def machine() -> str:
    """Returns what tells one boot of one machine, and one container on it, from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        # Where the system does not say, only the counter decides.
        return secrets.token_hex(16)


class Beacon:
    """A file that shows by a counter that the process which made it is alive."""

    def __init__(self, path: Path) -> None:
        """Creates the file.

        Raises:
            FileExistsError: The name is taken.
        """
        self.path = path
        self._token = secrets.token_hex(16)
        self._counter = 0
        storage.create_file(path, self._content())

    def renew(self) -> bool:
        """Counts one up; False: the file is gone, or another process's by now.

        The counter is changed in place. Replacing the file could write over the lease of one who
        took it over a moment ago; and a full disk stops no beacon that is there already.
        """

        def count_up(content: bytes) -> bytes | None:
            if not self._is_ours(content):
                return None
            self._counter += 1
            return self._content()

        try:
            return storage.change_in_place(self.path, count_up)
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Removes the file, unless it is another process's by now."""
        _take_away(self.path, self._is_ours)

    def _content(self) -> bytes:
        """Returns the file's content, of one length whatever the counter."""
        note = this_process()._asdict() | {"token": self._token}
        return f'{{"counter": {self._counter:12d}, {json.dumps(note)[1:]}\n'.encode()

    def _is_ours(self, content: bytes) -> bool:
        return self._token.encode() in content


def read_holder(content: bytes) -> Holder | None:
    """Returns whose beacon this is; None: it does not say, for instance half written."""
    try:
        note: Any = json.loads(content)
        return Holder(str(note["host"]), int(note["pid"]), str(note["machine"]))
    except (ValueError, KeyError, TypeError):
        return None


class Watch:
    """Measures how long files have been seen unchanged, by this process's monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Has seen nothing yet."""
        self._clock = clock
        self._seen: dict[Path, tuple[bytes, float]] = {}

    def look(self, path: Path, content: bytes) -> "Look":
        """Compares the content of a file with what it was at the last look."""
        now = self._clock()
        seen = self._seen.get(path)
        if seen is None or seen[0] != content:
            self._seen[path] = (content, now)
            return Look(0.0, seen is not None)
        return Look(now - seen[1], False)


class Look(NamedTuple):
    """How a file compares with the last time it was looked at."""

    unchanged_seconds: float  # since it was first seen with this content
    changed: bool  # True = it was seen before, with another content


class Leases:
    """The leases on the shards of one store."""

    def __init__(
        self, folder: Path, *, lease_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Names the folder.

        Args:
            folder: Where the leases are files.
            lease_seconds: A lease whose counter was seen unchanged for longer may be taken over.
            clock: Monotonic, in seconds.
        """
        self._folder = folder
        self._lease_seconds = lease_seconds
        self._watch = Watch(clock)

    def take(self, shard: int) -> Beacon | None:
        """Takes the lease on a shard if it is free or its holder is dead; None: it is held.

        Two processes may end up with one shard if a holder only seemed dead. That costs time and
        nothing else: the first one to finish gives the shard its name.

        Raises:
            FileNotFoundError: The folder is gone.
        """
        path = self._folder / f"shard-{shard:06d}.lease"
        with contextlib.suppress(FileExistsError):
            return Beacon(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None  # given back this moment; the next round takes it
        age = self._watch.look(path, content).unchanged_seconds
        holder = read_holder(content)
        if not (holder and holder.is_gone()) and age <= self._lease_seconds:
            return None
        if _take_away(path, lambda found: found == content):
            with contextlib.suppress(FileExistsError):
                return Beacon(path)
        return None


def _take_away(path: Path, is_the_one: Callable[[bytes], bool]) -> bool:
    """Removes a file if its content is as expected; only one of several callers is told True."""
    moved = path.with_name(unique_name(path.name))
    try:
        path.rename(moved)
    except FileNotFoundError:
        return False
    # Between looking and renaming another process may have put its own there: give it back.
    expected = is_the_one(moved.read_bytes())
    if not expected:
        link_first(moved, path)
    moved.unlink(missing_ok=True)
    return expected

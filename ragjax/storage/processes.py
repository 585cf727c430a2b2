"""Several processes that make one run, each with devices of its own: what they agree on.

All run the same program at the same time, so that each calls what is here as often as the others,
in the same order, in its main thread. Process 0 is the one whose folder and whose words count.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from numpy.typing import NDArray

from ragjax.storage.files import link_or_copy

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Beginnings of errors of JAX that are no sign of a lost process.
_OWN_FAULT = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
# Seconds without a sign of life after which a process counts as lost.
_SILENT = 30
# Seconds for which a process that ends waits for the others to end, too.
_ENDING = 20
# Seconds for which process 0, whose end is that of all, lets the others end with the same error.
_LAST = 2
_MOST_BYTES = 4096  # of what one process tells the others
# What each process has of its own, or all of them in common, in the folder of a run.
SHARES = "shares"
_NOT_COPIED = ("run.lock", "refresh.lock", "checkpoints", "process-*", SHARES)


def start(distributed: str) -> None:
    """Joins this process with the others of its run, unless it is by then.

    Args:
        distributed: "auto": as the cluster says (SLURM, Kubernetes, Open MPI, Cloud TPU), or as
            JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say; "off": this process
            is alone.

    Raises:
        ValueError: Nothing says how many processes there are, or some of them did not come.
    """
    if distributed == "off" or jax.distributed.is_initialized():
        return
    given: dict[str, Any] = {}
    for argument, name in (("num_processes", COUNT), ("process_id", NUMBER)):
        if value := os.environ.get(name):
            if not value.isdigit():
                raise ValueError(f"{name}={value}: expected a whole number")
            given[argument] = int(value)
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=_SILENT, shutdown_timeout_seconds=_ENDING
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"distributed={distributed}: {str(error).rstrip('.')}; start every process on a"
            f" cluster that JAX knows, or set {ADDRESS}, {COUNT} and {NUMBER} for each"
        ) from error


def several() -> bool:
    """Says whether this process makes the run with others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Says whether this is process 0, which alone writes the results."""
    return not several() or jax.process_index() == 0


def misses_another(error: BaseException) -> bool:
    """Says whether an error comes of a process of the run that is lost."""
    if not several():
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not str(error).startswith(_OWN_FAULT)
    return isinstance(error, TimeoutError)


def leave(code: int, *, together: bool) -> None:
    """Parts from the other processes of a run; does nothing where there are none.

    Args:
        code: Exit code of the program.
        together: All end at this point. Else this process ends here, at once: JAX would wait for
            the others, and then end it by a signal.
    """
    if not several():
        return
    if together:
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(_LAST)  # the others, which may say the same, are ended with it
    os._exit(code)


@contextlib.contextmanager
def last_words(text: str) -> Iterator[None]:
    """Has a line printed where this process is one of several, and ends without leaving the block.

    JAX itself ends a process that misses another one, without a word to Python, or soon after an
    error for which `misses_another` is true.

    Args:
        text: The line.
    """
    if not several():
        yield
        return
    script = "import sys; sys.stdin.read() or sys.stderr.write(sys.argv[1])"
    command = [sys.executable, "-c", script, f"{text}\n"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as watcher:
        try:
            yield
        except BaseException as error:
            if not misses_another(error):
                watcher.communicate(b".")
            raise
        watcher.communicate(b".")


def host(array: Any) -> NDArray[Any]:
    """Returns an array of the run as NumPy has it, whole, in every process."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def put(array: Any, sharding: Sharding | None) -> jax.Array:
    """Puts an array that every process has where it goes; each process fills its own devices."""
    spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    if sharding is None or sharding.is_fully_addressable or spread:
        return jax.device_put(array, sharding)
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def everyone(*mine: int) -> NDArray[np.int32]:
    """Returns what each process says, `[processes, values]`; waits for all of them."""
    return np.asarray(_gather(mine))


def largest(mine: int) -> int:
    """Returns the largest of what the processes say."""
    return int(everyone(mine).max()) if several() else mine


def meet() -> None:
    """Waits until all processes are here."""
    if several():
        everyone(0)


class Votes:
    """What each process says before a step, read before the next one: nobody waits for it.

    The answer is computed behind the steps that were given to the devices by then, as late as the
    metrics of a step are.
    """

    def __init__(self) -> None:
        """Begins without a vote."""
        self._last: jax.Array | None = None

    def __call__(self, *mine: int) -> NDArray[np.int32] | None:
        """Casts a vote; returns the one before, `[processes, values]`, None: there was none."""
        earlier, self._last = self._last, _gather(mine)
        return None if earlier is None else np.asarray(earlier)


def _gather(mine: tuple[int, ...]) -> jax.Array:
    """Returns `[processes, values]` int32, the same in each of them."""
    mesh, everywhere = _meeting()
    rows = np.tile(np.asarray(mine, np.int32), (mesh.local_mesh.size, 1))
    apart = NamedSharding(mesh, PartitionSpec("device"))
    shape = (mesh.size, rows.shape[1])
    return everywhere(jax.make_array_from_process_local_data(apart, rows, shape))


@functools.cache
def _meeting() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    """Returns a mesh of all devices, and what gives each the rows of the first of each process.

    Of all devices although one of each process would do: XLA runs on a CPU what one device of a
    process takes part in beside what several do, and what they send each other is mixed up.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices), ("device",))
    _, firsts = np.unique([device.process_index for device in devices], return_index=True)
    return mesh, jax.jit(
        lambda rows: rows[firsts], out_shardings=NamedSharding(mesh, PartitionSpec())
    )


@contextlib.contextmanager
def folder_of_run(folder: Path) -> Iterator[Path]:
    """Yields the folder in which this process works on a run.

    That of process 0 is the folder of the run. Each other one has a folder `process-N` in it, with
    what the run had at the start, the checkpoints of process 0, and what it writes itself, which
    is removed in the end. Entered once process 0 may use the folder, before it writes.

    Args:
        folder: Of the run; all processes see the same files in it.
    """
    if is_first():
        for left in filter(is_left, folder.glob("process-*")):
            shutil.rmtree(left, ignore_errors=True)
    if not several():
        yield folder
        return
    number, failure = jax.process_index(), None
    own = folder / f"process-{number}" if number else folder
    try:
        if number == 0:
            (folder / "checkpoints").mkdir(exist_ok=True)
        lock = folder / "run.lock"  # which names process 0
        claimed = zlib.crc32(lock.read_bytes()) & 0x7FFFFFFF if lock.is_file() else 0
        try:
            if everyone(claimed)[0, 0] != claimed:
                raise OSError("it is another folder there")
            if number:
                _copy(folder, own)
        except OSError as error:
            failure = error
        if failed := largest(number if failure else 0):
            raise ValueError(
                f"{folder}: process {failed} cannot work there on what process 0 has written"
                f" ({failure or 'it says why'}); give a folder that all hosts share"
            ) from failure
        yield own
        meet()
    finally:
        if number:
            shutil.rmtree(own, ignore_errors=True)


def is_left(path: Path) -> bool:
    """Says whether a folder is what a process of a run had of its own, and left when killed."""
    number = path.name.removeprefix("process-")
    return path.name != number and number.isdigit() and (path / "checkpoints").is_symlink()


def _copy(folder: Path, own: Path) -> None:
    """Gives a process what a run had before it started."""
    own.mkdir()
    (own / "checkpoints").symlink_to(Path("..") / "checkpoints", target_is_directory=True)
    next((own / "checkpoints").iterdir(), None)
    shutil.copytree(
        folder, own, ignore=shutil.ignore_patterns(*_NOT_COPIED), copy_function=_link_arrays,
        dirs_exist_ok=True,
    )  # fmt: skip


def _link_arrays(source: str, target: str) -> None:
    """Copies a file; arrays, which are never changed in place, by a link where that is possible."""
    if source.endswith(".npy"):
        link_or_copy(Path(source), Path(target))
    else:
        shutil.copy2(source, target)


def first_alone(act: Callable[[], Any]) -> Any:
    """Lets process 0 do something that the others must not; they raise what it raises.

    Args:
        act: Called without arguments, in process 0.

    Returns:
        What `act` returned; None in the other processes.

    Raises:
        ValueError: In the other processes, with the message of process 0.
    """
    if not several():
        return act()
    failure, result = None, None
    if is_first():
        try:
            result = act()
        except Exception as error:
            failure = error
    message = ("" if failure is None else str(failure) or repr(failure)).encode(
        "utf-8", "backslashreplace"
    )[:_MOST_BYTES]
    said = everyone(*message.ljust(_MOST_BYTES, b"\0"))[0].astype(np.uint8).tobytes()
    if failure is not None:
        raise failure
    if said := said.rstrip(b"\0"):
        raise ValueError(said.decode("utf-8", "replace"))
    return result


class SameInAll:
    """Finds out, a call later, that processes of a run do not compute the same."""

    def __init__(self, what: str) -> None:
        """Names what is to be the same in all of them, in the plural."""
        self._what, self._votes = what, Votes()

    def check(self, content: bytes, *, wait: bool = False) -> None:
        """Compares what each process has.

        Args:
            content: Of this process.
            wait: Compare it now, not at the next call.

        Raises:
            ValueError: In all processes, where one has another content than process 0.
        """
        if not several():
            return
        mine = zlib.crc32(content) & 0x7FFFFFFF
        seen = everyone(mine) if wait else self._votes(mine)
        if seen is not None and (others := np.flatnonzero(seen[:, 0] != seen[0, 0])).size:
            raise ValueError(
                f"{self._what} of process {others[0]} differ from those of process 0; start all"
                " processes with the same options, data, models and versions of the packages"
            )

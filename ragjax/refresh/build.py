"""Builds a ScaNN index in a process of its own, which may hang, crash or be killed.

That process is started afresh (never forked, so it inherits no JAX threads), with a cap on its
threads and without the accelerator. It reads finished embeddings and leaves a finished index, or
nothing.
"""

import ctypes
import dataclasses
import faulthandler
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ragjax import storage
from ragjax.index import EmbeddingStore, ScannIndex, ScannOptions, scann_options
from ragjax.refresh.task import Cancelled

_POLL_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_GRACE_SECONDS = 2.0
_LOG_LINES = 400
_PROGRAM = "import sys; from ragjax.refresh.build import main; sys.exit(main(sys.argv[1]))"
# Every library that might start one thread a core.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class BuildError(RuntimeError):
    """The process that builds the index failed, crashed, was killed or ran out of time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How an index is built from embeddings.

    Attributes:
        scann: Options of the index; None: ScaNN's advice for the number of documents.
        threads: Of the build; 0: half of the cores, so that training keeps the others.
        deadline_seconds: Longest build; after it the process is ended and the build has failed. 0:
            no limit.
    """

    scann: ScannOptions | None = None
    threads: int = 0
    deadline_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Refuses negative numbers."""
        if self.threads < 0 or self.deadline_seconds < 0:
            raise ValueError(
                f"threads and deadline_seconds must not be negative, got {self.threads} and "
                f"{self.deadline_seconds}"
            )

    @property
    def num_threads(self) -> int:
        """Threads of the build, at least 1."""
        return self.threads or max(1, (os.cpu_count() or 2) // 2)


class ScannBuild:
    """One build under way; `pid` names its process."""

    def __init__(
        self,
        building: Path,
        options: BuildOptions,
        *,
        probe_queries: np.ndarray | None = None,
        base: Path | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        """Starts the process.

        Args:
            building: Folder with finished `embeddings`; `index` is written into it.
            options: Of the build.
            probe_queries: `[P, D]` real queries to measure the recall with; None: documents.
            base: Index of an earlier generation that `rows` are upserted into, instead of a full
                build.
            rows: `[R]` int64, documents whose embeddings differ from those in `base`.
        """
        self._building = building
        self._deadline = options.deadline_seconds
        job: dict[str, Any] = {
            "building": str(building.resolve()),
            "scann": dataclasses.asdict(options.scann) if options.scann else None,
            "threads": options.num_threads,
            "base": str(base.resolve()) if base else "",
            "parent": os.getpid(),
        }
        for name, array in (("probe_queries", probe_queries), ("rows", rows)):
            (building / f"{name}.npy").unlink(missing_ok=True)
            if array is not None:
                storage.write_array(building / f"{name}.npy", array)
        path = building / "build.json"
        storage.write_sealed(path, job)
        threads = {name: str(options.num_threads) for name in _THREAD_VARIABLES}
        # The accelerator belongs to the trainer: a second process on it would find no memory.
        environment = os.environ | threads | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": _import_path()}
        # Not in the folder: where its disk is full, what the process says of it must not be lost.
        self._log = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the trainer, which then ends the build
            )
        except BaseException:
            self._log.close()
            raise
        self.pid = self._process.pid

    def wait(self, cancelled: Callable[[float], bool]) -> None:
        """Waits for the index.

        Args:
            cancelled: Waits at most so many seconds; True: the build is given up.

        Raises:
            BuildError: The process failed or ran out of time; the message has its exit code and
                the last line it wrote.
            Cancelled: It was given up; the process is gone.
        """
        try:
            self._wait(cancelled)
        finally:
            self._log.close()

    def _wait(self, cancelled: Callable[[float], bool]) -> None:
        started = time.monotonic()
        while self._process.poll() is None:
            if cancelled(_POLL_SECONDS):
                self.stop()
                raise Cancelled("the build was given up")
            if self._deadline and time.monotonic() - started > self._deadline:
                self.stop()
                raise BuildError(
                    f"the index build (process {self.pid}) was ended after its deadline of "
                    f"{self._deadline:g} s; raise deadline_seconds or lower num_leaves"
                )
        code = self._process.returncode
        if code:
            raise BuildError(
                f"the index build (process {self.pid}) {_describe_exit(code)}; the last line it "
                f"wrote: {self._last_line() or '(none)'}"
            )
        # The files of the job are no part of the generation.
        for name in ("build.json", "probe_queries.npy", "rows.npy"):
            (self._building / name).unlink(missing_ok=True)

    def stop(self) -> None:
        """Ends the process: SIGTERM, and SIGKILL where it does not listen."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _last_line(self) -> str:
        """Returns the line of the log that says most: the fatal one, or else the last."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()[-_LOG_LINES:]
        lines = [line.strip() for line in lines if line.strip()]
        for sign in ("Check failed", "error: "):
            if found := [line for line in lines if sign in line]:
                return found[-1]
        return lines[-1] if lines else ""


def _describe_exit(code: int) -> str:
    """Says how a process ended."""
    if code == -9:
        return "was killed (signal 9; often the system, for want of memory)"
    return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"


def _import_path() -> str:
    """Returns PYTHONPATH with the folder of this package first."""
    here = str(Path(__file__).parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH", "")])])


def _run(job: dict[str, Any]) -> None:
    """Builds the index of a job; in the child."""
    building = Path(job["building"])
    store = EmbeddingStore.open(building / "embeddings")
    embeddings = store.read()
    probes = building / "probe_queries.npy"
    queries = np.load(probes, allow_pickle=False) if probes.exists() else None
    if job["base"]:
        rows = np.load(building / "rows.npy", allow_pickle=False)
        index = ScannIndex.upserted_copy(
            job["base"],
            rows,
            embeddings,
            probe_queries=queries,
            threads=job["threads"],
        )
    else:
        options = ScannOptions(**job["scann"]) if job["scann"] else scann_options(len(embeddings))
        options = dataclasses.replace(options, threads=job["threads"])
        index = ScannIndex.build(embeddings, options=options, probe_queries=queries)
    try:
        index.save(building / "index")
    except RuntimeError as error:  # of ScaNN, which names no file
        free = shutil.disk_usage(building).free
        raise OSError(
            f"{building / 'index'} could not be written ({error}); {free:,} bytes are free there"
        ) from error


def _end_with_parent(parent: int) -> None:
    """Ends this process when the trainer is gone, however it went."""
    if sys.platform == "linux":  # also where this process is stopped and no thread of it runs
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(path: str) -> int:
    """Runs the job in a file and returns the exit code: 0, or 2 where it cannot be used."""
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    job = storage.read_sealed(Path(path), what="index build")
    _end_with_parent(job["parent"])
    try:
        _run(job)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0

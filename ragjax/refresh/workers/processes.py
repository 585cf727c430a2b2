"""Encoding in other processes, on this host or others, over a folder that all of them see.

executor = ProcessExecutor(root)      # the trainer's side
python experiments/refresh_worker.py --root ROOT ...       # any number of these, anywhere
"""

import collections
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ragjax.index import DiskFullError, EmbeddingStore, EmbeddingWriter
from ragjax.refresh.export import MismatchError
from ragjax.refresh.task import Cancelled, EncodeProgress, EncodeRequest, EncodeTask
from ragjax.refresh.workers.jobs import (
    WORKERS,
    Job,
    JobError,
    job_numbers,
    make_root,
    read_errors,
    relative_store,
    remove_job,
    write_job,
)
from ragjax.refresh.workers.leases import Watch, read_holder

_LOG = logging.getLogger(__name__)


class ProcessExecutor:
    """Writes jobs for worker processes and waits until every shard is there.

    The trainer's devices do nothing for it. Only a shard whose bytes match their checksum counts
    as finished, whatever becomes of the worker that wrote it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        worker_timeout: float = 300.0,
        lease_seconds: float = 60.0,
        max_shard_failures: int = 3,
        poll_seconds: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes the shared folder.

        Args:
            root: Shared with the workers; every store must lie below it.
            worker_timeout: Seconds without a sign of life of any worker until an encoding fails.
            lease_seconds: Seconds without a sign of life after which a worker's shard is given
                to another one.
            max_shard_failures: Errors in one shard until the encoding fails.
            poll_seconds: Between two looks at the folder; cancelling does not wait for it.
            clock: Monotonic, in seconds.

        Raises:
            ValueError: A number that is not positive.
            OSError: The folder cannot be written.
        """
        numbers = (worker_timeout, lease_seconds, max_shard_failures, poll_seconds)
        if min(numbers) <= 0:
            raise ValueError(
                "worker_timeout, lease_seconds, max_shard_failures and poll_seconds must be "
                f"positive, got {numbers}"
            )
        self.root = Path(root)
        self._worker_timeout = worker_timeout
        self._lease_seconds = lease_seconds
        self._max_shard_failures = max_shard_failures
        self._poll_seconds = poll_seconds
        self._clock = clock
        make_root(self.root)

    def copy_params(self, params: Any) -> Any:
        """Copies the parameters on their device; the next step may then donate the originals."""
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)

    def encode(self, task: EncodeTask, request: EncodeRequest) -> EmbeddingStore:
        """Has workers encode the documents of the request and publishes the store.

        Raises:
            Cancelled: `request.cancelled` was set; finished shards stay for the next call.
            ValueError: Embeddings are not finite. (A worker with another corpus or encoder is
                refused, with a warning, and the others go on.)
            RuntimeError: No worker shows a sign of life, or a shard failed too often.
            DiskFullError: There is no room for the job, or for a worker's shard.
        """
        relative_store(self.root, request.folder)
        writer = EmbeddingWriter.open(request.folder, request.spec)
        if not writer.missing():
            return writer.publish()
        job = write_job(self.root, task, request, lease_seconds=self._lease_seconds)
        try:
            for number in job_numbers(self.root):
                if number < job.number:
                    remove_job(self.root / "jobs" / f"{number:06d}")
            self._wait(job, writer, request)
            return writer.publish()
        finally:
            remove_job(job.folder)

    def close(self) -> None:
        """Has nothing to give up: a job ends with its `encode`."""

    def _wait(self, job: Job, writer: EmbeddingWriter, request: EncodeRequest) -> None:
        """Returns when every shard is there and verified."""
        workers = _Workers(self.root / WORKERS, self._clock)
        already = _documents(writer, set(writer.missing()))
        before, started = already, self._clock()
        warned = False
        refused: dict[str, str] = {}  # worker by message: one that is started again says the same

        def show(done: int) -> None:
            seconds = self._clock() - started
            request.progress(
                EncodeProgress.measured(
                    already, done, writer.spec.size, work=done, seconds=seconds, num_shapes=0
                )
            )

        while missing := writer.rescan():
            done = _documents(writer, set(missing))
            if done != before:
                before = done
                show(done)
            self._check(read_errors(job), refused)
            silent = workers.silent_seconds()
            if silent > self._worker_timeout:
                raise RuntimeError(
                    f"No worker has shown a sign of life for {silent:.0f} s in {self.root}, "
                    f"{len(missing)} of {writer.spec.num_shards} shards are missing"
                    f"{workers.last_seen()}{_told(refused)}. Start one: python "
                    f"experiments/refresh_worker.py --root {self.root} --data ... --encoder ... "
                    "(finished shards are kept)"
                )
            if silent > self._worker_timeout / 10 and not warned:
                warned = True
                _LOG.warning("waiting for a worker in %s", self.root)
            if request.cancelled.wait(self._poll_seconds):
                raise Cancelled("The encoding was cancelled")
        show(writer.spec.size)

    def _check(self, errors: list[JobError], refused: dict[str, str]) -> None:
        """Raises what workers cannot get over; notes and warns of those that do not belong here."""
        for error in errors:
            if error.kind == MismatchError.__name__ and error.message not in refused:
                refused[error.message] = error.worker
                _LOG.warning("%s is refused, the others go on: %s", error.worker, error.message)
        errors = [error for error in errors if error.kind != MismatchError.__name__]
        failures = collections.Counter(error.shard for error in errors)
        for error in errors:
            told = f"{error.worker} failed: {error.message}"
            if error.kind == DiskFullError.__name__:
                raise DiskFullError(told)
            if error.fatal:
                raise ValueError(told)
            if failures[error.shard] >= self._max_shard_failures:
                raise RuntimeError(
                    f"Shard {error.shard} failed {failures[error.shard]} times; {error.kind} in "
                    f"{told}"
                )


class _Workers:
    """Signs of life of all workers."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._clock = clock
        self._watch = Watch(clock)
        self._last = clock()

    def silent_seconds(self) -> float:
        """Returns for how long no worker has counted up; a file alone is no sign of life."""
        for path in self._folder.glob("*.json"):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            if self._watch.look(path, content).changed:
                self._last = self._clock()
        return self._clock() - self._last

    def last_seen(self) -> str:
        """Names the workers whose files are there, for a message."""
        holders = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                holders.append(str(read_holder(path.read_bytes())))
            except FileNotFoundError:
                continue
        return f" (last seen: {', '.join(holders)})" if holders else ""


def _told(refused: dict[str, str]) -> str:
    """Says which workers were refused, for a message."""
    reasons = "; ".join(f"{worker}: {message}" for message, worker in refused.items())
    return f" (refused: {reasons})" if refused else ""


def _documents(writer: EmbeddingWriter, missing: set[int]) -> int:
    """Returns the number of documents in finished shards."""
    return writer.spec.size - sum(len(writer.rows(shard)) for shard in missing)

"""A worker process: takes shards of the newest job, encodes them, and writes them.

    run_worker(root, task, encoder.params, stop=lambda: stopped)

Any number of workers, on any hosts that see the folder, share a job; each may be killed at any
moment, and the shard it was at goes to another one.
"""

import collections
import contextlib
import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax

from ragjax.index import DiskFullError, ShardWriter
from ragjax.refresh.encode import encode_corpus
from ragjax.refresh.export import MismatchError, read_export
from ragjax.refresh.task import Cancelled, DocRows, EncodeTask
from ragjax.refresh.workers.jobs import WORKERS, Job, job_numbers, read_job, write_error
from ragjax.refresh.workers.leases import Beacon, Leases, read_holder, this_process

# Between two looks at whether to stop, in seconds.
_STOP_SECONDS = 0.1
# A lease is renewed at least so many times in the seconds after which it counts as dead.
_RENEWALS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How a worker works.

    Attributes:
        poll_seconds: Between two looks for a job.
        heartbeat_seconds: Between two signs of life.
        batch_tokens: Tokens in a batch on this process's devices; None: as the trainer says.
            Another number changes embeddings by rounding.
        devices: That share a batch; None: the default device.
        once: True = leave when there is no job.
    """

    poll_seconds: float = 1.0
    heartbeat_seconds: float = 2.0
    batch_tokens: int | None = None
    devices: Sequence[jax.Device] | None = None
    once: bool = False


def run_worker(
    root: str | os.PathLike[str],
    task: EncodeTask,
    template_params: Any,
    *,
    stop: Callable[[], bool],
    options: WorkerOptions | None = None,
    report: Callable[[str], None] = print,
) -> int:
    """Works for the trainer that writes jobs to `root`, until it is told to stop.

    Args:
        root: The folder given to `ProcessExecutor`; waited for if it is not there yet.
        task: The trainer's corpus and encoder; its `options` are replaced by the job's.
        template_params: Tree of arrays or `jax.ShapeDtypeStruct`, as the trainer's parameters.
        stop: Asked about ten times a second, in another thread; the batch under way is finished.
        options: How it works.
        report: Shows one line to the user.

    Returns:
        The number of shards written.

    Raises:
        MismatchError: This worker has another corpus or encoder than the trainer, which is told so
            and goes on with the others.
        ValueError: Their versions differ, or the job is damaged and fails.
        OSError: The folder cannot be written.
    """
    options = options or WorkerOptions()
    worker = _Worker(Path(root), task, template_params, options, report)
    if not _await_root(worker.root, stop, options.poll_seconds, report):
        return 0
    with _SignsOfLife(worker.root, stop, options) as signs:
        while not stop():
            job = worker.newest_job()
            if job is None and options.once:
                break
            if job is None or not worker.encode_shard(job, signs):
                _pause(stop, options.poll_seconds)
    return worker.num_shards


class _Prepared(NamedTuple):
    """A job with what is read once for all its shards."""

    job: Job
    task: EncodeTask
    params: Any
    rows: DocRows  # of the documents to encode
    writer: ShardWriter
    leases: Leases
    failures: collections.Counter[int]  # by shard, in this process


class _Worker:
    """Encodes shards, one at a time."""

    def __init__(
        self,
        root: Path,
        task: EncodeTask,
        template_params: Any,
        options: WorkerOptions,
        report: Callable[[str], None],
    ) -> None:
        self.root = root
        self.num_shards = 0
        self._task, self._template = task, template_params
        self._options, self._report = options, report
        self._prepared: _Prepared | None = None
        self._failed: set[str] = set()

    def newest_job(self) -> Job | None:
        """Returns the open job with the highest number, unless it has failed here for good."""
        try:
            job = read_job(self.root, job_numbers(self.root)[-1])
        except (FileNotFoundError, IndexError):
            return None
        return None if job.id in self._failed else job

    def encode_shard(self, job: Job, signs: "_SignsOfLife") -> bool:
        """Encodes one shard of the job; False if none is free, or the job is gone."""
        try:
            prepared = self._prepare(job)
            taken = self._take(prepared)
        except OSError as error:
            self._tell(job, -1, error)
            return False
        if taken is None:
            return False
        shard, lease = taken
        failure: Exception | None = None
        try:
            with signs.working(job, lease) as cancelled:
                self._write(prepared, shard, cancelled)
        except Cancelled:
            return False
        except Exception as error:
            # Whatever it is, it belongs to the trainer; this process may serve the next job.
            failure = error
        finally:
            with contextlib.suppress(OSError):
                lease.release()
        if failure is not None:
            # After the lease has gone: on a full disk, its place is where the note fits.
            prepared.failures[shard] += 1
            self._tell(job, shard, failure)
        return failure is None

    def _prepare(self, job: Job) -> _Prepared:
        """Reads the parameters of a job, once."""
        if self._prepared is not None and self._prepared.job.id == job.id:
            return self._prepared
        self._prepared = None  # the old parameters make room for the new ones
        try:
            _check_same_task(self._task, job)
            params = jax.device_put(read_export(job.params, self._template).params)
            _check_dim(self._task, params, job)
            writer = ShardWriter.open(job.store, job.spec)
        except ValueError as error:
            if not job.is_open():  # a folder that is being removed looks damaged
                raise FileNotFoundError(f"{job.folder} is gone") from error
            write_error(job, error, shard=-1, fatal=not isinstance(error, MismatchError))
            raise
        self._report(f"job {job.number}: parameters of step {job.step}")
        options, rows = job.options, job.rows()
        if (batch_tokens := self._options.batch_tokens) is not None:
            options = dataclasses.replace(options, batch_tokens=batch_tokens)
        self._prepared = _Prepared(
            job=job,
            task=dataclasses.replace(self._task, options=options),
            params=params,
            rows=range(len(self._task.documents)) if rows is None else rows,
            writer=writer,
            leases=Leases(job.leases, lease_seconds=job.lease_seconds),
            failures=collections.Counter(),
        )
        return self._prepared

    def _take(self, prepared: _Prepared) -> tuple[int, Beacon] | None:
        """Takes the lease on a shard that nobody has finished or works on."""
        for shard in sorted(prepared.writer.missing(), key=lambda n: prepared.failures[n]):
            if lease := prepared.leases.take(shard):
                return shard, lease
        return None

    def _write(self, prepared: _Prepared, shard: int, cancelled: threading.Event) -> None:
        """Encodes and writes a shard."""
        started = time.monotonic()
        places = prepared.writer.rows(shard)
        embeddings = encode_corpus(
            prepared.task,
            prepared.params,
            rows=prepared.rows[places.start : places.stop],
            devices=self._options.devices,
            cancelled=cancelled,
        )
        prepared.writer.write(shard, embeddings)
        self.num_shards += 1
        seconds = time.monotonic() - started
        self._report(
            f"job {prepared.job.number}: shard {shard + 1} of {prepared.writer.spec.num_shards}, "
            f"{len(places) / seconds:,.0f} texts/s"
        )

    def _tell(self, job: Job, shard: int, error: Exception) -> None:
        """Passes an error on to the trainer, unless it comes from the job having ended."""
        if not job.is_open() or (isinstance(error, FileNotFoundError) and _is_published(job)):
            return
        where = f"shard {shard + 1}" if shard >= 0 else "reading it"
        self._report(f"job {job.number}: {where} failed: {error}")
        # The same parameters and documents give the same values again, and a full disk stays full
        # until somebody makes room; memory may be free at the next try.
        fatal = isinstance(error, (ValueError, DiskFullError))
        if fatal:
            self._failed.add(job.id)
        write_error(job, error, shard=shard, fatal=fatal)


class _SignsOfLife:
    """A thread that renews the beacons of this process and notices when work is for nothing."""

    def __init__(self, root: Path, stop: Callable[[], bool], options: WorkerOptions) -> None:
        self._root, self._stop = root, stop
        self._poll_seconds = options.poll_seconds
        self._heartbeat_seconds = options.heartbeat_seconds
        self._beacon = _join(root)
        self._work: tuple[Job, Beacon, threading.Event] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)

    def __enter__(self) -> Self:
        """Starts the thread."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the thread and removes this worker's file."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._beacon.release()

    @contextlib.contextmanager
    def working(self, job: Job, lease: Beacon) -> Iterator[threading.Event]:
        """Renews a lease in the block; yields what is set when the work is no longer wanted."""
        cancelled = threading.Event()
        self._work = (job, lease, cancelled)
        try:
            yield cancelled
        finally:
            self._work = None

    def _run(self) -> None:
        """Renews, and looks for a stop, a newer job or the end of this one."""
        due: dict[str, float] = collections.defaultdict(float)

        def is_due(name: str, seconds: float) -> bool:
            now = time.monotonic()
            if now < due[name]:
                return False
            due[name] = now + seconds
            return True

        while not self._ended.wait(min(_STOP_SECONDS, self._heartbeat_seconds)):
            # A file system that is away for a while is no reason to end; others will see.
            with contextlib.suppress(OSError):
                if is_due("worker", self._heartbeat_seconds):
                    self._beacon.renew()
                work = self._work
                if work is None:
                    continue
                job, lease, cancelled = work
                if self._stop():
                    cancelled.set()
                if is_due("lease", min(self._heartbeat_seconds, job.lease_seconds / _RENEWALS)):
                    lease.renew()
                if is_due("job", self._poll_seconds):
                    if not job.is_open() or job_numbers(self._root)[-1:] != [job.number]:
                        cancelled.set()


def _join(root: Path) -> Beacon:
    """Makes this worker's file; removes those of ended workers of this machine."""
    folder, me = root / WORKERS, this_process()
    try:
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                holder = read_holder(path.read_bytes())
                if holder and holder.is_gone():
                    path.unlink()
        # Host and process are for people: containers may share both, threads of a process do.
        return Beacon(folder / f"{me.host}-{me.pid}-{secrets.token_hex(4)}.json")
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: a worker must be able to write signs of life, leases and shards "
            "there; mount the folder for writing, or choose another root",
            str(root),
        ) from error


def _check_same_task(task: EncodeTask, job: Job) -> None:
    """Refuses to encode other documents, or with another encoder, than the trainer has."""
    for name, here, there, remedy in (
        ("corpus", task.corpus_digest, job.corpus_fingerprint, "documents"),
        ("encoder", task.model_fingerprint, job.model_fingerprint, "encoder"),
    ):
        if here != there:
            raise MismatchError(
                f"This worker has another {name} than the trainer: fingerprint {here!r} here, "
                f"{there!r} in job {job.number}; start it with the trainer's {remedy}"
            )


def _check_dim(task: EncodeTask, params: Any, job: Job) -> None:
    """Refuses an encoder that takes the trainer's parameters, but not as the trainer does."""
    try:
        found = f"gives {task.dim(params)} dimensions"
    except Exception as error:  # the trainer's encoder has run with them, so it is this one's fault
        raise MismatchError(f"This worker's encoder fails: {error}") from error
    if found != f"gives {job.spec.dim} dimensions":
        raise MismatchError(
            f"This worker's encoder {found}, that of the trainer {job.spec.dim} in job "
            f"{job.number}; start it with the trainer's encoder"
        )


def _is_published(job: Job) -> bool:
    """Tells whether the trainer has all shards and is about to end the job."""
    building = job.store.with_name(f"{job.store.name}.building")
    return not any(building.glob("partial-*"))


def _await_root(
    root: Path, stop: Callable[[], bool], poll_seconds: float, report: Callable[[str], None]
) -> bool:
    """Waits until the folder is there; False if stopped first."""
    if not root.is_dir():
        report(f"waiting for {root}: the trainer makes it, or it is not mounted here")
    while not root.is_dir():
        if stop():
            return False
        _pause(stop, poll_seconds)
    return True


def _pause(stop: Callable[[], bool], seconds: float) -> None:
    """Waits, but not for one who wants to stop."""
    end = time.monotonic() + seconds
    while not stop() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _STOP_SECONDS))

"""Encoding jobs as folders that a trainer writes and worker processes read.

    root/jobs/000007/     job.json, params/, rows.npy (of a part), leases/, errors/
    root/workers/         one file of each worker, with a counter that shows it lives

A job appears and goes by a rename. The highest number is the only one that counts.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ragjax import storage
from ragjax.index import StoreSpec
from ragjax.refresh.batches import EncodeOptions
from ragjax.refresh.export import list_exports, write_export
from ragjax.refresh.task import EncodeRequest, EncodeTask
from ragjax.refresh.workers.leases import this_process

_FORMAT = 1
_JOB = "job.json"
_ROWS = "rows.npy"
_WHAT = "encoding job"
WORKERS = "workers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What workers encode, and where to.

    Attributes:
        number: Of its folder; a higher one replaces it.
        folder: Of the job.
        id: Random; tells it from an earlier job of the same number.
        step: Training step of the parameters.
        store: Where the store will be published.
        spec: Of the store.
        options: Sizes of the batches.
        corpus_fingerprint: Of all documents of the trainer.
        model_fingerprint: Of the trainer's encoder without its weights.
        lease_seconds: For how long a worker may seem dead.
    """

    number: int
    folder: Path
    id: str
    step: int
    store: Path
    spec: StoreSpec
    options: EncodeOptions
    corpus_fingerprint: str
    model_fingerprint: str
    lease_seconds: float

    @property
    def params(self) -> Path:
        """Where the parameters are."""
        return self.folder / "params"

    @property
    def leases(self) -> Path:
        """Where the leases on shards are."""
        return self.folder / "leases"

    def rows(self) -> NDArray[np.int64] | None:
        """Returns the documents to encode; None: all."""
        path = self.folder / _ROWS
        return np.load(path, allow_pickle=False) if path.exists() else None

    def is_open(self) -> bool:
        """Tells whether this job is still wanted."""
        try:
            return storage.read_sealed(self.folder / _JOB, what=_WHAT).get("id") == self.id
        except (OSError, ValueError):
            return False


class JobError(NamedTuple):
    """What went wrong in a worker."""

    worker: str
    shard: int  # -1: before the first
    kind: str  # class of the exception
    message: str
    fatal: bool  # True = another try would fail in the same way


def make_root(root: Path) -> None:
    """Makes the shared folder, and removes what a killed trainer left half written in it."""
    for name in ("jobs", WORKERS):
        (root / name).mkdir(parents=True, exist_ok=True)
    for path in (root / "jobs").iterdir():
        if path.name.startswith((".writing.", ".removed-")):
            shutil.rmtree(path, ignore_errors=True)


def write_job(root: Path, task: EncodeTask, request: EncodeRequest, *, lease_seconds: float) -> Job:
    """Writes a job and gives it the next number.

    Raises:
        ValueError: The store would not lie below `root`, where workers find it.
        DiskFullError: There is no room; nothing is left.
    """
    store = relative_store(root, request.folder)
    beside = root / "jobs" / storage.unique_name(".writing")
    beside.mkdir(parents=True)
    note = {
        "format": _FORMAT,
        "id": secrets.token_hex(16),
        "step": int(request.step),
        "store": store,
        "spec": dataclasses.asdict(request.spec),
        "options": dataclasses.asdict(task.options),
        "corpus_fingerprint": task.corpus_digest,
        "model_fingerprint": task.model_fingerprint,
        "lease_seconds": lease_seconds,
    }
    try:
        write_export(beside / "params", request.params, step=request.step, info={})
        if request.rows is not None:
            storage.write_array(beside / _ROWS, np.asarray(request.rows, np.int64))
        for name in ("leases", "errors"):
            (beside / name).mkdir()
        storage.write_sealed(beside / _JOB, note)
        number = max(job_numbers(root), default=0) + 1
        folder = root / "jobs" / f"{number:06d}"
        beside.rename(folder)
        storage.sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return read_job(root, number)


def job_numbers(root: Path) -> list[int]:
    """Returns the numbers of the open jobs, ascending."""
    return [number for number, _ in list_exports(root / "jobs")]


def read_job(root: Path, number: int) -> Job:
    """Reads an open job.

    Raises:
        FileNotFoundError: It is gone.
        ValueError: It is damaged, of another version, or its store does not lie below `root`.
    """
    folder = root / "jobs" / f"{number:06d}"
    note = storage.read_sealed(folder / _JOB, what=_WHAT, version=_FORMAT)
    try:
        place = PurePosixPath(note["store"])
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"store {note['store']!r} does not lie below the root")
        options = note["options"] | {"buckets": tuple(note["options"]["buckets"])}
        return Job(
            number=number,
            folder=folder,
            id=str(note["id"]),
            step=int(note["step"]),
            store=root / place,
            spec=StoreSpec(**note["spec"]),
            options=EncodeOptions(**options),
            corpus_fingerprint=str(note["corpus_fingerprint"]),
            model_fingerprint=str(note["model_fingerprint"]),
            lease_seconds=float(note["lease_seconds"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / _JOB} describes no {_WHAT}: {error}") from error


def remove_job(folder: Path) -> None:
    """Removes a job; workers see it whole or not at all."""
    gone = folder.with_name(storage.unique_name(f".removed-{folder.name}"))
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def relative_store(root: Path, folder: Path) -> str:
    """Returns where a store lies below the root, the same on every host.

    Raises:
        ValueError: It does not lie there.
    """
    inside = Path(os.path.relpath(folder.resolve(), root.resolve()))
    if ".." in inside.parts or inside == Path("."):
        raise ValueError(
            f"The store {folder} must lie below {root}, the folder that trainer and workers share"
        )
    return inside.as_posix()


def write_error(job: Job, error: Exception, *, shard: int, fatal: bool) -> None:
    """Tells the trainer what went wrong here; a job that is gone needs no telling."""
    note = JobError(str(this_process()), shard, type(error).__name__, str(error), fatal)
    path = job.folder / "errors" / f"{storage.unique_name('error')}.json"
    # Not `write_sealed`, which would make the folder of a removed job again.
    with contextlib.suppress(FileNotFoundError), storage.replacing(path) as file:
        file.write(json.dumps(storage.sealed(note._asdict())).encode())


def read_errors(job: Job) -> list[JobError]:
    """Returns what workers told, fatal ones first."""
    found = []
    for path in sorted((job.folder / "errors").glob("*.json")):
        try:
            found.append(JobError(**storage.read_sealed(path, what=_WHAT)))
        except (ValueError, TypeError) as error:
            found.append(JobError("an unknown worker", -1, "ValueError", str(error), True))
    return sorted(found, key=lambda error: not error.fatal)

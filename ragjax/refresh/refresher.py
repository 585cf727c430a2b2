"""Keeps an index fresh while its encoder trains; the trainer never waits unless told to.

    refresher = Refresher(folder, task, trigger=EveryNSteps(500))
    refresher.start(doc_params)                          # generation 0, in the foreground
    for step in range(num_steps):
        snapshot = refresher.update(step, doc_params)    # the one callback a step
        found = snapshot.index.search(query_embeddings, k)
        ...
    refresher.close()

One refresh at a time goes IDLE -> ENCODING -> BUILDING -> READY and then, at the next `update`
or `poll`, serves; or it ends FAILED, the earlier generation serves on, and the failure is tried
again, reported and finally raised. `submit`, `poll` and `wait` are the parts of `update`, for
trainers that want to decide by themselves.
"""

import atexit
import dataclasses
import enum
import functools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax.index import IndexSnapshot
from ragjax.refresh.build import BuildOptions
from ragjax.refresh.encode import Cancelled, EncodeProgress
from ragjax.refresh.export import read_export
from ragjax.refresh.generations import GenerationStore
from ragjax.refresh.lock import RunLock
from ragjax.refresh.partial import PartialPolicy
from ragjax.refresh.pipeline import Export, Pipeline
from ragjax.refresh.task import EncodeTask, Executor
from ragjax.refresh.threads import ThreadExecutor
from ragjax.refresh.triggers import Never, Trigger, TriggerContext

_LOG = logging.getLogger(__name__)
# Generations that checkpoints name are kept; a trainer keeps a few checkpoints.
_PINNED = 4
_CLOCKED_STEPS = 200
# Indexes that no longer serve are held a little longer, until the trainer has let them go too.
_RETIRED_SECONDS = 1.0
_REPORT_EVERY_SECONDS = 10.0
_POLL_SECONDS = 0.01


class RefreshState(enum.Enum):
    """Where the refresh under way is."""

    IDLE = "idle"
    ENCODING = "encoding"
    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"


class RefreshError(RuntimeError):
    """A refresh failed for good; the cause is chained, the earlier generation still serves."""


class IndexTooStaleError(RuntimeError):
    """The index lags further behind the encoder than allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """How an index is refreshed.

    Attributes:
        index: kind of index; "auto" decides by size and memory.
        build: of a ScaNN index.
        keep: generations kept on disk, at least 3.
        max_retries: times that a failed refresh is tried again before it counts as failed.
        backoff_seconds: wait before the first retry; it doubles each time.
        on_failure: what a failed refresh does to training: "stop" raises at the next `update` or
            `poll`, "warn" says so and goes on with the earlier generation.
        max_index_lag_steps: most steps that the index may lag behind the encoder; 0: no limit.
        on_lag: what happens beyond it: "wait" for a fresher index, "warn", or "stop".
        adopt_after: steps from an export until its index serves. -1: as soon as it is ready,
            which depends on the speed of the machine. 0: training waits for it (synchronous).
            More: the index serves from exactly that step on, so that a repeated or resumed run is
            the same; the next export waits until then.
        partial: encode only a part of the documents in most refreshes; None encodes all.
    """

    index: Literal["auto", "exact", "scann"] = "auto"
    build: BuildOptions = dataclasses.field(default_factory=BuildOptions)
    keep: int = 3
    max_retries: int = 2
    backoff_seconds: float = 1.0
    on_failure: Literal["stop", "warn"] = "stop"
    max_index_lag_steps: int = 0
    on_lag: Literal["wait", "warn", "stop"] = "wait"
    adopt_after: int = -1
    partial: PartialPolicy | None = None

    def __post_init__(self) -> None:
        """Refuses what is out of range, naming the field."""
        for name, low in (("keep", 3), ("max_retries", 0), ("backoff_seconds", 0),
                          ("max_index_lag_steps", 0), ("adopt_after", -1)):  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        for name, known in (("index", ("auto", "exact", "scann")), ("on_failure", ("stop", "warn")),
                            ("on_lag", ("wait", "warn", "stop"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )


class RefreshStatus(NamedTuple):
    """What goes on, for a progress line."""

    state: RefreshState
    step: int  # of the parameters that are encoded or built; -1 where nothing is under way
    fraction: float  # of the encoding that is done
    remaining_seconds: float  # of the encoding, estimated
    waiting_step: int  # of the parameters that are next; -1 where none wait
    builder_pid: int  # process that builds the index; 0 where none does
    failures: int  # failed attempts since the start
    last_error: str  # of the newest failure, "" where there was none


class Refresher:
    """A generation that serves, and at most one that is being made in the background."""

    def __init__(
        self,
        folder: str | Path,
        task: EncodeTask,
        *,
        executor: Executor | None = None,
        trigger: Trigger | None = None,
        options: RefreshOptions | None = None,
        probe_queries: Callable[[], ArrayLike] | None = None,
        report: Callable[[str], None] = _LOG.warning,
    ) -> None:
        """Takes the folder; nothing is encoded before `start`.

        Args:
            folder: for the generations, the exports and what is being built.
            task: the documents and their encoder.
            executor: where documents are encoded; default: a thread on the training devices.
            trigger: when `update` submits; default: never.
            options: how.
            probe_queries: returns `[P, D]` live embeddings of a few real queries; called in the
                trainer's thread at each `submit`. They measure the recall of the index and how
                much its results have changed.
            report: called with one sentence when something needs attention.

        Raises:
            ValueError: another process refreshes in this folder (the message says which).
            OSError: the folder cannot be written; the message names it.
        """
        self._options = options or RefreshOptions()
        self._task = task
        self._trigger = trigger or Never()
        self._probe_queries = probe_queries
        self._report = report
        self._executor = executor or ThreadExecutor()
        self.folder = Path(folder)
        self._lock = RunLock(self.folder, name="refresh.lock", remedy="use another folder")
        _check_writable(self.folder)
        self._lock.__enter__()
        self.generations = GenerationStore(self.folder, keep=self._options.keep, report=report)
        self._condition = threading.Condition()
        self._cancelled = threading.Event()
        self._pipeline = Pipeline(
            self.folder, task, self._executor, self.generations,
            index=self._options.index, build=self._options.build, partial=self._options.partial,
            cancelled=self._cancelled, on_progress=self._note_progress, report=report,
        )  # fmt: skip
        self._pipeline.clean()
        self._thread: threading.Thread | None = None
        self._snapshot: IndexSnapshot | None = None
        self._ready: IndexSnapshot | None = None
        # Freeing a large index takes a while, which the refresher's thread has and a step has not.
        self._retired: list[IndexSnapshot] = []
        self._active: Export | None = None
        self._waiting: Export | None = None
        self._failure: BaseException | None = None
        self._progress: EncodeProgress | None = None
        self._failures = 0
        self._last_error = ""
        self._last_export_step = 0
        self._scheduled: tuple[int, int] | None = None  # (step of the export, step of adoption)
        self._pinned: deque[int] = deque(maxlen=_PINNED)
        self._lag_told = False
        self._clock = _StepClock()
        self._overlap = float("nan")
        self._swap_seconds = 0.0
        self._closed = False
        self._at_exit = functools.partial(_call_weakly, weakref.WeakMethod(self.close))
        atexit.register(self._at_exit)

    # ------------------------------------------------------------------ the index that serves

    @property
    def snapshot(self) -> IndexSnapshot:
        """The index that serves; reading it is safe from any thread.

        Raises:
            RuntimeError: `start` has not been called.
        """
        snapshot = self._snapshot
        if snapshot is None:
            raise RuntimeError("The refresher has no index yet: call start(params) first.")
        return snapshot

    def start(
        self,
        params: Any,
        *,
        step: int = 0,
        state: Mapping[str, Any] | None = None,
        embeddings: NDArray[np.float32] | None = None,
    ) -> IndexSnapshot:
        """Opens or builds the index to begin with, in the foreground.

        An index that an earlier life of the run built with the same parameters is opened, not
        built again.

        Args:
            params: document-encoder parameters at `step`.
            step: training step about to be taken.
            state: what `state()` returned for the checkpoint of that step: the generation that
                served then is opened, or built again from its exported parameters, and in the
                deterministic mode the refresh that was under way is taken up.
            embeddings: `[N, D]` of the documents with these parameters, where they are at hand:
                they are indexed and nothing is encoded.

        Returns:
            The snapshot that serves.

        Raises:
            RefreshError: it cannot be built; the cause is chained.
        """
        mismatch = self._pipeline.mismatch()
        if mismatch:
            self._report(f"the index is built anew: {mismatch}.")
        if state is None:
            return self._build_now(params, step, embeddings)
        wanted = int(state["encoder_step"])
        digest = str(state["params_digest"])
        found = self._pipeline.open_existing(digest)
        if found is None and mismatch:
            if self._options.adopt_after >= 0:
                raise RefreshError(
                    f"The run cannot be continued identically: {mismatch}, or continue with "
                    "adopt_after=-1."
                )
            return self._build_now(params, step)
        if found is None and (exported := self._exported(params, wanted, digest)) is not None:
            self._report(
                f"the index of step {wanted} that the checkpoint names is gone; it is built again "
                "from the exported parameters."
            )
            found = self._build_now(exported, wanted)
        elif found is None:
            message = (
                f"The checkpoint names the index of step {wanted}, but neither that generation nor "
                f"its exported parameters are left in {self.folder}"
            )
            if self._options.adopt_after >= 0:
                raise RefreshError(
                    f"{message}, so the run cannot be continued identically; start it again, or "
                    "continue with adopt_after=-1."
                )
            self._report(f"{message}; the index is built from the parameters of step {step}.")
            return self._build_now(params, step)
        self._adopt(found)
        self._last_export_step = max(wanted, int(state["last_export_step"]))
        if pending := state.get("pending"):
            export_step, adopt_step, pending_digest = pending
            exported = self._exported(params, int(export_step), str(pending_digest))
            if exported is None:
                raise RefreshError(
                    f"The parameters of step {export_step}, whose index is due at step "
                    f"{adopt_step}, are gone from {self.folder}; start the run again."
                )
            self._scheduled = (int(export_step), int(adopt_step))
            self.submit(exported, int(export_step))
        return self.snapshot

    def update(self, step: int, params: Any) -> IndexSnapshot:
        """Does everything that is due before a training step; the one callback a step.

        Adopts an index that is ready, asks the trigger whether to export, and bounds the lag.

        Args:
            step: number of the step about to be taken, counted over epochs.
            params: live document-encoder parameters; copied where they are exported.

        Returns:
            The snapshot to search in this step.

        Raises:
            RefreshError: a refresh failed for good and `on_failure` is "stop".
            IndexTooStaleError: the lag is beyond its bound and `on_lag` is "stop".
        """
        self._clock.end_step(self.busy)
        if self._options.adopt_after < 0:
            self.poll()
        elif self._scheduled and step >= self._scheduled[1]:
            self._adopt_scheduled()
        if self._scheduled is None:
            busy = self._options.adopt_after < 0 and self.busy
            context = TriggerContext(step, self._last_export_step, busy, params, self.snapshot)
            if self._trigger(context):
                if self._options.adopt_after >= 0:
                    self._scheduled = (step, step + self._options.adopt_after)
                self.submit(params, step)
                if self._options.adopt_after == 0:
                    self._adopt_scheduled()
        self._bound_lag(step, params)
        self._clock.begin_step(self.busy)
        return self.snapshot

    # ------------------------------------------------------------------ its parts

    def submit(
        self, params: Any, step: int, *, embeddings: NDArray[np.float32] | None = None
    ) -> bool:
        """Hands over parameters to build the next index from; never waits for it.

        Args:
            params: document-encoder parameters; copied before this returns.
            step: their training step.
            embeddings: `[N, D]` that they give, where they are known; then nothing is encoded.

        Returns:
            True if a refresh starts now. False if one is under way: these parameters wait, in the
            place of any that waited before.

        Raises:
            RuntimeError: the refresher is closed.
        """
        probes = None if self._probe_queries is None else np.asarray(self._probe_queries())
        export = Export(self._executor.copy_params(params), step, probes, embeddings)
        with self._condition:
            if self._closed:
                raise RuntimeError("The refresher is closed.")
            idle = self._active is None and self._waiting is None
            self._waiting = export
            self._last_export_step = max(self._last_export_step, step)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="refresh", daemon=True)
                self._thread.start()
            self._condition.notify_all()
        return idle

    def poll(self) -> IndexSnapshot | None:
        """Adopts and returns the index that became ready since the last call, or returns None.

        Never waits.

        Raises:
            RefreshError: a refresh failed for good and `on_failure` is "stop".
        """
        if self._ready is None and self._failure is None:  # nothing to take a lock for
            return None
        with self._condition:
            ready, self._ready = self._ready, None
            failure, self._failure = self._failure, None
        if ready is not None:
            self._adopt(ready)
        if failure is not None:
            message = (
                f"The index could not be refreshed: {_sentence(failure)} The generation of step "
                f"{self._snapshot.encoder_step if self._snapshot else '(none)'} still serves."
            )
            if self._options.on_failure == "stop":
                raise RefreshError(message) from failure
            self._report(message)
        return ready

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until no refresh is under way or waiting; `poll` then adopts the result.

        Args:
            timeout: in seconds; None: as long as it takes.

        Returns:
            True if nothing is under way any more.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        told = time.monotonic()
        with self._condition:
            while self._active is not None or self._waiting is not None:
                left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
                if left <= 0 or self._closed:
                    return False
                self._condition.wait(left)
                if time.monotonic() - told > _REPORT_EVERY_SECONDS:
                    told = time.monotonic()
                    self._report(f"waiting for the index: {self.line()}")
        return True

    def close(self) -> None:
        """Gives up what is under way and lets the folder go; finished shards stay on disk."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._cancelled.set()
            self._condition.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._executor.close()
        self._lock.__exit__(None, None, None)
        atexit.unregister(self._at_exit)

    def __enter__(self) -> Self:
        """Returns the refresher."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()

    # ------------------------------------------------------------------ what is known of it

    @property
    def busy(self) -> bool:
        """True while parameters are encoded, built, or waiting for their turn."""
        return self._active is not None or self._waiting is not None

    @property
    def state(self) -> RefreshState:
        """Where the refresh is."""
        if self._active is not None:
            building = self._pipeline.building
            return RefreshState.BUILDING if building else RefreshState.ENCODING
        if self._ready is not None:
            return RefreshState.READY
        return RefreshState.FAILED if self._failure is not None else RefreshState.IDLE

    def status(self) -> RefreshStatus:
        """Returns what goes on."""
        active, waiting, progress = self._active, self._waiting, self._progress
        return RefreshStatus(
            state=self.state,
            step=-1 if active is None else active.step,
            fraction=0.0 if active is None or progress is None else progress.fraction,
            remaining_seconds=0.0 if progress is None else progress.remaining_seconds,
            waiting_step=-1 if waiting is None else waiting.step,
            builder_pid=self._pipeline.builder_pid,
            failures=self._failures,
            last_error=self._last_error,
        )

    def line(self, step: int | None = None) -> str:
        """Returns one line for people: which index serves, how old it is, and what goes on."""
        status, snapshot = self.status(), self._snapshot
        served = "no index" if snapshot is None else f"index {snapshot.version}"
        if snapshot is not None and step is not None:
            served += f" ({snapshot.staleness_steps(step)} steps old)"
        if status.state is RefreshState.ENCODING:
            return f"{served}, encoding {status.fraction:.0%} {status.remaining_seconds:.0f} s left"
        return served if status.state is RefreshState.IDLE else f"{served}, {status.state.value}"

    def metrics(self, step: int) -> dict[str, float]:
        """Returns figures for the log of a training step.

        Args:
            step: the step about to be taken.

        Returns:
            `index/version`, `index/staleness_steps`, `index/staleness_seconds` (since the build),
            `index/overlap` (share of the probe queries' top 10 that the newest swap left alone),
            `index/recall` (against exact), `index/encode_seconds`, `index/build_seconds` (of the
            index that serves), `index/refreshing` (1 while a refresh is under way),
            `index/failures`, `index/swap_seconds` (of the newest swap),
            `index/step_seconds_inside` and `_outside` (median step during a refresh and otherwise).
            What is not known is left out.
        """
        snapshot = self.snapshot
        values = {
            "version": snapshot.version,
            "staleness_steps": snapshot.staleness_steps(step),
            "staleness_seconds": max(0.0, time.time() - snapshot.built_at),
            "overlap": self._overlap,
            "recall": snapshot.recall,
            "encode_seconds": snapshot.encode_seconds,
            "build_seconds": snapshot.build_seconds,
            "refreshing": float(self.busy),
            "failures": self._failures,
            "swap_seconds": self._swap_seconds,
            "step_seconds_inside": self._clock.median(inside=True),
            "step_seconds_outside": self._clock.median(inside=False),
        }
        return {f"index/{k}": float(v) for k, v in values.items() if np.isfinite(v)}

    def note_retrieved(self, doc_ids: NDArray[np.integer], mask: NDArray[np.bool_]) -> None:
        """Counts what training retrieved `[B, K]`, which a partial refresh encodes first."""
        self._pipeline.counts.add(doc_ids, mask)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps to continue with the same index; JSON values.

        The generation that serves is kept on disk for as long as checkpoints may name it. In the
        deterministic mode this waits until the parameters under way are on disk.
        """
        snapshot = self.snapshot
        self._pinned.append(snapshot.version)
        self._pipeline.pin(frozenset(self._pinned))
        pending = None
        if self._scheduled is not None:
            export_step, adopt_step = self._scheduled
            pending = [export_step, adopt_step, self._wait_for_export(export_step)]
        return {
            "generation": snapshot.version,
            "encoder_step": snapshot.encoder_step,
            "params_digest": self._pipeline.digest_of(snapshot.version),
            "last_export_step": self._last_export_step,
            "pending": pending,
        }

    # ------------------------------------------------------------------ private

    def _build_now(
        self, params: Any, step: int, embeddings: NDArray[np.float32] | None = None
    ) -> IndexSnapshot:
        """Builds (or opens) the index of these parameters and adopts it."""
        self.submit(params, step, embeddings=embeddings)
        self.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise RefreshError(f"The index could not be built: {_sentence(failure)}") from failure
        self.poll()
        return self.snapshot

    def _adopt(self, snapshot: IndexSnapshot) -> None:
        """Lets an index serve; one assignment, at a step boundary."""
        started = time.perf_counter()
        with self._condition:
            if self._snapshot is not None:
                self._retired.append(self._snapshot)
            self._snapshot = snapshot
            self._condition.notify_all()
        self._overlap = self._pipeline.overlap_of(snapshot.version)
        self._swap_seconds = time.perf_counter() - started

    def _adopt_scheduled(self) -> None:
        """Waits for the scheduled index and adopts it."""
        self._scheduled = None
        self.wait()
        self.poll()

    def _bound_lag(self, step: int, params: Any) -> None:
        """Does what `on_lag` says where the index lags too far behind."""
        bound = self._options.max_index_lag_steps
        lag = self.snapshot.staleness_steps(step)
        if not bound or lag <= bound:
            self._lag_told = False
            return
        message = f"The index is {lag} steps behind the encoder, more than {bound}"
        if self._options.on_lag == "stop":
            raise IndexTooStaleError(
                f"{message}; refresh less of it, on more devices, or raise max_index_lag_steps."
            )
        if self._options.on_lag == "warn":
            if not self._lag_told:
                self._report(f"{message}; refreshing is slower than training.")
            self._lag_told = True
            return
        while self.snapshot.staleness_steps(step) > bound:
            if not self.busy:
                self.submit(params, step)
            before = self.snapshot
            self._adopt_scheduled()
            if self.snapshot is before and not self.busy:
                return  # it failed, and `on_failure` says to go on: not to try for ever

    def _wait_for_export(self, step: int) -> str:
        """Waits until the parameters of a step are on disk and returns their digest."""
        while (digest := self._pipeline.exported.get(step)) is None:
            if not self.busy:
                self.poll()
                raise RefreshError(f"The parameters of step {step} could not be exported.")
            time.sleep(_POLL_SECONDS)
        return digest

    def _exported(self, template: Any, step: int, digest: str) -> Any | None:
        """Returns the exported parameters of a step, or None where they are not left."""
        try:
            export = read_export(self._pipeline.export_folder(step), template)
        except (OSError, ValueError) as error:
            self._report(f"the exported parameters of step {step} cannot be used: {error}")
            return None
        return export.params if export.digest == digest else None

    def _note_progress(self, progress: EncodeProgress) -> None:
        self._progress = progress

    def _work(self) -> None:
        """Turns exports into snapshots, one after the other; the refresher's thread."""
        while self._take_export():
            try:
                snapshot = self._attempts()
            except Cancelled:
                continue
            except BaseException as error:  # nothing may end this thread unseen
                with self._condition:
                    self._failure = error
            else:
                with self._condition:
                    self._ready, self._failure = snapshot, None

    def _take_export(self) -> bool:
        """Waits for the next export and makes it the active one; False when closed."""
        with self._condition:
            self._active, self._progress = None, None
            self._condition.notify_all()
        while True:
            with self._condition:
                if self._closed:
                    return False
                held = bool(self._retired)
                if self._waiting is None:
                    self._condition.wait(_RETIRED_SECONDS if held else None)
                # Freed when the lock is given back, in this thread, while no step waits for it.
                freed, self._retired = (self._retired, []) if held else ([], self._retired)
                if self._waiting is not None and not self._closed:
                    self._active, self._waiting = self._waiting, None
                    return True
            del freed

    def _attempts(self) -> IndexSnapshot:
        """Refreshes, trying again after failures, with newer parameters where there are any."""
        attempt = 0
        while True:
            assert self._active is not None, "set by the caller"
            try:
                return self._pipeline.run(self._active)
            except Cancelled:
                raise
            except BaseException as error:
                if _is_ending(error):
                    raise Cancelled("the program ends") from error
                self._failures += 1
                self._last_error = str(error)
                # The same parameters give the same embeddings: NaN stays NaN.
                hopeless = isinstance(error, ValueError) and self._waiting is None
                if attempt == self._options.max_retries or hopeless:
                    raise
                seconds = self._options.backoff_seconds * 2**attempt
                self._report(
                    f"a refresh failed ({error}); trying again in {seconds:g} s, "
                    f"{self._options.max_retries - attempt} attempts left."
                )
                attempt += 1
            if self._cancelled.wait(seconds):
                raise Cancelled("the refresher is closed")
            with self._condition:
                if self._waiting is not None:
                    self._active, self._waiting = self._waiting, None


class _StepClock:
    """Typical time between two updates, apart for steps during a refresh and others."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._busy = False
        # The newest ones: a compilation or a pause long ago must not colour the figure.
        self._seconds = {busy: deque[float](maxlen=_CLOCKED_STEPS) for busy in (False, True)}

    def end_step(self, busy: bool) -> None:
        """Ends a step; one that a refresh began or ended in counts as neither."""
        if self._started is not None and busy == self._busy:
            self._seconds[busy].append(time.perf_counter() - self._started)

    def begin_step(self, busy: bool) -> None:
        """Begins a step: what the update itself took is not part of it."""
        self._started, self._busy = time.perf_counter(), busy

    def median(self, *, inside: bool) -> float:
        """Returns seconds a step, NaN where there was none."""
        return float(np.median(self._seconds[inside])) if self._seconds[inside] else float("nan")


def _sentence(error: BaseException) -> str:
    """Returns the message of an error with one full stop at its end."""
    return f"{(str(error) or repr(error)).rstrip('.')}."


def _is_ending(error: BaseException) -> bool:
    """Tells whether threads were refused because the interpreter is on its way out."""
    return isinstance(error, RuntimeError) and "cannot schedule new futures" in str(error)


def _check_writable(folder: Path) -> None:
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


def _call_weakly(method: weakref.WeakMethod) -> None:
    """Calls a method if its object still lives; an interpreter that ends closes what is open."""
    if (alive := method()) is not None:
        alive()

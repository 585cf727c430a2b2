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
again, reported and finally raised.
"""

import atexit
import dataclasses
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax.index import EmbeddingStore, IndexSnapshot
from ragjax.refresh.background import Background, describe
from ragjax.refresh.gauges import Gauges, StepNumbers
from ragjax.refresh.generations import GenerationStore
from ragjax.refresh.kept import KeptForCheckpoints
from ragjax.refresh.options import (
    IndexTooStaleError,
    RefreshError,
    RefreshOptions,
    RefreshState,
    RefreshStatus,
)
from ragjax.refresh.pipeline import Pipeline, Submission
from ragjax.refresh.task import EncodeTask, Executor
from ragjax.refresh.threads import ThreadExecutor
from ragjax.refresh.triggers import Never, Trigger, TriggerContext
from ragjax.storage import RunLock, check_writable
from ragjax.storage.processes import several

_LOG = logging.getLogger(__name__)


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
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes the folder, also from one this process left open; encodes nothing before `start`.

        Args:
            folder: For the generations, the exports and what is being built.
            task: The documents and their encoder.
            executor: Where documents are encoded; default: a thread on the training devices.
            trigger: When `update` submits; default: never.
            options: How.
            probe_queries: Returns `[P, D]` live embeddings of a few real queries; called in the
                trainer's thread at each `submit`. They measure the recall of the index and how
                much its results have changed.
            report: Called with one sentence when something needs attention.
            check: Called about once a second while training waits for an index; may raise, for
                instance because the run was asked to stop.

        Raises:
            ValueError: Another process refreshes in this folder (the message says which).
            OSError: The folder cannot be written; the message names it.
        """
        self._options, self.folder = options or RefreshOptions(), Path(folder)
        self._trigger, self._executor = trigger or Never(), executor or ThreadExecutor()
        self._probe_queries, self._report, self._check = probe_queries, report, check
        # An interpreter that ends closes what is left open, and so does a cell that is run again.
        close = weakref.WeakMethod(self.close)
        self._at_exit = lambda: (method := close()) and method()
        self._lock = RunLock(
            self.folder, name="refresh.lock", remedy="use another folder", give_back=self._at_exit
        )
        check_writable(self.folder)
        self.generations = GenerationStore(self.folder, keep=self._options.keep, report=report)
        cancelled = threading.Event()
        self._pipeline = Pipeline(
            self.folder, task, self._executor, self.generations, self._options,
            cancelled=cancelled, on_progress=lambda what: self._gauges.note(what), report=report,
        )  # fmt: skip
        self._background = Background(
            self._pipeline.run, cancelled, max_retries=self._options.max_retries,
            backoff_seconds=self._options.backoff_seconds, report=report,
        )  # fmt: skip
        self._gauges = Gauges(self._background, self._pipeline)
        self._kept = KeptForCheckpoints(
            self._background, self._pipeline, report, adopt_after=self._options.adopt_after
        )
        self._snapshot: IndexSnapshot | None = None
        self._steps, self._last_export_step = StepNumbers(), 0
        self._scheduled: tuple[int, int] | None = None  # (step of the export, step of adoption)
        self._lag_told = False
        self._lock.__enter__()
        atexit.register(self._at_exit)
        self._pipeline.clean()

    @property
    def snapshot(self) -> IndexSnapshot:
        """The index that serves; reading it is safe from any thread.

        Raises:
            RuntimeError: `start` has not been called.
        """
        if self._snapshot is None:
            raise RuntimeError("The refresher has no index yet: call start(params) first")
        return self._snapshot

    def start(
        self,
        params: Any,
        *,
        step: int = 0,
        state: Mapping[str, Any] | None = None,
        store: EmbeddingStore | None = None,
    ) -> IndexSnapshot:
        """Opens or builds the index to begin with, in the foreground.

        An index that an earlier life of the run built with the same parameters is opened, not
        built again. Called again, it goes to another step of the run, an earlier one too.

        Args:
            params: Document-encoder parameters at `step`.
            step: Training step about to be taken.
            state: What `state_dict()` returned for the checkpoint of that step: the generation that
                served then is opened, or built again from its exported parameters, and the
                refresh that was under way is taken up.
            store: Embeddings of the documents with these parameters, where there are any: they are
                indexed and nothing is encoded.

        Returns:
            The snapshot that serves.

        Raises:
            RefreshError: It cannot be built; the cause is chained.
            ResumeError: The index of the checkpoint is lost, and `adopt_after` promises a run
                that continues identically.
        """
        step, self._steps, self._scheduled = StepNumbers().advance(step), StepNumbers(), None
        if self._snapshot is not None:  # what is under way belongs to the steps that are left
            self.wait()
            self._background.fetch()
        mismatch = self._pipeline.mismatch()
        if state is None:
            if mismatch:
                self._report(f"the index is built anew: {mismatch}.")
            return self._build_now(params, step, store)
        wanted, digest = int(state["encoder_step"]), str(state["params_digest"])
        number, pending = int(state["generation"]), state.get("pending")
        # Kept from here on: another checkpoint may be long in coming.
        self._kept.pin(number, wanted, pending)
        found = self._pipeline.open_existing(digest, number=number)
        if found is not None:
            # Parameters that a step left alone make no new generation, but the index is as fresh.
            self._adopt(dataclasses.replace(found, encoder_step=wanted))
        elif (exported := self._kept.params_of_index(params, wanted, digest, mismatch)) is None:
            return self._build_now(params, step)
        else:
            self._build_now(exported, wanted)
        self._last_export_step = self._steps.advance(wanted)
        if pending and (exported := self._kept.params_under_way(params, *pending)) is not None:
            self.submit(exported, pending[0])
            self._scheduled = (pending[0], pending[1]) if self._options.adopt_after >= 0 else None
        return self.snapshot

    def update(self, step: int, params: Any) -> IndexSnapshot:
        """Does everything that is due before a training step; the one callback a step.

        Adopts an index that is ready, asks the trigger whether to export, and bounds the lag.

        Args:
            step: Number of the step about to be taken, counted over epochs; it never goes back.
            params: Live document-encoder parameters; copied where they are exported.

        Returns:
            The snapshot to search in this step.

        Raises:
            ValueError: The step is no whole number, or an earlier one than the last.
            RefreshError: A refresh failed for good and `on_failure` is "stop".
            IndexTooStaleError: The lag is beyond its bound and `on_lag` is "stop".
        """
        step = self._steps.advance(step)
        self._gauges.clock.end_step(self.busy)
        if self._options.adopt_after < 0:
            self.poll()
        elif self._scheduled and step >= self._scheduled[1]:
            self._adopt_scheduled()
        # Several processes have one refresh under way at a time, so that all have the same.
        if self._scheduled is None and not (several() and self.busy):
            busy = self._options.adopt_after < 0 and self.busy
            context = TriggerContext(step, self._last_export_step, busy, params, self.snapshot)
            if self._trigger(context):
                self.submit(params, step)
                if self._options.adopt_after >= 0:
                    self._scheduled = (step, step + self._options.adopt_after)
                if self._options.adopt_after == 0:
                    self._adopt_scheduled()
        self._bound_lag(step, params)
        self._gauges.clock.begin_step(self.busy)
        return self.snapshot

    def submit(self, params: Any, step: int, *, store: EmbeddingStore | None = None) -> bool:
        """Hands over parameters to build the next index from; never waits for it.

        Args:
            params: Document-encoder parameters; copied before this returns.
            step: Their training step.
            store: Embeddings that they give, where there are any; then nothing is encoded.

        Returns:
            True if a refresh starts now. False if one is under way: these parameters wait next.

        Raises:
            ValueError: The step is no whole number, or an earlier one than the last.
            RuntimeError: The refresher is closed.
        """
        step = self._steps.advance(step)
        probes = None if self._probe_queries is None else np.asarray(self._probe_queries())
        counts = self._pipeline.counts.state()
        export = Submission(self._executor.copy_params(params), step, counts, probes, store)
        self._last_export_step = step
        return self._background.hand_over(export)

    def poll(self) -> IndexSnapshot | None:
        """Adopts and returns the index that became ready since the last call, or None; never waits.

        Raises:
            RefreshError: A refresh failed for good and `on_failure` is "stop".
        """
        ready, failure = self._background.fetch()
        if ready is not None:
            self._adopt(ready)
        if failure is not None:
            step = getattr(self._snapshot, "encoder_step", "(none)")
            why = f"the index could not be refreshed: {describe(failure)}"
            message = f"{why}; the generation of step {step} still serves"
            if self._options.on_failure == "stop":
                raise RefreshError(message) from failure
            self._report(message)
        return ready

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until no refresh is under way or waiting, or `check` raises; then `poll` adopts.

        Args:
            timeout: In seconds; None: as long as it takes.

        Returns:
            True if nothing is under way any more.
        """
        return self._background.wait(
            timeout, self._check, lambda: self._report(f"waiting for the index: {self.line()}")
        )

    def close(self) -> None:
        """Gives up what is under way and lets the folder go; finished shards stay on disk."""
        try:
            self._background.close()
        finally:
            # The folder must not stay locked for want of a thread.
            atexit.unregister(self._at_exit)
            self._executor.close()
            self._lock.__exit__()

    def __enter__(self) -> Self:
        """Returns the refresher."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()

    @property
    def busy(self) -> bool:
        """True while parameters are encoded, built, or waiting for their turn."""
        return self._background.busy

    @property
    def state(self) -> RefreshState:
        """Where the refresh is."""
        return self._gauges.state

    def status(self) -> RefreshStatus:
        """Returns what goes on."""
        return self._gauges.status()

    def line(self, step: int | None = None) -> str:
        """Returns one line for people: which index serves, how old it is, and what goes on."""
        return self._gauges.line(self._snapshot, step)

    def metrics(self, step: int) -> dict[str, float]:
        """Returns figures for the log of a training step.

        Args:
            step: The step about to be taken.

        Returns:
            `index/version`, `index/staleness_steps`, `index/staleness_seconds` (since the build),
            `index/overlap` (share of the probe queries' top 10 that the newest swap left alone),
            `index/recall` (against exact), `index/fresh_fraction` (share of the documents encoded
            for this index; below 1 after a partial refresh), `index/encode_seconds` and
            `index/build_seconds` (of the index that serves), `index/refreshing` (1 while a refresh
            is under way), `index/failures`, `index/swap_seconds` (of the newest swap),
            `index/step_seconds_inside` and `_outside` (median step during a refresh and otherwise).
            What is not known is left out.
        """
        return self._gauges.metrics(self.snapshot, step)

    def note_retrieved(self, doc_ids: NDArray[np.integer], mask: NDArray[np.bool_]) -> None:
        """Counts what training retrieved `[B, K]`, which a partial refresh encodes first."""
        self._pipeline.counts.add(doc_ids, mask)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps to continue with the same index; JSON values.

        What the newest checkpoints name is kept on disk: the generation that serves, and the
        parameters of the refresh that is under way. This waits until those are written.
        """
        snapshot = self.snapshot
        pending = self._kept.pending(self._scheduled)
        self._kept.pin(snapshot.version, snapshot.encoder_step, pending)
        return {
            "generation": snapshot.version,
            "encoder_step": snapshot.encoder_step,
            "params_digest": snapshot.params_digest,
            "pending": pending,
        }

    def _build_now(
        self, params: Any, step: int, store: EmbeddingStore | None = None
    ) -> IndexSnapshot:
        """Builds (or opens) the index of these parameters and adopts it."""
        self.submit(params, step, store=store)
        self.wait()
        ready, failure = self._background.fetch()
        if failure is not None:
            raise RefreshError(f"the index could not be built: {describe(failure)}") from failure
        if ready is not None:
            self._adopt(ready)
        return self.snapshot

    def _adopt(self, snapshot: IndexSnapshot) -> None:
        """Lets an index serve; one assignment, at a step boundary."""
        started = time.perf_counter()
        old, self._snapshot = self._snapshot, snapshot
        if old is not None:
            self._background.retire(old)
        self._gauges.swap_seconds = time.perf_counter() - started

    def _adopt_scheduled(self) -> None:
        """Waits for the scheduled index and adopts it."""
        self.wait()
        self.poll()
        # Not before: where it failed, a resumed run must try it again.
        self._scheduled = None

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
                f"{message}; refresh less of it or on more devices, or let on_lag be wait or warn"
            )
        if self._options.on_lag == "warn":
            if not self._lag_told:
                self._report(f"{message}; refreshing is slower than training.")
            self._lag_told = True
            return
        # The refresh under way may itself be too old; one of these parameters is not.
        for _ in range(2):
            if self._scheduled is None and not self.busy:
                self.submit(params, step)
            self._adopt_scheduled()
            if self.snapshot.staleness_steps(step) <= bound:
                return

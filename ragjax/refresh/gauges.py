"""What a refresher tells of itself (state, a line for people, figures), and its step numbers."""

import operator
import time
from collections import deque
from typing import Any

import numpy as np

from ragjax.index import IndexSnapshot
from ragjax.refresh.background import Background
from ragjax.refresh.options import RefreshState, RefreshStatus
from ragjax.refresh.pipeline import Pipeline
from ragjax.refresh.task import EncodeProgress

_CLOCKED_STEPS = 200


class StepClock:
    """Typical time between two updates, apart for steps during a refresh and others."""

    def __init__(self) -> None:
        """Starts before the first step."""
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


class StepNumbers:
    """The numbers of a run's steps, which may repeat but never count back."""

    def __init__(self) -> None:
        """Starts before the first step."""
        self._last = 0

    def advance(self, step: Any) -> int:
        """Returns the number of a step, also an integer of NumPy or JAX, as Python's.

        Raises:
            ValueError: It is no whole number, or an earlier one than the last.
        """
        try:
            number = operator.index(step)
        except TypeError as error:
            raise ValueError(f"step must be a whole number, got {step!r}") from error
        if number < 0:
            raise ValueError(f"step must be at least 0, got {number}")
        if number < self._last:
            raise ValueError(
                f"Step {number} comes after step {self._last}: count the steps over epochs, or, to "
                f"go back to a checkpoint, call start(params, step={number}, state=...) first"
            )
        self._last = number
        return number


class Gauges:
    """Reads what goes on in the background; the clock and the last swap are told to it."""

    def __init__(self, background: Background, pipeline: Pipeline) -> None:
        """Reads these two; nothing is under way yet."""
        self._background, self._pipeline = background, pipeline
        self._progress: tuple[int, EncodeProgress] | None = None  # with the step it is of
        self.clock = StepClock()
        self.swap_seconds = 0.0

    def note(self, progress: EncodeProgress) -> None:
        """Takes how far the encoding is; called in the background's thread."""
        active = self._background.active
        self._progress = None if active is None else (active.step, progress)
        self._background.free_retired()

    @property
    def state(self) -> RefreshState:
        """Where the refresh is."""
        work = self._background
        if work.works:
            building = self._pipeline.building
            return RefreshState.BUILDING if building else RefreshState.ENCODING
        if work.ready is not None:
            return RefreshState.READY
        return RefreshState.FAILED if work.failure is not None else RefreshState.IDLE

    def status(self) -> RefreshStatus:
        """Returns what goes on."""
        work, noted = self._background, self._progress
        active, waiting = work.active, work.waiting
        of_active = noted is not None and active is not None and noted[0] == active.step
        progress = noted[1] if noted is not None and of_active else None
        return RefreshStatus(
            state=self.state,
            step=-1 if active is None else active.step,
            fraction=0.0 if progress is None else progress.fraction,
            remaining_seconds=0.0 if progress is None else progress.remaining_seconds,
            waiting_step=-1 if waiting is None else waiting.step,
            builder_pid=self._pipeline.builder_pid,
            failures=work.failures,
            last_error=work.last_error,
        )

    def line(self, snapshot: IndexSnapshot | None, step: int | None) -> str:
        """Returns `Refresher.line` of the index that serves."""
        status = self.status()
        served = "no index" if snapshot is None else f"index {snapshot.version}"
        if snapshot is not None and step is not None:
            served += f" ({snapshot.staleness_steps(step)} steps old)"
        if status.state is RefreshState.ENCODING:
            return f"{served}, encoding {status.fraction:.0%} {status.remaining_seconds:.0f} s left"
        return served if status.state is RefreshState.IDLE else f"{served}, {status.state.value}"

    def metrics(self, snapshot: IndexSnapshot, step: int) -> dict[str, float]:
        """Returns `Refresher.metrics` of the index that serves."""
        values = {
            "refreshing": float(self._background.works),
            "failures": self._background.failures,
            "swap_seconds": self.swap_seconds,
            "step_seconds_inside": self.clock.median(inside=True),
            "step_seconds_outside": self.clock.median(inside=False),
        }
        return index_metrics(snapshot, step) | _finite(values)


def index_metrics(snapshot: IndexSnapshot, step: int) -> dict[str, float]:
    """Returns the part of `Refresher.metrics` that is of one index, searched for a step."""
    return _finite(
        {
            "version": snapshot.version,
            "staleness_steps": snapshot.staleness_steps(step),
            "staleness_seconds": max(0.0, time.time() - snapshot.built_at),
            "overlap": snapshot.overlap,
            "recall": snapshot.recall,
            "fresh_fraction": snapshot.fresh_fraction,
            "encode_seconds": snapshot.encode_seconds,
            "build_seconds": snapshot.build_seconds,
        }
    )


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {f"index/{k}": float(v) for k, v in values.items() if np.isfinite(v)}

"""The loop around a training step: resume, progress, checkpoints, signals, non-finite updates."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from ragjax.storage import JsonLog
from ragjax.storage.log import read_lines
from ragjax.storage.processes import Votes, largest, several
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.finite import NonFiniteError, advice, say_what_was_lost
from ragjax.training.steps import TrainState


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; `signum` says by which signal."""

    def __init__(self, signum: int):
        """Keeps the signal's number."""
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopFlag:
    """Set by the first SIGTERM or SIGINT; long work looks at it between two batches."""

    def __init__(self) -> None:
        """Starts unset."""
        self.signum: int | None = None

    def check(self) -> None:
        """Raises Interrupted if the run was asked to stop, whichever of its processes was."""
        if signum := largest(self.signum or 0):
            raise Interrupted(signum)


@contextmanager
def graceful_stop(
    report: Callable[[str], None] = print, *, kill: bool = True
) -> Iterator[StopFlag]:
    """Turns the first SIGTERM or SIGINT into a flag; the second one stops at once.

    Outside the main thread no signal can be caught: the flag is then set by nobody but the caller.

    Args:
        report: Shows one line to the user.
        kill: Stop at once by ending the process; False raises KeyboardInterrupt, for a notebook
            whose process has more to do.

    Yields:
        The flag. What is written to disk is whole at every moment, so ending at once is safe too;
        it only costs the work since the last checkpoint.
    """
    flag = StopFlag()

    def handle(signum: int, _: Any) -> None:
        if flag.signum is not None:
            if kill:
                os._exit(128 + signum)
            raise KeyboardInterrupt
        flag.signum = signum
        report(
            f"\n{signal.Signals(signum).name}: stopping after this batch and saving;"
            " once more to stop now"
        )

    try:
        old = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread
        old = {}
    try:
        yield flag
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


class MetricWriter(Protocol):
    """Takes metrics as they come, beside the file of a `MetricsLog`, whose step waits for it."""

    def write(self, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes the metrics of one step; None: not finite. A resumed stage repeats steps."""
        ...

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Takes what the run ended with, such as `after/recall@5`."""
        ...

    def close(self) -> None:
        """Takes nothing any more."""
        ...


class MetricsLog:
    """Metrics as JSON lines, one per step, flushed; a resumed stage drops the lines it redoes."""

    def __init__(self, path: str | os.PathLike, followers: Iterable[MetricWriter] = ()):
        """Names the file, which is created at the first line, and who else gets the metrics."""
        self._log, self.followers = JsonLog(path), list(followers)

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line; values that are not finite become null (JSON has no NaN)."""
        values = {
            k: (round(float(v), 6) if np.isfinite(float(v)) else None) for k, v in metrics.items()
        }
        self._log.append([{"stage": stage, "step": step} | values])
        for follower in self.followers:
            follower.write(stage, step, values)

    def rewind(self, stage: str, step: int) -> None:
        """Removes the lines of `stage` at or after `step`, and a torn last line."""
        self._log.keep(lambda row: row.get("stage") != stage or row.get("step", -1) < step)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Returns the lines of a stage, those of earlier starts among them."""
        if not self._log.path.exists():
            return []
        rows = (row for _, row in read_lines(self._log.path))
        return [row for row in rows if row is not None and row.get("stage") == stage]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a stage runs and how often it saves.

    Attributes:
        stage: Name of the stage in metrics and messages.
        num_steps: Steps of the whole stage.
        checkpoint_seconds: Seconds between two checkpoints, which are written while training goes
            on; 0: each step is saved before the next one is taken. The last step is always saved.
        max_skipped: Updates in a row that may be skipped for NaN or infinity before the run stops.
    """

    stage: str
    num_steps: int
    checkpoint_seconds: float = 120.0
    max_skipped: int = 3


class HostWork(Protocol):
    """What the host does before each step with the state of that moment, such as retrieval."""

    def resume(self, step: int, state: TrainState, saved: Mapping[str, Any] | None) -> None:
        """Gets ready for `step`; `saved` is `state_dict()` of its checkpoint, None at a start."""
        ...

    def before_step(self, step: int, state: TrainState) -> Mapping[str, float]:
        """Prepares what `batch_at(step)` needs; returns metrics of this step."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Returns the JSON values that a checkpoint keeps."""
        ...

    def line(self, step: int) -> str:
        """Returns a few words for the progress line."""
        ...


def run_steps(
    config: LoopConfig,
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, dict]],
    state: TrainState,
    batch_at: Callable[[int], Any],
    *,
    frozen: Any = None,
    checkpointer: Checkpointer,
    log: MetricsLog,
    stop: StopFlag,
    info: Mapping[str, Any] | None = None,
    describe_batch: Callable[[int], str] | None = None,
    host: HostWork | None = None,
    after_step: Callable[[int, TrainState], None] | None = None,
) -> TrainState:
    """Runs a stage to its end, from its newest good checkpoint if there is one.

    The batch of step n is `batch_at(n)`, a pure function, so the step after a resume is the one an
    uninterrupted run would have taken, bit for bit.

    Args:
        config: Length and cadence.
        step_fn: `(state, batch, frozen) -> (state, metrics)` from `make_train_step`.
        state: State before the first step; its buffers are donated.
        batch_at: Step number to batch.
        frozen: Passed on to `step_fn` at each step.
        checkpointer: Where states are saved.
        log: Where metrics go.
        stop: Looked at after each step.
        info: JSON values kept in each checkpoint; the one on disk must agree.
        describe_batch: Step number to a sentence on that batch, for the error about NaN.
        host: Called before each step, for batches that depend on the state.
        after_step: Called with the number of steps done and their state, whose buffers the next
            step takes; before that state is saved, so once more where a run is killed in between.

    Returns:
        The state after the last step.

    Raises:
        Interrupted: After saving, if a signal came.
        NonFiniteError: If more than `max_skipped` updates in a row were skipped, or, at the end,
            more than half of all. Seen a step late: metrics are fetched while the next step runs,
            so that the device never waits for the host.
        ValueError: If the checkpoint was written with other `info` (the message names what
            differs).
    """
    state, first, saved = _resume(config, state, checkpointer, dict(info or {}))
    if host is not None and first < config.num_steps:
        host.resume(first, state, saved)
    log.rewind(config.stage, first)

    progress = tqdm(
        total=config.num_steps, initial=first, desc=config.stage, unit="step", file=sys.stderr,
        mininterval=1.0, dynamic_ncols=True, disable=None if sys.stderr.isatty() else False,
        maxinterval=30.0,
    )  # fmt: skip
    running: list[_Ran] = []  # given to the device, metrics not fetched yet
    since = last_save = time.perf_counter()

    def fetch(left: int) -> None:
        """Writes the metrics of all steps but the last `left`; waits until they have run."""
        nonlocal since
        while len(running) > left:
            ran = running.pop(0)
            metrics = {k: float(v) for k, v in jax.device_get(ran.metrics).items()}
            metrics |= ran.prepared
            now = time.perf_counter()
            log.write(config.stage, ran.step, metrics | {"seconds": now - since})
            since = now
            doing = f", {host.line(ran.step)}" if host is not None else ""
            progress.set_postfix_str(f"loss={metrics['loss']:.3f}{doing}", refresh=False)
            progress.update()
            if metrics["skipped"] > config.max_skipped:
                where = f" ({describe_batch(ran.step)})" if describe_batch else ""
                raise NonFiniteError(
                    f"{config.stage}: {int(metrics['skipped'])} updates in a row had a loss or"
                    f" gradient that is not finite, the last at step {ran.step}{where}; parameters"
                    " are unchanged since the last good one."
                    f" {advice(log.rows(config.stage), state.params, frozen)}"
                )

    def save(done: int, state: TrainState, *, wait: bool = True) -> None:
        nonlocal since, last_save
        fetch(0)  # a run that goes on from here has the metrics of all steps before
        kept = {"host": dict(host.state_dict())} if host is not None else {}
        about = {"stage": config.stage, **(info or {}), **kept}
        checkpointer.save(done, state, about, wait=wait or not config.checkpoint_seconds)
        since = last_save = time.perf_counter()

    def due() -> bool:
        passed = time.perf_counter() - last_save
        return passed >= config.checkpoint_seconds and not checkpointer.busy

    votes, kept_at = Votes(), first

    def agree(step: int) -> tuple[Interrupted | None, bool]:
        """Says whether to stop, and whether to save, the same in each process of a run."""
        nonlocal kept_at
        if not several():
            return _asked_to_stop(stop), due()
        seen = votes(stop.signum or 0, due())
        if seen is None:
            return None, not config.checkpoint_seconds
        signum, asked_to_save = seen[:, 0].max(), seen[0, 1]
        # Process 0 knows of a save, and of its end, a step late.
        saving = not config.checkpoint_seconds or (asked_to_save and step > kept_at + 1)
        kept_at = step if saving else kept_at
        return Interrupted(int(signum)) if signum else None, bool(saving)

    with progress, checkpointer:
        for step in range(first, config.num_steps):
            prepared = _prepare(host, step, state, save)
            state, metrics = step_fn(state, batch_at(step), frozen)
            running.append(_Ran(step, metrics, prepared))
            done, (asked, saving) = step + 1, agree(step)
            ending = asked is not None or done == config.num_steps
            fetch(0 if ending else 1)
            if after_step is not None:
                started = time.perf_counter()
                after_step(done, state)
                since += time.perf_counter() - started  # no part of a step
            if ending or saving:
                save(done, state, wait=ending)
            if asked is not None:
                raise asked
    say_what_was_lost(config.stage, log.rows(config.stage), state.params, frozen, describe_batch)
    return state


def _asked_to_stop(stop: StopFlag) -> Interrupted | None:
    """Returns what is to be raised once the step is saved; None: the stage goes on."""
    try:
        stop.check()
    except Interrupted as asked:
        return asked
    return None


class _Ran(NamedTuple):
    """A step that was given to the device."""

    step: int
    metrics: Mapping[str, jax.Array]
    prepared: Mapping[str, float]


def _prepare(
    host: HostWork | None,
    step: int,
    state: TrainState,
    save: Callable[[int, TrainState], None],
) -> dict[str, float]:
    """Runs the host's side of a step; where it fails, what was learnt so far is saved first."""
    if host is None:
        return {}
    try:
        return dict(host.before_step(step, state))
    except Exception as error:
        if several():  # the others may not have failed, and do not save
            raise
        try:
            save(step, state)
        except Exception as second:  # the first error is the one to mend
            error.add_note(f"Step {step} could not be saved: {second}")
        raise


def _resume(
    config: LoopConfig, state: TrainState, checkpointer: Checkpointer, info: dict
) -> tuple[TrainState, int, Mapping[str, Any] | None]:
    restored = checkpointer.latest_good(state)
    if restored is None:
        return state, 0, None
    for name, value in info.items():
        if restored.info.get(name) != value:
            raise ValueError(
                f"{config.stage}: the checkpoint was written with {name}="
                f"{restored.info.get(name)!r}, this run has {value!r}; use another output folder"
            )
    print(f"{config.stage}: resuming after step {restored.step} of {config.num_steps}", flush=True)
    return restored.state, restored.step, restored.info.get("host")

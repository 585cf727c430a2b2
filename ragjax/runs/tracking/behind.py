"""A tracker behind a queue: neither its errors nor its silence reach the run."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ragjax.training.loop import MetricWriter

# Rows that may wait for a tracker; what comes beyond them it does not get.
_ROOM = 10_000
# Seconds that the end of a run waits for what a tracker has not taken yet: more than W&B takes to
# find out that nobody answers.
_PATIENCE = 60.0


class Behind:
    """Hands metrics to a tracker in a thread of its own, so that no step waits for one.

    The first problem of the tracker is said once, by the thread that writes; the run goes on, and
    later rows are tried all the same.
    """

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[Callable[[str], None]], MetricWriter],
        *,
        log: Callable[[str], None],
        room: int = _ROOM,
        patience: float = _PATIENCE,
    ) -> None:
        """Starts the thread, which opens the tracker.

        Args:
            name: Of the tracker, for the warning.
            open_tracker: Returns it; takes what says a problem that the tracker itself got over.
            log: Shows one line to the user.
            room: Rows that may wait.
            patience: Seconds that `close` waits at most.
        """
        self._name, self._log, self._patience = name, log, patience
        self._problem, self._said = "", False
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(room)
        # A daemon: one that hangs must not keep the process.
        self._thread = threading.Thread(
            target=self._deliver, args=(open_tracker,), name=f"track-{name}", daemon=True
        )
        self._thread.start()

    def write(self, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes the metrics of one step; see `MetricWriter`."""
        self._put("write", stage, step, metrics)

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Takes what the run ended with."""
        self._put("summarize", metrics)

    def close(self) -> None:
        """Waits for what the tracker has not taken yet, though not for long."""
        end = time.monotonic() + self._patience
        with contextlib.suppress(queue.Full):  # it hangs
            self._calls.put(("close", ()), timeout=self._patience)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._note(f"it did not take everything within {self._patience:g} seconds")
        self._say()

    def _put(self, *call: Any) -> None:
        try:
            self._calls.put_nowait((call[0], call[1:]))
        except queue.Full:
            self._note(f"{self._calls.maxsize:,} rows wait for it")
        self._say()

    def _deliver(self, open_tracker: Callable[[Callable[[str], None]], MetricWriter]) -> None:
        tracker, method = None, ""
        with self._noted():
            tracker = open_tracker(self._note)
        while method != "close":
            method, arguments = self._calls.get()
            if tracker is not None:
                with self._noted():
                    getattr(tracker, method)(*arguments)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Keeps whatever a tracker raises from the run."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self._note(f"{type(error).__name__}: {error}")

    def _note(self, problem: str) -> None:
        self._problem = self._problem or " ".join(problem.split())

    def _say(self) -> None:
        if self._problem and not self._said:
            self._said = True
            self._log(
                f"warning: {self._name} does not take all that this run logs ({self._problem});"
                " the run goes on, and metrics.jsonl has all of it"
            )

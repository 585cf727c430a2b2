"""How long a training step takes, during a refresh and otherwise."""

import time
from collections import deque

import numpy as np

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

"""The refresher's thread: one export after the other becomes an index that is ready to serve."""

import sys
import threading
import time
from collections.abc import Callable

from ragjax.index import IndexSnapshot
from ragjax.refresh.pipeline import Submission
from ragjax.refresh.task import Cancelled
from ragjax.storage.processes import Votes, largest, several

# Indexes that no longer serve are held a little longer, until the trainer has let them go too.
_RETIRED_SECONDS = 1.0
_TELL_EVERY_SECONDS = 10.0


class Background:
    """At most one export that is worked on, one that waits, and one result to fetch."""

    def __init__(
        self,
        run: Callable[[Submission], IndexSnapshot],
        cancelled: threading.Event,
        *,
        max_retries: int,
        backoff_seconds: float,
        report: Callable[[str], None],
    ) -> None:
        """Starts no thread before there is work.

        Args:
            run: Makes an index of an export; called in the thread.
            cancelled: Set by `close`, for `run` to look at.
            max_retries: Times that a failed export is tried again.
            backoff_seconds: Wait before the first retry; it doubles each time.
            report: Called with one sentence before each retry.
        """
        self._run, self._cancelled, self._report = run, cancelled, report
        self._max_retries, self._backoff_seconds = max_retries, backoff_seconds
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        # Freeing a large index takes a while, which this thread has and a training step has not.
        self._retired: list[IndexSnapshot] = []
        self.active: Submission | None = None
        self.waiting: Submission | None = None
        self.ready: IndexSnapshot | None = None
        self.failure: BaseException | None = None
        self.failures = 0
        self.last_error = ""
        # Of the processes of a run, on the export that was handed over; None: there is none.
        self._votes: Votes | None = None

    @property
    def busy(self) -> bool:
        """True while an export is worked on or waits; of several processes that make a run, in one.

        There it is the same in all of them.
        """
        return self._votes is not None if several() else self.works

    @property
    def works(self) -> bool:
        """True while this process works on an export, or one waits."""
        return self.active is not None or self.waiting is not None

    def hand_over(self, export: Submission) -> bool:
        """Takes an export in the place of one that waits; True where none is worked on.

        Raises:
            RuntimeError: It is closed.
        """
        with self._condition:
            if self._closed:
                raise RuntimeError(
                    "The refresher is closed, by close() or by another one opened on its folder"
                )
            idle = not self.works
            self._votes = Votes() if several() else None
            self.waiting = export
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="refresh", daemon=True)
                self._thread.start()
            self._condition.notify_all()
        return idle

    def fetch(self) -> tuple[IndexSnapshot | None, BaseException | None]:
        """Returns the index that became ready and the failure since the last call; never waits.

        Where several processes make a run, all of them get theirs at the same call, or a failure.
        """
        if self._votes is not None:
            seen = self._votes(2 if self.failure is not None else self.ready is not None)
            if seen is None or not seen.all():
                return None, None
            self._votes = None
            if seen.max() == 2:
                self._fail_with_others()
        if self.ready is None and self.failure is None:  # nothing to take a lock for
            return None, None
        with self._condition:
            ready, self.ready = self.ready, None
            failure, self.failure = self.failure, None
        return ready, failure

    def _fail_with_others(self) -> None:
        """Gives up an index that another process of the run could not make."""
        self.ready = None
        self.failure = self.failure or RuntimeError("another process failed, which says why")

    def retire(self, snapshot: IndexSnapshot) -> None:
        """Takes an index that no longer serves, to be freed here."""
        with self._condition:
            self._retired.append(snapshot)
            self._condition.notify_all()

    def free_retired(self) -> None:
        """Frees what was retired; called in this thread, while it works."""
        with self._condition:
            freed, self._retired = self._retired, []
        del freed  # where no lock is held

    def newest_step(self) -> int | None:
        """Returns the step of what is ready or worked on, None where there is neither."""
        with self._condition:
            if self.active is not None:
                return self.active.step
            return None if self.ready is None else self.ready.encoder_step

    def wait(
        self, timeout: float | None, check: Callable[[], None], tell: Callable[[], None]
    ) -> bool:
        """Waits until nothing is worked on or waits.

        Args:
            timeout: In seconds; None: as long as it takes.
            check: Called about once a second; what it raises ends the waiting.
            tell: Called now and then.

        Returns:
            False after `timeout` seconds, or where it was closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        told = time.monotonic()
        with self._condition:
            while self.works:
                left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
                if left <= 0 or self._closed:
                    return False
                self._condition.wait(left)
                check()
                if time.monotonic() - told > _TELL_EVERY_SECONDS:
                    told = time.monotonic()
                    tell()
        self._votes = None  # the other processes wait for theirs at this point, too
        if several() and largest(self.failure is not None):
            self._fail_with_others()
        return True

    def close(self) -> None:
        """Gives up what is worked on and ends the thread."""
        with self._condition:
            self._closed = True
            self._cancelled.set()
            self._condition.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.ready = self.waiting = None
        self._retired.clear()

    def _work(self) -> None:
        """Turns exports into snapshots, one after the other; this thread."""
        while self._take_export():
            try:
                snapshot = self._attempts()
            except Cancelled:
                continue
            except BaseException as error:  # nothing may end this thread unseen
                with self._condition:
                    self.failure = error
            else:
                with self._condition:
                    self.ready, failure = snapshot, self.failure
                    self.failure = None
                if failure is not None:  # newer parameters made up for it before it was fetched
                    self._report(f"an earlier refresh failed for good: {describe(failure)}.")

    def _take_export(self) -> bool:
        """Waits for the next export and makes it the active one; False when closed."""
        with self._condition:
            self.active = None
            self._condition.notify_all()
        while True:
            with self._condition:
                if self._closed:
                    return False
                held = bool(self._retired)
                if self.waiting is None:
                    self._condition.wait(_RETIRED_SECONDS if held else None)
                # Freed when the lock is given back, in this thread, while no step waits for it.
                freed, self._retired = (self._retired, []) if held else ([], self._retired)
                if self.waiting is not None and not self._closed:
                    self.active, self.waiting = self.waiting, None
                    return True
            del freed

    def _attempts(self) -> IndexSnapshot:
        """Refreshes, trying again after failures, with newer parameters where there are any."""
        attempt = 0
        while True:
            assert self.active is not None, "set by the caller"
            try:
                return self._run(self.active)
            except Cancelled:
                raise
            except BaseException as error:
                if _is_ending(error):
                    raise Cancelled("the program ends") from error
                self.failures += 1
                self.last_error = describe(error)
                # The same parameters give the same embeddings: NaN stays NaN.
                hopeless = isinstance(error, ValueError) and self.waiting is None
                if attempt == self._max_retries or hopeless:
                    raise
                seconds = self._backoff_seconds * 2**attempt
                self._report(
                    f"a refresh failed ({describe(error)}); trying again in {seconds:g} s, "
                    f"{self._max_retries - attempt} attempts left."
                )
                attempt += 1
            if self._cancelled.wait(seconds):
                raise Cancelled("the refresher is closed")
            with self._condition:
                if self.waiting is not None:
                    self.active, self.waiting = self.waiting, None


def _is_ending(error: BaseException) -> bool:
    """Tells whether threads were refused because the interpreter is on its way out."""
    ending = sys.is_finalizing() or not threading.main_thread().is_alive()
    return ending and isinstance(error, RuntimeError)


def describe(error: BaseException) -> str:
    """Returns the message of an error, or its name where it has none."""
    return str(error).rstrip(".") or repr(error)

"""One piece of host work done ahead, in a thread, while the device is busy."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Ahead(Generic[Result]):
    """At most one piece of work that goes on or has a result to fetch."""

    def __init__(self) -> None:
        """Starts no thread before there is work."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._future: Future[Result] | None = None

    @property
    def pending(self) -> bool:
        """True from `submit` until `result` has fetched it."""
        return self._future is not None

    def submit(self, work: Callable[[], Result]) -> None:
        """Begins work.

        Raises:
            RuntimeError: the result of earlier work was not fetched, or it is closed.
        """
        if self._future is not None:
            raise RuntimeError("The result of the work before was not fetched.")
        self._future = self._pool.submit(work)

    def look(self) -> Result | None:
        """Waits for the result and leaves it there; None where there is none or it failed."""
        if self._future is None or self._future.exception() is not None:
            return None
        return self._future.result()

    def result(self) -> Result:
        """Waits for the result, or raises what the work raised; then there is room for more.

        Raises:
            RuntimeError: nothing was begun.
        """
        if self._future is None:
            raise RuntimeError("Nothing was begun.")
        future, self._future = self._future, None
        return future.result()

    def close(self) -> None:
        """Waits for what goes on, and drops its result."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._future = None

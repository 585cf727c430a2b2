"""Requests of one kind that wait together are computed together, one batch at a time."""

import asyncio
import collections
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

from ragjax.runs.options.checks import Options, at_least

ANSWER = "answer"
# Seconds that the first of a batch waits for others.
_TOGETHER = 0.002


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeLimits(Options):
    """How much a server takes at a time.

    Attributes:
        batch: Texts that are searched with, or encoded, at once; answers are written one by one.
        waiting: Such texts that wait at most, and so the most in a request; more are refused.
        answers: Questions that wait for an answer at most; more are refused.
        body_kb: Longest body of a request, in thousands of bytes.
        watch_seconds: Seconds between two looks for a newer generation in the run's folder.
    """

    batch: int = 32
    waiting: int = 4096
    answers: int = 32
    body_kb: int = 4000
    watch_seconds: float = 10.0

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 1, "batch", "waiting", "answers", "body_kb")
        at_least(self, 0.1, "watch_seconds")


class Kind(NamedTuple):
    """What can be computed together."""

    what: str  # "search", "query_encoder", "doc_encoder" or "answer"
    k: int = 0  # documents that are searched for


class Overloaded(Exception):
    """As many requests wait as may wait."""


class Batches:
    """Queues of what waits, one for each kind, and who empties them in turns."""

    def __init__(
        self,
        compute: Callable[[Kind, Sequence[Any]], Sequence[Any]],
        limits: ServeLimits,
        pool: Executor,
    ) -> None:
        """Starts empty.

        Args:
            compute: Takes the items of one kind, in a thread of the pool, one call at a time.
            limits: How many.
            pool: Where it is called.
        """
        self._compute, self._limits, self._pool = compute, limits, pool
        self._queues: dict[Kind, collections.deque[tuple[Any, asyncio.Future[Any]]]] = {}
        self._there = asyncio.Event()

    def waiting(self, *, answers: bool) -> int:
        """Returns how many questions wait for an answer, or how many texts for the rest."""
        return sum(len(q) for kind, q in self._queues.items() if (kind.what == ANSWER) == answers)

    def put(self, kind: Kind, items: Sequence[Any]) -> list[asyncio.Future[Any]]:
        """Queues items and returns the results to come; one that is cancelled is not computed.

        Raises:
            Overloaded: They are too many beside those that wait; none is queued.
        """
        answers = kind.what == ANSWER
        most = self._limits.answers if answers else self._limits.waiting
        if self.waiting(answers=answers) + len(items) > most:
            raise Overloaded
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Any]] = [loop.create_future() for _ in items]
        self._queues.setdefault(kind, collections.deque()).extend(zip(items, futures, strict=True))
        self._there.set()
        return futures

    async def run(self) -> None:
        """Computes what is queued, until cancelled."""
        while True:
            await self._there.wait()
            kind, queue = next(iter(self._queues.items()))
            most = 1 if kind.what == ANSWER else self._limits.batch
            if len(queue) < most:
                await asyncio.sleep(_TOGETHER)
            batch = [queue.popleft() for _ in range(min(most, len(queue)))]
            # To the end of the line, so that no kind waits for all of another.
            del self._queues[kind]
            if queue:
                self._queues[kind] = queue
            if not self._queues:
                self._there.clear()
            await self._answer(kind, [each for each in batch if not each[1].done()])

    async def _answer(self, kind: Kind, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        if not batch:
            return
        loop, items = asyncio.get_running_loop(), [item for item, _ in batch]
        try:
            results = await loop.run_in_executor(self._pool, self._compute, kind, items)
        except Exception as error:
            if len(batch) > 1:  # whose fault it is, the others shall not feel
                for each in batch:
                    await self._answer(kind, [each])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)

"""The models of a run behind a queue: one thread computes, another opens what is newer.

B texts, K documents each, D embedding size.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ragjax.data import Passage
from ragjax.refresh.task import Cancelled
from ragjax.runs.ask.asker import Asker, Reply
from ragjax.runs.serve.batches import ANSWER, Batches, Kind, ServeLimits
from ragjax.runs.serve.source import Opened, Source
from ragjax.runs.system import (
    encode_documents,
    encode_queries,
    encode_query_of,
    query_lengths,
    retrieve,
)

_LOG = logging.getLogger(__name__)
_ENCODE = {"query_encoder": encode_queries, "doc_encoder": encode_documents}
ENCODERS = tuple(_ENCODE)
MOST_DOCUMENTS = 100
# The numbers of documents that are searched for: another one would compile a program of its own.
_DEPTHS = (10, MOST_DOCUMENTS)
# Longer texts are compiled for when the first one comes.
_WARM_TOKENS = 256


class Gone(Exception):
    """Whoever asked does not listen any more."""


class NotReady(Exception):
    """The models are still being read."""


@dataclasses.dataclass(kw_only=True)
class Ask:
    """A question to be answered.

    Attributes:
        question: Its text.
        answer: The answer that is explained; None: one is written.
        span: Find the words that carry the answer.
        show: Called with the text so far, in the thread that computes.
        gone: Nobody waits for the answer any more.
    """

    question: str
    answer: str | None = None
    span: bool = True
    show: Callable[[str], object] | None = None
    gone: bool = False

    def heard(self, text: str) -> None:
        """Passes on the text so far."""
        if self.gone:
            raise Gone
        if self.show is not None:
            self.show(text)


class Found(NamedTuple):
    """A document and its score by the index."""

    passage: Passage
    score: float


class Told(NamedTuple):
    """A result and the generation that it is of."""

    generation: str
    value: Any


class Explained(NamedTuple):
    """A reply, and what reading for it took."""

    reply: Reply
    prompt_tokens: int
    ended: bool  # False: truncated at the limit of tokens


class Service:
    """Serves a run from the event loop that `start` is awaited in.

    Attributes:
        limits: How much is taken at a time.
        on_failure: Called where the run cannot be opened at all.
        failure: Why it cannot; None: it can, as far as is known.
    """

    def __init__(self, source: Source, limits: ServeLimits) -> None:
        """Names the run, which `start` opens, and how much is taken at a time."""
        self.limits, self._source = limits, source
        self.on_failure: Callable[[], None] = lambda: None
        self._opened: Opened | None = None
        self._ending = False
        self.failure: Exception | None = None

    async def start(self) -> None:
        """Begins to open the run, and to look for newer generations after that."""
        # One thread computes; the other opens what is newer, meanwhile.
        self._pool = ThreadPoolExecutor(2, "serve")
        self._batches = Batches(self._compute, self.limits, self._pool)
        self._tasks = [asyncio.create_task(work) for work in (self._watch(), self._batches.run())]

    async def stop(self) -> None:
        """Ends; whatever was asked has been answered by then."""
        self._ending = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.shutdown(cancel_futures=True)

    @property
    def opened(self) -> Opened:
        """What answers now.

        Raises:
            NotReady: Nothing does yet.
        """
        if self._opened is None:
            raise NotReady
        return self._opened

    def waiting(self) -> dict[str, int]:
        """Returns how many texts and questions wait."""
        return {
            "texts": self._batches.waiting(answers=False),
            "answers": self._batches.waiting(answers=True),
        }

    async def search(self, texts: Sequence[str], k: int) -> list[Told]:
        """Returns the k best documents of each text, each a list of `Found`.

        Raises:
            Overloaded: Too many wait.
        """
        depth = next(depth for depth in _DEPTHS if depth >= k)
        told = await asyncio.gather(*self._batches.put(Kind("search", depth), texts))
        return [each._replace(value=each.value[:k]) for each in told]

    async def embed(self, encoder: str, texts: Sequence[str]) -> list[Told]:
        """Returns the embedding `[D]` float32 of each text by one of `ENCODERS`.

        Raises:
            Overloaded: Too many wait.
        """
        return await asyncio.gather(*self._batches.put(Kind(encoder), texts))

    def ask(self, ask: Ask) -> asyncio.Future[Told]:
        """Returns the `Explained` answer to come; cancelled, it is not written.

        Raises:
            Overloaded: Too many wait.
        """
        (future,) = self._batches.put(Kind(ANSWER), [ask])
        return future

    def _compute(self, kind: Kind, items: Sequence[Any]) -> list[Told]:
        opened = self.opened  # a whole batch is of one generation
        asker = opened.asker
        if kind.what == ANSWER:
            values: Sequence[Any] = [_answer(asker, item) for item in items]
        elif kind.what == "search":
            values = _search(asker, items, kind.k)
        else:
            values = list(_ENCODE[kind.what](asker.system, items))
        return [Told(opened.name, value) for value in values]

    async def _watch(self) -> None:
        loop, seen, told = asyncio.get_running_loop(), "", ""
        while True:
            try:
                newest = await loop.run_in_executor(self._pool, self._source.newest)
                if newest != seen:
                    opened = await loop.run_in_executor(self._pool, self._open)
                    # One assignment between two batches is the whole swap.
                    self._opened, seen = opened, newest
                    _LOG.warning("serving generation %s", opened.name)
            except Exception as error:
                if self._opened is None:
                    self.failure = error
                    self.on_failure()
                    return
                if told != (told := str(error)):
                    _LOG.warning("generation %s goes on serving: %s", self._opened.name, error)
            await asyncio.sleep(self.limits.watch_seconds)

    def _open(self) -> Opened:
        opened = self._source.open()
        for done in warm_up(opened.asker, self.limits.batch):
            if self._ending:
                raise Cancelled("the server ends")
            _LOG.info("compiled: %s", done)
        return opened


def warm_up(asker: Asker, batch: int) -> Iterator[str]:
    """Compiles every shape that a batch can need; yields what was compiled, one at a time.

    Args:
        asker: What answers.
        batch: Most texts at once.
    """
    yield from asker.warm_up()
    sizes = sorted({min(2**power, batch) for power in range(batch.bit_length() + 1)})
    workspace = asker.system.workspace
    encoders = {False: workspace.query_encoder, True: workspace.encoder}
    for documents, encoder in encoders.items():
        for length in query_lengths(encoder):
            if length <= max(_WARM_TOKENS, query_lengths(encoder)[0]):
                for size in sizes:
                    encode_query_of(asker.system, length, size, documents=documents)
                yield f"{batch} texts of {length} tokens"
    for depth in _DEPTHS:
        for size in sizes:
            retrieve(asker.system, ["warm up"] * size, depth, by=asker.by)
        yield f"{depth} documents"


def _search(asker: Asker, texts: Sequence[str], k: int) -> list[list[Found]]:
    found = retrieve(asker.system, texts, k, by=asker.by).found
    corpus = asker.system.workspace.dataset.corpus
    return [
        [
            Found(corpus[int(doc)], float(score))
            for doc, score in zip(docs[kept], scores[kept], strict=True)
        ]
        for docs, scores, kept in zip(*found, strict=True)
    ]


def _answer(asker: Asker, ask: Ask) -> Explained:
    ask.heard("")
    answer = asker.answer(ask.question, answer=ask.answer, show=ask.heard)
    contexts = answer.prompt.contexts or [answer.prompt.closed_book]
    read, ended = sum(map(len, contexts)), answer.generated.ended
    return Explained(asker.explain(answer, span=ask.span), read, ended)

"""Retrieval with live queries before each step, from an index that is kept fresh meanwhile.

How fresh, is one switch (`Freshness`):

| mode | document tower | index |
|---|---|---|
| frozen | trained | the one of the start: it grows stale |
| query_only | not trained | the one of the start: it stays fresh |
| rerank | trained | as frozen, but its best documents are encoded live and ranked again |
| sync | trained | built again when the trigger says so; training waits |
| async | trained | built again meanwhile; training goes on with the old one |

B questions a step, K documents each, D embedding size.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ragjax.index import EmbeddingStore, HostIndex, IndexSnapshot, SearchResult
from ragjax.index.base import empty_result
from ragjax.refresh import Never, Refresher, Trigger, live_embeddings, rerank
from ragjax.refresh.gauges import index_metrics
from ragjax.refresh.task import EncodeTask
from ragjax.storage.processes import SameInAll
from ragjax.training.steps import TrainState

Freshness = Literal["frozen", "query_only", "rerank", "sync", "async"]


class StepQueries(NamedTuple):
    """The questions of a step and what they are searched in."""

    snapshot: IndexSnapshot
    rows: NDArray[np.int64]  # [B] examples
    embeddings: NDArray[np.float32]  # [B, D]
    doc_params: Any  # live parameters of the document encoder


StepSearch = Callable[[StepQueries, int], SearchResult]  # (queries, k) -> the k best


class StepDocuments(NamedTuple):
    """What a step learns from."""

    step: int
    rows: NDArray[np.int64]  # [B] examples of the step
    found: SearchResult  # [B, K]
    # Of the index that was searched, which may not be the one that serves by then; empty: unknown.
    index: Mapping[str, float] = {}


def refresh_trigger(mode: Freshness, trigger: Trigger) -> Trigger:
    """Returns when a mode refreshes: as `trigger` says, or never."""
    return trigger if mode in ("sync", "async") else Never()


def search_dense(queries: StepQueries, k: int) -> SearchResult:
    """Searches the active index."""
    return queries.snapshot.index.search(queries.embeddings, k)


def search_reranked(task: EncodeTask, *, factor: int) -> StepSearch:
    """Returns a search that takes `factor` x k documents and ranks them by live embeddings.

    Args:
        task: The documents and their encoder.
        factor: Documents considered for each one returned.

    Raises:
        ValueError: `factor` is less than 1.
    """
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")

    def search(queries: StepQueries, k: int) -> SearchResult:
        depth = min(factor * k, max(k, queries.snapshot.index.size))
        live = live_embeddings(task, queries.doc_params)
        return rerank(search_dense(queries, depth), queries.embeddings, live, k)

    return search


class LiveRetrieval:
    """The host's side of a step: the refresher's callback, query embeddings, the search."""

    def __init__(
        self,
        open_refresher: Callable[[Callable[[], Any]], Refresher],
        *,
        towers: Callable[[Any], tuple[Any, Any]],
        encode_queries: Callable[[Any, NDArray[np.int64]], NDArray[np.float32]],
        rows_at: Callable[[int], NDArray[np.int64]],
        k: int,
        search: StepSearch = search_dense,
        store: EmbeddingStore | None = None,
    ) -> None:
        """Takes its parts.

        Args:
            open_refresher: Makes the refresher, not started, of what returns the live parameters
                of the query encoder; whoever opens this closes `refresher`.
            towers: Trainable parameters to those of the query and of the document encoder.
            encode_queries: (query parameters, examples [B]) to `[B, D]`.
            rows_at: Step to its examples `[B]`, a pure function.
            k: Documents for each question.
            search: Finds them.
            store: Embeddings of the documents with the parameters of the first step, where there
                are any, so that the first index needs no encoding.
        """
        self._towers, self._encode_queries = towers, encode_queries
        self._rows_at, self._k, self._search = rows_at, k, search
        self._store = store
        self._params: tuple[Any, Any] = (None, None)
        self.refresher = open_refresher(lambda: self.query_params)
        self._retrieved: StepDocuments | None = None
        self._same = SameInAll("documents retrieved")

    @property
    def doc_params(self) -> Any:
        """Live parameters of the document encoder, valid until the step that follows."""
        return self._params[1]

    @property
    def query_params(self) -> Any:
        """Live parameters of the query encoder, valid until the step that follows."""
        return self._params[0]

    def retrieved(self, step: int) -> StepDocuments:
        """Returns what `before_step(step)` found, for `batch_at(step)`.

        Raises:
            RuntimeError: Another step was prepared.
        """
        if self._retrieved is None or self._retrieved.step != step:
            raise RuntimeError(f"Step {step} was not prepared; run_steps(host=...) does that")
        return self._retrieved

    def resume(self, step: int, state: TrainState, saved: Mapping[str, Any] | None) -> None:
        """Opens or builds the index that the step starts from."""
        self._params = self._towers(state.params)
        store = self._store if saved is None and step == 0 else None
        self.refresher.start(self.doc_params, step=step, state=saved, store=store)

    def before_step(self, step: int, state: TrainState) -> dict[str, float]:
        """Refreshes what is due and retrieves for the step; returns the metrics of both."""
        started = time.perf_counter()
        snapshot = self.advance(step, state)
        updated = time.perf_counter()
        self._retrieved = self.look_up(step, snapshot)()
        return self.note(self._retrieved) | {
            "index/callback_seconds": updated - started,
            "index/search_seconds": time.perf_counter() - updated,
        }

    def advance(self, step: int, state: TrainState) -> IndexSnapshot:
        """Takes the parameters of the step and refreshes what is due; returns what serves."""
        self._params = self._towers(state.params)
        return self.refresher.update(step, self.doc_params)

    def look_up(self, step: int, snapshot: IndexSnapshot) -> Callable[[], StepDocuments]:
        """Embeds the questions of a step with the parameters of now; the search itself can wait.

        Returns:
            The search, which may run in another thread: unless it ranks again by the live document
            encoder (`search_reranked`), it needs none of the parameters.
        """
        rows = self._rows_at(step)
        embeddings = self._encode_queries(self.query_params, rows)
        queries = StepQueries(snapshot, rows, embeddings, self.doc_params)
        index = index_metrics(snapshot, step)
        return lambda: StepDocuments(step, rows, self._search(queries, self._k), index)

    def note(self, retrieved: StepDocuments) -> dict[str, float]:
        """Counts what a step retrieved; returns its metrics and those of the index searched."""
        found, metrics = retrieved.found, self.refresher.metrics(retrieved.step)
        self._same.check(retrieved.rows.tobytes() + found.doc_ids.tobytes())
        self.refresher.note_retrieved(found.doc_ids, found.mask)
        if retrieved.index:
            served = index_metrics(self.refresher.snapshot, retrieved.step)
            metrics = {k: v for k, v in metrics.items() if k not in served} | dict(retrieved.index)
        return metrics | {"retrieval/short": float((~found.mask).any(axis=1).mean())}

    def search(
        self, snapshot: IndexSnapshot, rows: NDArray[np.int64], embeddings: NDArray[np.float32]
    ) -> SearchResult:
        """Returns the documents of some questions `[B, K]` by their embeddings, without JAX."""
        on_host = dataclasses.replace(snapshot, index=HostIndex(snapshot.index))
        return self._search(StepQueries(on_host, rows, embeddings, None), self._k)

    def nothing(self, rows: int) -> SearchResult:
        """Returns what a search that finds nothing returns for so many questions."""
        return empty_result(rows, self._k)

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """Returns the questions of a step, `[B]`."""
        return self._rows_at(step)

    def state_dict(self) -> dict[str, Any]:
        """Returns which index serves, for the checkpoint."""
        return self.refresher.state_dict()

    def line(self, step: int) -> str:
        """Returns which index serves and what goes on."""
        return self.refresher.line(step)

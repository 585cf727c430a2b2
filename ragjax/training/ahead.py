"""Retrieval and host work for step n+1 while step n runs.

B questions a step, K documents each.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ragjax.index.base import NO_DOC, IndexSnapshot, pad_result
from ragjax.training.live import LiveRetrieval, StepDocuments
from ragjax.training.steps import TrainState

_AHEAD = "ahead"


class Prepared(NamedTuple):
    """What a step learns from, ready for the device."""

    retrieved: StepDocuments
    batch: Any
    metrics: Mapping[str, float]
    seconds: float  # that search and preparation took


class AheadRetrieval:
    """The host's side of a step whose documents were retrieved during the step before.

    The questions of step n+1 are embedded with the parameters that step n starts from, just before
    it; searching, tokenising and padding then go on in a thread while the device computes step n.
    The scores of what is found are live in any case. A checkpoint keeps what was found for the step
    that follows it, so a run that is continued takes the very steps of an uninterrupted one.
    """

    def __init__(
        self,
        retrieval: LiveRetrieval,
        prepare: Callable[[StepDocuments], tuple[Any, Mapping[str, float]]],
        *,
        num_steps: int,
        overlap: bool = True,
        max_lag: int = 0,
    ) -> None:
        """Takes its parts.

        Args:
            retrieval: Finds the documents; whoever made it closes its refresher.
            prepare: Makes the batch of a step, and its metrics, of what was retrieved; called in
                the thread.
            num_steps: Steps of the stage; nothing is retrieved for more.
            overlap: False: each step's documents are retrieved just before it, with its own
                parameters. Needed where the search uses live parameters (`search_reranked`).
            max_lag: Most steps that the index searched may lag behind the step; 0: no limit. Where
                it would lag by more, the step's documents are retrieved just before it, from the
                index that serves then.
        """
        self.retrieval, self._prepare = retrieval, prepare
        self._num_steps, self._overlap, self._max_lag = num_steps, overlap, max_lag
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._ahead: Future[Prepared] | None = None  # of the next step
        self._prepared: Prepared | None = None

    def batch_at(self, step: int) -> Any:
        """Returns the batch that `before_step(step)` got ready.

        Raises:
            RuntimeError: Another step was prepared.
        """
        if self._prepared is None or self._prepared.retrieved.step != step:
            raise RuntimeError(f"Step {step} was not prepared; run_steps(host=...) does that")
        return self._prepared.batch

    def resume(self, step: int, state: TrainState, saved: Mapping[str, Any] | None) -> None:
        """Opens or builds the index, and takes up what had been retrieved for the step."""
        kept = dict(saved) if saved is not None else None
        ahead = kept.pop(_AHEAD, None) if kept else None
        self.retrieval.resume(step, state, kept)
        if ahead is not None and ahead["step"] == step and self._overlap:
            retrieved = _from_json(ahead)
            self._ahead = self._pool.submit(self._work, lambda: retrieved)

    def before_step(self, step: int, state: TrainState) -> dict[str, float]:
        """Fetches what was prepared for this step and begins to prepare the next one."""
        started = time.perf_counter()
        snapshot = self.retrieval.advance(step, state)
        updated = time.perf_counter()
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            self._prepared = ahead.result()
        else:
            self._prepared = self._work(self.retrieval.look_up(step, snapshot))
        waited = time.perf_counter() - updated
        metrics = self.retrieval.note(self._prepared.retrieved)
        if self._may_search_for(step + 1, snapshot):
            search = self.retrieval.look_up(step + 1, snapshot)
            self._ahead = self._pool.submit(self._work, search)
        return metrics | {
            "index/callback_seconds": updated - started,
            "index/search_seconds": self._prepared.seconds,
            "retrieval/wait_seconds": waited,
            **self._prepared.metrics,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns which index serves and what was retrieved for the next step."""
        state = dict(self.retrieval.state_dict())
        # What failed comes up at its step; until then a checkpoint can be written all the same.
        if self._ahead is None or self._ahead.exception() is not None:
            return state
        return state | {_AHEAD: _to_json(self._ahead.result().retrieved)}

    def line(self, step: int) -> str:
        """Returns which index serves and what goes on."""
        return self.retrieval.line(step)

    def close(self) -> None:
        """Ends the thread and the refresher."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.retrieval.refresher.close()

    def _may_search_for(self, step: int, snapshot: IndexSnapshot) -> bool:
        if not self._overlap or step >= self._num_steps:
            return False
        return not self._max_lag or snapshot.staleness_steps(step) <= self._max_lag

    def _work(self, search: Callable[[], StepDocuments]) -> Prepared:
        started = time.perf_counter()
        retrieved = search()
        batch, metrics = self._prepare(retrieved)
        return Prepared(retrieved, batch, metrics, time.perf_counter() - started)


def _to_json(retrieved: StepDocuments) -> dict[str, Any]:
    found = retrieved.found
    return {
        "step": retrieved.step,
        "rows": retrieved.rows.tolist(),
        "doc_ids": np.where(found.mask, found.doc_ids, NO_DOC).tolist(),
        # Infinity in masked slots is no JSON.
        "scores": np.where(found.mask, found.scores, 0.0).tolist(),
        "index": dict(retrieved.index),
    }


def _from_json(saved: Mapping[str, Any]) -> StepDocuments:
    doc_ids = np.asarray(saved["doc_ids"], np.int32)
    found = pad_result(doc_ids, np.asarray(saved["scores"], np.float32), doc_ids.shape[1])
    rows, index = np.asarray(saved["rows"], np.int64), saved.get("index", {})
    return StepDocuments(int(saved["step"]), rows, found, index)

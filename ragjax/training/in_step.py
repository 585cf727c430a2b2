"""Retrieval inside the compiled step: its program calls back to the host for the documents.

Query embeddings, search, scores and gradient are one program. Between two steps the exported
document encoder refreshes the index, and the next step searches what serves then, without compiling
again. B questions a step, D embedding size.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from ragjax.index import IndexSnapshot, call_host
from ragjax.models.inputs import Tokens
from ragjax.training.end_to_end import RagBatch
from ragjax.training.live import LiveRetrieval, StepDocuments
from ragjax.training.lsr import Encode, gathered, towers
from ragjax.training.steps import LossFn, Metrics, TrainState

# (documents of a step) -> the fields of their `RagBatch` as arrays of numpy, and metrics
Prepare = Callable[[StepDocuments], tuple[dict[str, Any], Mapping[str, float]]]


# Metrics of a step that its program learns when it searches.
_SAID = ("index/searched", "retrieval/short", "retrieval/recall")


class StepInputs(NamedTuple):
    """What a step knows before it retrieves."""

    step: Array  # [B] int32, the same number
    rows: Array  # [B] int32 questions
    queries: Tokens  # [B, L]
    no_negatives: Array  # [B, R] int32 documents that are no negatives of the question; padded: -3


class InStepRetrieval:
    """The host's side of a step whose program retrieves."""

    def __init__(
        self, retrieval: LiveRetrieval, prepare: Prepare, inputs_at: Callable[[int], StepInputs]
    ) -> None:
        """Takes its parts.

        Args:
            retrieval: Finds the documents; whoever made it closes its refresher.
            prepare: Makes the arrays of a batch; called while the program waits, so without JAX.
            inputs_at: Step to what the program is given, a pure function.
        """
        self.retrieval, self._prepare, self.batch_at = retrieval, prepare, inputs_at
        # The program of a step may begin to search only after the next one was prepared.
        self._snapshots: deque[tuple[int, IndexSnapshot]] = deque(maxlen=3)
        self.failure: Exception | None = None

    def documents(
        self, embeddings: NDArray[np.float32], step: NDArray[np.int32], rows: NDArray[np.int32]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what the program goes on with; remembers what was raised, see `failure`."""
        try:
            snapshot = dict(self._snapshots)[int(step[0])]
            questions = rows.astype(np.int64)
            found = self.retrieval.search(snapshot, questions, embeddings)
            self.retrieval.refresher.note_retrieved(found.doc_ids, found.mask)
            arrays, metrics = self._prepare(StepDocuments(int(step[0]), questions, found))
            short = float((~found.mask).any(axis=1).mean())
            recall = metrics.get("retrieval/recall", np.nan)  # of no question is anything known
            said = dict(zip(_SAID, (snapshot.version, short, recall), strict=True))
            return arrays, {name: np.float32(value) for name, value in said.items()}
        except Exception as error:
            self.failure = error
            raise

    def shapes_of(self, rows: int) -> Any:
        """Returns the shapes of what `documents` returns for so many questions."""
        inputs = self.batch_at(0)
        empty = StepDocuments(
            0, np.asarray(inputs.rows[:rows], np.int64), self.retrieval.nothing(rows)
        )
        arrays, _ = self._prepare(empty)
        shape = jax.ShapeDtypeStruct
        described = jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype), arrays)
        return described, dict.fromkeys(_SAID, shape((), jnp.float32))

    def resume(self, step: int, state: TrainState, saved: Mapping[str, Any] | None) -> None:
        """Opens or builds the index that the step starts from."""
        self.retrieval.resume(step, state, saved)

    def before_step(self, step: int, state: TrainState) -> Mapping[str, float]:
        """Refreshes what is due, and says what the step will search."""
        started = time.perf_counter()
        self._snapshots.append((step, self.retrieval.advance(step, state)))
        seconds = time.perf_counter() - started
        metrics = self.retrieval.refresher.metrics(step)
        return {**metrics, "index/callback_seconds": seconds}

    def state_dict(self) -> Mapping[str, Any]:
        """Returns which index serves, for the checkpoint."""
        return self.retrieval.state_dict()

    def line(self, step: int) -> str:
        """Returns which index serves and what goes on."""
        return self.retrieval.line(step)

    def close(self) -> None:
        """Ends the refresher."""
        self.retrieval.refresher.close()


def make_in_step_loss(
    loss_fn: LossFn,
    host: InStepRetrieval,
    encode_queries: Encode,
    *,
    merge_tower: Callable[[Any, Any], Any] | None = None,
    axis_name: str | None = None,
    divide: Callable[[Any], Any] = lambda batch: batch,
) -> LossFn:
    """Builds a loss over `StepInputs` that retrieves its documents and is `loss_fn` of them.

    Args:
        loss_fn: Of `make_rag_loss`.
        host: Searches and prepares.
        encode_queries: `(params, tokens) -> [B, D]`.
        merge_tower: As of `make_rag_loss`.
        axis_name: As of `make_rag_loss`: each device calls back for its own questions.
        divide: Gives the rows of what the host returned to the devices.

    Gradients:
        As `loss_fn`; none through the search.
    """

    def loss(
        params: Any, frozen: Any, batch: StepInputs, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        trained = {name: part for name, part in params.items() if name != "lm"}
        query_params, _ = towers(trained, frozen["towers"], merge_tower)
        queries = encode_queries(query_params, batch.queries)
        shapes = host.shapes_of(len(batch.rows))
        arrays, said = call_host(host.documents, shapes, queries, batch.step, batch.rows)
        found = RagBatch(queries=batch.queries, **divide(arrays))
        ids = gathered(found.doc_ids.reshape(-1), axis_name)  # [M]
        relevant = (ids[None, :, None] == batch.no_negatives[:, None, :]).any(axis=2)
        value, metrics = loss_fn(params, frozen, found._replace(relevant=relevant), key)
        return value, metrics | said

    return loss


@contextmanager
def failures_of(host: Any) -> Iterator[None]:
    """Raises what failed on the host in place of the error of the program that called for it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        failure = getattr(host, "failure", None)
        if failure is None:
            raise
        raise failure from error

"""The end-to-end step of benchmarks/accelerator.py, and what re-indexing meanwhile costs it.

B questions, K documents each, N documents in all, L and T tokens.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _accelerator_models import PAD_ID, SCALE, Bench, Timing
from _accelerator_parts import Sides, adapter_size, lm_forward_flops, towers_flops
from numpy.typing import NDArray

from ragjax.models import Tokens
from ragjax.refresh import EncodeTask, Refresher, RefreshOptions
from ragjax.refresh.encode import encode_token_ids
from ragjax.training.ahead import AheadRetrieval
from ragjax.training.end_to_end import (
    LMReader,
    RagBatch,
    make_rag_loss,
    separate_reader,
    sequence_term,
)
from ragjax.training.in_step import InStepRetrieval, StepInputs, failures_of, make_in_step_loss
from ragjax.training.live import LiveRetrieval, StepDocuments
from ragjax.training.lsr import towers
from ragjax.training.steps import init_state, make_train_step

_NO_DOCUMENT = -3  # pads the documents that are no negatives
# Times as many steps that are taken at most until an index is there that was built meanwhile.
_PATIENCE = 6


class RagLoop:
    """Training steps end to end as a run takes them, without its files."""

    def __init__(self, bench: Bench, folder: Path, *, callback: bool) -> None:
        """Takes the devices.

        Args:
            bench: Models and sizes.
            folder: Of the index.
            callback: The compiled step retrieves; else documents are found during the step before.
        """
        self._bench, self._folder = bench, folder
        self.reindexing = False  # True: the next index is begun as soon as the last one is there
        sizes, split = bench.sizes, bench.split("lora")
        self._queries = bench.draw(sizes.encoder.vocab_size, sizes.corpus, sizes.query_tokens)
        self._docs, self._contexts = self._tables()
        self._targets = bench.draw(sizes.decoder.vocab_size, sizes.corpus, sizes.answer_tokens)
        self.retrieval = LiveRetrieval(
            self._open_refresher,
            towers=lambda trainable: towers({n: trainable[n] for n in ("query", "doc")}, None),
            encode_queries=self._encode_queries,
            rows_at=self._rows_at,
            k=sizes.documents,
        )
        loss = make_rag_loss(
            bench.encode,
            LMReader(separate_reader(bench.lm_log_probs)),
            {"marginal": (1.0, sequence_term)},
            scale=SCALE,
            chunk_tokens=bench.chunk_tokens,
            merge_lm=split.merge,
        )
        if callback:
            self._host: Any = InStepRetrieval(self.retrieval, self._arrays, self._inputs_at)
            loss = make_in_step_loss(loss, self._host, bench.encode, divide=bench.layout.divide)
        else:
            self._host = AheadRetrieval(self.retrieval, self._prepare, num_steps=2**31 - 1)
        self._update = make_train_step(loss, bench.optimizer)
        trainable = bench.towers | {"lm": split.trainable}
        place = bench.layout.place
        self._state = place(init_state(trainable, bench.optimizer, 0))
        self._frozen = {"lm": place(split.frozen), "towers": {}}
        self._step = 0
        self._running: Any = None
        self.metrics: Any = None  # of the last step that has ended
        self._host.resume(0, self._state, None)

    def steps(self, count: int) -> list[float]:
        """Takes some steps and returns the seconds from each one's end to the next one's."""
        ended = [time.perf_counter()]
        with failures_of(self._host):
            for _ in range(count):
                refresher = self.retrieval.refresher
                if self.reindexing and not refresher.busy:
                    refresher.submit(self._state.params["doc"], self._step)
                self._host.before_step(self._step, self._state)
                batch = self._bench.spread(self._host.batch_at(self._step), self._state.params)
                self._state, metrics = self._update(self._state, batch, self._frozen)
                # As a run does: a step is waited for while the next one runs.
                self.metrics, self._running = self._running, metrics
                jax.block_until_ready(self.metrics)
                self._step += 1
                ended.append(time.perf_counter())
        return np.diff(ended).tolist()

    @property
    def indexes(self) -> int:
        """How many indexes have been built meanwhile."""
        return self.retrieval.refresher.snapshot.version

    def close(self) -> None:
        """Waits for the last step, and ends the refresher."""
        jax.block_until_ready(self._running)
        self._host.close()

    def _open_refresher(self, query_params: Callable[[], Any]) -> Refresher:
        del query_params  # for probes, which are no part of the work
        bench = self._bench
        task = EncodeTask(
            encode=bench.encode,
            documents=bench.texts[: bench.sizes.corpus],
            pad_id=PAD_ID,
            options=bench.encode_options,
            corpus_fingerprint="benchmark",
            rows_per_shard=8192,
        )
        options = RefreshOptions(index="exact", devices=bench.layout.devices)
        return Refresher(self._folder, task, options=options, report=print)

    def _rows_at(self, step: int) -> NDArray[np.int64]:
        count = self._bench.sizes.questions * self._bench.rows
        return (np.arange(count, dtype=np.int64) + step * count) % self._bench.sizes.corpus

    def _encode_queries(self, params: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        bench = self._bench
        asked = self._queries[rows].tolist()
        return encode_token_ids(
            bench.encode, params, asked, pad_id=PAD_ID, options=bench.encode_options
        )

    def _tables(self) -> tuple[Tokens, Tokens]:
        """Returns all documents, and as contexts, padded on the left: `[N, L]` each."""
        sizes, texts = self._bench.sizes, self._bench.texts
        filled = []
        for length, left in ((sizes.doc_tokens, False), (sizes.context_tokens, True)):
            ids = np.full((sizes.corpus, length), PAD_ID, np.int32)
            mask = np.zeros(ids.shape, bool)
            for row, text in enumerate(texts[: sizes.corpus]):
                # A context holds the question as well.
                cut = text[: length - left * sizes.query_tokens] if left else text[:length]
                cut = [*cut, *self._queries[row]] if left else cut
                where = slice(length - len(cut), None) if left else slice(len(cut))
                ids[row, where], mask[row, where] = cut, True
            filled.append(Tokens._make((ids, mask)))
        docs, contexts = filled
        return docs, contexts._replace(ids=contexts.ids % sizes.decoder.vocab_size)

    def _arrays(self, found: StepDocuments) -> tuple[dict[str, Any], Mapping[str, float]]:
        """Returns the fields of a batch but its questions, with numpy alone."""
        doc_ids, targets = found.found.doc_ids, self._targets[found.rows]
        arrays = {
            "docs": Tokens(*(leaf[doc_ids] for leaf in self._docs)),
            "doc_ids": doc_ids,
            "doc_mask": found.found.mask,
            "context_ids": self._contexts.ids[doc_ids],
            "context_mask": self._contexts.mask[doc_ids],
            "target_ids": targets,
            "target_mask": np.ones(targets.shape, bool),
        }
        return arrays, {}

    def _asked(self, rows: NDArray[np.int64]) -> Tokens:
        return Tokens._make((self._queries[rows], np.ones(self._queries[rows].shape, bool)))

    def _prepare(self, found: StepDocuments) -> tuple[RagBatch, Mapping[str, float]]:
        arrays, metrics = self._arrays(found)
        batch = RagBatch(queries=self._asked(found.rows), **arrays)
        return self._bench.spread(batch, self._bench.lm_params), metrics

    def _inputs_at(self, step: int) -> StepInputs:
        rows = self._rows_at(step)
        nothing = np.full((len(rows), 1), _NO_DOCUMENT, np.int32)
        steps = np.full(len(rows), step, np.int32)
        return StepInputs._make((steps, rows.astype(np.int32), self._asked(rows), nothing))


def rag_flops(bench: Bench, devices: int = 0) -> float:
    """Returns the operations of a step: the language model learns adapters, both towers learn."""
    sizes, rows = bench.sizes, bench.sizes.questions * bench.sizes.documents
    tokens = rows * (devices or bench.rows) * (sizes.context_tokens + sizes.answer_tokens - 1)
    lm = 2 * lm_forward_flops(bench, devices) + 6.0 * adapter_size(bench) * tokens
    return lm + 3 * towers_flops(bench, devices)


def rag_step_host(bench: Bench) -> Sides:
    """Measures the step whose documents are found during the step before."""
    return {"ragjax": _measure(bench, _host_loop(bench))}


def rag_step_callback(bench: Bench) -> Sides:
    """Measures the step that calls back to the host for its documents."""
    loop = RagLoop(bench, bench.folder / "callback", callback=True)
    try:
        return {"ragjax": _measure(bench, loop)}
    finally:
        loop.close()


def refresh(bench: Bench) -> Sides:
    """Measures steps alone, and steps during which one index after the other is built."""
    loop = _host_loop(bench)
    try:
        alone = loop.steps(bench.sizes.steps + 2)[2:]
        begun, loop.reindexing, during = loop.indexes, True, []
        while len(during) < bench.sizes.steps or (
            loop.indexes == begun and len(during) < _PATIENCE * bench.sizes.steps
        ):
            during += loop.steps(1)
        loop.reindexing = False
        built = loop.indexes - begun
    finally:
        bench.forget("rag_loop")
        loop.close()
    documents = bench.sizes.corpus
    return {
        "without": bench.result(Timing(alone[0], alone), steps=1),
        "during": bench.result(Timing(during[0], during), steps=1)
        | {"indexes_built": built, "documents": documents},
    }


def _host_loop(bench: Bench) -> RagLoop:
    def make() -> RagLoop:
        return RagLoop(bench, bench.folder / "host", callback=False)

    return bench.keep("rag_loop", make)


def _measure(bench: Bench, loop: RagLoop) -> dict[str, Any]:
    first = loop.steps(3)
    timing = Timing(first[0], loop.steps(bench.sizes.steps))
    loss = float(loop.metrics["loss"])
    if not np.isfinite(loss):
        raise ValueError(f"the loss of the step is {loss}: what was timed is no step of training")
    questions = bench.sizes.questions * bench.rows
    return bench.result(timing, flops=rag_flops(bench), steps=1, questions=questions)

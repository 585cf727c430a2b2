"""Batches of an end-to-end run: retrieved documents as token arrays of one fixed shape.

B questions a step, K retrieved documents, S document slots, M = B * S.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.data import encode_texts, pad_right
from ragjax.index import SearchResult
from ragjax.models.inputs import Tokens
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.tokens import bucket_of, training_prompts, truncated
from ragjax.runs.train.statements import shown
from ragjax.runs.workspace import Workspace
from ragjax.training.end_to_end import NO_SLOT, NULL_DOC, RagBatch
from ragjax.training.in_step import StepInputs
from ragjax.training.live import StepDocuments
from ragjax.training.mesh import spread_rows

_CONTEXT_MULTIPLE = 32
# Fills up the documents that are no negatives of a question: no slot of a batch holds it.
_NOTHING = NO_SLOT - 1


class RagBatches:
    """Turns the results of a step into its batch; every step has the same shapes.

    Attributes:
        num_retrieved: K without the null document.
        context_tokens: Tokens of a context and its target, padding included.
        doc_tokens: Tokens of a document for the encoder, padding included.
    """

    def __init__(
        self,
        workspace: Workspace,
        config: RagConfig,
        *,
        sources: Sequence[frozenset[int]] | None = None,
    ) -> None:
        """Tokenises the training questions and answers.

        Args:
            workspace: Data and models.
            config: Options of the run.
            sources: Corpus rows that each question was made from, or that are itself, which are no
                negatives of it; None: they are as any other.
        """
        self._workspace, self._config = workspace, config
        encoder, query_ids = workspace.encoder, workspace.train_query_ids
        asked = workspace.query_encoder
        self._questions = workspace.questions["train"]
        self._prompts = training_prompts(workspace.config.prompt, workspace.lm)
        self._queries = pad_right(
            query_ids, length=bucket_of(asked, max(map(len, query_ids))), pad_id=asked.pad_id
        )
        self._targets = pad_right(
            [self._prompts.target(question.answers[0]) for question in self._questions],
            length=self._prompts.max_target_length,
            pad_id=self._prompts.pad_id,
        )
        self._relevant, self._sources = workspace.relevant_rows("train"), sources
        judged = self._relevant if config.objective.contrastive_weight else []
        self._no_negatives = _padded(len(self._questions), judged, sources or [])
        self._context_length = self._longest_context()
        self._null_ids = encode_texts(
            encoder.tokenizer, [encoder.doc_prefix], max_length=encoder.max_length
        ).ids[0]
        self.num_retrieved = min(config.training.documents, len(workspace.doc_tokens))
        self.context_tokens = self._context_length + self._prompts.max_target_length
        longest = int(workspace.doc_tokens.lengths.max())
        self.doc_tokens = bucket_of(encoder, min(config.retriever.doc_tokens, longest))

    def prepare(self, retrieved: StepDocuments) -> tuple[RagBatch, Mapping[str, float]]:
        """Returns the batch of a step and the recall of its candidates."""
        arrays, metrics = self.arrays(retrieved)
        rows = retrieved.rows
        arrays["queries"] = self._queries_of(rows)
        arrays["relevant"] = self._relevant_among(rows, arrays["doc_ids"])
        batch = RagBatch(**jax.tree.map(jnp.asarray, arrays))
        if not self._workspace.layout.rows_axis:  # else the step gives them out
            batch = spread_rows(batch, self._workspace.lm.params)
        return batch, metrics

    def inputs(self, step: int, rows: np.ndarray) -> StepInputs:
        """Returns what a step that retrieves by itself is given: its questions."""
        steps = np.full(len(rows), step, np.int32)
        known = (self._queries_of(rows), self._no_negatives[rows])
        return StepInputs._make([steps, rows.astype(np.int32), *known])

    def arrays(self, retrieved: StepDocuments) -> tuple[dict[str, Any], Mapping[str, float]]:
        """Returns the fields of a step's batch but `queries` and `relevant`, and the recall.

        Made without JAX, so that a compiled step may call back for them.
        """
        rows, results = retrieved.rows, retrieved.found
        doc_ids, mask = self._candidates(results)
        contexts = [
            self._context(row, doc)
            for row, docs in zip(rows, np.where(mask, doc_ids, NULL_DOC).tolist(), strict=True)
            for doc in docs
        ]
        packed = self._prompts.pack(
            contexts, [[]] * len(contexts), context_length=self._context_length
        )
        shape = (*mask.shape, self._context_length)
        target_ids, target_mask = (part[rows] for part in self._targets)
        positive, slots = self._slots(rows, doc_ids, mask)
        arrays = dict(
            docs=self._docs(slots),
            doc_ids=slots,
            doc_mask=mask,
            context_ids=packed.context_ids.reshape(shape),
            context_mask=packed.context_mask.reshape(shape),
            target_ids=target_ids,
            target_mask=target_mask,
            positive=positive,
        )
        return arrays, self._recall(rows, results)

    def _queries_of(self, rows: np.ndarray) -> Tokens:
        return Tokens._make(part[rows] for part in self._queries)

    def _candidates(self, results: SearchResult) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and mask `[B, K]`, the null document last."""
        doc_ids = np.where(results.mask, results.doc_ids, NO_SLOT).astype(np.int32)
        if not self._config.training.null_document:
            return doc_ids, results.mask
        return _with_column(doc_ids, NULL_DOC), _with_column(results.mask, True)

    def _context(self, row: int, doc: int) -> list[int]:
        documents = [] if doc == NULL_DOC else self._workspace.documents.get([doc])
        return self._prompts.context(shown(self._questions[row]), documents)

    def _slots(self, rows: np.ndarray, doc_ids: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        """Returns the slot of a relevant document of each question, and all slots.

        Without the contrastive term the slots are the candidates, and labels are not used.
        """
        if not self._config.objective.contrastive_weight:
            return None, doc_ids
        slots = _with_column(doc_ids, NO_SLOT)
        positive = np.full(len(rows), -1, np.int32)
        relevant = [self._relevant[row] for row in rows]
        for row, docs in enumerate(relevant):
            there = np.flatnonzero(mask[row] & np.isin(doc_ids[row], list(docs)))
            if there.size:
                positive[row] = there[0]
            elif docs:
                slots[row, -1] = min(docs)
                positive[row] = doc_ids.shape[1]
        return positive, slots

    def _relevant_among(self, rows: np.ndarray, slots: np.ndarray) -> np.ndarray | None:
        """Returns which documents of the batch are no negatives of a question, `[B, M]` bool."""
        if not (self._config.objective.contrastive_weight or self._sources):
            return None
        return (slots.reshape(1, -1, 1) == self._no_negatives[rows][:, None]).any(axis=2)

    def _docs(self, slots: np.ndarray) -> Tokens:
        special: dict[int, list[int]] = {NULL_DOC: self._null_ids, NO_SLOT: []}
        ids = [
            special[doc]
            if doc in special
            else truncated(self._workspace.doc_tokens[doc], self.doc_tokens)
            for doc in slots.reshape(-1).tolist()
        ]
        tokens = pad_right(ids, length=self.doc_tokens, pad_id=self._workspace.encoder.pad_id)
        return Tokens._make(leaf.reshape(*slots.shape, -1) for leaf in tokens)

    def _longest_context(self) -> int:
        """Returns one length for the contexts of all steps, so that the step is compiled once."""
        longest_document = [0] * self._prompts.template.max_document_tokens
        longest = max(
            len(self._prompts.context(shown(question), [longest_document]))
            for question in self._questions
        )
        whole = -(-longest // _CONTEXT_MULTIPLE) * _CONTEXT_MULTIPLE
        return min(whole, self._prompts.max_context_length)

    def _recall(self, rows: np.ndarray, results: SearchResult) -> dict[str, float]:
        hits = [
            bool(relevant & set(docs[mask].tolist()))
            for row, docs, mask in zip(rows, results.doc_ids, results.mask, strict=True)
            # What a question may not find is not what it failed to find.
            if (relevant := self._relevant[row] - (self._sources[row] if self._sources else set()))
        ]
        return {"retrieval/recall": float(np.mean(hits))} if hits else {}


def _padded(count: int, *sets: Sequence[frozenset[int]]) -> np.ndarray:
    """Returns the union of each question's sets `[Q, R]` int32, padded with no document's id."""
    unions = [frozenset().union(*(one[row] for one in sets if one)) for row in range(count)]
    padded = np.full((count, max(1, *map(len, unions))), _NOTHING, np.int32)
    for row, members in enumerate(unions):
        padded[row, : len(members)] = sorted(members)
    return padded


def _with_column(array: np.ndarray, value: int) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, 1)), constant_values=value)

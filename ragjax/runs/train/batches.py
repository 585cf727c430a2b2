"""Batches of an end-to-end run: retrieved documents as token arrays of one fixed shape.

B questions a step, K retrieved documents, S document slots, M = B * S.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ragjax.data import encode_texts, pad_right
from ragjax.index import SearchResult
from ragjax.models.inputs import Tokens
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.workspace import (
    Workspace,
    bucket_of,
    pad_tokens,
    training_prompts,
    truncated,
)
from ragjax.training.end_to_end import NO_SLOT, NULL_DOC, RagBatch
from ragjax.training.live import StepDocuments

_CONTEXT_MULTIPLE = 32


class RagBatches:
    """Turns the results of a step into its batch; every step has the same shapes."""

    def __init__(
        self,
        workspace: Workspace,
        config: RagConfig,
        place: Callable[[RagBatch], RagBatch],
        *,
        sources: Sequence[frozenset[int]] | None = None,
    ) -> None:
        """Tokenises the training questions and answers.

        Args:
            workspace: Data and models.
            config: Options of the run.
            place: Puts a batch on the devices.
            sources: Corpus rows that each question was made from, which are no negatives of it;
                None: they are as any other.
        """
        self._workspace, self._config, self._place = workspace, config, place
        encoder = workspace.encoder
        self._questions = workspace.questions["train"]
        self._prompts = training_prompts(workspace.config.prompt, workspace.lm)
        self._targets = [self._prompts.target(question.answers[0]) for question in self._questions]
        self._query_ids = workspace.train_query_ids
        self._relevant = workspace.relevant_rows("train")
        self._sources = sources
        length = int(workspace.doc_tokens.lengths.max())
        self._query_length = bucket_of(encoder, max(map(len, self._query_ids)))
        self._doc_length = bucket_of(encoder, min(config.retriever.doc_tokens, length))
        self._context_length = self._longest_context()
        self._null_ids = encode_texts(
            encoder.tokenizer, [encoder.doc_prefix], max_length=encoder.max_length
        ).ids[0]
        self.num_retrieved = min(config.training.documents, len(workspace.doc_tokens))

    @property
    def context_tokens(self) -> int:
        """Tokens of a context and its target, padding included."""
        return self._context_length + self._prompts.max_target_length

    @property
    def doc_tokens(self) -> int:
        """Tokens of a document for the encoder, padding included."""
        return self._doc_length

    def prepare(self, retrieved: StepDocuments) -> tuple[RagBatch, Mapping[str, float]]:
        """Returns the batch of a step and the recall of its candidates."""
        rows, results = retrieved.rows, retrieved.found
        doc_ids, mask = self._candidates(results)
        contexts = [
            context
            for row, docs, real in zip(rows, doc_ids, mask, strict=True)
            for context in self._contexts(int(row), docs, real)
        ]
        packed = self._prompts.pack(
            contexts, [[]] * len(contexts), context_length=self._context_length
        )
        targets = pad_right(
            [self._targets[row] for row in rows],
            length=self._prompts.max_target_length,
            pad_id=self._prompts.pad_id,
        )
        shape = (*mask.shape, self._context_length)
        positive, relevant, slots = self._slots(rows, doc_ids, mask)
        batch = RagBatch(
            queries=pad_tokens(
                self._workspace.encoder,
                [self._query_ids[row] for row in rows],
                self._query_length,
            ),
            docs=self._docs(slots),
            doc_ids=jnp.asarray(slots),
            doc_mask=jnp.asarray(mask),
            context_ids=jnp.asarray(packed.context_ids.reshape(shape)),
            context_mask=jnp.asarray(packed.context_mask.reshape(shape)),
            target_ids=jnp.asarray(targets.ids),
            target_mask=jnp.asarray(targets.mask),
            positive=positive,
            relevant=relevant,
        )
        return self._place(batch), self._recall(rows, results)

    def _candidates(self, results: SearchResult) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and mask `[B, K]`, the null document last."""
        doc_ids = np.where(results.mask, results.doc_ids, NO_SLOT).astype(np.int32)
        mask = results.mask
        if self._config.training.null_document:
            rows = len(doc_ids)
            doc_ids = np.concatenate([doc_ids, np.full((rows, 1), NULL_DOC, np.int32)], axis=1)
            mask = np.concatenate([mask, np.ones((rows, 1), bool)], axis=1)
        return doc_ids, mask

    def _contexts(self, row: int, docs: np.ndarray, mask: np.ndarray) -> list[list[int]]:
        question = self._questions[row].text
        return [
            self._prompts.context(question, self._workspace.documents.get([doc]))
            if real and doc != NULL_DOC
            else self._prompts.context(question)
            for doc, real in zip(docs.tolist(), mask.tolist(), strict=True)
        ]

    def _slots(
        self, rows: np.ndarray, doc_ids: np.ndarray, mask: np.ndarray
    ) -> tuple[Any, Any, np.ndarray]:
        """Returns the slot of a relevant document of each question, non-negatives, and all slots.

        Without the contrastive term the slots are the candidates, and labels are not used.
        """
        sources = [self._sources[row] if self._sources else frozenset() for row in rows]
        if not self._config.objective.contrastive_weight:
            relevant = _members(doc_ids, sources) if self._sources else None
            return None, relevant, doc_ids
        extra = np.full((len(rows), 1), NO_SLOT, np.int32)
        positive = np.full(len(rows), -1, np.int32)
        gold = [self._relevant[row] for row in rows]
        for number, relevant in enumerate(gold):
            there = [k for k in np.flatnonzero(mask[number]) if int(doc_ids[number, k]) in relevant]
            if there:
                positive[number] = there[0]
            elif relevant:
                extra[number, 0] = min(relevant)
                positive[number] = doc_ids.shape[1]
        slots = np.concatenate([doc_ids, extra], axis=1)
        no_negatives = [*map(frozenset.union, gold, sources)]
        return jnp.asarray(positive), _members(slots, no_negatives), slots

    def _docs(self, slots: np.ndarray) -> Tokens:
        special: dict[int, list[int]] = {NULL_DOC: self._null_ids, NO_SLOT: []}
        ids = [
            special[doc]
            if doc in special
            else truncated(self._workspace.doc_tokens[doc], self._doc_length)
            for doc in slots.reshape(-1).tolist()
        ]
        tokens = pad_tokens(self._workspace.encoder, ids, self._doc_length)
        return Tokens(*(leaf.reshape(*slots.shape, -1) for leaf in tokens))

    def _longest_context(self) -> int:
        """Returns one length for the contexts of all steps, so that the step is compiled once."""
        longest_document = [0] * self._prompts.template.max_document_tokens
        longest = max(
            len(self._prompts.context(question.text, [longest_document]))
            for question in self._questions
        )
        whole = -(-longest // _CONTEXT_MULTIPLE) * _CONTEXT_MULTIPLE
        return min(whole, self._prompts.max_context_length)

    def _recall(self, rows: np.ndarray, results: SearchResult) -> dict[str, float]:
        hits = [
            bool(relevant & set(docs[mask].tolist()))
            for row, docs, mask in zip(rows, results.doc_ids, results.mask, strict=True)
            if (relevant := self._relevant[row])
        ]
        return {"retrieval/recall": float(np.mean(hits))} if hits else {}


def _members(slots: np.ndarray, sets: Sequence[frozenset[int]]) -> Any:
    """Returns which documents of the batch are in each question's set, `[B, M]` bool."""
    return jnp.asarray(np.stack([np.isin(slots.reshape(-1), list(members)) for members in sets]))

"""A question beside its documents as token ids, in few fixed shapes that are known beforehand.

Shapes: K documents, L prompt slots, T answer tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ragjax.data import Corpus, DataError, DocumentTokens, PromptBuilder
from ragjax.data.joining import DocumentIds
from ragjax.data.prompts import DocumentPlace
from ragjax.models.language_model import LanguageModel
from ragjax.runs.options.checks import at_least
from ragjax.runs.options.shared import PromptConfig
from ragjax.runs.tokens import make_prompts

# A question of at most so many tokens, as nearly all are, has prompts of shapes of its own, beside
# those for `question_tokens`.
_QUESTION_TOKENS = 32
# Prompts of short documents need not be padded to the longest one's length.
_SHORT_PROMPT = 96
# The longest document is looked for among at most so many.
_MEASURED_DOCUMENTS = 20_000


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """How much is read and written.

    Attributes:
        documents: K, documents read for a question, at least 1.
        document_tokens: Tokens read of each document.
        question_tokens: Tokens read of a question, at most half of what the model can read.
        max_new_tokens: T, tokens of an answer.
        windows: Parts of a passage that are masked in turn to find the words behind the answer.
    """

    documents: int = 4
    document_tokens: int = 96
    question_tokens: int = 128
    max_new_tokens: int = 16
    windows: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        at_least(self, 1, *self.__dataclass_fields__)


class Prompt(NamedTuple):
    """A question beside each of its documents, as token ids."""

    question: str  # as it is read, perhaps truncated
    docs: tuple[int, ...]  # corpus rows, at most K
    contexts: list[list[int]]  # one per document
    read: list[DocumentPlace]  # where each document stands in its context
    joined: list[int]  # the context with all documents; empty: they do not fit
    closed_book: list[int]  # the context without a document
    log_weights: np.ndarray  # [K] float32, log p_R, -inf where there is no document
    notes: tuple[str, ...]  # what was truncated

    @property
    def places(self) -> list[tuple[int, int]]:
        """In each context: first token of the document, and its tokens."""
        return [(place.start, len(place.characters)) for place in self.read]


class ShapedPrompts:
    """Makes prompts in few fixed shapes, those that questions of a corpus need.

    Attributes:
        options: How much is read and written.
        builder: Joins token ids.
        documents: Token ids of the corpus.
        rows: K, fewer than asked for where the corpus is small.
        question_limit: Tokens read of a question.
        lengths: L of prompts with one document, rising.
        closed_lengths: L of prompts without a document.
        concat_lengths: L of prompts with all documents.
        suffix_lengths: Of what follows a document: the rest of the prompt, and the answer.
        cache_length: Slots for any prompt with one document, and the answer.
    """

    def __init__(self, lm: LanguageModel, corpus: Corpus, options: ReaderOptions) -> None:
        """Computes the shapes.

        Raises:
            ValueError: The model's context has no room for a question, documents and an answer.
        """
        self.options, self.builder = options, _prompt_builder(lm, options)
        self.documents = DocumentTokens(self.builder, corpus)
        self.rows = min(options.documents, len(corpus))
        self._fixed = len(self.builder.context("", [[]]))
        self._fixed_closed = len(self.builder.context(""))
        limit = self.builder.max_context_length
        self.question_limit = min(options.question_tokens, max(1, (limit - self._fixed) // 2))
        document = self._longest_document(len(corpus))
        # No context is longer than its parts would be with the longest document.
        self.builder.template = dataclasses.replace(
            self.builder.template, max_document_tokens=document
        )
        documents = self.rows * document + (self.rows - 1) * self.builder.separator_length
        questions = sorted({min(_QUESTION_TOKENS, self.question_limit), self.question_limit})

        def lengths(beside: int) -> tuple[int, ...]:
            return tuple(sorted({min(beside + n, limit) for n in questions}))

        self.lengths = lengths(document + self._fixed)
        if _SHORT_PROMPT < self.lengths[0] - 8:
            self.lengths = (_SHORT_PROMPT, *self.lengths)
        self.closed_lengths = lengths(self._fixed_closed)
        self.concat_lengths = lengths(documents + self._fixed)
        self.suffix_lengths = tuple(self._fixed + n + self.max_target for n in questions)
        self.cache_length = self.lengths[-1] + self.max_target

    @property
    def max_target(self) -> int:
        """T, tokens of an answer with those that begin it."""
        return self.builder.max_target_length

    def make(self, question: str, docs: Sequence[int], doc_scores: Sequence[float]) -> Prompt:
        """Puts a question beside each of its documents.

        Args:
            question: Its text; a long one is truncated, and that noted.
            docs: Corpus rows, best first; the first K are read.
            doc_scores: Logits of p_R.

        Raises:
            ValueError: The question is blank.
        """
        if not question.strip():
            raise ValueError("the question is empty; write at least one word")
        question, notes = self._truncated(question)
        docs = tuple(int(doc) for doc in docs[: self.rows])
        tokens = self.documents.get(docs)
        contexts = [self.builder.context(question, [ids]) for ids in tokens]
        weights = np.full(self.rows, -np.inf, np.float32)
        if docs:
            scores = np.asarray(doc_scores[: len(docs)], np.float32)
            weights[: len(docs)] = scores - np.logaddexp.reduce(scores)
        closed = self.builder.context(question)
        return Prompt(
            question=question,
            docs=docs,
            contexts=contexts,
            read=[self.builder.document_place(question, ids) for ids in tokens],
            joined=self._joined(question, tokens),
            closed_book=closed,
            log_weights=weights,
            notes=notes,
        )

    def _truncated(self, question: str) -> tuple[str, tuple[str, ...]]:
        """Returns as much of a question as is read, and a note if that is not all."""
        question = question.strip()  # else what is left of a long one may be blank
        encoding = self.builder.joiner.encoding(question)
        kept = question
        if len(encoding) > self.question_limit:
            kept = question[: encoding.offsets[self.question_limit - 1][1]]
        # Truncated, or beside the template, a text may take more tokens than it did.
        while (excess := self._excess(kept)) > 0:
            kept = kept[: -max(1, excess // 4)]  # no character takes more than 4 tokens
        if kept == question:
            return question, ()
        read = len(self.builder.joiner.encode(kept))
        note = f"the question has {len(encoding)} tokens; the language model reads the first {read}"
        return kept, (note,)

    def _excess(self, question: str) -> int:
        """Returns how many tokens a question has beyond those that the shapes hold."""
        try:
            beside = len(self.builder.context(question, [[]])) - self._fixed
            alone = len(self.builder.context(question)) - self._fixed_closed
        except DataError:  # beyond what the model can read
            return self.question_limit
        return max(beside, alone) - self.question_limit

    def warm_up(self) -> Iterator[Prompt]:
        """Yields dummy prompts that cover every compiled shape."""
        ladders = (
            self.lengths, self.closed_lengths, self.suffix_lengths, self.concat_lengths
        )  # fmt: skip
        count = max(map(len, ladders))
        padded = [(ladder[0],) * (count - len(ladder)) + ladder for ladder in ladders]
        for length, closed, suffix, joined in zip(*padded, strict=True):
            after = min(suffix - self.max_target, length - 1)
            yield Prompt(
                question="",
                docs=(0,),
                contexts=[[0] * length],
                read=[DocumentPlace(0, [(0, 0)] * (length - after), "")],
                joined=[0] * joined,
                closed_book=[0] * closed,
                log_weights=np.where(np.arange(self.rows) == 0, 0, -np.inf).astype(np.float32),
                notes=(),
            )

    def fitting_length(self, contexts: Sequence[Sequence[int]]) -> int:
        """Returns L, the length that the contexts of single documents are padded to."""
        return fitting(self.lengths, max(map(len, contexts)))

    def _joined(self, question: str, tokens: Sequence[DocumentIds]) -> list[int]:
        try:
            return self.builder.context(question, tokens)
        except DataError:  # there is no room for a token of each
            return []

    def _longest_document(self, count: int) -> int:
        if count > _MEASURED_DOCUMENTS:
            return self.builder.template.max_document_tokens
        return max(1, *map(len, self.documents.get(range(count))))


def fitting(lengths: Sequence[int], needed: int) -> int:
    """Returns the smallest of the lengths that holds what is needed."""
    return min(length for length in lengths if length >= needed)


def _prompt_builder(lm: LanguageModel, options: ReaderOptions) -> PromptBuilder:
    config = PromptConfig(
        document_tokens=options.document_tokens, answer_tokens=options.max_new_tokens
    )
    try:
        builder = make_prompts(config, lm)
        # Room for a token of each document and of the question.
        builder.context("?", [[0]])
    except DataError as error:
        raise ValueError(
            f"--max_new_tokens {options.max_new_tokens} leaves no room for a question and a"
            f" document in the {lm.max_length} tokens that {lm.source} takes; give fewer"
        ) from error
    return builder

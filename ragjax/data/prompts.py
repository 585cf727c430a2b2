"""Contexts c∘x and targets y as token ids, with a mask of the answer only.

    builder = PromptBuilder(lm.tokenizer, max_length=lm.max_length, pad_id=lm.pad_id)
    documents = DocumentTokens(builder, corpus)
    contexts = [builder.context(question.text, documents.get([row])) for row in rows]
    batch = builder.pack(contexts, [builder.target(answer)] * len(rows))

R is the number of rows (often batch x documents), L the context length, T the target length.
The ids are those of the whole text, context and target; see `ragjax.data.joining`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ragjax.data.corpus import Corpus
from ragjax.data.joining import DocumentIds, TextJoiner
from ragjax.data.jsonl import DataError
from ragjax.data.tables import Passage
from ragjax.data.template import PromptTemplate as PromptTemplate
from ragjax.data.template import TemplateTexts, fill
from ragjax.data.template import passage_text as passage_text
from ragjax.data.tokenization import EncodedTexts, pad_left, pad_right

_ASKED = "\n\nQuestion:"  # between a document and its question, where nothing else is read
_LENGTH_MULTIPLE = 32  # of context lengths chosen by `pack`, to bound the number of shapes


class PromptBatch(NamedTuple):
    """Contexts and targets in fixed shapes; fields as in `ragjax.models.LMBatch`."""

    context_ids: np.ndarray  # int32 [R, L], padded on the left
    context_mask: np.ndarray  # bool [R, L], True = real token
    target_ids: np.ndarray  # int32 [R, T], padded on the right
    target_mask: np.ndarray  # bool [R, T], True = token of the answer (or its end)


class DocumentPlace(NamedTuple):
    """Where a document stands in a context."""

    start: int  # its first token
    characters: list[tuple[int, int]]  # of its text, start and end, by its tokens
    text: str  # as much of it as is read


class PromptBuilder:
    """Builds contexts and targets for one language model.

    Special tokens spelled out in a document, question or answer ("<|endoftext|>") are encoded as
    ordinary characters: a document must not end the prompt.

    Args:
        tokenizer: The language model's; a private copy is kept.
        template: Texts and budgets.
        max_length: Tokens of context and target together, at most the model's limit.
        pad_id: Fills masked positions.
        bos_id: Put before each context, if given, unless the template's are `whole`.
        end_id: Put after each target that was not cut, if given, so that a model trained on it
            learns to stop: an end-of-text token, or a newline.
        context_end_ids: Put after each context: what an encoder expects there (</s> of T5). The
            target is then a text of its own.
        target_start_ids: Put before each target: what the model begins with (<s> of BART).
        new_tokens: Room is kept for a generated answer of so many tokens, too.

    Raises:
        DataError: `max_length` leaves no context beside the target.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: PromptTemplate | None = None,
        max_length: int,
        pad_id: int,
        bos_id: int | None = None,
        end_id: int | None = None,
        context_end_ids: Sequence[int] = (),
        target_start_ids: Sequence[int] = (),
        new_tokens: int = 0,
    ):
        """Prepares the tokenizer and the fixed parts of the template."""
        self.template = template or PromptTemplate()
        self.pad_id = pad_id
        self.max_length, self._new_tokens = max_length, new_tokens
        self._bos = [] if bos_id is None else [bos_id]
        self._end = [] if end_id is None else [end_id]
        self._context_end, self._target_start = list(context_end_ids), list(target_start_ids)
        self._first = [] if self.template.whole else self._bos
        controls = [pad_id, *self._bos, *self._context_end]
        self.joiner = TextJoiner(tokenizer, [*controls, *_written(tokenizer, self.template)])
        self._texts = TemplateTexts.of(self.template, self.joiner)
        self._questions: dict[tuple[str, int], _Around] = {}
        if self.max_context_length < 1:
            raise DataError(
                f"max_length = {max_length} leaves no context beside a target of "
                f"{max_length - self.max_context_length} tokens"
            )

    @property
    def max_target_length(self) -> int:
        """Most tokens of a target, its start and end included: T of `pack` unless given."""
        return len(self._target_start) + self.template.max_answer_tokens + len(self._end)

    @property
    def max_context_length(self) -> int:
        """Most tokens of a context."""
        return self.max_length - max(self.max_target_length, self._new_tokens)

    def passage_text(self, passage: Passage) -> str:
        """Returns what the template shows of a passage, as `encode_documents` takes it."""
        return passage_text(passage, self._texts.passage)

    @property
    def separator_length(self) -> int:
        """Tokens between two documents."""
        return len(self.joiner.after(self._texts.separator))

    def encode_documents(self, texts: Iterable[str]) -> EncodedTexts:
        """Tokenises document texts, cut to `max_document_tokens`; returns `DocumentIds`."""
        encoded = list(self.joiner.encode_texts(texts, self.template.max_document_tokens))
        return EncodedTexts([ids for ids, _ in encoded], sum(not whole for _, whole in encoded))

    def context(
        self, question: str, documents: Sequence[Sequence[int] | np.ndarray] = ()
    ) -> list[int]:
        """Joins documents and a question.

        Args:
            question: Its text.
            documents: `DocumentIds` of each, best first; none gives the closed-book prompt. When
                they do not all fit, each is cut to an equal share of the room. Token ids without a
                text are taken as they are.

        Returns:
            At most `max_context_length` token ids.

        Raises:
            DataError: No room is left for the question, or for a token of each document.
        """
        return self._fitted(question, documents)[1]

    def fixed_length(self, question: str, count: int) -> int:
        """Returns the tokens of a context with so many documents but for those of the documents."""
        return self._around(question, count).fixed

    def joined(self, parts: Sequence[str | Sequence[int]]) -> list[int]:
        """Returns a context of other parts than a template's: texts and `DocumentIds`."""
        return [*self._bos, *self.joiner.join(parts), *self._context_end]

    def document_texts(self, question: str, documents: Sequence[DocumentIds]) -> list[str]:
        """Returns of each document as much as its context has room for."""
        parts, _ = self._fitted(question, documents)
        return [part.text for part in parts if isinstance(part, DocumentIds)]

    def document_place(self, question: str, document: DocumentIds) -> DocumentPlace:
        """Returns where a document stands in the context that it alone is in.

        A token that stands for characters of both, document and template, is the document's.
        """
        (head, shown, tail), _ = self._fitted(question, [document])
        offsets = self.joiner.encoding(head + shown.text + tail).offsets
        start, size = len(head), len(shown.text)
        inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < start + size]
        return DocumentPlace(
            start=len(self._first) + (inside[0] if inside else 0),
            characters=[
                (max(offsets[i][0] - start, 0), min(offsets[i][1] - start, size)) for i in inside
            ],
            text=shown.text,
        )

    @property
    def asks_after_document(self) -> bool:
        """Whether a question follows its document in one text, as `question_place` needs it."""
        tail = self._texts.context.partition("{document}")[2]
        return "{question}" in tail and not (self._context_end or self._target_start)

    def question_place(self, question: str, document: DocumentIds) -> tuple[int, int]:
        """Returns the tokens of a context that are its question's: the first, and that behind.

        A token that stands for characters of both, question and template, is the question's. For a
        prompt that `asks_after_document`.
        """
        (head, shown, tail), _ = self._fitted(question, [document])
        label = self._texts.context.partition("{document}")[2].partition("{question}")[0]
        before = head + shown.text + label
        after = tail[len(label) + len(question) :]
        return self._place(before, question, after, self._first)

    def question_reading(self, question: str, document: DocumentIds) -> tuple[list[int], list[int]]:
        """Returns context and target in which a question follows its document and nothing else.

        An encoder reads the document and a decoder the question; elsewhere `Question:` stands
        between the two.
        """
        if self._context_end or self._target_start:
            target = [*self._target_start, *self.joiner.encode(question), *self._end]
            return [*self._bos, *document, *self._context_end], target
        ids = [*self._bos, *self.joiner.join([document, f"{_ASKED} {question}"])]
        start, end = self._place(f"{document.text}{_ASKED} ", question, "", self._bos)
        return ids[:start], ids[start:end]

    def target(self, answer: str) -> list[int]:
        """Returns the token ids of an answer, cut to `max_answer_tokens`, then `end_id` if uncut.

        Raises:
            DataError: The answer is empty.
        """
        if not answer.strip():
            raise DataError("the answer is empty; a target needs at least one token")
        ids = self.answer_ids(answer)
        if len(ids) > self.template.max_answer_tokens:
            return self._target_start + ids[: self.template.max_answer_tokens]
        return self._target_start + ids + self._end

    def answer_ids(self, answer: str) -> list[int]:
        """Returns all token ids of an answer, as they go on after a context."""
        # As an answer is read back: up to the end of the line, without white space around it.
        text = fill(self._texts.answer, answer=" ".join(answer.split()))
        if not (self._context_end or self._target_start):
            return self.joiner.after(text, self._texts.context_end)
        return self.joiner.encode(text)

    def pack(
        self,
        contexts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        *,
        context_length: int | None = None,
        target_length: int | None = None,
    ) -> PromptBatch:
        """Pads R contexts and targets.

        Args:
            contexts: From `context`.
            targets: From `target`, one each; empty lists for generation.
            context_length: L; the longest context rounded up to a multiple of 32 if None.
            target_length: T; `max_target_length` if None.

        Raises:
            ValueError: The numbers differ, or one does not fit.
        """
        if len(contexts) != len(targets):
            raise ValueError(f"{len(contexts)} contexts but {len(targets)} targets")
        if context_length is None:
            longest = max(map(len, contexts), default=1)
            context_length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        if target_length is None:
            target_length = self.max_target_length
        left = pad_left(contexts, length=context_length, pad_id=self.pad_id)
        right = pad_right(targets, length=target_length, pad_id=self.pad_id)
        return PromptBatch(left.ids, left.mask, right.ids, right.mask)

    def _place(self, before: str, text: str, after: str, first: Sequence[int]) -> tuple[int, int]:
        """Returns the tokens of a part of a whole text, its first and that behind; `first` ones."""
        offsets = self.joiner.encoding(before + text + after).offsets
        start, end = len(before), len(before) + len(text)
        inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < end]
        return len(first) + inside[0], len(first) + inside[-1] + 1

    def _fitted(
        self, question: str, documents: Sequence[Sequence[int] | np.ndarray]
    ) -> tuple[list[Any], list[int]]:
        """Returns the parts of a context, its documents cut to fit, and its ids."""
        count = len(documents)
        around = self._around(question, count)
        budget = min(self.template.max_document_tokens, around.room // count if count else 0)
        if around.room < count:
            raise DataError(
                f"the prompt leaves {max(around.room, 0)} tokens for {count} documents: of "
                f"{self.max_length} tokens (max_length), question and template take "
                f"{around.fixed} and the answer {self.max_length - self.max_context_length}; "
                f"shorten the question "
                f"{question[:60]!r}, use fewer documents, or raise max_length"
            )
        limit = around.fixed + count * budget
        while True:
            parts: list[Any] = [around.head]
            for place, document in enumerate(documents):
                parts += [self._texts.separator] if place else []
                parts.append(self._cut(document, budget))
            parts.append(around.tail)
            ids = [*self._first, *self.joiner.join(parts), *self._context_end]
            # At the borders, the whole may take more tokens than its parts.
            if (excess := len(ids) - limit) <= 0 or not budget:
                return parts, ids
            budget = max(budget - -(-excess // count), 0)

    def _cut(self, document: Any, budget: int) -> Any:
        if len(document) <= budget:
            return document
        if isinstance(document, DocumentIds):
            return self.joiner.cut(document.text, budget)
        return document[:budget]

    def _around(self, question: str, count: int) -> "_Around":
        """Returns what stands around so many documents."""
        if (question, count) not in self._questions:
            texts, join = self._texts, self.joiner.join
            form = texts.context if count else texts.closed_book
            head, _, tail = form.partition("{document}") if count else ("", "", form)
            head, tail = (fill(part, question=question) for part in (head, tail))
            lengths = [len(join([head])), len(join([[], tail] if count else [tail]))]
            lengths += [max(count - 1, 0) * self.separator_length]
            fixed = len(self._first) + sum(lengths) + len(self._context_end)
            self._questions[question, count] = _Around(
                head, tail, fixed, self.max_context_length - fixed
            )
        return self._questions[question, count]


def _written(tokenizer: Tokenizer, template: PromptTemplate) -> list[int]:
    """Returns the added tokens that a template writes, special or not: no text may spell them."""
    text = template.context + template.closed_book
    added = tokenizer.get_added_tokens_decoder().items()
    return [n for n, token in added if token.content.strip() and token.content in text]


class _Around(NamedTuple):
    """What stands around the documents of a question."""

    head: str
    tail: str
    fixed: int  # tokens of everything but the documents
    room: int  # tokens left for them


class DocumentTokens:
    """Token ids of corpus rows, each tokenised once, when first asked for.

    Takes at most about 1.4 kB a row asked for (at 140 tokens).

    Attributes:
        num_documents: Rows tokenised so far.
        num_truncated: Those of them that were cut.
    """

    def __init__(self, builder: PromptBuilder, corpus: Corpus):
        """Keeps the two; nothing is read yet."""
        self._builder = builder
        self._corpus = corpus
        self._kept: dict[int, tuple[np.ndarray, str]] = {}
        self.num_truncated = 0

    @property
    def num_documents(self) -> int:
        """Rows tokenised so far."""
        return len(self._kept)

    def get(self, rows: Iterable[int]) -> list[DocumentIds]:
        """Returns the token ids of each row, at most `max_document_tokens`."""
        rows = [int(row) for row in rows]
        missing = [row for row in dict.fromkeys(rows) if row not in self._kept]
        builder = self._builder
        texts = (builder.passage_text(self._corpus[row]) for row in missing)
        encoded = builder.joiner.encode_texts(texts, builder.template.max_document_tokens)
        for row, (ids, whole) in zip(missing, encoded, strict=True):
            self.num_truncated += not whole
            self._kept[row] = np.asarray(ids, np.int32), ids.text
        kept = [self._kept[row] for row in rows]
        return [DocumentIds(ids.tolist(), text) for ids, text in kept]

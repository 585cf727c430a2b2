"""Contexts c∘x and targets y as token ids, with a mask of the answer only.

    builder = PromptBuilder(lm.tokenizer, max_length=lm.max_length, pad_id=lm.pad_id)
    documents = DocumentTokens(builder, corpus)
    contexts = [builder.context(question.text, documents.get([row])) for row in rows]
    batch = builder.pack(contexts, [builder.target(answer)] * len(rows))

R is the number of rows (often batch x documents), L the context length, T the target length.
The parts are tokenised apart and joined as ids, so that a document keeps its tokens whatever
stands beside it, and the target begins exactly where the context ends.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ragjax.data.corpus import Corpus
from ragjax.data.corpus_cache import Passage
from ragjax.data.jsonl import DataError
from ragjax.data.tokenization import EncodedTexts, encode_texts, pad_left, pad_right

_LENGTH_MULTIPLE = 32  # of context lengths chosen by `pack`, to bound the number of shapes


class PromptBatch(NamedTuple):
    """Contexts and targets in fixed shapes; fields as in `ragjax.models.LMBatch`."""

    context_ids: np.ndarray  # int32 [R, L], padded on the left
    context_mask: np.ndarray  # bool [R, L], True = real token
    target_ids: np.ndarray  # int32 [R, T], padded on the right
    target_mask: np.ndarray  # bool [R, T], True = token of the answer (or its end)


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    r"""The text around documents, questions and answers, and what they may take.

    Attributes:
        context: Has {document} and {question} once each.
        closed_book: Context without a document; has {question} once.
        answer: Has {answer} once; begins with what separates it from the context.
        passage: What {document} shows of a passage, from {title} and {text}; a passage without
            a title shows its text only.
        separator: Between several documents.
        max_document_tokens: Each document is cut to this many tokens.
        max_answer_tokens: The answer is cut to this many tokens.
    """

    context: str = "{document}\n\nQuestion: {question}\nAnswer:"
    closed_book: str = "Question: {question}\nAnswer:"
    answer: str = " {answer}"
    passage: str = "{title}\n{text}"
    separator: str = "\n\n"
    max_document_tokens: int = 140
    max_answer_tokens: int = 24

    def __post_init__(self) -> None:
        """Checks that each place is there once, and the budgets."""
        needed = {
            "context": ("{document}", "{question}"),
            "closed_book": ("{question}",),
            "answer": ("{answer}",),
            "passage": ("{text}",),
        }
        for field, places in needed.items():
            for place in places:
                if getattr(self, field).count(place) != 1:
                    raise DataError(
                        f"the prompt template's {field} must hold {place} exactly once, got "
                        f"{getattr(self, field)!r}"
                    )
        for field in ("max_document_tokens", "max_answer_tokens"):
            if getattr(self, field) < 1:
                raise DataError(f"{field} must be at least 1, got {getattr(self, field)}")


def passage_text(passage: Passage, form: str = "{title}\n{text}") -> str:
    """Returns a passage as one text; only the title or the text where it lacks the other."""
    if not (passage.title and passage.text):
        return passage.title or passage.text
    return _fill(form, title=passage.title, text=passage.text)


class PromptBuilder:
    """Builds contexts and targets for one language model.

    Special tokens spelled out in a text ("<|endoftext|>", "<filename>") are encoded as ordinary
    characters: a document must not end the prompt.

    Args:
        tokenizer: The language model's; a private copy is kept.
        template: Texts and budgets.
        max_length: Tokens of context and target together, at most the model's limit.
        pad_id: Fills masked positions.
        bos_id: Put before each context, if given.
        end_id: Put after each target that was not cut, if given, so that a model trained on it
            learns to stop: an end-of-text token, or a newline.
        context_end_ids: Put after each context: what an encoder expects there (</s> of T5).
        target_start_ids: Put before each target: what the model begins with (<s> of BART).

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
    ):
        """Tokenises the fixed parts of the template."""
        self.template = template or PromptTemplate()
        self.pad_id = pad_id
        self.max_length = max_length
        self._bos = [] if bos_id is None else [bos_id]
        self._end = [] if end_id is None else [end_id]
        self._context_end, self._target_start = list(context_end_ids), list(target_start_ids)
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._separator = self._encode(self.template.separator)
        self._questions: dict[str, tuple[list[int], list[int]]] = {}
        if self.max_context_length < 1:
            raise DataError(
                f"max_length = {max_length} leaves no context beside a target of "
                f"{self.max_target_length} tokens"
            )

    @property
    def max_target_length(self) -> int:
        """Most tokens of a target, its start and end included: T of `pack` unless given."""
        return len(self._target_start) + self.template.max_answer_tokens + len(self._end)

    @property
    def max_context_length(self) -> int:
        """Most tokens of a context."""
        return self.max_length - self.max_target_length

    def encode_documents(self, texts: Iterable[str]) -> EncodedTexts:
        """Tokenises document texts, cut to `max_document_tokens`."""
        return encode_texts(
            self._tokenizer,
            texts,
            max_length=self.template.max_document_tokens,
            add_special_tokens=False,
        )

    def context(
        self, question: str, documents: Sequence[Sequence[int] | np.ndarray] = ()
    ) -> list[int]:
        """Joins documents and a question.

        Args:
            question: Its text.
            documents: Token ids of each, best first; none gives the closed-book prompt. When they
                do not all fit, each is cut to an equal share of the room.

        Returns:
            At most `max_context_length` token ids.

        Raises:
            DataError: No room is left for the question, or for a token of each document.
        """
        head, tail = self._around(question) if documents else self._closed_book(question)
        num_separators = max(len(documents) - 1, 0)
        tail = [*tail, *self._context_end]
        fixed = len(self._bos) + len(head) + len(tail) + num_separators * len(self._separator)
        room = self.max_context_length - fixed
        if room < len(documents):
            raise DataError(
                f"the prompt leaves {max(room, 0)} tokens for {len(documents)} documents: of "
                f"{self.max_length} tokens (max_length), question and template take {fixed} and "
                f"the answer {self.max_target_length}; shorten the question {question[:60]!r}, "
                "use fewer documents, or raise max_length"
            )
        ids = [*self._bos, *head]
        if documents:
            budget = min(self.template.max_document_tokens, room // len(documents))
            for place, document in enumerate(documents):
                ids += self._separator if place else []
                ids += [int(id) for id in document[:budget]]
        return ids + tail

    def document_start(self, question: str) -> int:
        """Returns how many tokens of `context` stand before the first document."""
        return len(self._bos) + len(self._around(question)[0])

    def target(self, answer: str) -> list[int]:
        """Returns the token ids of an answer, cut to `max_answer_tokens`, then `end_id` if uncut.

        Raises:
            DataError: The answer is empty.
        """
        # As an answer is read back: up to the end of the line, without white space around it.
        answer = " ".join(answer.split())
        if not answer:
            raise DataError("the answer is empty; a target needs at least one token")
        ids = self._encode(_fill(self.template.answer, answer=answer))
        if len(ids) > self.template.max_answer_tokens:
            return self._target_start + ids[: self.template.max_answer_tokens]
        return self._target_start + ids + self._end

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

    def _around(self, question: str) -> tuple[list[int], list[int]]:
        """Returns the ids before and after the documents."""
        if question not in self._questions:
            parts = self.template.context.split("{document}")
            head, tail = (self._encode(_fill(part, question=question)) for part in parts)
            self._questions[question] = head, tail
        return self._questions[question]

    def _closed_book(self, question: str) -> tuple[list[int], list[int]]:
        return [], self._encode(_fill(self.template.closed_book, question=question))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class DocumentTokens:
    """Token ids of corpus rows, each tokenised once, when first asked for.

    Takes at most about 700 bytes a row asked for (at 140 tokens).

    Attributes:
        num_documents: Rows tokenised so far.
        num_truncated: Those of them that were cut.
    """

    def __init__(self, builder: PromptBuilder, corpus: Corpus):
        """Keeps the two; nothing is read yet."""
        self._builder = builder
        self._corpus = corpus
        self._ids: dict[int, np.ndarray] = {}
        self.num_truncated = 0

    @property
    def num_documents(self) -> int:
        """Rows tokenised so far."""
        return len(self._ids)

    def get(self, rows: Iterable[int]) -> list[np.ndarray]:
        """Returns the token ids of each row, int32 [at most max_document_tokens]."""
        rows = [int(row) for row in rows]
        missing = [row for row in dict.fromkeys(rows) if row not in self._ids]
        if missing:
            form = self._builder.template.passage
            encoded = self._builder.encode_documents(
                passage_text(self._corpus[row], form) for row in missing
            )
            self.num_truncated += encoded.num_truncated
            for row, ids in zip(missing, encoded.ids, strict=True):
                self._ids[row] = np.asarray(ids, np.int32)
        return [self._ids[row] for row in rows]


def _fill(form: str, **values: str) -> str:
    # In one pass: a value that spells another place's name stays as it is.
    places = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(places, lambda match: values[match[0][1:-1]], form)

"""The text around documents, questions and answers."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from ragjax.data.joining import TextJoiner
from ragjax.data.jsonl import DataError
from ragjax.data.tables import Passage

_PLACES = ("{document}", "{question}")
# Beginnings of answers, beside words of the vocabulary; the last is unknown to most of them.
_PROBES = ("a", "The", "5", "\U00010380")


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    r"""The text around documents, questions and answers, and what they may take.

    Control tokens of the tokenizer ("<|im_start|>") that are written in it are those tokens.

    Attributes:
        context: Has {document} and {question} once each.
        closed_book: Context without a document; has {question} once.
        answer: Has {answer} once; begins with what separates it from the context. (White space
            between the two is counted to the one whose tokens it is part of.)
        passage: What {document} shows of a passage, from {title} and {text}; a passage without
            a title shows its text only.
        separator: Between several documents.
        whole: A context writes its first token itself, and none is put before it.
        max_document_tokens: Each document is cut to this many tokens.
        max_answer_tokens: The answer is cut to this many tokens.
    """

    context: str = "{document}\n\nQuestion: {question}\nAnswer:"
    closed_book: str = "Question: {question}\nAnswer:"
    answer: str = " {answer}"
    passage: str = "{title}\n{text}"
    separator: str = "\n\n"
    whole: bool = False
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
    return fill(form, title=passage.title, text=passage.text)


class TemplateTexts(NamedTuple):
    """The texts of a template as a joiner reads them."""

    context: str
    closed_book: str
    answer: str
    passage: str
    separator: str
    context_end: str  # what each context ends with, whatever the question

    @classmethod
    def of(cls, template: PromptTemplate, joiner: TextJoiner) -> "TemplateTexts":
        """Writes control tokens, and ends contexts where a token ends whatever the answer."""
        context, closed_book, answer = map(
            joiner.literal, (template.context, template.closed_book, template.answer)
        )
        trailing = {text[len(text.rstrip()) :] for text in (context, closed_book)}
        if len(trailing) == 1:
            white = trailing.pop() + answer[: len(answer) - len(answer.lstrip())]
            end = _context_end(context.rstrip())
            kept = _border(joiner, end or "?", white)
            context, closed_book = (text.rstrip() + white[:kept] for text in (context, closed_book))
            answer = white[kept:] + answer.lstrip()
        return cls(
            context=context,
            closed_book=closed_book,
            answer=answer,
            passage=joiner.literal(template.passage),
            separator=joiner.literal(template.separator),
            context_end=_context_end(context),
        )


def _context_end(context: str) -> str:
    return context[max(context.rfind(place) + len(place) for place in _PLACES) :]


def _border(joiner: TextJoiner, before: str, white: str) -> int:
    """Returns how much of the white space between context and answer belongs to the context.

    Preferably up to its last line break: an answer that begins on a new line is read as ended.
    """
    last = max(white.rfind(line_break) for line_break in "\r\n") + 1
    places = [*range(last, -1, -1), *range(last + 1, len(white) + 1)]
    texts = [before + white + probe for probe in (*_PROBES, *joiner.words)]
    for place in places:
        if all(joiner.is_border(text, len(before) + place) for text in texts):
            return place
    return last


def fill(form: str, **values: str) -> str:
    """Returns a form with its {places} filled."""
    # In one pass: a value that spells another place's name stays as it is.
    places = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(places, lambda match: values[match[0][1:-1]], form)

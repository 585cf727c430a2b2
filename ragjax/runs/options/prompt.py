"""Options of the prompt of the language model, and the template that they name."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ragjax.runs.options.checks import Options, at_least

_DOCUMENT, _QUESTION, _ANSWER = "{document}", "{question}", "{answer}"
_PLACES = (_DOCUMENT, _QUESTION, _ANSWER)


@dataclass(frozen=True, kw_only=True)
class PromptConfig(Options):
    r"""The prompt of the language model.

    Attributes:
        template: What the language model reads in training, scoring and answering, as text (`\n` is
            a line break) or as the name of a file that holds it: {document} and {question} once
            each, and {answer} at the end; without it, the answer follows a space. Closed book, the
            paragraph of {document} is left out, but for control tokens. Empty: what the model was
            trained with, or `{document}\n\nQuestion: {question}\nAnswer: {answer}`.
        chat: Whether that is put into the chat template of an instruct model: `on`, `off`, or
            `auto`, where the right answers to a few dev questions are likelier in it.
        document_tokens: Tokens kept of each document.
        answer_tokens: Tokens kept of the answer that is scored or trained on.
    """

    template: str = ""
    chat: Literal["auto", "on", "off"] = "auto"
    document_tokens: int = 140
    answer_tokens: int = 24

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 1, "document_tokens", "answer_tokens")
        if _is_text(self.template):
            parse_template(_unescaped(self.template), "template")


class Template(NamedTuple):
    """A template of the user's in parts, as `ragjax.data.PromptTemplate` has them."""

    context: str
    answer: str
    behind: str  # the answer: nothing, or a token that ends it


def read_template(config: PromptConfig) -> Template | None:
    """Returns the template of the options, from its file if they name one; None: they have none.

    Raises:
        ValueError: A place is missing, unknown or there twice, or the file cannot be read.
    """
    if not config.template:
        return None
    if _is_text(config.template):
        return parse_template(_unescaped(config.template), "--prompt.template")
    name = f"--prompt.template {config.template}"
    try:
        text = Path(config.template).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{name}: neither a text with {_DOCUMENT} and {_QUESTION} nor a file that can be read"
            f" ({error})"
        ) from error
    return parse_template(text.removesuffix("\n"), name)


def parse_template(text: str, name: str) -> Template:
    """Returns a template in parts.

    Args:
        text: The template.
        name: What messages call it.

    Raises:
        ValueError: A place is missing, unknown or there twice; the message names the line.
    """
    for place in re.finditer(r"\{\w+\}", text):
        if place[0] not in _PLACES:
            line = text.count("\n", 0, place.start()) + 1
            raise ValueError(
                f"{name}: line {line} has {place[0]}, and the places are {', '.join(_PLACES)}"
            )
    for place, least in ((_DOCUMENT, 1), (_QUESTION, 1), (_ANSWER, 0)):
        if not least <= text.count(place) <= 1:
            raise ValueError(
                f"{name} must hold {place} {'exactly' if least else 'at most'} once, got {text!r}"
            )
    context, found, behind = text.partition(_ANSWER)
    if _QUESTION not in context or _DOCUMENT not in context:
        raise ValueError(f"{name} must hold {_ANSWER} behind all else, got {text!r}")
    space = "" if found or context[-1:].isspace() else " "
    return Template(context, f"{space}{_ANSWER}", behind.strip())


def without_document(context: str, controls: Collection[str] = ()) -> str:
    """Returns a context without its document: without the paragraph of that, where it has one.

    Args:
        context: Of {document} and {question}.
        controls: Control tokens. What opens or closes a turn stays: the lines before that of the
            document, or all before it on its own line.
    """

    def written(start: int, end: int) -> bool:
        return any(token in context[start:end] for token in controls)

    place = context.index(_DOCUMENT)
    line = context.rfind("\n", 0, place) + 1
    end = re.compile(r"\n\s*\n").search(context, place)
    start = context.rfind("\n\n", 0, place) + 2 if "\n\n" in context[:place] else 0
    if end and not written(place, end.start()) and _QUESTION not in context[start : end.start()]:
        kept = place if written(line, place) else line if written(start, line) else start
        return context[:kept] + context[end.end() :]
    return context.replace(_DOCUMENT, "").lstrip()


def _is_text(template: str) -> bool:
    return _QUESTION in template or _DOCUMENT in template or "\n" in template


def _unescaped(template: str) -> str:
    """Returns a text as a shell hands it on, with its line breaks."""
    return template.replace("\\n", "\n")

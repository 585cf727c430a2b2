"""The text that the language model of a run reads: the user's, the model's own, or its chat."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ragjax.data import PromptTemplate
from ragjax.models.files.chat import render_turn
from ragjax.models.language_model import LanguageModel, PromptText
from ragjax.runs.options.prompt import PromptConfig, Template, without_document

# What a run chose, in its folder.
PROMPT = "prompt.json"


def with_prompt(
    lm: LanguageModel, config: PromptConfig, given: Template | None, folder: Path | None = None
) -> LanguageModel:
    """Returns a language model that reads what a run has chosen, or else what its options say.

    Args:
        lm: As its files have it.
        config: Options.
        given: Their template.
        folder: Of a run, perhaps one that has chosen; None: there is none.

    Raises:
        ValueError: The template does not suit the model, or the file of the run is damaged.
    """
    if folder is not None and (kept := read_kept(folder)) is not None:
        text = kept["text"]
        return dataclasses.replace(lm, prompt=None if text is None else PromptText(**text))
    if given is not None:
        lm = dataclasses.replace(lm, prompt=_given_text(lm, given))
    if config.chat == "on":
        try:
            return dataclasses.replace(lm, prompt=chat_text(lm))
        except ValueError as error:
            raise ValueError(f"--prompt.chat on: {error}; leave it out") from error
    return lm


def read_kept(folder: Path) -> dict[str, Any] | None:
    """Returns what `prompt.json` of a run holds, None where there is none.

    Raises:
        ValueError: It is damaged.
    """
    path = folder / PROMPT
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text("utf-8-sig"))
        if kept["text"] is not None:
            PromptText(**kept["text"])
        return {"text": kept["text"], "reason": str(kept["reason"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}), and says what the run's language model reads; put the"
            " file back from a copy of the run"
        ) from error


def chat_text(lm: LanguageModel) -> PromptText:
    """Returns what a language model reads, put into its chat template.

    The context is what the user says; the answer ends with the token that ends a turn.

    Raises:
        ValueError: It has no chat template, or one that cannot be used.
    """
    if lm.chat is None:
        raise ValueError(f"{lm.source} has no chat template")
    text = lm.prompt or usual_text()
    if written := _control_tokens(lm, text.context):
        raise ValueError(f"the template writes {written[0]!r} itself, as a chat template does")
    try:
        turn = render_turn(lm.chat)
    except ValueError as error:
        raise ValueError(f"{lm.source}: {error}") from error

    def said(context: str) -> str:
        # As chat templates trim what is said; the document comes without white space around it.
        return turn.before + context.strip() + turn.between

    return text._replace(
        context=said(text.context),
        closed_book=said(text.closed_book),
        answer=turn.space + "{answer}",
        end=_first_token(lm, turn.behind),
        whole=True,
    )


def usual_text() -> PromptText:
    """Returns what a language model reads that was trained with no text of its own."""
    usual = PromptTemplate()
    return PromptText(usual.context, usual.closed_book, usual.answer, usual.passage)


def _given_text(lm: LanguageModel, given: Template) -> PromptText:
    end = _first_token(lm, given.behind)
    if end != given.behind:
        raise ValueError(
            f"--prompt.template has {given.behind!r} behind {{answer}}, which is no token of"
            f" {lm.source}: leave it out, or write the one token that ends an answer there"
        )
    bos = None if lm.bos_id is None else lm.tokenizer.id_to_token(lm.bos_id)
    return (lm.prompt or usual_text())._replace(
        context=given.context,
        closed_book=without_document(given.context, _control_tokens(lm, given.context)),
        answer=given.answer,
        end=end,
        whole=bos is not None and given.context.startswith(bos),
    )


def _first_token(lm: LanguageModel, text: str) -> str:
    """Returns the added token that a text begins with, "" where it begins with none."""
    found = [token for token in _added(lm) if text.lstrip().startswith(token)]
    return max(found, key=len, default="")


def _control_tokens(lm: LanguageModel, text: str) -> list[str]:
    return [token for token in _added(lm) if token in text]


def _added(lm: LanguageModel) -> list[str]:
    tokens = lm.tokenizer.get_added_tokens_decoder().values()
    return [token.content for token in tokens if token.content.strip()]

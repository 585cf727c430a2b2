"""The chat template of a model: what it was trained to see around a question and an answer."""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.models.files.config import read_json
from ragjax.models.files.tokenizers import token_text

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Stand for what is said; no template changes them.
_ASKED, _ANSWERED = "RagjaxAsked", "RagjaxAnswered"
# Templates that write the date would make a run read other prompts tomorrow.
_DATE = datetime.date(2024, 7, 26)


class ChatTemplate(NamedTuple):
    """A template in Jinja, as transformers applies it, and the tokens that it may write."""

    source: str
    tokens: tuple[tuple[str, str], ...]  # role, such as "bos_token", and token


class Turn(NamedTuple):
    """What a chat template puts around a question and its answer."""

    before: str  # the question, from the start of the text
    between: str  # question and answer
    space: str  # before the answer, counted to it
    behind: str  # the answer


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """Returns the chat template of a Hugging Face folder, None where it has none."""
    settings = read_json(folder / "tokenizer_config.json")
    if (source := default_template(declared_template(folder, settings))) is None:
        return None
    declared = settings | read_json(folder / "special_tokens_map.json")
    tokens = {role: token_text(declared.get(role)) for role in ROLES}
    return ChatTemplate(source, tuple((role, token) for role, token in tokens.items() if token))


def declared_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> Any:
    """Returns what a folder declares: a text, a list of named ones, or None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8-sig")
    return tokenizer_config.get("chat_template")


def default_template(declared: Any) -> str | None:
    """Returns the one template, or of several named ones that called "default"."""
    if isinstance(declared, str):
        return declared or None
    named = {
        entry["name"]: entry["template"]
        for entry in (declared if isinstance(declared, list) else ())
        if isinstance(entry, Mapping) and {"name", "template"} <= entry.keys()
    }
    return named.get("default")


def render_turn(template: ChatTemplate) -> Turn:
    """Renders a conversation of one question and one answer, without a thinking part.

    As `apply_chat_template` of transformers does, in the same sandbox of Jinja, but on one fixed
    day: the template is code of whoever made the model.

    Raises:
        ValueError: It cannot be rendered, or leaves out the question.
    """
    asked = [{"role": "user", "content": _ASKED}]
    prompt = _render(template, asked, add_generation_prompt=True)
    if prompt.count(_ASKED) != 1:
        raise ValueError(f"the chat template writes a question {prompt.count(_ASKED)} times")
    before, _, between = prompt.partition(_ASKED)
    answered = [*asked, {"role": "assistant", "content": _ANSWERED}]
    whole, found, behind = _render(template, answered).partition(_ANSWERED)
    # One that thinks first may write more, or less, before an answer that is there.
    more = whole.removeprefix(prompt) if found and whole.startswith(prompt) else ""
    if more.strip():
        return Turn(before, between + more, "", behind)
    return Turn(before, between, more, behind if found else "")


def _render(
    template: ChatTemplate, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    # Only here: loading a model needs no Jinja.
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Reads `{% generation %}`, which marks an answer for trainers, as what it holds."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            """Returns the nodes inside."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    try:
        return environment.from_string(template.source).render(
            messages=messages,
            raise_exception=refuse,
            strftime_now=_DATE.strftime,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,  # answers are short
            **dict(template.tokens),
        )
    except Exception as error:  # whatever the code of a template raises
        raise ValueError(f"the chat template cannot be rendered ({error!s:.200})") from error

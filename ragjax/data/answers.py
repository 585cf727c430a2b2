"""The answers of a question in a user's file, under the names that they have there."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragjax.data.fields import DEFAULT_FIELDS
from ragjax.data.jsonl import DataError, check_encodable

# Read where the usual field is missing and no other one was named, in this order.
_OTHER_NAMES = ("golden_answers", "gold_answers", "answer", "output")
_NO_ANSWERS = ("_id", "id", "qid", "text", "question", "query", "title", "metadata", "doc", "split")


class AnswerFields:
    """Reads the answers of each question of a file, and counts where they were found."""

    def __init__(self, name: str):
        """Takes the name of the field, in the metadata or beside the text."""
        self._name = name
        self._is_default = name == DEFAULT_FIELDS["answers"]
        self._found: Counter[str] = Counter()
        self._present: Counter[str] = Counter()

    def read(self, record: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the answers of a question, () if it has none.

        Raises:
            DataError: The field holds something else.
        """
        whole = {**record, **{name: v for name, v in metadata.items() if v is not None}}
        value = whole.get(self._name)
        if value is not None:
            self._found[self._name] += 1
            # One text under a name of the user's own, such as "answer", is one answer.
            is_one = isinstance(value, str) and not self._is_default
            return _parsed([value] if is_one else value, self._name)
        for name in _OTHER_NAMES if self._is_default else ():
            if answers := _guessed(whole.get(name)):
                self._found[name] += 1
                return answers
        self._present.update(name for name in whole if name not in _NO_ANSWERS)
        return ()

    def notes(self, path: Path) -> list[str]:
        """Returns where answers were read from, if not under the usual name."""
        notes = [
            f"{path}: the answers of {count} questions are read from the field {name!r}"
            for name, count in self._found.items()
            if name != self._name
        ]
        if not self._found and self._present:
            others = ", ".join(name for name, _ in self._present.most_common(10))
            notes.append(
                f"{path}: no question has answers in the field {self._name!r}; other fields there:"
                f" {others}; the right one is named with fields='answers=NAME'"
            )
        return notes


def _parsed(answers: Any, name: str) -> tuple[str, ...]:
    if not isinstance(answers, list):
        raise DataError(
            f"{name} is a {type(answers).__name__}; expected a list of strings, for example "
            f'{{"{name}": ["31 kb"]}}'
        )
    for place, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            shown = "empty" if isinstance(answer, str) else f"a {type(answer).__name__}"
            raise DataError(f"{name}[{place}] is {shown}; expected a flat list of strings")
        check_encodable(answer, name)
    return tuple(answer.strip() for answer in answers)


def _guessed(value: Any) -> tuple[str, ...]:
    """Returns the answers in a field of another name; () if it holds none in a known form."""
    values = value if isinstance(value, list) else [value]
    # KILT: [{"answer": "31 kb", "provenance": [...]}, {"provenance": [...]}]
    texts = [one.get("answer") if isinstance(one, dict) else one for one in values]
    kept = [text for text in texts if text is not None]
    if not all(isinstance(text, str) for text in kept):
        return ()
    for text in kept:
        check_encodable(text, "answer")
    return tuple(text.strip() for text in kept if text.strip())

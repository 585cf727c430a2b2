"""The answers of a question in a user's file, under the names that they have there."""

import ast
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragjax.data.fields import DEFAULT_FIELDS, plain_name
from ragjax.data.jsonl import DataError, Flaw, check_encodable

# Read where the usual field is missing and no other one was named, in this order.
_OTHER_NAMES = (
    *("golden_answers", "gold_answers", "answer", "output"),
    *("correct_answer", "ground_truth", "reference_answer"),
)
_NO_ANSWERS = (
    *("_id", "id", "qid", "text", "question", "query", "input", "title", "metadata", "doc"),
    *("split", "context", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"),
)
_LONGEST_LIST = 1 << 20  # characters of a cell


class AnswerFields:
    """Reads the answers of each question of a file, and counts where they were found."""

    def __init__(self, name: str, *, has_cells: bool = False):
        """Takes the name of the field, in the metadata or beside the text.

        Args:
            name: Of the field.
            has_cells: Whether all fields are text, as in CSV: an answer, or a list of several as
                JSON or Python writes it; an empty one is none.
        """
        self._name, self._has_cells = name, has_cells
        self._is_default = name == DEFAULT_FIELDS["answers"]
        self._found: Counter[str] = Counter()
        self._present: Counter[str] = Counter()

    def read(self, record: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the answers of a question, () if it has none.

        Raises:
            DataError: The field holds something else.
        """
        whole = {**record, **{name: v for name, v in metadata.items() if v is not None}}
        if self._has_cells:
            # "Answer" and "Answers" head columns as often.
            whole |= {plain_name(name): v for name, v in whole.items()}
            names = {self._name, *_OTHER_NAMES}
            whole |= {name: _cell(whole[name]) for name in names & whole.keys()}
        value = whole.get(self._name)
        if isinstance(value, dict) and isinstance(value.get("text"), list):
            value = value["text"]  # SQuAD as `datasets` has it
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
                Flaw(
                    f"{path}: no question has answers in the field {self._name!r}; other fields"
                    f" there: {others}; the right one is named with fields='answers=NAME'"
                )
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


def _cell(text: Any) -> Any:
    """Returns the answers in a cell of a table; None if it is empty."""
    if not isinstance(text, str):  # of metadata
        return text
    if not text.strip():
        return None
    if text.lstrip().startswith("[") and len(text) <= _LONGEST_LIST:
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue  # an answer that begins with a bracket
            if isinstance(value, list):
                return value
    return [text]


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

"""Questions of a user's files, of any kind that `records` tells, as `Question`s by id."""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.data.examples import Question
from ragjax.data.fields import (
    DEFAULT_FIELDS,
    SPLITS,
    found_field,
    missing_field,
    resolve_fields,
    usual_fields,
)
from ragjax.data.jsonl import (
    DataError,
    Flaw,
    RejectedRows,
    id_field,
    parse_object,
    require_path,
    string_field,
)
from ragjax.data.questions.answers import AnswerFields
from ragjax.data.questions.records import Context, Record, RecordFile
from ragjax.data.tables import ENDINGS, saved_files, shown_columns, table_stem

_SHARD = re.compile(r"-\d+-of-\d+\Z")  # of the files that the Hugging Face hub cuts a split into
# By the name of a file.
_QUERIES = ("queries", "questions")
_NAMED: Mapping[str, str | None] = {**dict.fromkeys(_QUERIES), **SPLITS}
BEIR_NAME = "queries.jsonl"


class Asked(NamedTuple):
    """A question, where it belongs, and what its file says to be relevant to it."""

    question: Question
    split: str  # that it belongs to where no qrels file names it
    relevant: tuple[str, ...] = ()  # ids of passages


def question_files(path: Path, notes: list[str] | None = None) -> dict[Path, str | None]:
    """Returns the files of questions at a path, each with its split, or None where the rows say it.

    Args:
        path: One file; or a folder with one for each split (`train.csv`, `dev-v2.0.json`, ...), or
            saved by `datasets`.
        notes: Told which files of a folder are not read, or serve as a split of another name.

    Raises:
        FileNotFoundError: No such path; the message suggests the nearest name.
        DataError: The folder holds none.
    """
    if not require_path(path).is_dir():
        return {path: None}
    if saved := saved_files(path, "queries"):
        return dict.fromkeys(saved)
    there = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    stems = {file: stem for file in there if (stem := table_stem(file)) and file.is_file()}
    if not stems:
        raise DataError(
            f"{path} holds no questions; expected a file for each split, for example train.jsonl or"
            f" test.csv ({', '.join(ENDINGS)}, or these with .gz)"
        )
    files, told = _splits(stems), [] if notes is None else notes
    if others := [file.name for file in there if file not in files]:
        told.append(f"{path}: {len(others)} files are not read: {shown_columns(others)}")
    for file, split in files.items():
        if split in SPLITS and split != SPLITS.get(_name(stems[file]).lower()):
            told.append(f"{file} serves as {split}")
    return files


def questions_among(there: Iterable[Path]) -> Path | None:
    """Returns the file or folder of questions among those in a folder; None where there is none.

    Raises:
        DataError: Several could be it.
    """
    found = sorted(
        path
        for path in there
        if (path.name if path.is_dir() else table_stem(path)).lower() in _QUERIES
    )
    # Beside BEIR's own file others may lie, for other programs.
    found = [path for path in found if path.name.removesuffix(".gz") == BEIR_NAME] or found
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(
            f"{found[0].parent} holds {names}, and each could be its questions; name one with"
            f" queries='{found[0]}'"
        )
    return found[0] if found else None


def read_questions(
    files: Mapping[Path, str | None],
    rejected: RejectedRows,
    notes: list[str],
    *,
    fields: Mapping[str, str] | None,
    need_ids: bool,
    keep: Callable[[Context], None] | None = None,
) -> dict[str, Asked]:
    """Reads files of questions of any kind.

    Args:
        files: Path to split, as of `question_files`.
        rejected: Takes what cannot be read.
        notes: Told the kind of a file, and what its fields are called, where that is not BEIR's.
        fields: Names in the files for "query_id", "query" and "answers", where they are others.
        need_ids: Whether qrels name the questions; else ids may be missing, and are made.
        keep: Takes the passages that stand beside the questions, which are relevant by their ids;
            None: only those that have an id of their own are.

    Raises:
        DataError: As the policy of `rejected` says; an id is there twice; a file has no questions.
    """
    reader = _Reader(fields or {}, need_ids=need_ids, keep=keep)
    for path, split in files.items():
        before = len(reader.asked)
        reader.read(path, split, rejected, notes)
        if len(reader.asked) == before:
            why = rejected.first_reason or "the file is empty"
            raise DataError(f"{path}: 0 questions ({why})")
    return reader.asked


class _Reader:
    """Collects the questions of several files."""

    def __init__(
        self,
        given: Mapping[str, str],
        *,
        need_ids: bool,
        keep: Callable[[Context], None] | None,
    ) -> None:
        self.asked: dict[str, Asked] = {}
        self._given = given
        self._need_ids, self._keep = need_ids, keep
        self._places: dict[str, tuple[Path, int]] = {}

    def read(self, path: Path, split: str | None, rejected: RejectedRows, notes: list[str]) -> None:
        file = RecordFile(path)
        given = {} if file.is_squad else self._given
        answers = AnswerFields(resolve_fields(given)["answers"], has_cells=file.has_cells)
        found: _Found | None = None
        repeated = 0
        for record in file.records(rejected):
            try:
                if self._keep:
                    for context in record.contexts:
                        self._keep(context)
                if record.fields is None:
                    continue
                found = found or self._find(record.fields, given)
                asked = self._parse(record, found, answers, split)
            except DataError as error:
                rejected.add(path, record.line, f"{record.where}{error}", record.row.raw)
                continue
            repeated += self._add(asked, path, record.line, made=found.id is None)
        notes += file.notes
        if found is not None:
            notes += found.notes(path)
        if repeated:
            notes.append(
                f"{path}: {repeated} rows ask what another row asks; their answers count together"
            )
        notes += answers.notes(path)

    def _find(self, fields: Mapping[str, Any], given: Mapping[str, str]) -> "_Found":
        """Returns the names of the fields of a file, by its first row."""
        names = resolve_fields(given)
        wanted = {name: names[name] for name in ("query_id", "query")}
        id_name, text_name = (found_field(name, fields, given) for name in wanted)
        if id_name is None and not self._need_ids and not usual_fields("query_id", fields):
            del wanted["query_id"]
        if text_name is None or (id_name is None and "query_id" in wanted):
            raise missing_field(fields, wanted)
        could = () if "query" in given else usual_fields("query", fields)
        return _Found(id_name, text_name, tuple(name for name in could if name != text_name))

    def _parse(
        self, record: Record, found: "_Found", answers: AnswerFields, split: str | None
    ) -> Asked:
        fields = record.fields or {}
        if found.text not in fields or (found.id or found.text) not in fields:
            raise missing_field(fields, {"query": found.text} | found.id_name)
        text = string_field(fields, found.text).strip()
        if not text:
            raise DataError(f"the question in field {found.text!r} is empty")
        metadata = fields.get("metadata") or {}
        if isinstance(metadata, str) and metadata.lstrip().startswith("{"):  # a cell of a table
            metadata = parse_object(metadata.encode("utf-8", "surrogatepass"))
        if not isinstance(metadata, dict):
            raise DataError(f"metadata is a {type(metadata).__name__}; expected an object")
        own = split or metadata.get("split") or fields.get("split") or "train"
        own = SPLITS.get(str(own).lower(), str(own))
        source = metadata.get("doc")
        question = Question(
            id=id_field(fields, found.id) if found.id else made_id(own, text),
            text=text,
            answers=answers.read(fields, metadata),
            source=None if source is None else str(source),
        )
        counted = (c.id for c in record.contexts if c.relevant and (self._keep or c.named))
        return Asked(question, own, tuple(dict.fromkeys(counted)))

    def _add(self, asked: Asked, path: Path, line: int, *, made: bool) -> bool:
        """Keeps a question; tells whether it was there, asked in another row."""
        id, place = asked.question.id, (path, line)
        if (first := self._places.setdefault(id, place)) == place and id not in self.asked:
            self.asked[id] = asked
            return False
        if not made:
            there = f"line {first[1]}" if first[0] == path else f"{first[0]}:{first[1]}"
            raise DataError(
                f"{path}: the id {id!r} stands in {there} and again in line {line}; ids are"
                ' compared as text, so the number 1 equals "1"; make them unique'
            )
        known = self.asked[id]
        answers = tuple(dict.fromkeys(known.question.answers + asked.question.answers))
        question = dataclasses.replace(known.question, answers=answers)
        relevant = tuple(dict.fromkeys(known.relevant + asked.relevant))
        self.asked[id] = known._replace(question=question, relevant=relevant)
        return True


class _Found(NamedTuple):
    """What the fields of a file are called."""

    id: str | None  # None: ids are made
    text: str
    others: tuple[str, ...]  # that could be the text, too

    @property
    def id_name(self) -> dict[str, str]:
        """What ids are called, if there are any."""
        return {} if self.id is None else {"query_id": self.id}

    def notes(self, path: Path) -> list[str]:
        """Returns a sentence where the fields are not called as BEIR has them."""
        parts = []
        if self.text != DEFAULT_FIELDS["query"]:
            parts.append(f"the questions are read from the field {self.text!r}")
        if self.id is None:
            parts.append("their ids are made of their text")
        notes = [f"{path}: {', '.join(parts)}"] if parts else []
        if self.others:
            notes.append(
                Flaw(
                    f"{path}: the questions are read from the field {self.text!r}, and there is"
                    f" {self.others[0]!r}, too, which is read with fields='query={self.others[0]}'"
                )
            )
        return notes


def made_id(split: str, text: str) -> str:
    """Returns the id of a question whose file has none: the same wherever it stands."""
    return "q-" + hashlib.sha256(f"{split}\n{text}".encode()).hexdigest()[:16]


def _name(stem: str) -> str:
    return _SHARD.sub("", stem)


def _splits(stems: Mapping[Path, str]) -> dict[Path, str | None]:
    """Returns the split that each file is named after, if it is.

    A name that only has a split's in it, such as `train-v2.0`, is of that split if no other is.
    """
    within = {
        name: {SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS}
        for name in map(_name, stems.values())
    }
    named = Counter(split for found in within.values() for split in found)
    splits: dict[str, str | None] = {}
    for name, found in within.items():
        if name.lower() in _NAMED:
            splits[name] = _NAMED[name.lower()]
        elif len(found) == 1 and named[split := next(iter(found))] == 1:
            splits[name] = split
        else:
            splits[name] = name
    return {file: splits[_name(stem)] for file, stem in stems.items()}

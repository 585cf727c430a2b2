"""Reads a folder in the BEIR layout: corpus.jsonl, queries.jsonl, qrels/*.tsv."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.data.answers import AnswerFields
from ragjax.data.corpus import DEFAULT_MAX_CHARS, Corpus
from ragjax.data.examples import Dataset, Question, hold_out
from ragjax.data.fields import missing_field, resolve_fields
from ragjax.data.jsonl import (
    BadRowPolicy,
    DataError,
    ReadProgress,
    RejectedRows,
    SourceFile,
    id_field,
    plain_or_gzipped,
    read_jsonl,
    require_path,
    string_field,
)

MAX_UNKNOWN_FRACTION = 0.01
_SHOWN_IDS = 10
_PARTS = ("corpus.jsonl", "queries.jsonl", "qrels")
# Other names of a split -> ours.
_SPLITS = {
    **{name: name for name in ("train", "dev", "test")},
    **dict.fromkeys(("validation", "valid", "val", "development"), "dev"),
    "training": "train",
    "testing": "test",
}
_DATA_ENDINGS = (".jsonl", ".gz", ".csv", ".tsv", ".parquet")
_INTEGER = re.compile(r"-?[0-9]+")


def read_beir(
    folder: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str],
    fields: Mapping[str, str] | None = None,
    on_bad_row: BadRowPolicy = "stop",
    on_unknown: BadRowPolicy = "stop",
    dev_fraction: float = 0.2,
    max_chars: int = DEFAULT_MAX_CHARS,
    progress: ReadProgress | None = None,
) -> Dataset:
    """Reads passages, questions and relevance judgements.

    A question belongs to the splits whose qrels file names it. Its answers are
    `metadata.answers`, or `answers` beside the text, or a usual other name of them; they may be
    missing. Without
    `qrels/dev.tsv` (or another usual name, such as `validation.tsv`), a part of train is held out,
    chosen by a hash of the question ids.

    Args:
        folder: Has `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv` with the columns
            query-id, corpus-id, score, separated by tabs; each plain or `.gz`.
        cache: Folder for the prepared corpus and for lists of rejected rows.
        fields: Names in the files for "id", "title", "text" (passages) and "query_id", "query",
            "answers" (questions), where they differ from BEIR's.
        on_bad_row: "stop" raises at the first bad row; "skip" counts bad rows and writes them to
            a `rejected.jsonl` below `cache`.
        on_unknown: What to do where more than 1 % of a qrels file name ids that the other files do
            not have: "stop" raises, "skip" drops those rows. Ids of questions and passages that
            were skipped do not count: their rows are dropped with them.
        dev_fraction: Of the train questions, in [0, 1), used when there is no dev split.
        max_chars: Longest passage, in characters.
        progress: Called with (bytes read, bytes in all) while the corpus is read.

    Returns:
        The splits that exist; `Dataset.notes` tells what was skipped.

    Raises:
        FileNotFoundError: A file is missing; the message suggests the nearest name.
        DataError: Bad rows, duplicate ids, an empty file, or more than 1 % of a qrels file
            naming unknown ids, as `on_bad_row` and `on_unknown` say.
    """
    folder, cache = Path(folder), Path(cache)
    if not require_path(folder).is_dir():
        raise DataError(
            f"{folder} is a file; expected a folder with corpus.jsonl and queries.jsonl"
        )
    if on_unknown not in ("stop", "skip"):
        raise DataError(f"on_unknown must be 'stop' or 'skip', got {on_unknown!r}")
    notes = _check_parts(folder)
    qrels_files = _qrels_files(folder / "qrels", notes)
    queries_file = plain_or_gzipped(folder, "queries.jsonl")
    corpus = Corpus.open(
        folder,
        cache=cache,
        fields=fields,
        on_bad_row=on_bad_row,
        max_chars=max_chars,
        progress=progress,
    )
    path_key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    with RejectedRows(cache / f"queries-{path_key}" / "rejected.jsonl", on_bad_row) as rejected:
        questions = _read_questions(queries_file, resolve_fields(fields), rejected, notes)
        notes += corpus.report.notes()
        skipped = {"passage": corpus.report.rejected + corpus.report.blank}
        policy = _Unknown(on_unknown, skipped | {"question": rejected.count})
        qrels = {
            split: _read_qrels(file, corpus, questions, rejected, notes, policy)
            for split, file in qrels_files.items()
        }
    if rejected.count:
        notes.append(
            f"{rejected.count} bad rows of questions and qrels are skipped, see {rejected.path}; "
            f"the first: {rejected.first_reason}"
        )
    unused = sum(all(id not in judged for judged in qrels.values()) for id in questions)
    if unused:
        notes.append(f"{unused} questions stand in no qrels file and are left out")
    dataset = Dataset(
        name=folder.resolve().name,
        corpus=corpus,
        questions={
            split: tuple(question for id, question in questions.items() if id in judged)
            for split, judged in qrels.items()
        },
        qrels=qrels,
        notes=tuple(notes),
    )
    if "dev" in qrels or "train" not in qrels:
        return dataset
    return hold_out(dataset, split="train", into="dev", fraction=dev_fraction)


def _check_parts(folder: Path) -> list[str]:
    """Returns a note on files that look like data and are not read.

    Raises:
        DataError: The folder has no part of a data set.
    """
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name.removesuffix(".gz") not in _PARTS]
    if len(others) == len(names):
        raise DataError(
            f"{folder} is no data set: expected corpus.jsonl, queries.jsonl and qrels/test.tsv"
            f" there, found {_some(names) or 'nothing'} (ragjax.data.folders makes a data set of"
            " text files)"
        )
    others = [name for name in others if name.endswith(_DATA_ENDINGS)]
    return [f"{folder}: {len(others)} files are not read: {_some(others)}"] if others else []


def _qrels_files(folder: Path, notes: list[str]) -> dict[str, Path]:
    """Returns the files of relevance judgements by split, under the names that runs use."""
    files: dict[str, Path] = {}
    others: list[str] = []
    for path in sorted(require_path(folder).iterdir()):
        split = path.name.removesuffix(".gz").removesuffix(".tsv")
        if path.name not in (f"{split}.tsv", f"{split}.tsv.gz") or not path.is_file():
            others.append(path.name)
        elif split in files:
            raise DataError(f"{folder} holds {split}.tsv and {split}.tsv.gz; remove one of them")
        else:
            files[split] = path
    found = f"{folder}: {len(others)} files are not read: {_some(others)}"
    if not files:
        detail = f" ({found})" if others else ""
        raise DataError(f"{folder} holds no .tsv file; expected for example test.tsv{detail}")
    if others:
        notes.append(f"{found}; a split is a .tsv or .tsv.gz file")
    for split in [name for name in files if _SPLITS.get(name.lower(), name) != name]:
        usual = _SPLITS[split.lower()]
        if usual in files:
            notes.append(f"{files[split]} is a split of its own, because {files[usual]} is {usual}")
        else:
            notes.append(f"{files[split]} serves as {usual}")
            files[usual] = files.pop(split)
    return files


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN_IDS]) + (", ..." if len(names) > _SHOWN_IDS else "")


def _read_questions(
    path: Path, names: Mapping[str, str], rejected: RejectedRows, notes: list[str]
) -> dict[str, Question]:
    questions: dict[str, Question] = {}
    lines: dict[str, int] = {}
    answers = AnswerFields(names["answers"])
    for row in read_jsonl(SourceFile(path), rejected):
        try:
            question = _parse_question(row.record, names, answers)
        except DataError as error:
            rejected.add(path, row.line, str(error), row.raw)
            continue
        if question.id in questions:
            raise DataError(
                f"{path}: the id {question.id!r} stands in line {lines[question.id]} and again in "
                f'line {row.line}; ids are compared as text, so the number 1 equals "1"; make '
                "them unique"
            )
        questions[question.id] = question
        lines[question.id] = row.line
    if not questions:
        raise DataError(f"{path}: 0 questions ({rejected.first_reason or 'the file is empty'})")
    notes += answers.notes(path)
    return questions


def _parse_question(
    record: dict[str, Any], names: Mapping[str, str], answers: AnswerFields
) -> Question:
    id_name, text_name = names["query_id"], names["query"]
    if id_name not in record or text_name not in record:
        raise missing_field(record, {"query_id": id_name, "query": text_name})
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DataError(f"metadata is a {type(metadata).__name__}; expected an object")
    text = string_field(record, text_name).strip()
    if not text:
        raise DataError(f"the question in field {text_name!r} is empty")
    source = metadata.get("doc")
    return Question(
        id=id_field(record, id_name),
        text=text,
        answers=answers.read(record, metadata),
        source=None if source is None else str(source),
    )


def _read_qrels(
    path: Path,
    corpus: Corpus,
    questions: Mapping[str, Question],
    rejected: RejectedRows,
    notes: list[str],
    policy: "_Unknown",
) -> dict[str, dict[str, int]]:
    """Returns question id to passage id to grade; what is dropped is noted."""
    judged: dict[str, dict[str, int]] = {}
    known_docs: dict[str, bool] = {}
    unknown: list[tuple[str, str]] = []
    num_rows = 0
    for row in _qrels_rows(path, rejected):
        num_rows += 1
        if row.doc_id not in known_docs:
            known_docs[row.doc_id] = row.doc_id in corpus
        if row.question_id not in questions:
            unknown.append(("question", row.question_id))
        elif not known_docs[row.doc_id]:
            unknown.append(("passage", row.doc_id))
        else:
            grades = judged.setdefault(row.question_id, {})
            if grades.setdefault(row.doc_id, row.grade) != row.grade:
                reason = (
                    f"question {row.question_id!r} and passage {row.doc_id!r} have the grades "
                    f"{grades[row.doc_id]} and {row.grade}; keep one"
                )
                rejected.add(path, row.line, reason)
    if not num_rows:
        raise DataError(f"{path}: 0 rows; expected query-id, corpus-id and score")
    if unknown:
        notes.append(policy.note(path, unknown, num_rows))
    positive = {id: grades for id, grades in judged.items() if max(grades.values()) > 0}
    if not positive:
        raise DataError(f"{path}: no question has a relevant passage (a score above 0)")
    if len(positive) < len(judged):
        dropped = len(judged) - len(positive)
        notes.append(f"{path}: {dropped} questions without a relevant passage are dropped")
    return positive


class _Unknown(NamedTuple):
    """What to do with rows of qrels files that name unknown ids."""

    on_unknown: BadRowPolicy
    skipped: Mapping[str, int]  # rows that were skipped, by what they are: unknown for that reason

    def note(self, path: Path, unknown: list[tuple[str, str]], num_rows: int) -> str:
        """Returns what is dropped, or raises DataError."""
        distinct = list(dict.fromkeys(unknown))
        excused = {
            one
            for kind, count in self.skipped.items()
            for one in [each for each in distinct if each[0] == kind][:count]
        }
        shown = _some([f"{kind} {id!r}" for kind, id in distinct])
        message = f"{path}: {len(unknown)} of {num_rows} rows name unknown ids ({shown})"
        left = sum(one not in excused for one in unknown)
        if self.on_unknown == "stop" and left > MAX_UNKNOWN_FRACTION * num_rows:
            raise DataError(
                f"{message}, more than {MAX_UNKNOWN_FRACTION:.0%}; do corpus, queries and qrels"
                " belong together? If they do, on_unknown=skip drops these rows"
            )
        return f"{message} and are dropped"


class _QrelsRow(NamedTuple):
    line: int
    question_id: str
    doc_id: str
    grade: int


def _qrels_rows(path: Path, rejected: RejectedRows) -> Iterator[_QrelsRow]:
    for number, raw, _ in SourceFile(path).lines():
        columns = raw.decode("utf-8", errors="replace").split("\t")
        if len(columns) != 3:
            reason = f"{len(columns)} columns; expected 3, with tabs: query-id, corpus-id, score"
            rejected.add(path, number, reason, raw)
        elif _INTEGER.fullmatch(columns[2]):
            yield _QrelsRow(number, columns[0], columns[1], int(columns[2]))
        elif number > 1:  # the first line may be the header
            reason = f"the score is {columns[2]!r}; expected a whole number"
            rejected.add(path, number, reason, raw)

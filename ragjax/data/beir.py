"""Reads a data set: a folder in the BEIR layout, with a corpus of any kind, or a corpus alone."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.data.answers import AnswerFields
from ragjax.data.corpus import DEFAULT_MAX_CHARS, Corpus
from ragjax.data.examples import SUPERVISION, Dataset, Question, hold_out
from ragjax.data.fields import missing_field, resolve_fields
from ragjax.data.jsonl import (
    BadRowPolicy,
    DataError,
    ReadProgress,
    RejectedRows,
    SourceFile,
    id_field,
    nearest_path,
    plain_or_gzipped,
    read_jsonl,
    string_field,
)
from ragjax.data.qrels import SPLITS, Unknown, qrels_files, read_qrels, shown_names
from ragjax.data.tables import find_tables

_PARTS = ("corpus.jsonl", "queries.jsonl", "qrels")
# What is trained on and chosen by; other splits are for measuring.
_TAUGHT = frozenset({"train", "dev"})
# Of the train questions, where there is no test split.
TEST_FRACTION = 0.2
_NEEDED = {
    "questions": "questions to queries.jsonl",
    "answers": "answers to queries.jsonl",
    "judgements": "qrels/train.tsv",
}
_DATA_ENDINGS = (".jsonl", ".json", ".gz", ".csv", ".tsv", ".parquet")


def read_beir(
    folder: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str],
    fields: Mapping[str, str] | None = None,
    on_bad_row: BadRowPolicy = "stop",
    on_unknown: BadRowPolicy = "stop",
    dev_fraction: float = 0.2,
    supervision: str = "auto",
    max_chars: int = DEFAULT_MAX_CHARS,
    progress: ReadProgress | None = None,
) -> Dataset:
    """Reads passages, and what there is of questions, answers and relevance judgements.

    A question belongs to the splits whose qrels file names it. One that no file names belongs to
    `metadata.split`, or else to train, unless there is a file of that split. Where there is no test
    or no dev split (dev has other usual names, such as `validation`), a part of train is held out,
    chosen by a hash of the question ids. The answers of a question are `metadata.answers`, or
    `answers` beside the text, or a usual other name of them.

    Args:
        folder: Has `corpus.jsonl`, or a corpus of another kind, see `Corpus.open`, and it may have
            `queries.jsonl` and `qrels/SPLIT.tsv` with the columns query-id, corpus-id, score,
            separated by tabs; each plain or `.gz`. Or a file of passages, or a data set of the
            Hugging Face hub, which have no questions.
        cache: Folder for the prepared corpus and for lists of rejected rows.
        fields: Names in the files for "id", "title", "text" (passages) and "query_id", "query",
            "answers" (questions), where they differ from BEIR's.
        on_bad_row: "stop" raises at the first bad row; "skip" counts bad rows and writes them to
            a `rejected.jsonl` below `cache`.
        on_unknown: What to do where more than 1 % of a qrels file name ids that the other files do
            not have: "stop" raises, "skip" drops those rows. Ids of questions and passages that
            were skipped do not count: their rows are dropped with them.
        dev_fraction: Of the train questions, in [0, 1), used when there is no dev split.
        supervision: One of `SUPERVISION`, the most that is read for train and dev; "auto": all.
            Other splits are for measuring and read in any case.
        max_chars: Longest passage, in characters.
        progress: Called with (bytes read, bytes in all) while the corpus is read.

    Returns:
        The splits that exist; `Dataset.notes` tells what was skipped.

    Raises:
        FileNotFoundError: A file is missing; the message suggests the nearest name.
        DataError: Bad rows, duplicate ids, an empty file, or more than 1 % of a qrels file
            naming unknown ids, as `on_bad_row` and `on_unknown` say.
        ImportError: What a kind of file needs is missing; the message says how to install it.
    """
    folder, cache = Path(folder), Path(cache)
    if on_unknown not in ("stop", "skip"):
        raise DataError(f"on_unknown must be 'stop' or 'skip', got {on_unknown!r}")
    if supervision not in ("auto", *SUPERVISION):
        known = ", ".join(("auto", *SUPERVISION))
        raise DataError(f"supervision must be one of {known}, got {supervision!r}")
    notes: list[str] = []
    judged, queries_file = {}, None
    if folder.is_dir():
        notes += _check_parts(folder)
        judged = qrels_files(folder / "qrels", notes)
        if supervision not in ("auto", "judgements"):
            judged = _only_measured(judged, notes)
        queries_file = _queries_file(folder, judged)
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
        asked: dict[str, _Asked] = {}
        if queries_file is not None:
            asked = _read_questions(queries_file, resolve_fields(fields), rejected, notes)
        notes += corpus.report.notes()
        skipped = {"passage": corpus.report.rejected + corpus.report.blank}
        policy = Unknown(on_unknown, skipped | {"question": rejected.count})
        qrels = {
            split: read_qrels(file, corpus, asked, rejected, notes, policy)
            for split, file in judged.items()
        }
    if rejected.count:
        notes.append(
            f"{rejected.count} bad rows of questions and qrels are skipped, see {rejected.path}; "
            f"the first: {rejected.first_reason}"
        )
    dataset = Dataset(
        name=folder.resolve().name if folder.is_dir() else folder.name.partition(".")[0],
        corpus=corpus,
        questions=_by_split(asked, qrels, notes),
        qrels=qrels,
        notes=tuple(notes),
    )
    dataset = _hold_out(dataset, dev_fraction)
    return dataset if supervision == "auto" else _restricted(dataset, supervision)


def _only_measured(files: Mapping[str, Path], notes: list[str]) -> dict[str, Path]:
    """Returns the files that nothing is trained on or chosen by."""
    if unread := [str(path) for split, path in files.items() if split in _TAUGHT]:
        notes.append(f"{shown_names(unread)}: not read, as supervision says")
    return {split: path for split, path in files.items() if split not in _TAUGHT}


def _queries_file(folder: Path, judged: Mapping[str, Path]) -> Path | None:
    """Returns the file of questions; None where the folder has documents only."""
    name = "queries.jsonl"
    there = any((folder / f"{name}{ending}").exists() for ending in ("", ".gz"))
    if not there and not judged and nearest_path(folder / name, having=".jsonl") is None:
        return None
    return plain_or_gzipped(folder, name)


def _by_split(
    asked: Mapping[str, "_Asked"],
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]],
    notes: list[str],
) -> dict[str, tuple[Question, ...]]:
    """Returns the questions of each split, in the order of the file."""
    splits = {
        split: [asked.question for id, asked in asked.items() if id in judged]
        for split, judged in qrels.items()
    }
    unused = 0
    for id, one in asked.items():
        if any(id in judged for judged in qrels.values()):
            continue
        # Beside judged training questions others cannot be trained on or chosen by alike.
        if one.split in qrels or ("train" in qrels and one.split in _TAUGHT):
            unused += 1
        else:
            splits.setdefault(one.split, []).append(one.question)
    if unused:
        notes.append(
            f"{unused} questions stand in no qrels file and are left out"
            + ("; supervision=answers or questions trains on them" if "train" in qrels else "")
        )
    return {split: tuple(questions) for split, questions in splits.items()}


def _hold_out(dataset: Dataset, dev_fraction: float) -> Dataset:
    """Returns the data with the splits that it lacks, taken from train."""
    if "test" not in dataset.questions and len(dataset.questions.get("train", ())) > 1:
        dataset = hold_out(dataset, split="train", into="test", fraction=TEST_FRACTION)
    train = dataset.questions.get("train", ())
    if "dev" in dataset.questions or not ("train" in dataset.qrels or len(train) > 1):
        return dataset
    return hold_out(dataset, split="train", into="dev", fraction=dev_fraction)


def _restricted(dataset: Dataset, supervision: str) -> Dataset:
    """Returns the data without what lies above this supervision in train and dev.

    Raises:
        DataError: The data do not have as much.
    """
    found = dataset.supervision
    if SUPERVISION.index(found) < SUPERVISION.index(supervision):
        raise DataError(
            f"supervision={supervision}: {dataset.name} has {found} only for train and dev; add"
            f" {_NEEDED[supervision]}, or use supervision=auto"
        )
    questions = dict(dataset.questions)
    for split in _TAUGHT & questions.keys():
        if supervision == "documents":
            del questions[split]
        elif supervision == "questions":
            asked = questions[split]
            questions[split] = tuple(dataclasses.replace(q, answers=()) for q in asked)
    return dataclasses.replace(dataset, questions=questions)


def _check_parts(folder: Path) -> list[str]:
    """Returns a note on files that look like data and are not read.

    Raises:
        DataError: The folder has no part of a data set.
    """
    names = sorted(path.name for path in folder.iterdir())
    corpus = find_tables(folder, "corpus", others=("queries", "questions", "qrels"))
    read = {path.relative_to(folder).parts[0] for path in corpus}
    others = [name for name in names if name.removesuffix(".gz") not in _PARTS and name not in read]
    if len(others) == len(names):
        raise DataError(
            f"{folder} is no data set: expected corpus.jsonl (or .csv, .tsv, .parquet), and"
            f" queries.jsonl and qrels/test.tsv if you have them; found"
            f" {shown_names(names) or 'nothing'} (ragjax.data.folders makes a data set of text"
            " files)"
        )
    others = [name for name in others if name.endswith(_DATA_ENDINGS)]
    return [f"{folder}: {len(others)} files are not read: {shown_names(others)}"] if others else []


def _read_questions(
    path: Path, names: Mapping[str, str], rejected: RejectedRows, notes: list[str]
) -> dict[str, "_Asked"]:
    questions: dict[str, _Asked] = {}
    lines: dict[str, int] = {}
    answers = AnswerFields(names["answers"])
    for row in read_jsonl(SourceFile(path), rejected):
        try:
            asked = _parse_question(row.record, names, answers)
        except DataError as error:
            rejected.add(path, row.line, str(error), row.raw)
            continue
        id = asked.question.id
        if id in questions:
            raise DataError(
                f"{path}: the id {id!r} stands in line {lines[id]} and again in "
                f'line {row.line}; ids are compared as text, so the number 1 equals "1"; make '
                "them unique"
            )
        questions[id] = asked
        lines[id] = row.line
    if not questions:
        raise DataError(f"{path}: 0 questions ({rejected.first_reason or 'the file is empty'})")
    notes += answers.notes(path)
    return questions


class _Asked(NamedTuple):
    question: Question
    split: str  # that it belongs to where no qrels file names it


def _parse_question(
    record: dict[str, Any], names: Mapping[str, str], answers: AnswerFields
) -> _Asked:
    id_name, text_name = names["query_id"], names["query"]
    if id_name not in record or text_name not in record:
        raise missing_field(record, {"query_id": id_name, "query": text_name})
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DataError(f"metadata is a {type(metadata).__name__}; expected an object")
    text = string_field(record, text_name).strip()
    if not text:
        raise DataError(f"the question in field {text_name!r} is empty")
    source, split = metadata.get("doc"), str(metadata.get("split") or "train")
    question = Question(
        id=id_field(record, id_name),
        text=text,
        answers=answers.read(record, metadata),
        source=None if source is None else str(source),
    )
    return _Asked(question, SPLITS.get(split.lower(), split))

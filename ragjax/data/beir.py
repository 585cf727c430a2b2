"""Reads documents, questions and judgements: a folder in the BEIR layout, or files of each."""

import dataclasses
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from ragjax.data.corpus import DEFAULT_MAX_CHARS, Corpus
from ragjax.data.examples import SUPERVISION, Dataset, Question, hold_out
from ragjax.data.fields import resolve_fields
from ragjax.data.jsonl import (
    BadRowPolicy,
    DataError,
    Flaw,
    ReadProgress,
    RejectedRows,
    nearest_path,
    require_path,
)
from ragjax.data.qrels import (
    Judged,
    Unknown,
    given_qrels,
    judged_beside,
    qrels_files,
    read_qrels,
    shown_names,
)
from ragjax.data.questions import (
    BEIR_NAME,
    Asked,
    holds_contexts,
    question_files,
    questions_among,
    read_questions,
    written_contexts,
)
from ragjax.data.tables import ENDINGS, OTHERS, SAVED_FILES, find_tables

_CORPUS = "corpus.jsonl"
_PARTS = (_CORPUS, BEIR_NAME, "qrels")
# What is trained on and chosen by; other splits are for measuring.
_TAUGHT = frozenset({"train", "dev"})
# Of the train questions, where there is no test split.
TEST_FRACTION = 0.2
_NEEDED = {
    "questions": "questions to queries.jsonl",
    "answers": "answers to queries.jsonl",
    "judgements": "qrels/train.tsv",
}
_DATA_ENDINGS = (".gz", *ENDINGS)


def read_beir(
    folder: str | os.PathLike[str] | None,
    *,
    cache: str | os.PathLike[str],
    queries: str | os.PathLike[str] | None = None,
    qrels: str | os.PathLike[str] | None = None,
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
    its `metadata.split` or `split`, or else to train, unless there is a file of that split. Where
    there is no test or no dev split (dev has other usual names, such as `validation`), a part of
    train is held out, chosen by a hash of the question ids. The answers of a question are
    `metadata.answers`, or `answers` beside the text, or a usual other name of them.

    Where there is no corpus, the passages beside the questions are it (SQuAD, DPR, a field
    `context`), and those of a question are relevant to it.

    Args:
        folder: Has `corpus.jsonl`, or a corpus of another kind, see `Corpus.open`, and it may have
            `queries.jsonl` (or `queries` or `questions` of another kind) and `qrels/SPLIT.tsv` with
            the columns query-id, corpus-id, score, separated by tabs; each plain or `.gz`. Or a
            file of passages, or of questions with their passages, or a data set of the Hugging
            Face hub. None: the passages are those in `queries`.
        cache: Folder for the prepared corpus and for lists of rejected rows.
        queries: File of questions of any kind, see `ragjax.data.questions`, or a folder with one
            for each split; None: those in the folder.
        qrels: File of judgements, as BEIR or as TREC has them, or a folder with one for each
            split; None: those in the folder.
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
    cache = Path(cache)
    if on_unknown not in ("stop", "skip"):
        raise DataError(f"on_unknown must be 'stop' or 'skip', got {on_unknown!r}")
    if supervision not in ("auto", *SUPERVISION):
        known = ", ".join(("auto", *SUPERVISION))
        raise DataError(f"supervision must be one of {known}, got {supervision!r}")
    notes: list[str] = []
    files = _find(folder, queries, qrels, notes)
    if supervision not in ("auto", "judgements"):
        files = files._replace(judged=_only_measured(files.judged, notes))
    path_key = hashlib.sha256(os.fsencode(files.source.resolve())).hexdigest()[:16]

    def open_corpus(path: Path, fields: Mapping[str, str] | None) -> Corpus:
        return Corpus.open(
            path,
            cache=cache,
            fields=fields,
            on_bad_row=on_bad_row,
            max_chars=max_chars,
            progress=progress,
        )

    corpus = open_corpus(files.corpus, fields) if files.corpus else None
    with RejectedRows(cache / f"queries-{path_key}" / "rejected.jsonl", on_bad_row) as rejected:
        asked: dict[str, Asked] = {}
        needs = {"fields": fields, "need_ids": bool(files.judged)}
        resolve_fields(fields)
        if corpus is None:
            contexts = cache / f"contexts-{path_key}" / _CORPUS
            with written_contexts(contexts, max_chars=max_chars) as keep:
                asked = read_questions(files.queries, rejected, notes, keep=keep, **needs)
            corpus = open_corpus(contexts, None)
            notes.append(f"the corpus is the {len(corpus):,} passages that stand beside questions")
        elif files.queries:
            asked = read_questions(files.queries, rejected, notes, **needs)
        notes += corpus.report.notes()
        skipped = {"passage": corpus.report.rejected + corpus.report.blank}
        policy = Unknown(on_unknown, skipped | {"question": rejected.count})
        judged: dict[str, Judged] = {
            split: read_qrels(file, corpus, asked, rejected, notes, policy)
            for split, file in files.judged.items()
        }
        judged = _judged_beside(files, asked, judged, corpus, notes, policy) | judged
        if supervision not in ("auto", "judgements"):
            judged = {split: rows for split, rows in judged.items() if split not in _TAUGHT}
    if rejected.count:
        notes.append(
            f"{rejected.count} bad rows of questions and qrels are skipped, see {rejected.path}; "
            f"the first: {rejected.first_reason}"
        )
    dataset = Dataset(
        name=files.name,
        corpus=corpus,
        questions=_by_split(asked, judged, notes),
        qrels=judged,
        notes=tuple(notes),
    )
    dataset = _hold_out(dataset, dev_fraction)
    return dataset if supervision == "auto" else _restricted(dataset, supervision)


def read_questions_alone(
    folder: str | os.PathLike[str] | None,
    rejected: RejectedRows,
    *,
    queries: str | os.PathLike[str] | None = None,
    fields: Mapping[str, str] | None = None,
) -> None:
    """Reads the questions of a data set whose documents cannot be read, for what is wrong there.

    Args:
        folder: As for `read_beir`, and so are `queries` and `fields`.
        rejected: Takes the bad rows.
        queries: File or folder of questions.
        fields: Names in the files.

    Raises:
        FileNotFoundError, DataError, ImportError: As `read_beir`.
    """
    if folder is None and queries is not None:
        asked, need_ids = question_files(Path(queries)), False
    else:
        files = _find(folder, queries, None, [])
        asked, need_ids = files.queries, bool(files.judged)
    if asked:
        read_questions(asked, rejected, [], fields=fields, need_ids=need_ids)


class _Files(NamedTuple):
    """Where the parts of a data set are."""

    source: Path  # what it is called after
    corpus: Path | None  # None: the passages beside the questions
    queries: Mapping[Path, str | None]  # with the split of each, where its name tells it
    judged: Mapping[str, Path]

    @property
    def name(self) -> str:
        """What the data set is called."""
        name = self.source.resolve().name
        return name if self.source.is_dir() else name.partition(".")[0]


def _judged_beside(
    files: _Files,
    asked: Mapping[str, Asked],
    judged: Mapping[str, Judged],
    corpus: Corpus,
    notes: list[str],
    policy: Unknown,
) -> dict[str, Judged]:
    """Returns judgements by split of the passages that the questions bring or name themselves.

    Those of questions and splits that qrels files judge are not looked at.
    """
    known = {id for questions in judged.values() for id in questions}
    beside = {
        id: (one.split, one.relevant)
        for id, one in asked.items()
        if one.relevant and one.split not in judged and id not in known
    }
    if not beside:
        return {}
    return judged_beside(next(iter(files.queries)), beside, corpus, notes, policy)


def _find(
    folder: str | os.PathLike[str] | None,
    queries: str | os.PathLike[str] | None,
    qrels: str | os.PathLike[str] | None,
    notes: list[str],
) -> _Files:
    """Returns the files of a data set.

    Raises:
        FileNotFoundError: A part is missing.
        DataError: There are no passages, or what there is is no data set.
    """
    source = None if folder is None else Path(folder)
    if source is not None and source.is_file() and queries is None and holds_contexts([source]):
        source, queries = None, source
    if source is None and queries is None:
        raise DataError("there is nothing to read: give a folder of documents, or queries")
    is_folder = source is not None and source.is_dir()
    judged = given_qrels(Path(qrels), notes) if qrels is not None else {}
    if source is not None and is_folder and qrels is None:
        judged = qrels_files(source / "qrels", notes)
    asked = question_files(Path(queries), notes) if queries is not None else {}
    if source is not None and is_folder and queries is None:
        asked = _queries_in(source, judged, notes)
    if source is not None:
        corpus = find_tables(source, "corpus", others=OTHERS) if is_folder else ()
        notes[:0] = _check_parts(source, [*corpus, *asked]) if is_folder else []
        if corpus or not is_folder or not holds_contexts(asked):
            return _Files(source, source, asked, judged)
    elif not holds_contexts(asked):
        raise DataError(
            f"{queries} has questions and no passages (SQuAD's or DPR's JSON, or a field context,"
            " has them); give a folder of documents, too"
        )
    return _Files(source or Path(queries or ""), None, asked, judged)


def _only_measured(files: Mapping[str, Path], notes: list[str]) -> dict[str, Path]:
    """Returns the files that nothing is trained on or chosen by."""
    if unread := [str(path) for split, path in files.items() if split in _TAUGHT]:
        notes.append(f"{shown_names(unread)}: not read, as supervision says")
    return {split: path for split, path in files.items() if split not in _TAUGHT}


def _queries_in(
    folder: Path, judged: Mapping[str, Path], notes: list[str]
) -> dict[Path, str | None]:
    """Returns the files of questions in a folder; none where it has documents only."""
    if found := questions_among(folder.iterdir()):
        return question_files(found, notes)
    if not judged and nearest_path(folder / BEIR_NAME, having=".jsonl") is None:
        return {}
    return {require_path(folder / BEIR_NAME): None}


def _by_split(
    asked: Mapping[str, Asked],
    qrels: Mapping[str, Judged],
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
        remedy = "; supervision=answers or questions trains on them" if "train" in qrels else ""
        notes.append(Flaw(f"{unused} questions stand in no qrels file and are left out{remedy}"))
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


def _check_parts(folder: Path, read: Collection[Path]) -> list[str]:
    """Returns a note on files that look like data and are not read.

    Raises:
        DataError: The folder has no part of a data set.
    """
    parts = {path.relative_to(folder).parts[0] for path in read if path.is_relative_to(folder)}
    names = sorted(path.name for path in folder.iterdir())
    parts |= {name for name in names if name.removesuffix(".gz") in _PARTS or name in SAVED_FILES}
    others = [name for name in names if name not in parts]
    if len(others) == len(names):
        raise DataError(
            f"{folder} is no data set: expected corpus.jsonl (or .csv, .tsv, .parquet), and"
            " queries.jsonl and qrels/test.tsv if you have them; found"
            f" {shown_names(names) or 'nothing'} (ragjax.data.folders makes a data set of text"
            " files)"
        )
    others = [name for name in others if name.lower().endswith(_DATA_ENDINGS)]
    return [f"{folder}: {len(others)} files are not read: {shown_names(others)}"] if others else []

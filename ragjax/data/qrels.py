"""Relevance judgements: qrels/SPLIT.tsv as BEIR has them, or files as TREC has them."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ragjax.data.corpus import Corpus
from ragjax.data.fields import SPLITS
from ragjax.data.jsonl import (
    BadRowPolicy,
    DataError,
    Flaw,
    RejectedRows,
    SourceFile,
    nearest_path,
    require_path,
)

MAX_UNKNOWN_FRACTION = 0.01
_SHOWN_IDS = 10
# Question id to passage id to grade.
Judged = Mapping[str, Mapping[str, float]]
_BEIR = "3, with tabs: query-id, corpus-id, score"
_TREC = "4, as in the first line: query-id, iteration, document-id, relevance"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)

_QUERIES = ("queries", "questions")  # folders of these may lie beside


def qrels_files(folder: Path, notes: list[str]) -> dict[str, Path]:
    """Returns the files of relevance judgements by split, under the names that runs use.

    Args:
        folder: That holds them; there may be none.
        notes: Told what is not read, or serves as another split.
    """
    near = nearest_path(folder)
    meant = near is not None and (
        (near.is_dir() and near.name not in _QUERIES) or near.stem == folder.name
    )
    if not folder.exists() and not meant:
        return {}
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
    found = f"{folder}: {len(others)} files are not read: {shown_names(others)}"
    if not files:
        detail = f" ({found})" if others else ""
        raise DataError(f"{folder} holds no .tsv file; expected for example test.tsv{detail}")
    if others:
        notes.append(Flaw(f"{found}; a split is a .tsv or .tsv.gz file"))
    for split in [name for name in files if SPLITS.get(name.lower(), name) != name]:
        usual = SPLITS[split.lower()]
        if usual in files:
            notes.append(f"{files[split]} is a split of its own, because {files[usual]} is {usual}")
        else:
            notes.append(f"{files[split]} serves as {usual}")
            files[usual] = files.pop(split)
    return files


def given_qrels(path: Path, notes: list[str]) -> dict[str, Path]:
    """Returns the files of a folder by split, or one file by the split that its name has.

    A file whose name has none, such as `qrels.txt`, judges questions of train, of which a part is
    held out as usual.
    """
    if require_path(path).is_dir():
        return qrels_files(path, notes)
    words = re.split(r"[^a-z]+", path.name.lower())
    split = next((SPLITS[word] for word in words if word in SPLITS), "train")
    notes.append(f"{path}: judgements of {split}")
    return {split: path}


def read_qrels(
    path: Path,
    corpus: Corpus,
    questions: Collection[str],
    rejected: RejectedRows,
    notes: list[str],
    policy: "Unknown",
) -> Judged:
    """Returns the judgements of a file; what is dropped is noted."""
    judged: dict[str, dict[str, float]] = {}
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
        why = rejected.first_reason or "expected query-id, corpus-id and score"
        raise DataError(f"{path}: 0 rows ({why})")
    if unknown:
        notes.append(Flaw(policy.note(path, unknown, num_rows)))
    positive = {id: grades for id, grades in judged.items() if max(grades.values()) > 0}
    if not positive:
        raise DataError(f"{path}: no question has a relevant passage (a score above 0)")
    if len(positive) < len(judged):
        dropped = len(judged) - len(positive)
        notes.append(Flaw(f"{path}: {dropped} questions without a relevant passage are dropped"))
    return positive


def judged_beside(
    path: Path,
    beside: Mapping[str, tuple[str, Sequence[str]]],
    corpus: Corpus,
    notes: list[str],
    policy: "Unknown",
) -> dict[str, Judged]:
    """Returns judgements by split of passages that a file of questions names itself.

    Args:
        path: Of the questions, for messages.
        beside: Question id to its split and the ids of its relevant passages.
        corpus: The passages; where it has none of them, nothing is judged.
        notes: Told what is dropped.
        policy: For passages that the corpus does not have.
    """
    named = [(split, id, doc) for id, (split, docs) in beside.items() for doc in docs]
    unknown = [("passage", doc) for _, _, doc in named if doc not in corpus]
    if named and len(unknown) == len(named):
        unused = f"{path}: the passages that it names are not in the corpus, and not used"
        notes.append(Flaw(unused))
        return {}
    if unknown:
        notes.append(Flaw(policy.note(path, unknown, len(named))))
    judged: dict[str, dict[str, dict[str, float]]] = {}
    for split, id, doc in named:
        if doc in corpus:
            judged.setdefault(split, {}).setdefault(id, {})[doc] = 1
    return dict(judged)


class Unknown(NamedTuple):
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
        shown = shown_names([f"{kind} {id!r}" for kind, id in distinct])
        message = f"{path}: {len(unknown)} of {num_rows} rows name unknown ids ({shown})"
        left = sum(one not in excused for one in unknown)
        if self.on_unknown == "stop" and left > MAX_UNKNOWN_FRACTION * num_rows:
            raise DataError(
                f"{message}, more than {MAX_UNKNOWN_FRACTION:.0%}; do corpus, queries and qrels"
                " belong together? If they do, drop these rows with on_unknown=skip"
            )
        return f"{message} and are dropped"


class _QrelsRow(NamedTuple):
    line: int
    question_id: str
    doc_id: str
    grade: float  # an int where it is whole


def _qrels_rows(path: Path, rejected: RejectedRows) -> Iterator[_QrelsRow]:
    is_trec: bool | None = None  # told by the first line
    for number, raw, _ in SourceFile(path).lines():
        text = raw.decode("utf-8", errors="replace")
        if is_trec is None:
            is_trec = text.count("\t") != 2 and len(text.split()) == 4
        columns = text.split() if is_trec else text.split("\t")
        if len(columns) != (4 if is_trec else 3):
            expected = _TREC if is_trec else _BEIR
            rejected.add(path, number, f"{len(columns)} columns; expected {expected}", raw)
        elif (grade := _grade(columns[-1])) is not None:
            yield _QrelsRow(number, columns[0], columns[-2], grade)
        elif number > 1 or is_trec:  # the first line of BEIR's may be the header
            rejected.add(path, number, f"the score is {columns[-1]!r}; expected a number", raw)


def _grade(text: str) -> float | None:
    """Returns a score; None if it is no finite number."""
    if not _NUMBER.fullmatch(text := text.strip()):
        return None
    value = float(text)
    return (int(value) if value.is_integer() else value) if math.isfinite(value) else None


def shown_names(names: Sequence[str]) -> str:
    """Returns the first few names, for a message."""
    return ", ".join(names[:_SHOWN_IDS]) + (", ..." if len(names) > _SHOWN_IDS else "")

"""Relevance judgements of a folder in the BEIR layout: qrels/SPLIT.tsv."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ragjax.data.corpus import Corpus
from ragjax.data.jsonl import (
    BadRowPolicy,
    DataError,
    RejectedRows,
    SourceFile,
    nearest_path,
    require_path,
)

MAX_UNKNOWN_FRACTION = 0.01
_SHOWN_IDS = 10
# Other names of a split -> ours.
SPLITS = {
    **{name: name for name in ("train", "dev", "test")},
    **dict.fromkeys(("validation", "valid", "val", "development"), "dev"),
    "training": "train",
    "testing": "test",
}
_INTEGER = re.compile(r"-?[0-9]+")


def qrels_files(folder: Path, notes: list[str]) -> dict[str, Path]:
    """Returns the files of relevance judgements by split, under the names that runs use.

    Args:
        folder: That holds them; there may be none.
        notes: Told what is not read, or serves as another split.
    """
    near = nearest_path(folder)
    meant = near is not None and (near.is_dir() or near.stem == folder.name)
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
        notes.append(f"{found}; a split is a .tsv or .tsv.gz file")
    for split in [name for name in files if SPLITS.get(name.lower(), name) != name]:
        usual = SPLITS[split.lower()]
        if usual in files:
            notes.append(f"{files[split]} is a split of its own, because {files[usual]} is {usual}")
        else:
            notes.append(f"{files[split]} serves as {usual}")
            files[usual] = files.pop(split)
    return files


def read_qrels(
    path: Path,
    corpus: Corpus,
    questions: Collection[str],
    rejected: RejectedRows,
    notes: list[str],
    policy: "Unknown",
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


def shown_names(names: Sequence[str]) -> str:
    """Returns the first few names, for a message."""
    return ", ".join(names[:_SHOWN_IDS]) + (", ..." if len(names) > _SHOWN_IDS else "")

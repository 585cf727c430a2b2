"""Scores of (question, passage) pairs from a file: a teacher that ran elsewhere."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.data import DataError, Dataset, Question
from ragjax.data.jsonl import RejectedRows, SourceFile, id_field, read_jsonl
from ragjax.index import SearchResult
from ragjax.runs.data import Log
from ragjax.storage import nearest_name, write_jsonl

_QUESTION, _PASSAGE = ("query-id", "question"), ("corpus-id", "passage")
_EXAMPLE = '{"query-id": "q1", "corpus-id": "d1", "score": 0.5}'


class FileScores:
    """Scores by question id and corpus row.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, dataset: Dataset) -> None:
        """Reads the file.

        Args:
            path: JSON lines `{"query-id", "corpus-id", "score"}`; "question" and "passage" are the
                same ids. Plain or `.gz`.
            dataset: Whose questions and passages are scored.

        Raises:
            ValueError: There is no such file, or a line names an id that the data has not, or a
                pair for the second time, or its score is no finite number; file, line and remedy
                are named.
        """
        if not path.is_file():
            raise ValueError(f"--retriever.scores_file {path}: no such file")
        self.path = path
        self._corpus, self._scores = dataset.corpus, dict[tuple[str, int], float]()
        known = {q.id for questions in dataset.questions.values() for q in questions}
        lines: dict[tuple[str, int], int] = {}
        # Its policy is to stop, so nothing is written.
        for row in read_jsonl(
            SourceFile(path), RejectedRows(path.with_name("rejected.jsonl"), "stop")
        ):
            place = f"{path}:{row.line}"
            try:
                question, passage = (_id(row.record, names) for names in (_QUESTION, _PASSAGE))
                score = _number(row.record)
            except DataError as error:
                raise ValueError(f"{place}: {error}; expected {_EXAMPLE}") from error
            if question not in known:
                raise ValueError(f"{place}: {_unknown('question', question, known)}")
            if passage not in self._corpus:
                raise ValueError(f"{place}: {_unknown('passage', passage, ())}")
            pair = question, self._corpus.row_of(passage)
            if pair in lines:
                raise ValueError(
                    f"{place}: question {question!r} and passage {passage!r} have a score in line"
                    f" {lines[pair]} already; leave one of the two out"
                )
            lines[pair], self._scores[pair] = row.line, score

    def scores(self, questions: Sequence[Question], candidates: SearchResult) -> np.ndarray:
        """Returns `[Q, K]` float64; NaN where masked or the file has none."""
        found = np.full(candidates.mask.shape, np.nan)
        for q, k in np.argwhere(candidates.mask).tolist():
            pair = questions[q].id, int(candidates.doc_ids[q, k])
            found[q, k] = self._scores.get(pair, np.nan)
        return found

    def report(
        self, questions: Sequence[Question], candidates: SearchResult, missing: Path, log: Log
    ) -> None:
        """Says what share of the pairs that are needed the file covers, and lists the others.

        Raises:
            ValueError: It covers none.
        """
        lacks = candidates.mask & np.isnan(self.scores(questions, candidates))
        needed, known = int(candidates.mask.sum()), int(candidates.mask.sum() - lacks.sum())
        if lacks.any():
            ids = self._corpus.id_of
            missing.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(
                missing,
                (
                    {"query-id": questions[q].id, "corpus-id": ids(int(candidates.doc_ids[q, k]))}
                    for q, k in np.argwhere(lacks).tolist()
                ),
            )
        where = f"the pairs that it lacks stand in {missing}"
        if not known:
            raise ValueError(
                f"--retriever.scores_file {self.path} scores none of the {needed:,} pairs of a"
                f" training question and a candidate; {where}: score those"
            )
        share = f"{known:,} of {needed:,} pairs ({known / needed:.1%})"
        none = int((~(candidates.mask & ~lacks).any(axis=1)).sum())
        log(
            f"teacher: {self.path} scores {share}"
            + (
                f"; a pair without a score counts as the mean of its question's, and {none} of"
                f" {len(questions)} questions have none; {where}"
                if lacks.any()
                else ""
            )
        )


def _id(record: dict[str, Any], names: tuple[str, ...]) -> str:
    there = [name for name in names if name in record]
    if len(there) != 1:
        raise DataError(f"needs one of the fields {' and '.join(map(repr, names))}")
    return id_field(record, there[0])


def _number(record: dict[str, Any]) -> float:
    score = record.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise DataError(f"'score' is {score!r}, which is no finite number")
    return float(score)


def _unknown(what: str, given: str, known: Any) -> str:
    near = nearest_name(given, known)
    hint = f"did you mean {near!r}?" if near else f"take the ids of the data's {what}s"
    return f"there is no {what} {given!r}; {hint}"

"""Which documents a question may find: not itself, and of copies one.

Q questions, K documents.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ragjax.data import Corpus, Question
from ragjax.index import Index, SearchResult
from ragjax.index.base import NO_DOC
from ragjax.runs.workspace import Workspace
from ragjax.training.live import StepQueries, StepSearch

_SHOWN = 3


class Findable(NamedTuple):
    """What Q questions may find."""

    dropped: Sequence[frozenset[int]]  # rows that a question does not find
    stands_for: Sequence[Mapping[int, int]]  # row to the copy of it that is found in its place

    def take(self, rows: Sequence[int]) -> "Findable":
        """Returns what some of the questions may find."""
        return Findable([self.dropped[row] for row in rows], [self.stands_for[row] for row in rows])


def findable_in(
    workspace: Workspace, split: str, questions: Sequence[Question] | None = None
) -> Findable:
    """Returns what questions may find where they are measured.

    A question that is itself a passage does not find itself, as in BEIR's evaluation, unless that
    is relevant to it. A copy of a relevant passage counts as that passage.

    Args:
        workspace: Data; what was found of both kinds is noted.
        split: Of the questions.
        questions: Of the split; None: all that are used.
    """
    questions = workspace.questions[split] if questions is None else questions
    twins, graded = workspace.dataset.twins, workspace.dataset.graded_rows(split, questions)
    dropped: list[frozenset[int]] = []
    stands_for: list[dict[int, int]] = []
    for question, grades in zip(questions, graded, strict=True):
        relevant = [row for row, grade in grades.items() if grade > 0]
        copied = {copy: row for row in relevant for copy in twins.copies.get(row, ())}
        dropped.append(twins.own.get(question.id, frozenset()) - {*relevant, *copied})
        stands_for.append({copy: row for copy, row in copied.items() if copy not in grades})
    if count := sum(map(bool, dropped)):
        workspace.note(
            f"{count} of the {len(questions)} {split} questions stand in the corpus themselves,"
            " with the same id or the same text: none of them finds itself"
        )
    if count := sum(map(bool, stands_for)):
        workspace.note(
            f"{count} of the {len(questions)} {split} questions have a relevant passage with copies"
            " under other ids, which count as that passage"
        )
    return Findable(dropped, stands_for)


def findable_in_training(
    workspace: Workspace, sources: Sequence[frozenset[int]] | None = None
) -> Findable:
    """Returns what the training questions may find: neither themselves nor a passage twice.

    Args:
        workspace: Data; copies are noted.
        sources: Further rows that each question does not find; None: there are none.
    """
    own = findable_in(workspace, "train").dropped
    copies = workspace.dataset.twins.copies
    if copies:
        extra = len(copies) - len({min(group) for group in copies.values()})
        workspace.note(
            f"{extra} passages have the title and text of another: in training they are one passage"
        )
    firsts = {row: min(group) for row, group in copies.items()}
    sources = sources or [frozenset()] * len(own)
    dropped = [
        frozenset(copy for row in mine | theirs for copy in copies.get(row, (row,)))
        for mine, theirs in zip(own, sources, strict=True)
    ]
    return Findable(dropped, [firsts] * len(own))


def first_copies(workspace: Workspace, rows: frozenset[int]) -> frozenset[int]:
    """Returns the rows with the first of its copies in place of each."""
    copies = workspace.dataset.twins.copies
    return frozenset(min(copies.get(row, (row,))) for row in rows)


def search_findable(
    search: Callable[[int], SearchResult], findable: Findable, k: int, *, size: int
) -> SearchResult:
    """Returns the k best documents that each question may find.

    Args:
        search: Returns the best documents of all Q questions for a number of them; called with
            more than k where some are left out.
        findable: What they may find.
        k: Columns returned.
        size: N, documents in all.
    """
    if not any(findable.dropped) and not any(findable.stands_for):
        return search(k)
    depth = min(size, k + max(map(len, findable.dropped), default=0))
    while True:
        found = search(depth)
        kept = _keep(found, findable, k)
        short = ~kept.mask[:, -1] & found.mask[:, -1]
        if depth >= size or not short.any():
            return kept
        depth = min(size, 4 * depth)


class FindableIndex:
    """An index as the questions of a split search it, all of them at once."""

    def __init__(self, index: Index[Any], findable: Findable) -> None:
        """Takes the index and what each question may find."""
        self._index, self._findable = index, findable

    @property
    def size(self) -> int:
        """Number of documents."""
        return self._index.size

    def search(self, queries: Any, k: int) -> SearchResult:
        """Returns the k best documents that each question may find; see `search_findable`."""
        return search_findable(
            lambda depth: self._index.search(queries, depth), self._findable, k, size=self.size
        )


def search_in_training(
    search: StepSearch, findable: Findable, questions: Sequence[Question]
) -> StepSearch:
    """Returns a search that finds what the training questions of a step may find.

    Args:
        search: Finds documents.
        findable: What each training question may find.
        questions: The training questions, to name in an error.

    Returns:
        The search; it raises ValueError where nothing is left for a question.
    """

    def allowed(queries: StepQueries, k: int) -> SearchResult:
        kept = search_findable(
            lambda depth: search(queries, depth),
            findable.take(queries.rows.tolist()),
            k,
            size=queries.snapshot.index.size,
        )
        for row, mask in zip(queries.rows, kept.mask, strict=True):
            if not mask.any() and findable.dropped[row]:
                raise ValueError(
                    f"question {questions[row].id!r}: all documents that were found are the"
                    f" question itself or its own source {questions[row].source!r}, so nothing is"
                    " left to read; add other documents, or let it find its source (same_source"
                    " keep)"
                )
        return kept

    return allowed


def source_rows(corpus: Corpus, questions: Sequence[Question]) -> list[frozenset[int]]:
    """Returns the corpus rows that each question was made from.

    A question's source is its `metadata.doc`; the rows of it are those whose id or title it is.

    Args:
        corpus: The passages.
        questions: Q questions.

    Returns:
        Q sets of rows; empty for a question that names no source.

    Raises:
        ValueError: No question names a source, or no passage is of one.
    """
    wanted = {question.source for question in questions if question.source is not None}
    if not wanted:
        raise ValueError(
            "--training.same_source drop: no question names the document it was made from"
            ' ("doc" in the metadata of queries.jsonl); add it, or use --training.same_source keep'
        )
    rows: dict[str, set[int]] = {}
    for row, passage in enumerate(corpus):
        for name in {passage.id, passage.title} & wanted:
            rows.setdefault(name, set()).add(row)
    if not rows:
        shown = ", ".join(repr(name) for name in sorted(wanted)[:_SHOWN])
        raise ValueError(
            f"--training.same_source drop: no passage has the id or title of a source ({shown},"
            " ...); make the metadata of queries.jsonl and corpus.jsonl agree, or use"
            " --training.same_source keep"
        )
    return [frozenset(rows.get(question.source or "", ())) for question in questions]


def _keep(found: SearchResult, findable: Findable, k: int) -> SearchResult:
    """Returns the k best of the documents that were found, each once."""
    shape = (len(found.doc_ids), k)
    doc_ids = np.full(shape, NO_DOC, np.int32)
    scores = np.full(shape, -np.inf, np.float32)
    for row, (dropped, stands_for) in enumerate(zip(*findable, strict=True)):
        kept: dict[int, float] = {}
        for column in np.flatnonzero(found.mask[row]):
            doc = int(found.doc_ids[row, column])
            if doc not in dropped:
                kept.setdefault(stands_for.get(doc, doc), found.scores[row, column])
            if len(kept) == k:
                break
        doc_ids[row, : len(kept)] = list(kept)
        scores[row, : len(kept)] = list(kept.values())
    return SearchResult(doc_ids, scores, doc_ids != NO_DOC)

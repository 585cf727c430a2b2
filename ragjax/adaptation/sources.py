"""Leaves out the documents that a question was made from."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ragjax.data import Corpus, Question
from ragjax.index import IndexSnapshot, SearchResult
from ragjax.index.base import NO_DOC
from ragjax.training.live import Search

_SHOWN = 3


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


def search_without_sources(
    search: Search, sources: Sequence[frozenset[int]], questions: Sequence[Question]
) -> Search:
    """Returns a search that looks deeper by as many documents as it leaves out.

    Args:
        search: Finds documents.
        sources: Rows left out for each question.
        questions: The same questions, to name in an error.

    Returns:
        The search; it raises ValueError where nothing is left for a question, rather than hand it
        the document that it was made from.
    """

    def without(
        snapshot: IndexSnapshot, rows: NDArray[np.int64], embeddings: NDArray[np.float32], k: int
    ) -> SearchResult:
        deepest = k + max(len(sources[row]) for row in rows)
        found = search(snapshot, rows, embeddings, min(deepest, snapshot.index.size))
        kept = drop_rows(found, [sources[row] for row in rows], k)
        for row, mask in zip(rows, kept.mask, strict=True):
            if not mask.any():
                raise ValueError(
                    f"question {questions[row].id!r}: all {found.mask.shape[1]} documents that were"
                    f" found are its own source {questions[row].source!r}, so nothing is left to"
                    " read; use --training.same_source keep, or a corpus with other documents"
                )
        return kept

    return without


def drop_rows(found: SearchResult, dropped: Sequence[frozenset[int]], k: int) -> SearchResult:
    """Returns the k best documents of each query that are not among its dropped ones.

    Args:
        found: `[B, D]` documents, best first.
        dropped: B sets of rows.
        k: Columns returned.
    """
    shape = (len(dropped), k)
    doc_ids = np.full(shape, NO_DOC, np.int32)
    scores = np.full(shape, -np.inf, np.float32)
    for row, unwanted in enumerate(dropped):
        kept = [
            column
            for column in np.flatnonzero(found.mask[row])
            if int(found.doc_ids[row, column]) not in unwanted
        ][:k]
        doc_ids[row, : len(kept)] = found.doc_ids[row, kept]
        scores[row, : len(kept)] = found.scores[row, kept]
    return SearchResult(doc_ids, scores, doc_ids != NO_DOC)

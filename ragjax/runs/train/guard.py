"""The retriever's training measured by what would be served, on dev questions and a few passages.

Q dev questions, M passages of the pool, N of the corpus, D embedding size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax.index import Bm25Index, HybridIndex, HybridQueries, SearchResult
from ragjax.index.base import pad_result
from ragjax.refresh import encode_corpus
from ragjax.runs.compare.choice import (
    FIGURE_DEPTH,
    choose,
    judge_problem,
    optimism,
    ranking_figure,
)
from ragjax.runs.found import Findable, FindableIndex, findable_in
from ragjax.runs.indexes import Retriever, search
from ragjax.runs.train.best import FACTORS, BestStep, save_kept
from ragjax.runs.trainable import average_params
from ragjax.runs.workspace import Workspace
from ragjax.training.lsr import towers

POOL_PASSAGES = 256
"""Passages that are encoded to measure a step: about 4 seconds on two cores."""
_QUESTIONS = 128
_DEPTH = 20
_RANDOM = 0.1  # share of the pool
_TIE = 1e-3


class Kept(NamedTuple):
    """Towers that training leaves behind, and how they were chosen."""

    params: dict[str, Any]
    step: str  # name of the step
    factor: float  # weight of its parameters beside those before training
    # By how much the figure on dev is too high for having been chosen there, in MRR: 0 for the last
    # step as it is.
    optimism: float = 0.0


class DevPool:
    """The passages that matter for the dev questions, searched as the whole corpus will be.

    They are the best that the un-adapted hybrid finds for each question, one that is relevant to
    it, and a tenth of random ones.

    Attributes:
        rows: `[M]` corpus rows, ascending.
    """

    def __init__(
        self,
        workspace: Workspace,
        bm25: Bm25Index,
        before: Retriever,
        base: Mapping[str, Any],
        found: SearchResult,
    ) -> None:
        """Chooses the passages and searches their words.

        Args:
            workspace: Data and encoder.
            bm25: The lexical side.
            before: The un-adapted retriever, whose weight the hybrid of the pool has.
            base: Its towers by name.
            found: `[Q, K]` what its hybrid finds for the dev questions.
        """
        relevant = workspace.relevant_rows("dev")
        known = np.flatnonzero([bool(rows) for rows in relevant])[:_QUESTIONS]
        self._questions = [workspace.questions["dev"][row] for row in known]
        self._texts = [question.text for question in self._questions]
        wanted = [_wanted(found, int(row), relevant[row]) for row in known]
        size = len(workspace.dataset.corpus)
        self.rows = _pool_rows(wanted, size, seed=workspace.config.seed)
        place = {int(row): number for number, row in enumerate(self.rows)}
        findable = findable_in(workspace, "dev").take(known.tolist())
        self._findable = _placed(findable, place)
        self._relevant = [
            frozenset(place[row] for row in relevant[question] if row in place)
            for question in known
        ]
        self._lexical = _search_words(bm25, self._texts, place, size)
        self._workspace, self._weight = workspace, before.hybrid.dense_weight
        self._base_doc, self._base = towers(base, None)[1], before.embeddings[self.rows]

    def figure(self, params: Mapping[str, Any]) -> NDArray[np.float64]:
        """Computes the figure of the hybrid for each question of the pool, as `ranking_figure`.

        Hybrids that are as good are told apart by their dense sides, by a thousandth of the figure.
        Towers whose embeddings are not finite find nothing.
        """
        query_params, doc_params = towers(params, None)
        try:
            docs = self._base
            if doc_params is not self._base_doc:
                docs = encode_corpus(self._workspace.task, doc_params, rows=self.rows)
            queries = self._workspace.encode_queries(query_params, self._questions)
        except ValueError:
            return np.zeros(len(self._questions))
        scores = queries @ docs.T
        order = np.argsort(-scores, axis=1, kind="stable").astype(np.int32)
        dense = pad_result(order, np.take_along_axis(scores, order, axis=1), len(self.rows))
        hybrid = HybridIndex(_Known(dense), _Known(self._lexical), dense_weight=self._weight)
        both = FindableIndex(hybrid, self._findable).search(
            HybridQueries(queries, self._texts), FIGURE_DEPTH
        )
        alone = FindableIndex(_Known(dense), self._findable).search(queries, FIGURE_DEPTH)
        return ranking_figure(both, self._relevant) + _TIE * ranking_figure(alone, self._relevant)


class Guard:
    """Watches the retriever train, and keeps of it what is best on dev."""

    def __init__(
        self, workspace: Workspace, bm25: Bm25Index, before: Retriever, base: dict[str, Any]
    ) -> None:
        """Looks at what the un-adapted hybrid finds for the dev questions.

        Args:
            workspace: Data, options (`keep`) and folder.
            bm25: The lexical side.
            before: The un-adapted retriever.
            base: Its towers by name.
        """
        self._workspace, self._base = workspace, base
        self._best: BestStep | None = None
        if workspace.config.keep == "last":
            return
        relevant, size = workspace.relevant_rows("dev"), len(workspace.dataset.corpus)
        found = _found_before(workspace, before)
        if problem := judge_problem(ranking_figure(found, relevant), relevant, size):
            workspace.log(f"note: dev questions cannot judge the training: {problem}")
            return
        pool = DevPool(workspace, bm25, before, base, found)
        self._best = BestStep(workspace, "retriever", pool.figure)

    def watch(
        self, stage: str, num_steps: int, towers_of: Callable[[Any], dict[str, Any]]
    ) -> Callable[[int, Any], None] | None:
        """Returns what `run_stage` calls after each step; None: nothing is measured.

        Args:
            stage: Its name.
            num_steps: Its length.
            towers_of: Trainable parameters to the towers by name.
        """
        return None if self._best is None else self._best.watch(stage, num_steps, towers_of)

    def finish(self, params: dict[str, Any]) -> Kept:
        """Chooses among steps and averages, and saves the result for whoever opens the run.

        Args:
            params: Towers after the last step, kept where nothing was measured.
        """
        kept = Kept(params, "the last", 1.0)
        if self._best is not None:
            with self._workspace.timed("average"):
                kept = self._choose(self._best, params)
            self._workspace.log(
                f"kept of the retriever: {kept.step}, its weights with a factor of {kept.factor:g}"
                f" beside {1 - kept.factor:g} of those before training"
            )
        info = {"step": kept.step, "factor": kept.factor}
        save_kept(self._workspace, "retriever", kept.params, info)
        return kept

    def _choose(self, best: BestStep, params: dict[str, Any]) -> Kept:
        """Takes the last step as it is, or what is better than that by more than noise.

        The best of eight that differ by noise is too little training as often as it is too much.
        """
        names, rows = list(best.figures), list(best.figures.values())
        step = names[-1] if names else "the last"
        if names and choose(rows, default=len(rows) - 1) != len(rows) - 1:
            step, params = best.restore(params)
        averages = {factor: average_params(self._base, params, factor) for factor in (1, *FACTORS)}
        figures = {
            factor: best.measure(step if factor == 1 else f"{step} x {factor:g}", averaged)
            for factor, averaged in averages.items()
        }
        factor = list(figures)[choose(list(figures.values()))]
        if not figures[factor].any():
            return Kept(self._base, "before training", 0.0)
        kept = Kept(averages[factor], step, float(factor))
        if not names or (step == names[-1] and factor == 1):
            return kept
        return kept._replace(optimism=optimism([*rows[-1:], *rows, *figures.values()]))


class _Known:
    """An index whose results for the questions of the pool are known."""

    def __init__(self, found: SearchResult) -> None:
        self._found = found

    @property
    def size(self) -> int:
        return self._found.mask.shape[1]

    def search(self, queries: ArrayLike | Sequence[str], k: int) -> SearchResult:
        return self._found.top(k)


def _found_before(workspace: Workspace, before: Retriever) -> SearchResult:
    if not workspace.questions["dev"]:
        return pad_result(np.zeros((0, _DEPTH), np.int32), np.zeros((0, _DEPTH)), _DEPTH)
    return search(workspace, before, "dev", _DEPTH).hybrid


def _wanted(found: SearchResult, row: int, relevant: frozenset[int]) -> list[int]:
    """Returns the passages wanted for a question: a relevant one, then the best that are found."""
    ranked = found.doc_ids[row][found.mask[row]].tolist()
    first = next((doc for doc in ranked if doc in relevant), min(relevant))
    return [first, *(doc for doc in ranked if doc != first)]


def _pool_rows(wanted: Sequence[Sequence[int]], size: int, *, seed: int) -> NDArray[np.int64]:
    """Returns the corpus rows of the pool: what each question wants, in turn, and random ones."""
    most = min(size, POOL_PASSAGES)
    asked = int((1 - _RANDOM) * most)
    turns = (docs[turn] for turn in range(_DEPTH + 1) for docs in wanted if turn < len(docs))
    chosen: dict[int, None] = {}
    for doc in turns:
        if len(chosen) == asked:
            break
        chosen[int(doc)] = None
    for doc in np.random.default_rng(seed).permutation(size):
        if len(chosen) == most:
            break
        chosen[int(doc)] = None
    return np.array(sorted(chosen), np.int64)


def _placed(findable: Findable, place: Mapping[int, int]) -> Findable:
    """Returns what questions may find in places of the pool in place of corpus rows."""
    dropped = [frozenset(place[row] for row in rows if row in place) for rows in findable.dropped]
    stands_for = [
        {place[row]: place[other] for row, other in rows.items() if {row, other} <= place.keys()}
        for rows in findable.stands_for
    ]
    return Findable(dropped, stands_for)


def _search_words(
    bm25: Bm25Index, texts: Sequence[str], place: Mapping[int, int], size: int
) -> SearchResult:
    """Returns the passages of the pool that share a word with each question, `[Q, M]`."""
    rows = []
    for text in texts:  # one at a time: N results of each
        found = bm25.search([text], size)
        there = [column for column in np.flatnonzero(found.mask[0])
                 if int(found.doc_ids[0, column]) in place]  # fmt: skip
        ids = np.array([[place[int(doc)] for doc in found.doc_ids[0, there]]], np.int32)
        scores = found.scores[0, there][None]
        rows.append(pad_result(ids.reshape(1, -1), scores.reshape(1, -1), len(place)))
    return SearchResult(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))

"""What p_R is trained towards: scores of a teacher, judgements, passages of written questions.

Q questions, B of them in a step, K candidates.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ragjax.index import SearchResult
from ragjax.runs.found import first_copies
from ragjax.runs.teachers.choice import LsrTeacher
from ragjax.runs.teachers.reading import TeacherScores, score_candidates
from ragjax.runs.workspace import Workspace
from ragjax.training.score_cache import ResultCache, Score


class Targets(NamedTuple):
    """Documents of several questions and the distribution that p_R is trained towards."""

    doc_ids: NDArray[np.int32]  # [B, K] corpus rows
    mask: NDArray[np.bool_]  # [B, K]
    log_probs: NDArray[np.float32]  # [B, K] log q of those documents
    # Relevant documents of each question: they share the target wherever they stand in the batch,
    # also where another question brought them. Empty where the language model set the target.
    relevant: Sequence[frozenset[int]]
    share: NDArray[np.float32]  # [B] of the target that those have; log_probs holds the rest

    def take(self, rows: NDArray[np.int64]) -> "Targets":
        """Returns those of some questions."""
        relevant = [self.relevant[row] for row in rows]
        arrays = (self.doc_ids[rows], self.mask[rows], self.log_probs[rows])
        return Targets(*arrays, relevant, self.share[rows])

    def best(self, count: int) -> NDArray[np.bool_]:
        """Returns the relevant documents and those of highest target, `[B, K]`, at most `count`."""
        own = np.stack(
            [
                np.isin(docs, list(known))
                for docs, known in zip(self.doc_ids, self.relevant, strict=True)
            ]
        )
        scores = np.where(own, np.inf, np.where(self.mask, self.log_probs, -np.inf))
        order = np.lexsort((~self.mask, -scores))
        return self.mask & (np.argsort(order, axis=1) < count)


class Teaching(NamedTuple):
    """What sets the targets of questions without judgements."""

    teacher: LsrTeacher | None  # None where no question needs one
    passage_share: float = 1.0  # of the target of a written question that is on its passage

    def asks(self, passages: Sequence[frozenset[int]]) -> NDArray[np.int64]:
        """Returns which questions the teacher scores, by the passages they were written from."""
        asked = [place for place, own in enumerate(passages) if not own or self.passage_share < 1]
        return np.asarray(asked, np.int64)


def taught_targets(
    workspace: Workspace,
    teaching: Teaching,
    rows: NDArray[np.int64],
    found: SearchResult,
    cache: ResultCache[Score],
    *,
    score: Callable[..., TeacherScores] = score_candidates,
) -> Targets:
    """Returns targets by the scores of a teacher and the passages of written questions.

    Args:
        workspace: Data and prompts.
        teaching: The teacher, and its part in the target of a written question.
        rows: Of B training questions.
        found: `[B, K]` candidates of theirs.
        cache: Scores of the teacher's language model known already; new ones are added.
        score: `score_candidates`, or `score_step` within a training step.
    """
    questions, every = workspace.questions["train"], written_passages(workspace)
    passages = [every[row] for row in rows]
    log_probs = np.zeros(found.mask.shape, np.float32)
    if (asked := teaching.asks(passages)).size:
        assert teaching.teacher is not None, "only judgements teach without one"
        chosen = [questions[rows[place]] for place in asked]
        log_probs[asked] = teaching.teacher.log_probs(
            workspace, chosen, found.take(asked), cache, score=score
        )
    return with_passages(scored_targets(found, log_probs), passages, teaching.passage_share)


def scored_targets(candidates: SearchResult, log_probs: NDArray[np.float32]) -> Targets:
    """Returns targets `[B, K]` that the language model set over these candidates."""
    empty = [frozenset[int]()] * len(log_probs)
    share = np.ones(len(log_probs), np.float32)
    return Targets(candidates.doc_ids, candidates.mask, log_probs, empty, share)


def written_passages(workspace: Workspace) -> list[frozenset[int]]:
    """Returns of each training question the row of the passage that it was written from, if any."""
    corpus = workspace.dataset.corpus
    return [
        frozenset()
        if question.passage is None
        else first_copies(workspace, frozenset({corpus.row_of(question.passage)}))
        for question in workspace.questions["train"]
    ]


def with_passages(targets: Targets, passages: Sequence[frozenset[int]], share: float) -> Targets:
    """Puts a share of the target of each written question on the passage it was written from.

    Where that is all of it, its other candidates are left out: they were found by the question too,
    and may answer it.

    Args:
        targets: Of the language model's scores.
        passages: The passage of each question; empty for one that was not written.
        share: Of the target, from 0 to 1; the scores have the rest.
    """
    if not share or not any(passages):
        return targets
    doc_ids, mask = np.array(targets.doc_ids), np.array(targets.mask)
    log_probs = np.array(targets.log_probs)
    shares = np.ones(len(passages), np.float32)
    for row, own in enumerate(passages):
        if not own:
            continue
        if share == 1:
            mask[row] = False
        if not np.isin(list(own), doc_ids[row][mask[row]]).all():
            doc_ids[row, -1], mask[row, -1], log_probs[row, -1] = min(own), True, -np.inf
        total = np.logaddexp.reduce(log_probs[row][mask[row]])
        if share < 1 and np.isfinite(total):
            shares[row], log_probs[row] = share, log_probs[row] + np.log1p(-share) - total
        else:
            log_probs[row] = -np.inf
    return Targets(doc_ids, mask, log_probs, passages, shares)

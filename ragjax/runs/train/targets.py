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


class Known(NamedTuple):
    """Passages of Q training questions that are known to be right, and their part in the target."""

    passages: list[frozenset[int]]  # corpus rows, of copies the first; none where none is known
    shares: NDArray[np.float32]  # [Q] of the target that they have; the teacher has the rest

    def take(self, rows: NDArray[np.int64]) -> "Known":
        """Returns those of some questions."""
        return Known([self.passages[row] for row in rows], self.shares[rows])

    @property
    def asked(self) -> NDArray[np.int64]:
        """Which questions the teacher scores."""
        return np.flatnonzero(self.shares < 1)


class Teaching(NamedTuple):
    """What sets the targets of training questions."""

    teacher: LsrTeacher | None  # None where no question needs one
    known: Known


def taught_targets(
    workspace: Workspace,
    teaching: Teaching,
    rows: NDArray[np.int64],
    found: SearchResult,
    cache: ResultCache[Score],
    *,
    score: Callable[..., TeacherScores] = score_candidates,
) -> Targets:
    """Returns targets by the scores of a teacher and the passages that are known.

    Args:
        workspace: Data and prompts.
        teaching: The teacher, and what is known.
        rows: Of B training questions.
        found: `[B, K]` candidates of theirs.
        cache: Scores of the teacher's language model known already; new ones are added.
        score: `score_candidates`, or `score_step` within a training step.
    """
    questions, known = workspace.questions["train"], teaching.known.take(rows)
    log_probs = np.zeros(found.mask.shape, np.float32)
    if (asked := known.asked).size:
        assert teaching.teacher is not None, "only what is known teaches without one"
        chosen = [questions[rows[place]] for place in asked]
        log_probs[asked] = teaching.teacher.log_probs(
            workspace, chosen, found.take(asked), cache, score=score
        )
    return with_passages(scored_targets(found, log_probs), known)


def scored_targets(candidates: SearchResult, log_probs: NDArray[np.float32]) -> Targets:
    """Returns targets `[B, K]` that the language model set over these candidates."""
    empty = [frozenset[int]()] * len(log_probs)
    share = np.ones(len(log_probs), np.float32)
    return Targets(candidates.doc_ids, candidates.mask, log_probs, empty, share)


def known_passages(workspace: Workspace, *, given: float, written: float) -> Known:
    """Returns what is known of the training questions.

    Args:
        workspace: Data; its `relevant_rows` say what counts as found.
        given: Share of the target that the relevant passages of a question have.
        written: Share that the passage has of which a question was written.
    """
    own = written_passages(workspace)
    if given:
        relevant = [first_copies(workspace, rows) for rows in workspace.relevant_rows("train")]
    else:
        relevant = [frozenset[int]()] * len(own)
    passages, shares = [], []
    for question, passage, found in zip(workspace.questions["train"], own, relevant, strict=True):
        share = given if question.passage is None else written
        passages.append((passage or found) if share else frozenset())
        shares.append(share if passages[-1] else 0.0)
    return Known(passages, np.asarray(shares, np.float32))


def written_passages(workspace: Workspace) -> list[frozenset[int]]:
    """Returns of each training question the row of the passage that it was written from, if any."""
    corpus = workspace.dataset.corpus
    return [
        frozenset()
        if question.passage is None
        else first_copies(workspace, frozenset({corpus.row_of(question.passage)}))
        for question in workspace.questions["train"]
    ]


def with_passages(targets: Targets, known: Known) -> Targets:
    """Puts the share of the target that is theirs on the passages that are known.

    Where that is all of it, the other candidates are left out: they were found by the question too,
    and may answer it. A passage that is none of the candidates takes the place of the last.

    Args:
        targets: Of the teacher's scores.
        known: Of the same questions.
    """
    if not known.shares.any():
        return targets
    doc_ids, mask = np.array(targets.doc_ids), np.array(targets.mask)
    log_probs = np.array(targets.log_probs)
    shares = np.ones(len(doc_ids), np.float32)
    for row in np.flatnonzero(known.shares):
        own, share = known.passages[row], known.shares[row]
        if share == 1:
            mask[row] &= np.isin(doc_ids[row], list(own))
        if not (np.isin(doc_ids[row], list(own)) & mask[row]).any():
            doc_ids[row, -1], mask[row, -1], log_probs[row, -1] = min(own), True, -np.inf
        total = np.logaddexp.reduce(log_probs[row][mask[row]])
        if share < 1 and np.isfinite(total):
            shares[row], log_probs[row] = share, log_probs[row] + np.log1p(-share) - total
        else:
            log_probs[row] = -np.inf
    return Targets(doc_ids, mask, log_probs, known.passages, shares)

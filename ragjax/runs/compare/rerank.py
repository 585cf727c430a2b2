"""Ranks the best of a search again: by the likelihood of the question, or by a cross-encoder.

    p(c|x) ∝ p_R(c|x) · p_LM(x|c)^α

over the best D documents, with the mean of log p_LM over the tokens of the question, and with a
cross-encoder its logit in place of that. α counts in units of the search's own scores (z-scores of
a hybrid, scaled cosines of a dense one) and is chosen on dev. Q questions, K documents.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from ragjax.data import Question
from ragjax.index import Bm25Index, SearchResult, choose_near_usual
from ragjax.index.base import empty_result
from ragjax.losses import log_prob_per_token, rerank_log_probs
from ragjax.models.cross_encoder import load_cross_encoder
from ragjax.runs.compare.choice import MIN_KNOWN, choose, ranking_figure
from ragjax.runs.compare.systems import Documents, retrieve_documents
from ragjax.runs.folder import RunFiles
from ragjax.runs.indexes import Retriever
from ragjax.runs.teachers.cross_encoder import PairScore, cross_scores
from ragjax.runs.teachers.reading import QUESTION, score_candidates, score_step
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage import write_json
from ragjax.training.score_cache import ResultCache, Score

RERANK = "rerank.json"
AUTO, NONE = "auto", "none"
WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Values of α that are tried on dev; with 0 nothing is re-ranked."""
DEFAULT_DEPTH = 10
DEFAULT_WEIGHT = 0.5
"""α where there is no dev question to choose it on, and re-ranking was asked for."""
_DISTANCES = tuple(abs(math.log2(w / DEFAULT_WEIGHT)) if w else math.inf for w in WEIGHTS)
_TIMED = 2
# Documents whose scores are cosines.
_DENSE = ("before", "after")


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What scores (question, document) pairs.

    Attributes:
        name: `question`, or the source of a cross-encoder.
        fingerprint: Of the model.
        scores: `(questions, [Q, K] candidates) -> [Q, K]` float32, 0 where masked; it keeps what it
            computes where that was asked for.
        afresh: The same, which keeps and shows nothing.
    """

    name: str
    fingerprint: str
    scores: Callable[[Sequence[Question], SearchResult], np.ndarray]
    afresh: Callable[[Sequence[Question], SearchResult], np.ndarray]


class Chosen(NamedTuple):
    """How a run re-ranks: what rerank.json holds."""

    name: str  # `question`, or the source of a cross-encoder
    fingerprint: str  # of its model
    depth: int  # documents that are ranked again
    weight: float  # α; 0: none of them is
    questions: int  # dev questions that can choose it
    mrr: dict[str, float]  # by α tried, on dev
    milliseconds: float | None  # of one question alone, after compiling

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Returns what a run chose; None where its folder says nothing of it."""
        values = RunFiles(folder).mapping(RERANK)
        return cls(**values) if values.keys() == set(cls._fields) else None


@dataclass(frozen=True, kw_only=True)
class Reranker:
    """A scorer with its place in the ranking.

    Attributes:
        scorer: Scores pairs.
        depth: Documents of a question that are ranked again.
        weight: α.
        prior_scale: Factor of the search's scores: that of p_R where they are cosines.
    """

    scorer: Scorer
    depth: int
    weight: float
    prior_scale: float = 1.0

    def __call__(
        self, questions: Sequence[Question], found: SearchResult, *, keep: bool = True
    ) -> SearchResult:
        """Returns `[Q, K]` documents in their new order.

        Args:
            questions: Q questions.
            found: `[Q, K]` documents of a search.
            keep: Keep the scores on disk, and show progress.
        """
        if not self.weight or not questions:
            return found
        score = self.scorer.scores if keep else self.scorer.afresh
        scores = score(questions, found.top(self.depth))
        return reranked(found, scores, self.weight, prior_scale=self.prior_scale)

    def documents(self, questions: Sequence[Question], documents: Documents) -> Documents:
        """Returns the documents of a system in their new order, with their logits of p_R."""
        new, (old, logits) = self(questions, documents.found), documents
        place = (old.doc_ids[:, None] == new.doc_ids[:, :, None]).argmax(axis=2)  # [Q, K]
        return Documents(new, np.take_along_axis(logits, place, axis=1))


def reranked(
    found: SearchResult, scores: np.ndarray, weight: float, *, prior_scale: float = 1.0
) -> SearchResult:
    """Ranks the first documents again; those behind them stay where they are.

    Args:
        found: `[Q, K]` documents, best first.
        scores: `[Q, D]` of the first D of them: log p_LM(x|c), or any other score.
        weight: α.
        prior_scale: Factor of the scores of the search.

    Returns:
        The same documents, `[Q, K]`; the scores of the first D are log p(c|x) among these, and
        those of the others are moved by as much as leaves them behind.
    """
    depth = min(scores.shape[1], found.mask.shape[1])
    if not depth:
        return found
    head = found.top(depth)
    prior = np.where(head.mask, head.scores, 0).astype(np.float32) * np.float32(prior_scale)
    log_probs = np.asarray(
        rerank_log_probs(prior, scores[:, :depth], weight=weight, doc_mask=head.mask)
    )
    order = np.argsort(-log_probs, axis=1, kind="stable")
    doc_ids, new, mask = (
        np.take_along_axis(part, order, axis=1) for part in (head.doc_ids, log_probs, head.mask)
    )
    tail_ids, tail_scores, tail_mask = (part[:, depth:] for part in found)
    # Where documents are behind, all in front are there.
    moved = np.where(head.mask.all(axis=1), new[:, -1] - prior[:, -1], 0)
    behind = tail_scores * np.float32(prior_scale) + moved[:, None]
    return SearchResult(
        np.concatenate([doc_ids, tail_ids], axis=1).astype(np.int32),
        np.concatenate([new, behind], axis=1).astype(np.float32),
        np.concatenate([mask, tail_mask], axis=1).astype(np.bool_),
    )


def chosen_name(asked: str) -> str:
    """Returns what re-ranks where `auto` was asked for: the question, but nothing on a CPU."""
    of_auto = NONE if jax.default_backend() == "cpu" else QUESTION
    return of_auto if asked == AUTO else asked


def check_reranker(asked: str, flag: str) -> None:
    """Loads a cross-encoder that was asked for, to refuse it before any expensive work.

    Args:
        asked: `auto`, `none`, `question`, or a source.
        flag: What asked for it.

    Raises:
        OSError, ValueError: It is none.
    """
    if is_cross_encoder(asked):
        _load(asked, flag)


def is_cross_encoder(asked: str) -> bool:
    """Says whether what was asked for is the source of a cross-encoder."""
    return asked not in (AUTO, NONE, QUESTION)


def make_scorer(
    workspace: Workspace,
    name: str,
    lm: FrozenLM,
    *,
    folder: Path | None,
    earlier: Sequence[Path] = (),
) -> Scorer:
    """Returns what re-ranks.

    Args:
        workspace: Passages, prompts and base models.
        name: `question`, or the source of a cross-encoder.
        lm: The language model that reads the question after a passage.
        folder: Output folder, which keeps the scores; None: they are not kept.
        earlier: Folders of runs that kept some.
    """

    def file_in(run: Path) -> Path:
        kind = "rerank" if name == QUESTION else "cross-encoder"
        return run / "scores" / f"{kind}.jsonl"

    path = file_in(folder) if folder else None
    known = [file for run in earlier if (file := file_in(run)).is_file()]
    if name == QUESTION:
        kept = ResultCache(path, Score, earlier=known)

        def likelihood(
            score: Any, cache: ResultCache[Score], questions: Any, found: Any
        ) -> np.ndarray:
            read = score(workspace, lm, questions, found, cache, wanted=(QUESTION,))
            return np.asarray(log_prob_per_token(read.question_log_probs, read.question_lengths))

        return Scorer(
            name=name,
            fingerprint=lm.fingerprint,
            scores=lambda q, found: likelihood(score_candidates, kept, q, found),
            afresh=lambda q, found: likelihood(score_step, ResultCache(None, Score), q, found),
        )
    model = _load(name, "re-ranking by")
    logits, pairs = jax.jit(model.logits), ResultCache(path, PairScore, earlier=known)

    def cross(cache: ResultCache[PairScore], questions: Any, found: Any, quiet: bool) -> np.ndarray:
        return cross_scores(workspace, model, questions, found, cache, logits=logits, quiet=quiet)

    return Scorer(
        name=name,
        fingerprint=model.fingerprint,
        scores=lambda q, found: cross(pairs, q, found, quiet=False),
        afresh=lambda q, found: cross(ResultCache(None, PairScore), q, found, quiet=True),
    )


def fit_to_run(
    workspace: Workspace,
    bm25: Bm25Index,
    before: Retriever,
    after: Retriever,
    lm: FrozenLM,
    *,
    name: str,
    depth: int,
    served: str,
    earlier: Sequence[Path] = (),
) -> Reranker | None:
    """Chooses how what is served is ranked again; see `fit_reranker`.

    Args:
        workspace: Dev questions, their truth, options and folder.
        bm25: The index of words.
        before: The un-adapted retriever.
        after: The adapted one, or the un-adapted one again.
        lm: The language model that answers.
        name: `auto`, `none`, `question`, or the source of a cross-encoder.
        depth: Documents of a question that are ranked again.
        served: What is served, by its name among the documents of `SYSTEMS`.
        earlier: Folders of runs that kept scores.

    Returns:
        None where nothing is ranked again, as asked or as dev says.
    """
    asked = name != AUTO
    if (name := chosen_name(name)) == NONE:
        return None
    with workspace.timed("re-rank"):
        questions = workspace.questions["dev"]
        found = empty_result(0, depth)
        if questions:
            documents = retrieve_documents(workspace, bm25, before, after, "dev", deepest=depth)
            found = documents[served].found
        scorer = make_scorer(workspace, name, lm, folder=workspace.folder, earlier=earlier)
        scale = workspace.scale if served in _DENSE else 1.0
        reranker = fit_reranker(
            workspace, scorer, found, depth=depth, prior_scale=scale, asked=asked
        )
    return reranker if reranker.weight else None


def fit_reranker(
    workspace: Workspace,
    scorer: Scorer,
    found: SearchResult,
    *,
    depth: int,
    prior_scale: float = 1.0,
    asked: bool = False,
) -> Reranker:
    """Chooses α on the dev questions, writes `rerank.json` and says so.

    Where it was asked for, it is done unless dev speaks against it; else only where it is better
    on dev by more than noise, see `choose`.

    Args:
        workspace: Dev questions, their truth, and the folder.
        scorer: Scores pairs.
        found: `[Q, K]` what is served for the dev questions, K at least 10.
        depth: Documents of a question that are ranked again.
        prior_scale: Factor of the scores of `found`.
        asked: Whether somebody asked for it.
    """
    rows = _judging(workspace, scorer)
    # Nothing is read that cannot choose.
    judging = rows if len(rows) >= MIN_KNOWN else []
    questions = [workspace.questions["dev"][row] for row in judging]
    known = workspace.relevant_rows("dev")
    relevant = [known[row] for row in judging]
    found = found.take(np.array(judging, np.int64))
    figures: list[np.ndarray] = []
    if questions:
        scores = scorer.scores(questions, found.top(depth))
        figures = [
            ranking_figure(reranked(found, scores, weight, prior_scale=prior_scale), relevant)
            for weight in WEIGHTS
        ]
    weight = 0.0
    if figures and asked:
        near = choose_near_usual(np.stack(figures, axis=1), _DISTANCES)
        weight = WEIGHTS[near] if figures[near].mean() > figures[0].mean() else 0.0
    elif figures:
        weight = WEIGHTS[choose(figures)]
    before = Chosen.read(workspace.folder)  # of an earlier life
    same = before and (before.fingerprint, before.depth) == (scorer.fingerprint, depth)
    took = before.milliseconds if before and same else _timed(scorer, questions, found.top(depth))
    chosen = Chosen(
        name=scorer.name,
        fingerprint=scorer.fingerprint,
        depth=depth,
        weight=weight,
        questions=len(rows),
        mrr={
            f"{tried:g}": round(float(figure.mean()), 6)
            for tried, figure in zip(WEIGHTS, figures, strict=False)
        },
        milliseconds=took,
    )
    write_json(workspace.folder / RERANK, chosen._asdict())
    workspace.note(describe(chosen))
    return Reranker(scorer=scorer, depth=depth, weight=weight, prior_scale=prior_scale)


def _judging(workspace: Workspace, scorer: Scorer) -> list[int]:
    """Returns the dev questions that can say whether re-ranking helps.

    The passage that a language model wrote a question from makes it likely: read by one, such
    questions always speak for it.
    """
    relevant = workspace.relevant_rows("dev")
    return [
        row
        for row, question in enumerate(workspace.questions["dev"])
        if relevant[row] and not (scorer.name == QUESTION and question.passage is not None)
    ]


def describe(chosen: Chosen) -> str:
    """Returns a sentence on what a run re-ranks with."""
    by = "by the likelihood of the question" if chosen.name == QUESTION else f"by {chosen.name}"
    on = f"on {chosen.questions} dev questions"
    took = "" if chosen.milliseconds is None else f"; {chosen.milliseconds:,.0f} ms a question"
    if chosen.questions < MIN_KNOWN:
        return (
            f"not re-ranked: {chosen.questions} dev questions have a known truth and were not"
            f" written by a language model, and {MIN_KNOWN} are the fewest that choose a weight"
        )
    tried = ", ".join(f"{mrr:.3f} at {weight}" for weight, mrr in chosen.mrr.items())
    if not chosen.weight:
        return f"not re-ranked: {by} it is not better {on} (MRR@10 by weight: {tried}{took})"
    return (
        f"re-ranked: the best {chosen.depth} {by}, weight {chosen.weight:g} {on} (MRR@10 by weight:"
        f" {tried}{took})"
    )


def _load(source: str, flag: str) -> Any:
    try:
        return load_cross_encoder(source)
    except ValueError as error:
        raise ValueError(f"{flag} {source}: {error}") from error
    except OSError as error:
        raise type(error)(
            f"{flag} {source}: {error}; it takes {NONE}, {QUESTION}, or a cross-encoder: a folder"
            " or a hub id"
        ) from error


def _timed(scorer: Scorer, questions: Sequence[Question], found: SearchResult) -> float | None:
    """Returns milliseconds of a question alone, compiled before, mean over a few."""
    seconds = []
    for row in range(min(_TIMED, len(questions))):
        one = questions[row : row + 1], found.take(np.array([row]))
        scorer.afresh(*one)
        started = time.perf_counter()
        scorer.afresh(*one)
        seconds.append(time.perf_counter() - started)
    return round(1000 * sum(seconds) / len(seconds), 1) if seconds else None

"""Which teachers teach, and with what weights: chosen on the training questions that they score.

Each mixture is judged by how high it ranks a passage that counts as found among the candidates of
the training questions, which are scored in any case: the choice costs nothing, and has many
questions. Fixed weights are kept where no other is better by more than noise, see
`ragjax.runs.compare.choice`.

Q questions, K candidates.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ragjax.data import Question
from ragjax.index import SearchResult
from ragjax.runs.compare.choice import MIN_KNOWN, choose, ranking_figure
from ragjax.runs.compare.rerank import Scorer, make_scorer
from ragjax.runs.options.dual import RetrieverConfig
from ragjax.runs.options.teachers import LsrTarget, TeacherWeights
from ragjax.runs.teachers.files import FileScores
from ragjax.runs.teachers.reading import TeacherScores, no_scores, score_candidates
from ragjax.runs.teachers.target import mixed, parts_wanted, target_log_probs, teacher_parts
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage import write_json
from ragjax.training.score_cache import ResultCache, Score

TEACHERS = "teachers.json"
# The first is kept in case of doubt. Nats and not z-scores: how far the candidates of a question
# lie apart says how sure the language model is.
_WITH_ANSWERS = (
    TeacherWeights(answer=1.0, question=1.0, prior=0.3),
    TeacherWeights(answer=1.0, prior=0.5),
    TeacherWeights(answer=1.0, question=1.0, prior=0.8),
    TeacherWeights(question=1.5, prior=0.5),
    TeacherWeights(question=1.0, prior=1.0),
    TeacherWeights(prior=1.0),
)
_WITHOUT_ANSWERS = tuple(weights for weights in _WITH_ANSWERS if not weights.answer)
# Of a file or a cross-encoder, beside which no language model reads anything.
_OTHERS, _OTHERS_PRIOR = 0.7, 0.3


class LsrTeacher(NamedTuple):
    """What sets the target of the training questions."""

    target: LsrTarget
    lm: FrozenLM
    file: FileScores | None = None
    reranker: Scorer | None = None

    def log_probs(
        self,
        workspace: Workspace,
        questions: Sequence[Question],
        found: SearchResult,
        cache: ResultCache[Score],
        *,
        score: Callable[..., TeacherScores] = score_candidates,
    ) -> np.ndarray:
        """Returns log p_LSR `[Q, K]` float32 of candidates.

        Args:
            workspace: Data and prompts.
            questions: Q questions.
            found: `[Q, K]` candidates.
            cache: Scores of the language model known already; new ones are added.
            score: `score_candidates`, or `score_step` within a training step.
        """
        parts = self.parts(workspace, questions, found, cache, score)
        return target_log_probs(self.target, parts, found)

    def parts(
        self,
        workspace: Workspace,
        questions: Sequence[Question],
        found: SearchResult,
        cache: ResultCache[Score],
        score: Callable[..., TeacherScores],
    ) -> dict[str, np.ndarray]:
        """Returns what each teacher says of candidates, `[Q, K]` by name; see `log_probs`."""
        wanted = parts_wanted(self.target.weights, questions)
        if wanted:
            scores = score(workspace, self.lm, questions, found, cache, wanted=wanted)
        else:
            scores = no_scores(found.mask.shape)
        others = {}
        if self.file is not None:
            others["file"] = self.file.scores(questions, found)
        if self.reranker is not None:
            # What is scored in a step is not kept, and shows no progress of its own.
            whole = score is score_candidates
            cross = self.reranker.scores if whole else self.reranker.afresh
            others["reranker"] = cross(questions, found)
        return teacher_parts(self.target.score, scores, found, others)


def choose_teacher(
    workspace: Workspace,
    config: RetrieverConfig,
    lm: tuple[str, FrozenLM],
    cache: ResultCache[Score],
    found: SearchResult | None = None,
) -> LsrTeacher:
    """Chooses weights as the options say, and writes `teachers.json`.

    Args:
        workspace: Data, prompts, folder.
        config: Options of the stage.
        lm: Name and parameters of the language model that teaches.
        cache: Its scores; new ones are added.
        found: `[Q, K]` candidates of the training questions; None: they are not known yet, and the
            weights are the default ones.

    Raises:
        ValueError: The file of scores has none of the pairs that are needed.
    """
    train = workspace.questions["train"]
    file = open_scores(workspace, config)
    if file is not None and found is not None:
        file.report(train, found, workspace.folder / "scores" / "missing.jsonl", workspace.log)
    reranker = None
    if config.reranker:
        base = workspace.base_lm()
        reranker = make_scorer(workspace, config.reranker, base, folder=workspace.folder)
    mixtures = _mixtures(config, train)
    first = LsrTeacher(config.target._replace(weights=mixtures[0]), lm[1], file, reranker)
    chosen, report = mixtures[0], {}
    rows = np.zeros(0, np.int64) if found is None else _able(workspace, found)
    if len(mixtures) == 1:
        why = "as the options say"
    elif found is None or len(rows) < MIN_KNOWN:
        why = (
            f"by default: what counts as found is among the candidates of {len(rows)} training"
            f" questions, and {MIN_KNOWN} are the fewest that choose"
        )
    else:
        every = first.parts(workspace, train, found, cache, score_candidates)
        parts = {name: values[rows] for name, values in every.items()}
        relevant = [workspace.relevant_rows("train")[row] for row in rows]
        judge = functools.partial(_figure, found.take(rows), relevant)
        figures = [judge(mixed(weights, parts)) for weights in mixtures]
        chosen = mixtures[choose(figures)]
        used = {name for weights in mixtures for name in weights.named}
        alone = {name: round(float(judge(parts[name]).mean()), 4) for name in sorted(used)}
        means = [round(float(figure.mean()), 4) for figure in figures]
        report = {
            "questions": len(rows),
            "alone": {lm[0]: alone},
            "mixtures": [
                {"language_model": lm[0], "weights": weights.named, "mrr": mean}
                for weights, mean in zip(mixtures, means, strict=True)
            ],
        }
        why = f"chosen on {len(rows)} training questions"
        each = ", ".join(f"{name} {value:.3f}" for name, value in alone.items())
        workspace.log(
            f"teacher: MRR of what counts as found ({workspace.measured_by('train')}) among the"
            f" candidates: {each}; of mixtures up to {max(means):.3f}"
        )
    workspace.log(f"teacher: {chosen} by the {lm[0]} language model, {why}")
    write_json(
        workspace.folder / TEACHERS,
        {"weights": chosen.named, "language_model": lm[0], "why": why, **report},
    )
    return first._replace(target=config.target._replace(weights=chosen))


def open_scores(workspace: Workspace, config: RetrieverConfig) -> FileScores | None:
    """Reads the file of scores, where the options name one; see `FileScores`."""
    return FileScores(Path(config.scores_file), workspace.dataset) if config.scores_file else None


def teaching_lm(config: RetrieverConfig, base: FrozenLM, adapted: FrozenLM) -> tuple[str, FrozenLM]:
    """Returns name and parameters of the language model that teaches.

    Args:
        config: Options of the stage.
        base: The base language model.
        adapted: The adapted one, or the base one again where none was adapted or kept.
    """
    if config.teaching_lm == "base" or adapted.fingerprint == base.fingerprint:
        return "base", base
    return "adapted", adapted


def count_pairs(workspace: Workspace, config: RetrieverConfig, questions: int) -> int:
    """Returns how many (question, candidate) pairs of so many the language model reads at most."""
    mixtures = _mixtures(config, workspace.questions["train"])
    if config.objective == "dpr" or not any(one.answer or one.question for one in mixtures):
        return 0
    return questions * config.rounds * config.candidates


def _mixtures(config: RetrieverConfig, questions: Sequence[Question]) -> Sequence[TeacherWeights]:
    """Returns the weights to choose from, the default first."""
    if (weights := config.weights) is not None:
        return (weights,)
    given = {"file": config.scores_file, "reranker": config.reranker}
    if others := [name for name, source in given.items() if source]:
        shares = dict.fromkeys(others, _OTHERS / len(others))
        return (TeacherWeights(prior=_OTHERS_PRIOR, **shares),)
    return _WITH_ANSWERS if any(q.answers for q in questions) else _WITHOUT_ANSWERS


def _able(workspace: Workspace, found: SearchResult) -> np.ndarray:
    """Returns which training questions can judge: one of several candidates counts as found."""
    good = np.stack(
        [
            np.isin(docs, list(relevant))
            for docs, relevant in zip(found.doc_ids, workspace.relevant_rows("train"), strict=True)
        ]
    )
    return np.flatnonzero((good & found.mask).any(axis=1) & (~good & found.mask).any(axis=1))


def _figure(
    found: SearchResult, relevant: Sequence[frozenset[int]], scores: np.ndarray
) -> np.ndarray:
    """Returns the reciprocal rank `[Q]` of what counts as found, by these scores `[Q, K]`."""
    order = np.argsort(-np.where(found.mask, scores, -np.inf), axis=1, kind="stable")
    ranked = found._replace(doc_ids=np.take_along_axis(found.doc_ids, order, 1))
    return ranking_figure(ranked, relevant)

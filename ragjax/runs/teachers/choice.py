"""Which teachers teach, and with what weights: chosen on dev questions.

Each mixture is judged by how high it ranks a passage that counts as found among the candidates of
dev questions, which are scored as those of the training questions are. Fixed weights are kept where
no other is better by more than noise, see `ragjax.runs.compare.choice`.

Q questions, K candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragjax.data import Question
from ragjax.index import SearchResult
from ragjax.runs.compare.choice import MIN_KNOWN, choose, ranking_figure
from ragjax.runs.compare.rerank import Scorer, make_scorer
from ragjax.runs.indexes import Retriever, search
from ragjax.runs.options.dual import RetrieverConfig
from ragjax.runs.options.teachers import LsrTarget, TeacherWeights
from ragjax.runs.teachers.files import FileScores
from ragjax.runs.teachers.reading import TeacherScores, no_scores, score_candidates
from ragjax.runs.teachers.target import mixed, parts_wanted, target_log_probs, teacher_parts
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage import write_json
from ragjax.training.score_cache import ResultCache, Score

TEACHERS = "teachers.json"
DEV_QUESTIONS = 24
"""Most dev questions whose candidates are scored for the choice."""
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
        parts = self._parts(workspace, questions, found, cache, score)
        return target_log_probs(self.target, parts, found)

    def _parts(
        self,
        workspace: Workspace,
        questions: Sequence[Question],
        found: SearchResult,
        cache: ResultCache[Score],
        score: Callable[..., TeacherScores],
    ) -> dict[str, np.ndarray]:
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


class _Dev(NamedTuple):
    """Dev questions that can judge: a passage that counts as found is among their candidates."""

    questions: list[Question]
    found: SearchResult  # [Q, K]
    relevant: list[frozenset[int]]


def choose_teacher(
    workspace: Workspace,
    config: RetrieverConfig,
    before: Retriever,
    lms: Mapping[str, FrozenLM],
    cache: ResultCache[Score],
    *,
    found: SearchResult | None = None,
) -> LsrTeacher:
    """Chooses language model and weights as the options say, and writes `teachers.json`.

    Args:
        workspace: Data, prompts, folder.
        config: Options of the stage.
        before: Finds the candidates of dev questions.
        lms: Language models that may teach by name, the first in case of doubt.
        cache: Their scores; new ones are added.
        found: `[Q, K]` candidates of the training questions that will be scored too: documents
            that they share with dev are then read once.

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
    options = [
        LsrTeacher(config.target._replace(weights=weights), lm, file, reranker)
        for lm in lms.values()
        for weights in mixtures
    ]
    names = [name for name in lms for _ in mixtures]
    dev = _dev_questions(workspace, before, config) if len(options) > 1 else None
    chosen, report = 0, {}
    if len(options) == 1:
        why = "as the options say"
    elif dev is None or len(dev.questions) < MIN_KNOWN:
        count = 0 if dev is None else len(dev.questions)
        why = (
            f"by default: what counts as found is among the candidates of {count} dev questions,"
            f" and {MIN_KNOWN} are the fewest that choose"
        )
    else:
        parts = _dev_parts(workspace, dev, options[0], lms, cache, found)
        figures = [
            _figure(mixed(one.target.weights, parts[name]), dev)
            for name, one in zip(names, options, strict=True)
        ]
        chosen = choose(figures)
        report = _report(dev, parts, names, options, figures)
        why = f"chosen on {len(dev.questions)} dev questions"
        workspace.log(_shown(report))
    teacher, name = options[chosen], names[chosen]
    workspace.log(f"teacher: {teacher.target.weights} by the {name} language model, {why}")
    write_json(
        workspace.folder / TEACHERS,
        {"weights": teacher.target.weights.named, "language_model": name, "why": why, **report},
    )
    return teacher


def open_scores(workspace: Workspace, config: RetrieverConfig) -> FileScores | None:
    """Reads the file of scores, where the options name one; see `FileScores`."""
    return FileScores(Path(config.scores_file), workspace.dataset) if config.scores_file else None


def teaching_lms(config: RetrieverConfig, base: FrozenLM, adapted: FrozenLM) -> dict[str, FrozenLM]:
    """Returns the language models that may teach by name, the default first.

    Args:
        config: Options of the stage.
        base: The base language model.
        adapted: The adapted one, or the base one again where none was adapted or kept.
    """
    if adapted.fingerprint == base.fingerprint:
        return {"base": base}
    both = {"adapted": adapted, "base": base}
    wanted = config.teaching_lm
    return both if wanted == "auto" else {wanted: both[wanted]}


def count_pairs(workspace: Workspace, config: RetrieverConfig, questions: int) -> int:
    """Returns how many (question, candidate) pairs of so many the language model reads at most."""
    mixtures = _mixtures(config, workspace.questions["train"])
    if config.objective == "dpr" or not any(one.answer or one.question for one in mixtures):
        return 0
    asked = questions * config.rounds
    if len(mixtures) > 1:
        asked += min(len(workspace.questions["dev"]), DEV_QUESTIONS)
    return asked * config.candidates


def _mixtures(config: RetrieverConfig, questions: Sequence[Question]) -> Sequence[TeacherWeights]:
    """Returns the weights to choose from, the default first."""
    if (weights := config.weights) is not None:
        return (weights,)
    given = {"file": config.scores_file, "reranker": config.reranker}
    if others := [name for name, source in given.items() if source]:
        shares = dict.fromkeys(others, _OTHERS / len(others))
        return (TeacherWeights(prior=_OTHERS_PRIOR, **shares),)
    return _WITH_ANSWERS if any(q.answers for q in questions) else _WITHOUT_ANSWERS


def _dev_questions(workspace: Workspace, before: Retriever, config: RetrieverConfig) -> _Dev | None:
    """Returns dev questions spread over those that can judge; None: there are none."""
    questions = workspace.questions["dev"]
    if not questions:
        return None
    both = search(workspace, before, "dev", config.candidates)
    found = both.hybrid if config.search == "hybrid" else both.dense
    relevant = workspace.relevant_rows("dev")
    able = [
        row
        for row, (docs, mask) in enumerate(zip(found.doc_ids, found.mask, strict=True))
        if relevant[row].intersection(docs[mask].tolist())
    ]
    if not able:
        return None
    places = np.unique(np.linspace(0, len(able) - 1, DEV_QUESTIONS).astype(int))
    rows = np.asarray(able)[places]
    return _Dev([questions[r] for r in rows], found.take(rows), [relevant[r] for r in rows])


def _dev_parts(
    workspace: Workspace,
    dev: _Dev,
    first: LsrTeacher,
    lms: Mapping[str, FrozenLM],
    cache: ResultCache[Score],
    found: SearchResult | None,
) -> dict[str, dict[str, np.ndarray]]:
    """Returns what each teacher says of the dev questions, by language model."""
    questions, candidates = dev.questions, dev.found
    if found is not None and len(lms) == 1:
        # In one go with the training questions; their scores are then known.
        questions = [*questions, *workspace.questions["train"]]
        candidates = SearchResult(
            np.concatenate([candidates.doc_ids, found.doc_ids]),
            np.concatenate([candidates.scores, found.scores]),
            np.concatenate([candidates.mask, found.mask]),
        )
    parts = {}
    for name, lm in lms.items():
        teacher = first._replace(lm=lm)
        every = teacher._parts(workspace, questions, candidates, cache, score_candidates)
        parts[name] = {part: values[: len(dev.questions)] for part, values in every.items()}
    return parts


def _figure(scores: np.ndarray, dev: _Dev) -> np.ndarray:
    """Returns the reciprocal rank `[Q]` of what counts as found, by these scores `[Q, K]`."""
    order = np.argsort(-np.where(dev.found.mask, scores, -np.inf), axis=1, kind="stable")
    ranked = dev.found._replace(doc_ids=np.take_along_axis(dev.found.doc_ids, order, 1))
    return ranking_figure(ranked, dev.relevant)


def _report(
    dev: _Dev,
    parts: Mapping[str, Mapping[str, np.ndarray]],
    names: Sequence[str],
    options: Sequence[LsrTeacher],
    figures: Sequence[np.ndarray],
) -> dict[str, Any]:
    used = {part for one in options for part in one.target.weights.named}
    return {
        "dev_questions": len(dev.questions),
        "alone": {
            name: {
                part: round(float(_figure(values, dev).mean()), 4)
                for part, values in of_lm.items()
                if part in used
            }
            for name, of_lm in parts.items()
        },
        "mixtures": [
            {
                "language_model": name,
                "weights": one.target.weights.named,
                "mrr": round(float(figure.mean()), 4),
            }
            for name, one, figure in zip(names, options, figures, strict=True)
        ],
    }


def _shown(report: Mapping[str, Any]) -> str:
    """Returns one line on what each teacher is worth alone."""
    alone = "; ".join(
        f"{name} language model: " + ", ".join(f"{part} {value:.3f}" for part, value in of.items())
        for name, of in report["alone"].items()
    )
    best = max(one["mrr"] for one in report["mixtures"])
    return (
        "teacher: MRR of what counts as found among the candidates of"
        f" {report['dev_questions']} dev questions: {alone}; mixtures up to {best:.3f}"
    )

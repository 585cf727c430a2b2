"""Choices made on dev questions: when a gain is more than noise.

Q questions, C candidates.

Why one standard error: over 30 to 200 dev questions the reciprocal ranks of two versions of one
system differ with a standard deviation of about .2, so their mean difference has a standard error
of .014 to .036. A true gain of .03 is then taken in 6 of 10 cases at 75 questions and 8 of 10 at
200, where the usual 1.64 errors would take 4 and 7 of them. What is taken by mistake is a candidate
as good as the incumbent (1 in 7), which costs nothing on the mean; one that is worse by .02 is
taken once in 30 to 50 times. What would make it worse is to test the best of many candidates, whose
figure on the questions that chose it is too high: `choose` tests it on questions that did not.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax.evaluation.retrieval import reciprocal_rank
from ragjax.index import HybridQueries, Index, SearchResult
from ragjax.runs.found import FindableIndex, findable_in
from ragjax.runs.workspace import Workspace

MIN_KNOWN = 20
"""Dev questions with a known truth that a choice needs."""
FIGURE_DEPTH = 10
"""Ranks that the figure looks at."""
# One question alone that changed is exactly 1 standard error.
_ERRORS = 1.1
_FOLDS = 5
# Far below what any retriever reaches on questions that belong to the corpus.
_ABOVE_CHANCE = 0.1


def prefer(candidate: ArrayLike, incumbent: ArrayLike, *, fewest: int = MIN_KNOWN) -> bool:
    """Says whether a candidate is better than the incumbent by more than noise.

    A one-sided paired test: the mean gain is above 1.1 of its standard errors.

    Args:
        candidate: `[Q]` figure of each dev question, higher is better, in any unit; NaN: unknown.
        incumbent: `[Q]` the same of the default, which is kept in case of doubt.
        fewest: Questions that have both figures, at least.

    Returns:
        False also where fewer questions have both figures.

    Raises:
        ValueError: The shapes differ or are not `[Q]`.
    """
    gain = _gains(candidate, incumbent)
    if len(gain) < fewest:
        return False
    return bool(gain.mean() > _ERRORS * gain.std(ddof=1) / np.sqrt(len(gain)))


def choose(figures: Sequence[ArrayLike], default: int = 0) -> int:
    """Chooses among candidates, or keeps the default where none is better by more than noise.

    The best mean is taken. Whether it may replace the default is tested without the optimism of a
    maximum: in each of 5 parts of the questions stands the figure of the candidate that is best on
    the other 4, and that row of figures has to be preferred to the default's.

    Args:
        figures: C rows `[Q]` as `prefer` takes them, all with the same questions unknown.
        default: Which of them is the incumbent.

    Returns:
        The number of the chosen candidate; of equal ones the default, then the first.

    Raises:
        ValueError: There are none, or their shapes differ.
    """
    gains = _all_gains(figures, default)
    held_out, none = _held_out(gains, default), np.zeros(gains.shape[1])
    if len(none) < MIN_KNOWN:
        return default
    best = _best(gains, default)
    return best if prefer(held_out, none) and prefer(gains[best], none) else default


def optimism(figures: Sequence[ArrayLike], default: int = 0) -> float:
    """Estimates by how much the figure of the best candidate is too high on what chose it.

    Args:
        figures: As for `choose`.
        default: As for `choose`.

    Returns:
        At least 0, in the unit of the figures: to be taken off those of the candidate that was
        best, where they are measured again on the same questions.
    """
    gains = _all_gains(figures, default)
    if gains.shape[1] < _FOLDS:
        return 0.0
    best = gains[_best(gains, default)].mean()
    return float(max(0.0, best - _held_out(gains, default).mean()))


def judge_problem(figure: ArrayLike, relevant: Sequence[frozenset[int]], size: int) -> str:
    """Says why dev questions cannot judge a retriever; "" where they can.

    What counts as found may be nonsense: shuffled answers, or those of another domain. Then even
    the un-adapted system finds it no more often than chance would. So its mean figure has to be
    above that of a random ranking by .1, and by 3 standard errors.

    Args:
        figure: `[Q]` of the un-adapted system, as of `ranking_figure`.
        relevant: Q sets of corpus rows that count as found.
        size: Documents in the corpus.
    """
    figure = np.asarray(figure, np.float64)
    known = ~np.isnan(figure)
    if known.sum() < MIN_KNOWN:
        return (
            f"what is to be found is known for {known.sum()} of {len(figure)} dev questions, and"
            f" {MIN_KNOWN} are the fewest that judge"
        )
    chance = np.array([_chance(len(rows), size) for rows in relevant])[known]
    above = figure[known] - chance
    needed = max(_ABOVE_CHANCE, 3 * above.std(ddof=1) / np.sqrt(len(above)))
    if above.mean() > needed:
        return ""
    return (
        f"the un-adapted system finds what is to be found for the {known.sum()} dev questions"
        f" hardly better than chance (MRR@{FIGURE_DEPTH} {figure[known].mean():.3f}, by chance"
        f" {chance.mean():.3f})"
    )


def ranking_figure(found: SearchResult, relevant: Sequence[frozenset[int]]) -> NDArray[np.float64]:
    """Computes the figure of a ranking, whose mean is MRR@10.

    Args:
        found: `[Q, K]` documents, best first.
        relevant: Q sets of corpus rows that count as found.

    Returns:
        `[Q]`, 1 over the rank of the first of them; NaN where none is known.
    """
    grades = [dict.fromkeys(rows, 1) for rows in relevant]
    return reciprocal_rank(found.doc_ids, grades, k=FIGURE_DEPTH)


def served_figure(
    workspace: Workspace, hybrid: Index[HybridQueries], query_params: object, split: str = "dev"
) -> NDArray[np.float64]:
    """Computes the figure of a served retriever on dev questions, for `prefer`.

    Args:
        workspace: Data; its `relevant_rows` say what counts as found.
        hybrid: Of the retriever (`Retriever.hybrid`), or what ranks in its place.
        query_params: Of its query encoder.
        split: Of the workspace's questions.

    Returns:
        `[Q]` as of `ranking_figure`.
    """
    questions = workspace.questions[split]
    if not questions:
        return np.zeros(0)
    embeddings = workspace.encode_queries(query_params, questions)
    queries = HybridQueries(embeddings, [question.text for question in questions])
    found = FindableIndex(hybrid, findable_in(workspace, split)).search(queries, FIGURE_DEPTH)
    return ranking_figure(found, workspace.relevant_rows(split))


def _gains(candidate: ArrayLike, incumbent: ArrayLike) -> NDArray[np.float64]:
    new, old = np.asarray(candidate, np.float64), np.asarray(incumbent, np.float64)
    if new.ndim != 1 or new.shape != old.shape:
        raise ValueError(
            f"candidate and incumbent must have one figure per question, got {new.shape} and"
            f" {old.shape}"
        )
    gain = new - old
    return gain[~np.isnan(gain)]


def _all_gains(figures: Sequence[ArrayLike], default: int) -> NDArray[np.float64]:
    """Returns what each candidate gains over the default, `[C, known]`."""
    if not 0 <= default < len(figures):
        raise ValueError(f"default must be one of the candidates, got {default} of {len(figures)}")
    return np.stack([_gains(row, figures[default]) for row in figures])


def _held_out(gains: NDArray[np.float64], default: int) -> NDArray[np.float64]:
    """Returns for each question the gain of the candidate that is best on other questions."""
    fold = np.arange(gains.shape[1]) % _FOLDS
    held_out = np.zeros(gains.shape[1])
    for part in set(fold.tolist()):
        others = gains[:, fold != part]
        best = _best(others, default) if others.size else default
        held_out[fold == part] = gains[best, fold == part]
    return held_out


def _chance(num_relevant: int, size: int) -> float:
    """Returns the expected figure of a random ranking."""
    expected, missed = 0.0, 1.0
    for rank in range(1, min(FIGURE_DEPTH, size) + 1):
        hit = min(1.0, num_relevant / (size - rank + 1))
        expected += missed * hit / rank
        missed *= 1 - hit
    return expected


def _best(gains: NDArray[np.float64], default: int) -> int:
    """Returns the row of highest mean; its gain over the default's is that mean."""
    means = gains.mean(axis=1)
    return default if means.max() <= 0 else int(means.argmax())

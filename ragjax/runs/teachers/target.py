"""The LSR target: what teachers say of a question's candidates, as one distribution.

Q questions, K candidates.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ragjax import losses
from ragjax.data import Question
from ragjax.index import SearchResult
from ragjax.runs.options.teachers import LsrTarget, TeacherWeights
from ragjax.runs.teachers.reading import ANSWER, QUESTION, TeacherScores

SCORES = {
    "prob": losses.prob,
    "prob_per_token": losses.prob_per_token,
    "log_prob": losses.log_prob,
    "log_prob_per_token": losses.log_prob_per_token,
}


def parts_wanted(weights: TeacherWeights, questions: Sequence[Question]) -> tuple[str, ...]:
    """Returns what the language model has to read: answers, questions, both or nothing."""
    answers = bool(weights.answer) and any(question.answers for question in questions)
    instead = bool(weights.answer) and not all(question.answers for question in questions)
    return (ANSWER,) * answers + (QUESTION,) * (bool(weights.question) or instead)


def teacher_parts(
    score: str,
    scores: TeacherScores,
    candidates: SearchResult,
    others: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Returns what each teacher says of the candidates, `[Q, K]` float32 by its name.

    Where a question has no answer, the score of the question itself stands in its place.

    Args:
        score: Form of the answer's log-probability, a name of `SCORES`.
        scores: Of the language model.
        candidates: With their retrieval scores, of which the prior is made.
        others: `[Q, K]` scores of other teachers in any unit, NaN where there is none.
    """
    question = losses.log_prob_per_token(scores.question_log_probs, scores.question_lengths)
    answer = SCORES[score](scores.log_probs, scores.lengths)
    # What another teacher does not score has z = 0, the mean of what it does.
    z_scored = {name: z_scores(values, candidates.mask) for name, values in (others or {}).items()}
    return z_scored | {
        "answer": np.where(scores.lengths[:, None] > 0, answer, question),
        "question": np.asarray(question),
        "prior": z_scores(candidates.scores, candidates.mask),
    }


def mixed(weights: TeacherWeights, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns g `[Q, K]` float32, the weighted sum of the parts."""
    total = np.zeros_like(parts["prior"])
    for name, weight in weights.named.items():
        total += np.float32(weight) * parts[name]
    return total


def target_log_probs(
    target: LsrTarget, parts: Mapping[str, np.ndarray], candidates: SearchResult
) -> np.ndarray:
    """Returns log p_LSR `[Q, K]` float32, log_softmax(g / τ), of the candidates."""
    g = mixed(target.weights, parts)
    return np.asarray(
        losses.lsr_target(g, temperature=target.temperature, doc_mask=candidates.mask), np.float32
    )


def z_scores(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns `[Q, K]` float32 of mean 0 and deviation 1 over each question's candidates.

    0 where they are masked, not finite, or all the same.
    """
    mask = mask & np.isfinite(scores)
    count = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    scores = np.where(mask, scores, 0).astype(np.float64)
    centred = np.where(mask, scores - scores.sum(axis=1, keepdims=True) / count, 0)
    spread = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    return (centred / np.where(spread > 0, spread, 1)).astype(np.float32)

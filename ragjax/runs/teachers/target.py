"""The LSR target: what teachers say of a question's candidates, as one distribution.

Q questions, K candidates.
"""

import numpy as np

from ragjax import losses
from ragjax.index import SearchResult
from ragjax.runs.options.shared import LsrTarget
from ragjax.runs.teachers.reading import TeacherScores

SCORES = {
    "prob": losses.prob,
    "prob_per_token": losses.prob_per_token,
    "log_prob": losses.log_prob,
    "log_prob_per_token": losses.log_prob_per_token,
}


def target_log_probs(
    target: LsrTarget, scores: TeacherScores, candidates: SearchResult
) -> np.ndarray:
    """Returns log p_LSR `[Q, K]` float32 of the candidates.

    log p_LSR = log_softmax((g + w · z) / τ), with g the score function and z the
    z-score of the candidates' retrieval scores (w = 0 gives the papers' target).
    """
    g = np.asarray(SCORES[target.score](scores.log_probs, scores.lengths))
    if target.prior_weight:
        g = g + np.float32(target.prior_weight) * z_scores(candidates.scores, candidates.mask)
    return np.asarray(
        losses.lsr_target(g, temperature=target.temperature, doc_mask=candidates.mask), np.float32
    )


def z_scores(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns `[Q, K]` float32 of mean 0 and deviation 1 over each question's candidates.

    0 where they are masked, or all the same.
    """
    count = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    scores = np.where(mask, scores, 0).astype(np.float64)
    centred = np.where(mask, scores - scores.sum(axis=1, keepdims=True) / count, 0)
    spread = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    return (centred / np.where(spread > 0, spread, 1)).astype(np.float32)

"""Calibration of a confidence: calibration error, Brier score, AUROC, risk and coverage.

Every function takes one confidence in [0, 1] and one outcome (1.0 right, 0.0 wrong) per question.
NaN in either leaves the question out. Questions of equal confidence are never told apart: they
share a bin, and count as if in random order, so no result depends on the order of the questions.

Example:
    calibrate(answer_confidence(log_probs), exact_matches).auroc.value
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ragjax.evaluation.intervals import Interval

_MAX_CELLS = 2**21  # numbers held at once, in each of a few arrays of float64


class ReliabilityBin(NamedTuple):
    """Questions of similar confidence."""

    low: float  # lowest confidence in the bin
    high: float  # highest
    confidence: float  # mean
    accuracy: float  # share of right answers
    count: int


class Calibration(NamedTuple):
    """Calibration measures with 95 % bootstrap intervals over the questions."""

    n: int
    accuracy: Interval
    confidence: Interval  # mean confidence
    # Over bins of equal mass; biased upwards where they hold few questions.
    ece: Interval  # expected calibration error, sum_b n_b / n |accuracy_b - confidence_b|
    brier: Interval  # mean of (confidence - correct)^2
    # How often a right answer has a higher confidence than a wrong one, ties counting half;
    # None: all answers are right, or all wrong.
    auroc: Interval | None
    # Area under the risk-coverage curve: the error rate of the most confident answers (in
    # expectation over random orders of equal confidences), averaged over all coverages 1/Q ... 1.
    aurc: Interval  # lower is better; the error rate for a confidence without information
    reliability: tuple[ReliabilityBin, ...]


def answer_confidence(log_probs: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
    """Computes confidences from log-probabilities: p(y), or its geometric mean per token.

    Args:
        log_probs: [Q] float, log p(y) of the generated answers in nats; NaN where there is none.
        lengths: [Q] int, tokens behind each log-probability; None: not normalised by length.

    Returns:
        [Q] float64 in [0, 1].

    Raises:
        ValueError: A log-probability is above 0, or the lengths differ in number.
    """
    values = np.asarray(log_probs, np.float64)
    if lengths is not None:
        counts = np.asarray(lengths)
        if counts.shape != values.shape:
            raise ValueError(f"expected {values.shape} lengths, got shape {counts.shape}")
        values = values / np.maximum(counts, 1)
    # Sums of float32 log-probabilities of a certain answer end a little above 0.
    if (values > 1e-4).any():
        raise ValueError(f"log-probabilities are at most 0, got {np.nanmax(values):g}")
    return np.exp(np.minimum(values, 0.0))


def reliability_table(
    confidence: np.ndarray, correct: np.ndarray, *, num_bins: int = 10
) -> tuple[ReliabilityBin, ...]:
    """Groups questions by confidence into bins that hold about equally many.

    A question with 0-based rank r (ties share their mean rank) of n goes to bin
    floor((r + 1/2) B / n); bins that ties leave empty are not listed.

    Args:
        confidence: [Q] float in [0, 1].
        correct: [Q] 1.0 or 0.0.
        num_bins: B, at least 1.

    Returns:
        The bins from least to most confident.

    Raises:
        ValueError: No question is left, shapes differ, or a value is out of range.

    References:
        Nguyen and O'Connor, Posterior calibration and exploratory analysis for natural language
        processing models, 2015, section 4 (equal-mass bins).
    """
    data = _sorted(confidence, correct)
    bins = _bin_of(np.arange(data.n)[None, :], data, num_bins)[0]
    table = []
    for number in np.unique(bins):
        inside = bins == number
        values = data.confidence[inside]
        table.append(
            ReliabilityBin(
                low=float(values[0]),
                high=float(values[-1]),
                confidence=float(values.mean()),
                accuracy=float(data.correct[inside].mean()),
                count=int(inside.sum()),
            )
        )
    return tuple(table)


def calibrate(
    confidence: np.ndarray,
    correct: np.ndarray,
    *,
    num_bins: int = 10,
    num_resamples: int = 2_000,
    seed: int = 0,
) -> Calibration:
    """Computes every measure of this module with its 95 % percentile bootstrap interval.

    Args:
        confidence: [Q] float in [0, 1].
        correct: [Q] 1.0 or 0.0.
        num_bins: Bins of the calibration error and the table, at least 1.
        num_resamples: Bootstrap samples, at least 1.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: No question is left, shapes differ, or a value is out of range.

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017, section 2 (ECE).
        Brier, Verification of forecasts expressed in terms of probability, 1950.
        El-Yaniv and Wiener, On the Foundations of Noise-free Selective Classification, 2010.
        Geifman, Uziel and El-Yaniv, Bias-Reduced Uncertainty Estimation for Deep Neural
        Classifiers, 2019, section 2 (AURC).
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    table = reliability_table(confidence, correct, num_bins=num_bins)
    data = _sorted(confidence, correct)
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "accuracy": lambda rows: data.correct[rows].mean(axis=1),
        "confidence": lambda rows: data.confidence[rows].mean(axis=1),
        "ece": lambda rows: _ece(rows, data, num_bins),
        "brier": lambda rows: ((data.confidence - data.correct) ** 2)[rows].mean(axis=1),
        "auroc": lambda rows: _auroc(rows, data),
        "aurc": lambda rows: _risks(rows, data).mean(axis=1),
    }
    estimate = {name: measure(np.arange(data.n)[None, :])[0] for name, measure in measures.items()}
    drawn = _resampled(measures, data.n, num_resamples, seed)
    intervals = {name: _interval(estimate[name], drawn[name]) for name in measures}
    found = Calibration(n=data.n, **intervals, reliability=table)
    return found._replace(auroc=None) if np.isnan(estimate["auroc"]) else found


class _Sorted(NamedTuple):
    """Questions from least to most confident."""

    confidence: np.ndarray  # [n] float64
    correct: np.ndarray  # [n] float64
    group: np.ndarray  # [n] int, equal for equal confidences, ascending

    @property
    def n(self) -> int:
        return len(self.confidence)


def _sorted(confidence: np.ndarray, correct: np.ndarray) -> _Sorted:
    values, outcomes = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if values.ndim != 1 or values.shape != outcomes.shape:
        raise ValueError(
            "expected one confidence and one outcome per question, shape [Q], got shapes "
            f"{values.shape} and {outcomes.shape}"
        )
    kept = ~(np.isnan(values) | np.isnan(outcomes))
    values, outcomes = values[kept], outcomes[kept]
    if not len(values):
        raise ValueError("no question is left: all values are NaN (not applicable), or none came")
    if (values < 0).any() or (values > 1).any():
        raise ValueError(f"confidences lie in [0, 1], got {values.min():g} ... {values.max():g}")
    if not np.isin(outcomes, (0.0, 1.0)).all():
        wrong = outcomes[~np.isin(outcomes, (0.0, 1.0))][0]
        raise ValueError(f"an outcome is 1.0 (right) or 0.0 (wrong), got {wrong:g}")
    order = np.argsort(values, kind="stable")
    values = values[order]
    group = np.concatenate([[0], np.cumsum(np.diff(values) > 0)])
    return _Sorted(values, outcomes[order], group)


# Below, `rows` [R, n] holds R samples of the n questions, each ascending in the sorted order.


class _Groups(NamedTuple):
    """Answers of each sample in each group of equal confidence, [R, G] float64."""

    count: np.ndarray
    right: np.ndarray


def _groups(rows: np.ndarray, data: _Sorted) -> _Groups:
    num_groups = int(data.group[-1]) + 1
    cells = data.group[rows] + num_groups * np.arange(len(rows))[:, None]
    size, shape = num_groups * len(rows), (len(rows), num_groups)
    return _Groups(
        np.bincount(cells.ravel(), minlength=size).reshape(shape).astype(np.float64),
        np.bincount(cells.ravel(), data.correct[rows].ravel(), minlength=size).reshape(shape),
    )


def _bin_of(rows: np.ndarray, data: _Sorted, num_bins: int) -> np.ndarray:
    """Returns the bin of each question of each sample, [R, n] int."""
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    count = _groups(rows, data).count
    # The mean rank of a group, plus 1/2, is half an integer: exact in float64.
    middle = np.cumsum(count, axis=1) - count / 2
    bins = np.floor(middle * num_bins / data.n).astype(int)
    return np.take_along_axis(bins, data.group[rows], axis=1)


def _ece(rows: np.ndarray, data: _Sorted, num_bins: int) -> np.ndarray:
    cells = _bin_of(rows, data, num_bins) + num_bins * np.arange(len(rows))[:, None]
    gaps = (data.correct - data.confidence)[rows]
    sums = np.bincount(cells.ravel(), gaps.ravel(), minlength=num_bins * len(rows))
    return np.abs(sums.reshape(len(rows), num_bins)).sum(axis=1) / data.n


def _auroc(rows: np.ndarray, data: _Sorted) -> np.ndarray:
    count, right = _groups(rows, data)
    wrong = count - right
    below = np.cumsum(wrong, axis=1) - wrong / 2
    pairs = right.sum(axis=1) * wrong.sum(axis=1)
    won = (right * below).sum(axis=1)
    return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)


def _risks(rows: np.ndarray, data: _Sorted) -> np.ndarray:
    """Returns the risk at each coverage, [R, n], most confident first."""
    count, right = _groups(rows, data)
    # In a random order of equals, each place holds the mean of its group in expectation.
    errors = 1.0 - right / np.maximum(count, 1)
    placed = np.take_along_axis(errors, data.group[rows], axis=1)[:, ::-1]
    return np.cumsum(placed, axis=1) / np.arange(1, data.n + 1)[None, :]


def _resampled(
    measures: dict[str, Callable[[np.ndarray], np.ndarray]], n: int, total: int, seed: int
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = max(1, _MAX_CELLS // n)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    for start in range(0, total, size):
        rows = np.sort(rng.integers(n, size=(min(size, total - start), n)), axis=1)
        for name, measure in measures.items():
            parts[name].append(measure(rows))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _interval(value: float, drawn: np.ndarray) -> Interval:
    # A sample of right answers only has no AUROC.
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (value, value)
    return Interval(float(value), float(low), float(high))

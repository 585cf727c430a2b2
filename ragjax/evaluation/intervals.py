"""Bootstrap intervals of means over questions, and a paired test.

NaN stands for "the metric does not apply to this question" and is left out before anything is
computed; of a pair, both values are left out when one is NaN.

Example:
    paired_difference(after_f1, before_f1)  # PairedDifference(value=0.12, low=0.05, ...)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_MAX_CELLS = 2**22  # numbers held at once: 32 MiB of float64


class Interval(NamedTuple):
    """A mean with its confidence interval, in the unit of the values."""

    value: float  # the mean
    low: float
    high: float


class PairedDifference(NamedTuple):
    """The mean difference of two systems on the same questions."""

    value: float  # mean of after - before
    low: float
    high: float
    p_value: float  # two-sided; how often chance alone gives a mean difference as large
    n: int  # number of pairs


def bootstrap_interval(
    values: np.ndarray,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Computes the mean over questions and its percentile bootstrap interval.

    The interval of identical values (all 0, all 1, or one question) has no width: resampling
    cannot show what was not observed.

    Args:
        values: [Q] one value per question; NaN where the metric does not apply.
        confidence: Share of intervals that should hold the true mean, in (0, 1).
        num_resamples: Number of bootstrap samples, at least 1.
        seed: Seed of the resampling; the same seed gives the same interval.

    Returns:
        Mean, lower and upper bound.

    Raises:
        ValueError: If no value is left, a value is infinite, the shape is not [Q], or an option
            is out of range.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    _check_options(confidence, num_resamples)
    array = _one_dimensional(values)
    return _interval(array[~np.isnan(array)], confidence, num_resamples, seed)


def paired_difference(
    after: np.ndarray,
    before: np.ndarray,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compares two systems on the same questions.

    The interval is the percentile bootstrap over the pairwise differences. The p-value is that of
    the sign-flip permutation test: if the systems were interchangeable, each difference could
    equally well have the other sign. All sign patterns are tried when they are no more than
    `num_resamples`; otherwise that many are drawn and p = (1 + count) / (1 + drawn).

    Args:
        after: [Q] values of one system.
        before: [Q] values of the other, in the same order of questions.
        confidence: Share of intervals that should hold the true difference, in (0, 1).
        num_resamples: Number of bootstrap samples and of drawn sign patterns, at least 1.
        seed: Seed of both.

    Returns:
        Mean of after - before, its interval, the two-sided p-value and the number of pairs.

    Raises:
        ValueError: If the lengths differ, no pair is left, a value is infinite, the shape is not
            [Q], or an option is out of range.

    References:
        Smucker, Allan and Carterette, A Comparison of Statistical Significance Tests for
        Information Retrieval Evaluation, 2007.
        Phipson and Smyth, Permutation P-values Should Never Be Zero, 2010.
    """
    _check_options(confidence, num_resamples)
    after, before = _one_dimensional(after), _one_dimensional(before)
    if len(after) != len(before):
        raise ValueError(f"pairs need equal lengths, got {len(after)} and {len(before)} values")
    differences = after - before
    differences = differences[~np.isnan(differences)]
    interval = _interval(differences, confidence, num_resamples, seed)
    p_value = _sign_flip_p_value(differences, num_resamples, seed)
    return PairedDifference(*interval, p_value=p_value, n=len(differences))


def _check_options(confidence: float, num_resamples: int) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")


def _one_dimensional(values: np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"expected one value per question, shape [Q], got shape {array.shape}")
    if np.isinf(array).any():
        raise ValueError(f"value {int(np.isinf(array).argmax())} is infinite")
    return array


def _interval(values: np.ndarray, confidence: float, num_resamples: int, seed: int) -> Interval:
    if not len(values):
        raise ValueError("no question is left: all values are NaN (not applicable), or none came")
    rng = np.random.default_rng(seed)
    size = len(values)
    means = _in_chunks(
        lambda rows: values[rng.integers(size, size=(rows, size))].mean(axis=1), num_resamples, size
    )
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def _sign_flip_p_value(differences: np.ndarray, num_resamples: int, seed: int) -> float:
    changed = differences[differences != 0.0]
    size = len(changed)
    # Equal sums reached in another order differ in the last bits and must count as equal.
    threshold = abs(changed.sum()) - 1e-9 * np.abs(changed).sum()
    if 2**size <= num_resamples:
        patterns = (np.arange(2**size)[:, None] >> np.arange(size)[None, :]) & 1  # [2**n, n]
        return float((np.abs((2.0 * patterns - 1.0) @ changed) >= threshold).mean())
    rng = np.random.default_rng([seed, 1])
    sums = _in_chunks(
        lambda rows: (2.0 * rng.integers(2, size=(rows, size)) - 1.0) @ changed, num_resamples, size
    )
    return float((1 + (np.abs(sums) >= threshold).sum()) / (1 + num_resamples))


def _in_chunks(draw: Callable[[int], np.ndarray], total: int, size: int) -> np.ndarray:
    """Draws `total` rows of `size` numbers, as many at a time as memory should hold."""
    rows = max(1, _MAX_CELLS // size)
    return np.concatenate([draw(min(rows, total - start)) for start in range(0, total, rows)])

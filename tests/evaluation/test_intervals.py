import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ragjax.evaluation import bootstrap_interval, intervals, paired_difference


def exact_sign_flip(differences) -> float:
    observed = abs(sum(differences)) - 1e-9
    patterns = list(itertools.product([-1, 1], repeat=len(differences)))
    as_large = [
        abs(sum(s * d for s, d in zip(p, differences, strict=True))) >= observed for p in patterns
    ]
    return sum(as_large) / len(patterns)


def test_interval_of_two_values_is_known_exactly():
    # Resampled means of (0, 1) are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.5, 0.0, 1.0)
    assert bootstrap_interval(np.array([0.0, 1.0]), confidence=0.4) == (0.5, 0.5, 0.5)


def test_interval_of_many_values_is_the_normal_one(rng):
    values = rng.normal(3.0, 2.0, size=2000)
    half_width = 1.96 * values.std() / np.sqrt(2000)
    value, low, high = bootstrap_interval(values)
    assert value == pytest.approx(values.mean())
    assert low == pytest.approx(value - half_width, abs=0.05 * half_width)
    assert high == pytest.approx(value + half_width, abs=0.05 * half_width)


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(7)
    covered = 0
    for seed in range(400):
        values = rng.binomial(1, 0.4, size=80).astype(float)
        _, low, high = bootstrap_interval(values, num_resamples=1000, seed=seed)
        covered += low <= 0.4 <= high
    # Standard error of a share of 95 % over 400 trials: 1.1 points.
    assert 0.92 <= covered / 400 <= 0.98


def test_interval_of_one_or_equal_values_is_the_value():
    assert bootstrap_interval(np.array([0.3])) == (0.3, 0.3, 0.3)
    value, low, high = bootstrap_interval(np.full(7, 0.1))
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    assert low <= value <= high


def test_the_seed_decides(rng):
    values = rng.normal(size=50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_chunks_of_resamples_equal_one_piece(rng, monkeypatch):
    values, others = rng.normal(size=(2, 50))
    whole = paired_difference(values, others, num_resamples=500)
    for cells in (120, 20):  # two rows at a time; less than one
        monkeypatch.setattr(intervals, "_MAX_CELLS", cells)
        assert paired_difference(values, others, num_resamples=500) == pytest.approx(whole)


def test_values_that_do_not_apply_are_left_out(rng):
    values = rng.normal(size=20)
    with_gaps = np.insert(values, [0, 5, 20], np.nan)
    assert bootstrap_interval(with_gaps) == bootstrap_interval(values)
    after, before = np.array([1.0, np.nan, 1.0, 0.5]), np.array([0.0, 0.0, np.nan, 0.5])
    kept = paired_difference(np.array([1.0, 0.5]), np.array([0.0, 0.5]))
    assert paired_difference(after, before) == kept
    assert kept.n == 2


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([-1.0, -0.5, -0.1, 0.0, 0.1, 0.2, 0.3, 1.0]), min_size=1, max_size=8)
)
def test_p_value_of_few_pairs_is_exact(differences):
    result = paired_difference(np.array(differences), np.zeros(len(differences)))
    assert result.value == pytest.approx(np.mean(differences))
    assert result.p_value == pytest.approx(exact_sign_flip(differences))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.1, 0.1, 0.1, -0.2], 1.0),  # no signs give a smaller sum
        ([0.1, 0.2, 0.1, 0.7], 2 / 16),  # the largest sum: all signs equal
    ],
)
def test_sums_that_differ_by_rounding_count_as_equal(differences, expected):
    assert paired_difference(np.array(differences), np.zeros(4)).p_value == expected


def test_drawn_p_value_agrees_with_the_exact_one(rng):
    differences = rng.normal(0.4, 1.0, size=12)
    drawn = paired_difference(differences, np.zeros(12), num_resamples=4000).p_value
    exact = exact_sign_flip(differences)
    assert 0.02 < exact < 0.9
    assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 4000))


def test_drawn_p_value_is_never_zero():
    result = paired_difference(np.ones(40), np.zeros(40), num_resamples=999)
    assert result == (1.0, 1.0, 1.0, 1 / 1000, 40)


def test_p_value_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(3)
    p_values = [
        paired_difference(rng.normal(size=30), rng.normal(size=30), num_resamples=500).p_value
        for _ in range(200)
    ]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.05)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.07)


def test_pairing_removes_what_questions_share(rng):
    difficulty = rng.normal(0, 5, size=100)
    after, before = difficulty + 0.3 + rng.normal(0, 0.1, 100), difficulty
    result = paired_difference(after, before)
    assert result.low > 0.2 and result.high < 0.4 and result.p_value < 0.001
    assert bootstrap_interval(after).low < bootstrap_interval(before).value


@pytest.mark.parametrize(
    "function", [bootstrap_interval, lambda v, **o: paired_difference(v, v, **o)]
)
@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "no question is left"),
        ([np.nan], {}, "no question is left"),
        ([1.0, np.inf], {}, "value 1 is infinite"),
        ([[1.0]], {}, r"shape \[Q\], got shape \(1, 1\)"),
        ([1.0], {"confidence": 1.0}, "confidence must lie between 0 and 1, got 1.0"),
        ([1.0], {"num_resamples": 0}, "num_resamples must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(function, values, options, message):
    with pytest.raises(ValueError, match=message):
        function(np.array(values), **options)


def test_pairs_need_equal_lengths():
    with pytest.raises(ValueError, match="got 1 and 2 values"):
        paired_difference(np.zeros(1), np.zeros(2))


def test_intervals_and_p_values_equal_scipy(rng):
    before, gain = rng.random(40), rng.normal(0.1, 0.3, size=40)
    found = paired_difference(before + gain, before)
    theirs = stats.bootstrap((gain,), np.mean, n_resamples=10_000, method="percentile", rng=1)
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.005)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.005)
    for size, tolerance in ((9, 1e-9), (40, 0.01)):  # all signs, then some of them
        found = paired_difference((before + gain)[:size], before[:size])
        theirs = stats.permutation_test(
            (gain[:size],), np.mean, permutation_type="samples", n_resamples=10_000, rng=2
        )
        assert found.p_value == pytest.approx(theirs.pvalue, abs=tolerance)

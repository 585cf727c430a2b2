import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.evaluation.calibration import answer_confidence, calibrate, reliability_table

DETERMINISTIC = settings(derandomize=True, deadline=None)
# Few distinct confidences, so that ties are common.
CASES = st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.booleans()), min_size=1)


def columns(case):
    return np.array([c for c, _ in case]), np.array([float(y) for _, y in case])


def measured(name, confidence, correct, num_bins=10):
    """Returns one measure without its interval."""
    found = getattr(calibrate(confidence, correct, num_bins=num_bins, num_resamples=1), name)
    return np.nan if found is None else found.value


def plain_bins(case, num_bins):
    """Bin number of each question: ranks by counting, ties share their mean rank."""
    bins = []
    for confidence, _ in case:
        below = sum(other < confidence for other, _ in case)
        equal = sum(other == confidence for other, _ in case)
        mean_rank = below + (equal - 1) / 2
        bins.append(int((mean_rank + 0.5) * num_bins // len(case)))
    return bins


@DETERMINISTIC
@given(case=CASES, num_bins=st.integers(1, 6))
def test_the_calibration_error_is_that_of_the_formula(case, num_bins):
    bins = plain_bins(case, num_bins)
    expected = 0.0
    for number in set(bins):
        inside = [question for question, b in zip(case, bins, strict=True) if b == number]
        mean = sum(c for c, _ in inside) / len(inside)
        accuracy = sum(y for _, y in inside) / len(inside)
        expected += len(inside) / len(case) * abs(accuracy - mean)
    assert measured("ece", *columns(case), num_bins) == pytest.approx(expected)


@DETERMINISTIC
@given(case=CASES, num_bins=st.integers(1, 6))
def test_the_table_holds_every_question_once_and_gives_the_error(case, num_bins):
    table = reliability_table(*columns(case), num_bins=num_bins)
    assert sum(row.count for row in table) == len(case)
    assert all(one.high < other.low for one, other in itertools.pairwise(table))
    error = sum(row.count * abs(row.accuracy - row.confidence) for row in table) / len(case)
    assert error == pytest.approx(measured("ece", *columns(case), num_bins))


@DETERMINISTIC
@given(case=CASES)
def test_auroc_counts_pairs(case):
    right = [c for c, y in case if y]
    wrong = [c for c, y in case if not y]
    pairs = [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    expected = np.mean(pairs) if pairs else np.nan
    assert measured("auroc", *columns(case)) == pytest.approx(expected, nan_ok=True)


@DETERMINISTIC
@given(case=st.lists(st.tuples(st.sampled_from([0.1, 0.7]), st.booleans()), min_size=1, max_size=6))
def test_risk_is_the_mean_over_all_orders_of_equal_confidences(case):
    orders = [
        order
        for order in itertools.permutations(case)
        if all(one[0] >= other[0] for one, other in itertools.pairwise(order))
    ]
    risks = [[sum(not y for _, y in order[: i + 1]) / (i + 1) for i in range(len(order))]
             for order in orders]  # fmt: skip
    assert measured("aurc", *columns(case)) == pytest.approx(np.mean(risks))


@DETERMINISTIC
@given(case=CASES, seed=st.integers(0, 3))
def test_the_order_of_questions_does_not_matter(case, seed):
    shuffled = [case[i] for i in np.random.default_rng(seed).permutation(len(case))]
    one = calibrate(*columns(case), num_resamples=5)
    other = calibrate(*columns(shuffled), num_resamples=5)
    for name in ("accuracy", "ece", "brier", "aurc"):
        assert getattr(one, name).value == pytest.approx(getattr(other, name).value)
    assert [row.count for row in one.reliability] == [row.count for row in other.reliability]


def test_equal_mass_bins_without_ties_by_hand():
    table = reliability_table(
        np.array([0.9, 0.1, 0.2, 0.8]), np.array([1.0, 0.0, 1.0, 0.0]), num_bins=2
    )
    assert [(row.low, row.high, row.count) for row in table] == [(0.1, 0.2, 2), (0.8, 0.9, 2)]
    assert [row.accuracy for row in table] == [0.5, 0.5]
    assert [row.confidence for row in table] == pytest.approx([0.15, 0.85])


def test_all_right_and_sure_is_perfect():
    found = calibrate(np.ones(4), np.ones(4), num_resamples=20)
    assert found.ece == found.brier == found.aurc == (0.0, 0.0, 0.0)
    assert found.accuracy == (1.0, 1.0, 1.0)
    assert found.auroc is None
    assert [row.count for row in found.reliability] == [4]


def test_all_wrong_and_sure_is_as_bad_as_can_be():
    found = calibrate(np.ones(3), np.zeros(3), num_resamples=20)
    assert found.ece.value == found.brier.value == found.aurc.value == 1.0
    assert found.auroc is None


def test_one_question():
    found = calibrate(np.array([0.3]), np.array([1.0]), num_resamples=20)
    assert found.n == 1
    assert found.ece == pytest.approx((0.7, 0.7, 0.7))
    assert found.brier.value == pytest.approx(0.49)
    assert found.aurc.value == 0.0


def test_equal_confidences_tell_nothing():
    confidence, correct = np.full(10, 0.4), np.array([1.0] * 4 + [0.0] * 6)
    assert measured("auroc", confidence, correct) == 0.5
    assert measured("aurc", confidence, correct) == pytest.approx(0.6)
    assert measured("ece", confidence, correct) == pytest.approx(0.0)


def test_questions_without_a_value_are_left_out(rng):
    confidence, correct = rng.uniform(size=20), rng.integers(2, size=20).astype(float)
    more = np.concatenate([confidence, [np.nan, 0.5]]), np.concatenate([correct, [1.0, np.nan]])
    assert calibrate(*more, num_resamples=30) == calibrate(confidence, correct, num_resamples=30)


def test_intervals_equal_a_plain_bootstrap(rng):
    confidence = np.round(rng.uniform(size=15), 1)
    correct = (rng.uniform(size=15) < confidence).astype(float)
    found = calibrate(confidence, correct, num_bins=3, num_resamples=400, seed=7)
    draw = np.random.default_rng(7)
    order = np.argsort(confidence, kind="stable")
    samples = [order[rows] for rows in draw.integers(15, size=(400, 15))]
    for name in ("ece", "brier", "auroc", "aurc"):
        values = [measured(name, confidence[rows], correct[rows], 3) for rows in samples]
        low, high = np.nanquantile(values, [0.025, 0.975])
        expected = (measured(name, confidence, correct, 3), low, high)
        assert getattr(found, name) == pytest.approx(expected)


def test_intervals_depend_on_the_seed_only(rng):
    confidence, correct = rng.uniform(size=30), rng.integers(2, size=30).astype(float)
    assert calibrate(confidence, correct, seed=1) == calibrate(confidence, correct, seed=1)
    assert calibrate(confidence, correct, seed=1) != calibrate(confidence, correct, seed=2)


def test_many_questions_are_resampled_in_parts(rng, monkeypatch):
    confidence, correct = rng.uniform(size=20), rng.integers(2, size=20).astype(float)
    whole = calibrate(confidence, correct, num_resamples=50)
    monkeypatch.setattr("ragjax.evaluation.calibration._MAX_CELLS", 60)
    assert calibrate(confidence, correct, num_resamples=50) == whole


def test_confidence_of_log_probs():
    log_probs = np.log([0.25, 1.0, 0.125])
    np.testing.assert_allclose(answer_confidence(log_probs), [0.25, 1.0, 0.125])
    normalised = answer_confidence(log_probs, np.array([2, 1, 3]))
    np.testing.assert_allclose(normalised, [0.5, 1.0, 0.5])
    assert answer_confidence(np.array([0.0]), np.array([0])).tolist() == [1.0]
    assert np.isnan(answer_confidence(np.array([np.nan]))).all()
    assert answer_confidence(np.array([-np.inf])).tolist() == [0.0]
    with pytest.raises(ValueError, match="at most 0, got 0.5"):
        answer_confidence(np.array([0.5]))
    with pytest.raises(ValueError, match="lengths"):
        answer_confidence(log_probs, np.array([1]))


@pytest.mark.parametrize(
    ("confidence", "correct", "match"),
    [
        ([], [], "no question is left"),
        ([np.nan], [1.0], "no question is left"),
        ([0.5, 0.5], [1.0], "shapes"),
        ([1.5], [1.0], r"in \[0, 1\], got 1.5"),
        ([0.5], [0.5], "got 0.5"),
    ],
)
def test_bad_input_is_named(confidence, correct, match):
    with pytest.raises(ValueError, match=match):
        calibrate(np.array(confidence), np.array(correct))


def test_options_out_of_range_are_named():
    one = np.array([0.5]), np.array([1.0])
    with pytest.raises(ValueError, match="num_bins must be at least 1"):
        calibrate(*one, num_bins=0)
    with pytest.raises(ValueError, match="num_resamples must be at least 1"):
        calibrate(*one, num_resamples=0)

"""Choices on dev questions: real gains are taken, noise and losses are not."""

import numpy as np
import pytest

from ragjax.index.base import pad_result
from ragjax.runs.compare.choice import (
    MIN_KNOWN,
    _chance,
    choose,
    judge_problem,
    optimism,
    prefer,
    ranking_figure,
)
from ragjax.runs.compare.served import _best
from ragjax.runs.train.guard import Kept


def ranks(seed: int, count: int, gain: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Reciprocal ranks of two versions of one system whose differences look like measured ones."""
    draw = np.random.default_rng(seed)
    old = 1 / draw.integers(1, 8, count)
    changed = draw.random(count) < 0.25
    new = old + changed * draw.normal(gain / 0.25, 0.4, count)
    return new, old


class TestPrefer:
    def test_takes_a_clear_gain_and_refuses_a_loss(self):
        old = np.linspace(0, 0.8, 60)
        assert prefer(old + np.resize([0.0, 0.2], 60), old)
        assert not prefer(old - np.resize([0.0, 0.2], 60), old)

    def test_keeps_the_incumbent_where_nothing_or_one_question_changed(self):
        old = np.full(40, 0.5)
        one = old.copy()
        one[3] = 1.0
        assert not prefer(old, old)
        assert not prefer(one, old)

    def test_needs_enough_known_questions(self):
        old = np.zeros(MIN_KNOWN)
        assert prefer(old + 1, old)
        assert not prefer(old[1:] + 1, old[1:])
        assert not prefer(np.zeros(0), np.zeros(0))

    def test_leaves_out_what_is_unknown(self):
        unknown = np.full(200, np.nan)
        known_new, known_old = ranks(0, 30, gain=0.2)
        assert prefer(np.r_[known_new, unknown], np.r_[known_old, unknown])
        assert not prefer(np.r_[known_new[:10], unknown], np.r_[known_old[:10], unknown])

    def test_usually_takes_a_true_gain_and_seldom_a_true_loss(self):
        taken = {
            gain: np.mean([prefer(*ranks(seed, 120, gain)) for seed in range(300)])
            for gain in (-0.02, 0.0, 0.03)
        }
        assert taken[0.03] > 0.6
        assert taken[0.0] < 0.2
        assert taken[-0.02] < 0.04

    def test_says_which_shapes_it_was_given(self):
        with pytest.raises(ValueError, match=r"one figure per question, got \(2,\) and \(3,\)"):
            prefer(np.zeros(2), np.zeros(3))


class TestChoose:
    def test_takes_the_best_of_several_real_gains(self):
        old = np.linspace(0, 0.5, 50)
        figures = [old, old + 0.1, old + 0.3, old - 0.2]
        assert choose(figures) == 2
        assert choose(figures, default=2) == 2

    def test_is_not_fooled_by_the_best_of_many_without_a_gain(self):
        draw, fooled, naive = np.random.default_rng(1), [], []
        for _ in range(200):
            old = draw.random(100)
            figures = [old, *(old + draw.normal(0, 0.2, (30, 100)))]
            best = max(range(1, 31), key=lambda row: figures[row].mean())
            fooled.append(choose(figures) != 0)
            naive.append(prefer(figures[best], old))
        assert np.mean(naive) > 0.8
        assert np.mean(fooled) < 0.25

    def test_keeps_the_default_without_enough_known_questions(self):
        old = np.r_[np.zeros(MIN_KNOWN - 1), [np.nan] * 50]
        assert choose([old, old + 1]) == 0

    def test_refuses_a_default_that_is_no_candidate(self):
        with pytest.raises(ValueError, match="got 2 of 1"):
            choose([np.zeros(30)], default=2)


def test_the_figure_is_the_reciprocal_rank_of_the_first_document_that_counts():
    found = pad_result(np.array([[3, 1], [2, 0], [0, 1]]), np.ones((3, 2)), 2)
    figure = ranking_figure(found, [frozenset({1, 9}), frozenset({5}), frozenset()])
    np.testing.assert_array_equal(figure, [0.5, 0.0, np.nan])


class TestJudge:
    def test_enough_questions_that_are_found_can_judge(self):
        assert judge_problem(np.linspace(0, 1, 40), [frozenset({1})] * 40, 1000) == ""

    def test_few_known_questions_cannot(self):
        figure = np.r_[np.ones(MIN_KNOWN - 1), [np.nan] * 10]
        relevant = [frozenset({1})] * (MIN_KNOWN - 1) + [frozenset()] * 10
        assert f"known for {MIN_KNOWN - 1} of 29" in judge_problem(figure, relevant, 1000)

    def test_what_is_found_as_often_as_by_chance_cannot(self):
        draw = np.random.default_rng(0)
        relevant = [frozenset(draw.choice(50, 5, replace=False).tolist()) for _ in range(100)]
        ranked = np.stack([draw.permutation(50)[:10] for _ in range(100)])
        figure = ranking_figure(pad_result(ranked, np.ones(ranked.shape), 10), relevant)
        assert figure.mean() > 0.2  # each question has many passages that count
        assert "hardly better than chance" in judge_problem(figure, relevant, 50)
        # By chance alone: what the mean of many random rankings is.
        assert _chance(5, 50) == pytest.approx(0.27, abs=0.03)
        assert _chance(1, 1) == _chance(50, 50) == 1.0


class TestOptimism:
    def test_is_on_average_that_of_a_maximum_over_candidates_without_a_gain(self):
        draw, best, estimated = np.random.default_rng(2), [], []
        for _ in range(50):
            old = draw.random(100)
            figures = [old, *(old + draw.normal(0, 0.2, (30, 100)))]
            best.append(max(float((row - old).mean()) for row in figures))
            estimated.append(optimism(figures))
        assert 0.8 < np.mean(estimated) / np.mean(best) < 1.4

    def test_is_none_for_one_clear_gain(self):
        old = np.linspace(0, 0.5, 50)
        assert optimism([old, old + 0.3]) == pytest.approx(0)
        assert optimism([old[:3], old[:3] + 0.3]) == 0


@pytest.mark.parametrize(
    ("dense", "hybrid", "shipped"),
    [
        (0.2, 0.002, "hybrid"),  # what the dense side gains hardly shows in the hybrid
        (0.2, -0.002, "hybrid_before"),
        (0.0, 0.002, "hybrid_before"),
        (0.0, 0.2, "hybrid"),
    ],
)
def test_an_adapted_hybrid_is_shipped_for_its_own_gain_or_that_of_its_dense_side(
    dense, hybrid, shipped
):
    draw = np.random.default_rng(0)
    base = draw.uniform(0.5, 0.7, 60)
    one = np.zeros(60)
    one[7] = 60 * hybrid  # of a few questions only
    rank = {
        "hybrid_before": base,
        "bm25": base - 0.1,
        "before": base - 0.4,
        "after": base - 0.4 + dense,
        "hybrid": base + (one if abs(hybrid) < 0.1 else hybrid),
    }
    hits = dict.fromkeys(rank, np.ones(60))
    kept = Kept({}, "the last", 1.0)
    assert _best(list(rank), rank, hits, kept) == shipped

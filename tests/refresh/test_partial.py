"""Partial refreshes: counting what is retrieved, and which documents are encoded first."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ragjax.refresh import PartialPolicy, RetrievalCounts, select_rows

# ------------------------------------------------------------------ counts


def test_real_results_are_counted_and_masked_ones_are_not():
    counts = RetrievalCounts(5)
    counts.add([[0, 3, -1], [3, 3, 4]], [[True, True, False], [True, False, True]])
    counts.add(np.array([[4]], np.int32), np.array([[True]]))
    assert counts.counts.tolist() == [1, 0, 0, 2, 2]
    assert counts.counts.dtype == np.int64


def test_what_is_retrieved_while_a_document_is_encoded_still_counts():
    counts = RetrievalCounts(4)
    counts.add([[0, 2, 2]], [[True, True, True]])
    exported = counts.state()
    counts.add([[1, 2]], [[True, True]])
    assert exported.tolist() == [1, 0, 2, 0]
    counts.forget(np.array([2, 3]), exported)
    assert counts.counts.tolist() == [1, 1, 1, 0]


def test_counts_of_another_corpus_are_refused():
    counts = RetrievalCounts(3)
    with pytest.raises(ValueError, match="Document 3 is not one of the 3"):
        counts.add([[0, 3]], [[True, True]])
    with pytest.raises(ValueError, match="Document -1 is not one of the 3"):
        counts.add([[-1]], [[True]])
    with pytest.raises(ValueError, match="Document 7 is not one of the 3"):
        counts.forget([1, 7], [0, 0, 0])
    with pytest.raises(ValueError, match="one shape"):
        counts.add([[0, 1]], [[True]])
    assert counts.counts.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="at least 1 document, got 0"):
        RetrievalCounts(0)


# ------------------------------------------------------------------ policy


def test_every_so_many_refreshes_are_full():
    policy = PartialPolicy(0.1, 4)
    assert [number for number in range(10) if policy.is_full(number)] == [0, 4, 8]
    assert all(PartialPolicy(0.1, 1).is_full(number) for number in range(5))


@pytest.mark.parametrize(
    ("fraction", "size", "expected"), [(0.1, 30, 3), (0.1, 3, 1), (1.0, 7, 7), (0.25, 1000, 250)]
)
def test_the_budget_is_a_fraction_and_at_least_one_document(fraction, size, expected):
    assert PartialPolicy(fraction, 2).budget(size) == expected


@pytest.mark.parametrize(
    ("fraction", "full_every", "problem"),
    [(0.0, 1, "fraction"), (1.1, 1, "fraction"), (np.nan, 1, "fraction"), (0.5, 0, "full_every")],
)
def test_a_policy_that_cannot_be_is_refused(fraction, full_every, problem):
    with pytest.raises(ValueError, match=f"{problem} must be"):
        PartialPolicy(fraction, full_every)


def test_a_policy_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PartialPolicy(0.1, 2).fraction = 0.2


# ------------------------------------------------------------------ which documents


def by_sorting(counts, drift, age, budget):
    """The same choice by sorting tuples."""
    left = set(range(len(counts)))
    chosen = []

    def take(number, candidates, key):
        best = sorted(candidates, key=lambda row: (*(-value for value in key(row)), row))[:number]
        chosen.extend(best)
        left.difference_update(best)

    retrieved = [row for row in left if counts[row] > 0]
    take(budget - budget // 2, retrieved, lambda row: (counts[row], age[row]))
    drifted = [row for row in left if drift[row] > 0]
    take(budget // 4, drifted, lambda row: (drift[row], age[row], counts[row]))
    take(budget - len(chosen), left, lambda row: (age[row], counts[row]))
    return sorted(chosen)


@st.composite
def corpora(draw):
    size = draw(st.integers(1, 40))
    small = st.integers(0, 4)
    known = st.sampled_from([0.0, 0.1, 0.5, 2.0, float("nan")])
    return {
        "counts": draw(hnp.arrays(np.int64, size, elements=small)),
        "drift": draw(hnp.arrays(np.float32, size, elements=known.map(np.float32))),
        "age": draw(hnp.arrays(np.int64, size, elements=small)),
        "budget": draw(st.integers(1, size)),
    }


@settings(derandomize=True, deadline=None, max_examples=300)
@given(corpora())
def test_the_choice_is_that_of_sorting(corpus):
    rows = select_rows(**corpus)
    assert rows.dtype == np.int64
    assert rows.tolist() == by_sorting(*corpus.values())


@settings(derandomize=True, deadline=None, max_examples=300)
@given(corpora())
def test_exactly_the_budget_is_chosen_distinct_and_ascending(corpus):
    before = {name: np.copy(value) for name, value in corpus.items()}
    rows = select_rows(**corpus)
    assert len(rows) == corpus["budget"]
    assert np.all(np.diff(rows) > 0)
    assert rows[0] >= 0 and rows[-1] < len(corpus["counts"])
    np.testing.assert_array_equal(rows, select_rows(**corpus))
    for name, value in before.items():
        np.testing.assert_array_equal(corpus[name], value)


def test_shares_of_the_budget():
    counts, age = np.zeros(100, np.int64), np.zeros(100, np.int64)
    drift = np.full(100, np.nan)
    counts[:20] = np.arange(20, 0, -1)
    drift[30:60] = np.arange(30, 0, -1) / 10
    age[70:] = np.arange(30, 0, -1)
    rows = select_rows(counts=counts, drift=drift, age=age, budget=12)
    assert rows.tolist() == [*range(6), *range(30, 33), *range(70, 73)]
    # What one share cannot use goes to the oldest.
    counts[2:] = 0
    rows = select_rows(counts=counts, drift=np.full(100, np.nan), age=age, budget=12)
    assert rows.tolist() == [0, 1, *range(70, 80)]


def test_the_share_of_the_retrieved_is_not_for_what_was_never_retrieved():
    counts, age = np.zeros(8, np.int64), np.array([9, 8, 7, 6, 5, 0, 0, 0])
    drift = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5])
    # Document 0 drifted most and is the oldest: it uses the share of the drift, so 7 waits.
    assert select_rows(counts=counts, drift=drift, age=age, budget=4).tolist() == [0, 1, 2, 3]


def test_every_document_gets_its_turn():
    size, budget = 50, 8
    counts, age = np.zeros(size, np.int64), np.zeros(size, np.int64)
    counts[:10], drift = 1000, np.zeros(size)  # these are retrieved again and again
    drift[10:20] = 5.0
    seen = set()
    for _ in range(25):
        age += 100
        rows = select_rows(counts=counts, drift=drift, age=age, budget=budget)
        age[rows] = 0
        seen.update(rows.tolist())
    assert seen == set(range(size))


def test_what_does_not_fit_is_refused():
    values = {"counts": [0, 0], "drift": [0.0, 0.0], "age": [0, 0]}
    with pytest.raises(ValueError, match="between 1 and the 2 documents, got 3"):
        select_rows(**values, budget=3)
    with pytest.raises(ValueError, match="between 1 and the 2 documents, got 0"):
        select_rows(**values, budget=0)
    with pytest.raises(ValueError, match=r"drift \(3,\)"):
        select_rows(**values | {"drift": [0.0] * 3}, budget=1)
    with pytest.raises(ValueError, match="whole numbers, got int64 and float64"):
        select_rows(**values | {"age": [0.0, np.nan]}, budget=1)
    with pytest.raises(ValueError, match="whole numbers, got float64 and int64"):
        select_rows(**values | {"counts": [0.0, np.nan]}, budget=1)

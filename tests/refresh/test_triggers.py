"""Triggers: which steps are due, skipped steps, resuming, parsing and what a message says."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.index import ExactIndex, IndexSnapshot
from ragjax.refresh import (
    AsSoonAsPossible,
    EveryNSteps,
    Never,
    OnDrift,
    StepRange,
    StepRanges,
    Trigger,
    TriggerContext,
    parse_trigger,
)


@pytest.fixture(scope="module")
def snapshot():
    return IndexSnapshot(
        index=ExactIndex(np.eye(2)), version=0, encoder_step=0, corpus_hash="", built_at=0.0
    )


def context(step, last=0, *, busy=False, params=None, snapshot=None) -> TriggerContext:
    return TriggerContext(step, last, busy, params, snapshot)


def fired(trigger: Trigger, steps, last=0) -> list[int]:
    """The steps at which a run refreshes whose exports are always taken at once."""
    found = []
    for step in steps:
        if trigger(context(step, last)):
            found.append(step)
            last = step
    return found


def due_steps(ranges, num_steps) -> list[int]:
    """The steps of a schedule, listed; step 0 has the initial index."""
    steps = []
    for start, stop, every in ranges:
        steps += range(start, num_steps if stop is None else min(stop, num_steps), every)
    return [step for step in steps if step > 0]


RANGES = [
    ((0, None, 7),),
    ((0, 10, 5), (10, None, 20)),
    ((0, 9, 2), (9, 20, 3), (40, 90, 13)),
    ((5, 30, 4),),
    ((30, 31, 100), (31, None, 1)),
]


@pytest.mark.parametrize("n", [1, 3, 10, 99, 100, 1000])
def test_every_n_steps_is_due_at_the_multiples(n):
    assert fired(EveryNSteps(n), range(100)) == list(range(n, 100, n))


@pytest.mark.parametrize("ranges", RANGES)
def test_ranges_are_due_at_the_steps_of_the_schedule(ranges):
    assert fired(StepRanges(ranges), range(100)) == due_steps(ranges, 100)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 11))
def test_skipped_steps_delay_a_refresh_and_lose_none(n, stride, offset):
    steps = range(offset, 300, stride)
    shown_before = [0, *steps]
    expected = [
        step
        for before, step in zip(shown_before, steps, strict=False)
        if any(skipped % n == 0 for skipped in range(before + 1, step + 1))
    ]
    assert fired(EveryNSteps(n), steps) == expected
    assert fired(StepRanges(((0, None, n),)), steps) == expected


def test_a_missed_step_counts_within_its_range_only():
    trigger = StepRanges(((0, 100, 50), (200, 300, 50)))
    assert trigger(context(51, 0))
    assert trigger(context(99, 49))
    assert not trigger(context(99, 50))
    assert not trigger(context(100, 49))
    assert not trigger(context(199, 0))
    assert trigger(context(203, 99))
    assert not trigger(context(300, 0))


@settings(derandomize=True, deadline=None)
@given(
    st.sampled_from([EveryNSteps(7), *(StepRanges(ranges) for ranges in RANGES)]),
    st.integers(0, 120),
    st.integers(0, 120),
)
def test_a_step_rule_is_due_until_it_is_submitted_also_while_busy(trigger, last, step):
    due = trigger(context(step, last))
    assert trigger(context(step, last, busy=True)) == due
    if step <= last:  # resumed before the export
        assert not due


@settings(derandomize=True, deadline=None)
@given(st.sampled_from([(EveryNSteps(7), ((0, None, 7),)), *((StepRanges(r), r) for r in RANGES)]))
def test_mean_steps_between_refreshes(case):
    trigger, ranges = case
    for num_steps in (1, 7, 8, 41, 100):
        due = due_steps(ranges, num_steps)
        expected = np.mean(np.diff([0, *due])) if due else math.inf
        assert trigger.steps_between(num_steps) == expected


def test_as_soon_as_possible_needs_newer_parameters_and_no_refresh_under_way():
    trigger = AsSoonAsPossible()
    assert trigger(context(1, 0))
    assert not trigger(context(1, 1))
    assert not trigger(context(1, 0, busy=True))
    assert trigger.steps_between(100) is None


def test_never_is_never_due():
    assert not Never()(context(10**9, 0))
    assert Never().steps_between(10**9) == math.inf


class Measured:
    """A measure that grows with the parameters and notes when it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, params, snapshot):
        self.calls.append((params, snapshot))
        return params / 100


def test_drift_is_measured_at_its_steps_only_and_fires_at_the_threshold(snapshot):
    measure = Measured()
    trigger = OnDrift(measure, threshold=0.53, check_every=10)
    last, found = 3, []
    for step in range(100):
        if trigger(context(step, last, params=step, snapshot=snapshot)):
            found.append(step)
            last = step
    assert found == [53, 63, 73, 83, 93]
    assert measure.calls == [(step, snapshot) for step in range(13, 100, 10)]
    assert trigger == OnDrift(measure, threshold=0.53, check_every=10)
    assert trigger.steps_between(11) is None
    assert trigger.steps_between(10) == math.inf


def test_drift_is_not_measured_while_a_refresh_runs_or_before_the_export(snapshot):
    measure = Measured()
    trigger = OnDrift(measure, threshold=0.01, check_every=10)
    assert not trigger(context(20, 0, busy=True, params=99, snapshot=snapshot))
    assert not trigger(context(20, 20, params=99, snapshot=snapshot))
    assert not trigger(context(10, 20, params=99, snapshot=snapshot))
    assert measure.calls == []


def test_a_resumed_drift_trigger_measures_at_the_same_steps(snapshot):
    whole, resumed = Measured(), Measured()
    trigger = OnDrift(whole, threshold=1.0, check_every=10)
    for step in range(60):
        if step == 37:
            trigger = dataclasses.replace(trigger, measure=resumed)
        trigger(context(step, 5, params=step, snapshot=snapshot))
    assert [step for step, _ in whole.calls + resumed.calls] == [15, 25, 35, 45, 55]


def test_a_drift_that_is_no_number_is_refused(snapshot):
    trigger = OnDrift(lambda params, snapshot: math.nan, threshold=0.1, check_every=10)
    with pytest.raises(ValueError, match="step 10 is not a number"):
        trigger(context(10, snapshot=snapshot))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500", EveryNSteps(500)),
        (" 500 ", EveryNSteps(500)),
        ("every:500", EveryNSteps(500)),
        ("Every: 1e3", EveryNSteps(1000)),
        ("16k", EveryNSteps(16_000)),
        ("1.5K", EveryNSteps(1500)),
        ("2m", EveryNSteps(2_000_000)),
        ("1.50e1", EveryNSteps(15)),
        ("0-1000:500,1000-:2000", StepRanges(((0, 1000, 500), (1000, None, 2000)))),
        ("0-1k:5e2, 1k-2k:1000", StepRanges(((0, 1000, 500), (1000, 2000, 1000)))),
        ("100-:20", StepRanges(((100, None, 20),))),
        ("asap", AsSoonAsPossible()),
        ("NEVER", Never()),
    ],
)
def test_forms(text, expected):
    assert parse_trigger(text) == expected


@pytest.mark.parametrize(
    ("text", "threshold", "check_every"),
    [("drift:0.05", 0.05, 50), ("drift:0.05/100", 0.05, 100), ("drift: 5e-2 / 1e2", 0.05, 100)],
)
def test_drift_forms(text, threshold, check_every):
    measure = Measured()
    assert parse_trigger(text, measure=measure) == OnDrift(measure, threshold, check_every)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not a whole number"),
        ("0", "at least 1, got 0"),
        ("-1", "'-1' is not a whole number"),
        ("every:", "'' is not a whole number"),
        ("1.5", "'1.5' is not a whole number"),
        ("1e-3", "'1e-3' is not a whole number"),
        ("1e999999999", "is not a whole number"),
        ("five hundred", "'five hundred' is not a whole number"),
        ("each:500", "'each' is not known"),
        ("0-1000", "'0-1000' is not a whole number"),
        ("0-1000:500,", "'' is not a range"),
        ("0-1000:500;1000-:5", "'0-1000:500;1000-:5' is not a range"),
        ("0-1000:0", "every must be a whole number of steps, at least 1, got 0"),
        ("0-1000:500,900-:100", "900- starts before 0-1000 ends"),
        ("1000-2000:500,0-1000:100", "0-1000 starts before 1000-2000 ends"),
        ("0-:500,1000-2000:100", "1000-2000 starts before 0- ends"),
        ("1000-1000:5", "1000-1000 is empty"),
        ("drift:", "'' is not a number"),
        ("drift:much", "'much' is not a number"),
        ("drift:0", "above 0, got 0"),
        ("drift:nan", "above 0, got nan"),
        ("drift:0.1/0", "check_every must be a whole number of steps, at least 1, got 0"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_forms(text, problem):
    with pytest.raises(ValueError) as error:
        parse_trigger(text, measure=Measured())
    message = str(error.value)
    assert repr(text) in message and problem in message
    for form in ("every:500", "0-1000:500,1000-:2000", "asap", "never", "drift:0.05/100"):
        assert form in message


def test_drift_without_a_measure_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"pass measure=EmbeddingDrift\(\.\.\.\)"):
        parse_trigger("drift:0.05")


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_steps_are_positive_whole_numbers(n):
    with pytest.raises(ValueError, match="at least 1, got"):
        EveryNSteps(n)


def test_a_schedule_without_ranges_or_with_a_negative_start_is_refused():
    with pytest.raises(ValueError, match="at least one range"):
        StepRanges(())
    with pytest.raises(ValueError, match="empty or negative"):
        StepRanges(((-5, 10, 5),))


def test_ranges_have_names_and_are_frozen():
    trigger = StepRanges([(0, None, 5)])
    assert trigger.ranges == (StepRange(start=0, stop=None, every=5),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        trigger.ranges = ()

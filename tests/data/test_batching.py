import collections
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.data import (
    batch_rows,
    buckets_up_to,
    fill_rows,
    length_buckets,
    num_steps,
    two_lengths,
)
from ragjax.data.batching import _permutation

SIZES = {"num_examples": st.integers(1, 60), "batch_size": st.integers(1, 40)}


def stream(seed, epochs, num_examples, batch_size):
    steps = num_steps(num_examples=num_examples, batch_size=batch_size, epochs=epochs)
    sizes = {"num_examples": num_examples, "batch_size": batch_size}
    return np.stack([batch_rows(seed, step, **sizes) for step in range(steps)])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(), **SIZES)
def test_each_epoch_is_a_permutation(seed, num_examples, batch_size):
    rows = stream(seed, 4, num_examples, batch_size).ravel()[: 4 * num_examples]
    for epoch in rows.reshape(4, num_examples):
        assert sorted(epoch) == list(range(num_examples))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9), data=st.data(), batch_size=st.integers(1, 20))
def test_no_batch_repeats_an_example(seed, data, batch_size):
    num_examples = data.draw(st.integers(2 * batch_size, 4 * batch_size + 7))
    for rows in stream(seed, 6, num_examples, batch_size):
        assert len(set(rows)) == batch_size


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.integers(0, 50), min_size=1, max_size=20), **SIZES)
def test_a_batch_does_not_depend_on_earlier_calls(steps, num_examples, batch_size):
    sizes = {"num_examples": num_examples, "batch_size": batch_size}
    expected = [batch_rows(3, step, **sizes) for step in range(51)]
    for step in steps:
        batch_rows(step, step + 1, **sizes)[:] = -1  # a caller may write into its batch
        np.testing.assert_array_equal(batch_rows(3, step, **sizes), expected[step])


def test_seeds_and_epochs_differ_and_places_are_even():
    sizes = {"num_examples": 100, "batch_size": 100}
    orders = [tuple(batch_rows(seed, step, **sizes)) for seed in range(5) for step in range(5)]
    assert len(set(orders)) == 25
    # Where example 0 lands over many seeds: uniform, so mean 49.5 and deviation 28.9.
    places = [int(np.flatnonzero(batch_rows(seed, 0, **sizes) == 0)[0]) for seed in range(2000)]
    assert abs(np.mean(places) - 49.5) < 4 * 28.9 / math.sqrt(2000)
    assert abs(np.std(places) - 28.9) < 2


def test_order_is_that_of_splitmix64():
    def splitmix64(state):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        return state, mixed ^ (mixed >> 31)

    state, keys = 0, []
    for _ in range(50):  # seed 0, epoch 0 start from state 0
        state, value = splitmix64(state)
        keys.append(value)
    expected = sorted(range(50), key=keys.__getitem__)
    assert _permutation(0, 0, 50).tolist() == expected


@pytest.mark.parametrize(("num_examples", "batch_size", "step"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_batches_are_refused(num_examples, batch_size, step):
    with pytest.raises(ValueError, match=f"got {num_examples}, {batch_size} and {step}"):
        batch_rows(0, step, num_examples=num_examples, batch_size=batch_size)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 64), max_size=80),
    batch_tokens=st.integers(1, 400),
    buckets=st.sets(st.integers(1, 63), max_size=4).map(lambda some: [*some, 64]),
)
def test_length_buckets_cover_exactly_with_few_shapes(lengths, batch_tokens, buckets):
    batches = length_buckets(lengths, batch_tokens=batch_tokens, buckets=buckets)
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(len(lengths)))
    for batch in batches:
        fitting = [min(b for b in buckets if b >= lengths[row]) for row in batch.rows]
        assert set(fitting) == {batch.length}
        assert 1 <= len(batch.rows) <= batch.batch_size
        assert batch.batch_size * batch.length <= max(batch_tokens, batch.length)
    shapes = {(batch.length, batch.batch_size) for batch in batches}
    assert len(shapes) <= 2 * len(buckets)
    short = [batch for batch in batches if len(batch.rows) < batch.batch_size]
    assert len({batch.length for batch in short}) == len(short)
    assert [batch.length for batch in batches] == sorted(
        (batch.length for batch in batches), reverse=True
    )


@given(st.integers(1, 40_000), st.sampled_from([(16, 64, 512), (8,), (100, 300)]))
def test_buckets_above_the_given_ones_grow_by_half(longest, given_buckets):
    buckets = buckets_up_to(longest, given_buckets)
    assert buckets[-1] == longest and list(buckets) == sorted(set(buckets))
    below = [bucket for bucket in given_buckets if bucket < longest]
    assert list(buckets[: len(below)]) == below
    above = [b for b in buckets if b >= given_buckets[-1]]
    # A text is padded to at most half of its length more, and to whole blocks of 64.
    assert all(
        after <= before * 3 // 2 + 64 for before, after in zip(above, above[1:], strict=False)
    )
    assert len(buckets) <= len(given_buckets) + 22


def test_length_buckets_refusals():
    with pytest.raises(ValueError, match="65 tokens exceed the largest bucket, 64"):
        length_buckets([3, 65], batch_tokens=10, buckets=(64,))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        length_buckets([3], batch_tokens=0)
    assert length_buckets([], batch_tokens=10) == []


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9),
    data=st.data(),
    batch_size=st.integers(1, 12),
    beside=st.integers(0, 64),
)
def test_batches_of_two_lengths_take_the_rows_of_the_stream(seed, data, batch_size, beside):
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=60))
    order = stream(seed, 2, len(lengths), batch_size).ravel().tolist()
    batches = two_lengths(order, lengths, batch_size=batch_size, beside=beside)
    assert sorted(row for batch in batches for row in batch.rows) == sorted(order)
    assert all(len(batch.rows) == batch.batch_size == batch_size for batch in batches)
    assert all(lengths[row] <= batch.length for batch in batches for row in batch.rows)
    used = {batch.length for batch in batches}
    longest = -(-max(lengths) // 32) * 32
    assert len(used) <= 2 and used <= set(range(32, longest + 1, 32))
    # What is left shares one batch; every other one that could be short is.
    short = min(used)
    fits = [all(lengths[row] <= short for row in batch.rows) for batch in batches]
    assert sum(fit != (batch.length == short) for fit, batch in zip(fits, batches, strict=True)) < 2


def test_the_second_length_is_the_one_that_saves_most_or_there_is_none():
    lengths = [60] * 40 + [190] * 20 + [300] * 20
    order = stream(0, 1, 80, 8).ravel().tolist()
    batches = two_lengths(order, lengths, batch_size=8, beside=32)
    counts = collections.Counter(batch.length for batch in batches)
    assert counts == {64: 5, 320: 5}
    # Both kinds come in turn, as the order is random, and no text waits long.
    assert len({batch.length for batch in batches[:5]}) == 2
    place = {int(row): step for step, batch in enumerate(batches) for row in batch.rows}
    assert max(place[row] - turn // 8 for turn, row in enumerate(order)) <= 4
    # An eighth is what the second program must save.
    for few, expected in ((6, {320}), (20, {64, 320})):
        lengths = [60] * few + [300] * (80 - few)
        batches = two_lengths(order, lengths, batch_size=4, beside=32)
        assert {batch.length for batch in batches} == expected


def test_rows_are_filled_with_every_text_as_often_as_it_is_named(rng):
    sizes, order = rng.integers(10, 200, 100).tolist(), [*range(100), *range(100)]
    batches = fill_rows(order, sizes, rows=3, length=256, window=24)
    rows = [row for batch in batches for row in batch]
    assert sorted(text for row in rows for text in row) == sorted(order)
    assert max(sum(sizes[text] for text in row) for row in rows) <= 256
    assert all(len(batch) == 3 for batch in batches)
    # The last batch takes what is left.
    used = sum(sizes[text] for batch in batches[:-1] for row in batch for text in row)
    assert used > 0.85 * (len(batches) - 1) * 3 * 256
    assert batches[0][0][0] == 0, "in their order"
    with pytest.raises(ValueError, match="300 tokens do not fit"):
        fill_rows([0], [300], rows=3, length=256, window=24)
    assert fill_rows([], [], rows=1, length=8, window=1) == []

"""Grouping by length: static shapes, padding and the options."""

import numpy as np
import pytest

from ragjax.refresh import EncodeOptions
from ragjax.refresh.batches import plan_batches, prepare_window

PAD = 49
OPTIONS = EncodeOptions(buckets=(4, 8, 16), batch_tokens=64, max_rows=8)


def test_only_the_last_batch_has_room_to_spare(rng):
    lengths = rng.integers(0, 17, size=83).tolist()
    batches = plan_batches(lengths, OPTIONS)
    assert sorted(np.concatenate([batch.documents for batch in batches])) == list(range(83))
    for batch in batches:
        longest = max(lengths[row] for row in batch.documents)
        assert batch.length == min(bucket for bucket in (4, 8, 16) if bucket >= longest)
        assert batch.rows <= min(64 // batch.length, 8)
    assert all(len(batch.documents) == batch.rows for batch in batches[:-1])


@pytest.mark.parametrize(("documents", "rows"), [(1, 2), (2, 2), (3, 8), (8, 8), (9, 8)])
def test_a_few_questions_do_not_pay_for_a_full_batch(documents, rows):
    assert plan_batches([3] * documents, OPTIONS)[0].rows == rows


@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_the_rows_of_a_batch_divide_among_the_devices(rng, num_devices):
    lengths = rng.integers(0, 17, size=83)
    batches = plan_batches(lengths, OPTIONS, num_devices=num_devices)
    assert sorted(np.concatenate([batch.documents for batch in batches])) == list(range(83))
    for batch in batches:
        assert batch.rows % num_devices == 0
        assert batch.rows <= num_devices * min(64 // batch.length, 8)
    # Each device has as many rows as one device alone would have.
    assert batches[0].rows == num_devices * plan_batches(lengths, OPTIONS)[0].rows


@pytest.mark.parametrize(("documents", "rows"), [(1, 16), (9, 16), (17, 64)])
def test_a_few_questions_do_not_pay_for_a_full_batch_on_each_device(documents, rows):
    assert plan_batches([3] * documents, OPTIONS, num_devices=8)[0].rows == rows


def test_a_window_holds_every_token_and_padding_only_elsewhere(rng):
    token_ids = [rng.integers(0, 49, size=length) for length in (3, 0, 7, 5)]
    window = prepare_window(token_ids, range(20, 24), OPTIONS, pad_id=PAD)
    assert window.ids.shape == (4, 8) and window.ids.dtype == np.int32
    assert window.lengths.tolist() == [3, 0, 7, 5]
    for row, ids in enumerate(token_ids):
        assert window.ids[row].tolist() == [*ids, *[PAD] * (8 - len(ids))]


def test_a_document_too_long_for_memory_is_refused_before_it_is_padded():
    with pytest.raises(ValueError, match="document 21 has 1099511627776 tokens"):
        plan_batches(np.asarray([3, 2**40]), OPTIONS, rows=[20, 21])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "must be positive"),
        ({"max_rows": 0}, "must be positive"),
        ({"window": -1}, "must be positive"),
        ({"buckets": ()}, "ascending lengths"),
        ({"buckets": (8, 4)}, "ascending lengths"),
        ({"buckets": (0, 4)}, "positive lengths"),
        ({"compute_dtype": "float16"}, "one of float32, bfloat16, got 'float16'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EncodeOptions(**options)

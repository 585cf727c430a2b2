"""Which rows form batch n: pure functions of (seed, step), equal on every machine and version."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ragjax.data.tokenization import DEFAULT_BUCKETS

# Of the lengths that `two_lengths` pads to.
_LENGTH_MULTIPLE = 32


class LengthBatch(NamedTuple):
    """Texts of similar length that are encoded together."""

    rows: np.ndarray  # int64 [b], b <= batch_size
    length: int  # tokens to pad to
    batch_size: int  # rows to pad to


def batch_rows(seed: int, step: int, *, num_examples: int, batch_size: int) -> np.ndarray:
    """Returns the examples of one training step.

    The steps read one endless stream, epoch after epoch, each an exact permutation of the
    examples; a batch may take its rows from two epochs. With num_examples >= 2 * batch_size no
    batch has an example twice (in-batch negatives would punish the copy).

    Args:
        seed: Any integer; another one gives other permutations.
        step: From 0.
        num_examples: N.
        batch_size: Rows a step.

    Returns:
        int64 [batch_size], values in [0, N).

    Raises:
        ValueError: A size below 1 or a negative step.
    """
    if num_examples < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            f"expected num_examples >= 1, batch_size >= 1 and step >= 0, got {num_examples}, "
            f"{batch_size} and {step}"
        )
    rows = np.empty(batch_size, np.int64)
    filled = 0
    while filled < batch_size:
        epoch, start = divmod(step * batch_size + filled, num_examples)
        part = _epoch_order(seed, epoch, num_examples, batch_size)[start : start + batch_size]
        part = part[: batch_size - filled]
        rows[filled : filled + len(part)] = part
        filled += len(part)
    return rows


def num_steps(*, num_examples: int, batch_size: int, epochs: float) -> int:
    """Returns the steps after which every example has been seen `epochs` times."""
    return math.ceil(num_examples * epochs / batch_size)


def length_buckets(
    lengths: Sequence[int] | np.ndarray,
    *,
    batch_tokens: int,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    devices: int = 1,
) -> list[LengthBatch]:
    """Groups texts by length into batches of few static shapes, the longest first.

    A bucket's full batch has `batch_tokens // length` rows; the rest of the bucket goes into
    batches of a quarter of that. So at most two shapes a bucket are compiled, and at most a
    quarter of a batch a bucket is padding rows.

    Args:
        lengths: Tokens of each text.
        batch_tokens: Padded tokens a batch and device, about; one row is always allowed.
        buckets: Lengths to pad to; the largest must hold the longest text.
        devices: That share the rows of a batch evenly.

    Returns:
        Batches that cover every row exactly once.

    Raises:
        ValueError: A text is longer than the largest bucket, or `batch_tokens` is below 1.
    """
    lengths = np.asarray(lengths, np.int64)
    edges = np.unique(np.asarray(buckets, np.int64))
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if lengths.size and lengths.max() > edges[-1]:
        raise ValueError(f"{lengths.max()} tokens exceed the largest bucket, {edges[-1]}")
    bucket_of = np.searchsorted(edges, lengths)
    batches = []
    for bucket in range(len(edges) - 1, -1, -1):
        rows = np.flatnonzero(bucket_of == bucket)
        length = int(edges[bucket])
        full = max(batch_tokens // length, 1)
        small = max(full // 4, 1) * devices
        full *= devices
        while len(rows):
            size = full if len(rows) >= full else small
            batches.append(LengthBatch(rows[:size], length, size))
            rows = rows[size:]
    return batches


def two_lengths(
    order: Sequence[int], lengths: Sequence[int], *, batch_size: int, beside: int = 0
) -> list[LengthBatch]:
    """Puts texts into full batches that are padded to one of two lengths.

    Short texts and long ones gather in their order, and are a batch when there are enough; so the
    batches of either length come as randomly as the texts do, and no text comes much later than its
    turn. What is left in the end shares one batch. There is one length where a second one saves
    less than an eighth of the padded tokens.

    Args:
        order: Texts, a multiple of `batch_size`; one may come several times.
        lengths: Tokens of each text.
        batch_size: Texts of a batch.
        beside: Tokens of a row beside its text.
    """
    taken = np.asarray(lengths, np.int64)[np.asarray(order, np.int64)]
    longest = _padded(int(taken.max()))
    whole = len(taken) * (longest + beside)
    saved, short = max(
        (int((taken <= length).sum()) * (longest - length), length)
        for length in range(_LENGTH_MULTIPLE, longest + 1, _LENGTH_MULTIPLE)
    )
    short = short if 8 * saved >= whole else longest
    waiting: dict[int, list[int]] = {short: [], longest: []}
    batches = []
    for text in order:
        length = short if lengths[text] <= short else longest
        waiting[length].append(text)
        if len(waiting[length]) == batch_size:
            batches.append(LengthBatch(np.asarray(waiting[length], np.int64), length, batch_size))
            waiting[length] = []
    if left := [text for texts in waiting.values() for text in texts]:
        batches.append(LengthBatch(np.asarray(left, np.int64), longest, batch_size))
    return batches


def fill_rows(
    order: Sequence[int], sizes: Sequence[int], *, rows: int, length: int, window: int
) -> list[list[list[int]]]:
    """Puts texts into the rows of batches of one static shape, each into the first row with room.

    Args:
        order: Texts, in the order in which they are taken as far as they fit; those that find no
            room wait for the next batch, in their order. One may come several times.
        sizes: Tokens of each text.
        rows: Rows of a batch.
        length: Tokens of a row.
        window: Texts that a batch looks at, at most.

    Returns:
        Texts by row, by batch.

    Raises:
        ValueError: A text is longer than a row.
    """
    longest = max((sizes[text] for text in order), default=0)
    if longest > length or min(rows, window) < 1:
        raise ValueError(f"{longest} tokens do not fit {rows} rows of {length}, {window} at a time")
    batches, waiting = [], list(order)
    while waiting:
        batch: list[list[int]] = [[] for _ in range(rows)]
        room, left = [length] * rows, []
        for text in waiting[:window]:
            place = next((row for row, free in enumerate(room) if sizes[text] <= free), None)
            if place is None:
                left.append(text)
                continue
            batch[place].append(text)
            room[place] -= sizes[text]
        batches.append(batch)
        waiting = left + waiting[window:]
    return batches


def buckets_up_to(longest: int, buckets: Sequence[int] = DEFAULT_BUCKETS) -> tuple[int, ...]:
    """Returns lengths to pad to, the largest of them `longest`.

    Above the given ones they grow by half, so that a text slightly longer than those is not padded
    to the whole length of a long-context model.

    Args:
        longest: Tokens of the longest text that may come.
        buckets: Lengths that suit the most texts, in rising order.
    """
    lengths = [length for length in buckets if length < longest]
    while lengths and lengths[-1] * 3 // 2 < longest:
        lengths.append(-(-lengths[-1] * 3 // 2 // 64) * 64)
    return tuple(length for length in lengths if length < longest) + (longest,)


def _padded(length: int) -> int:
    return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_examples: int, batch_size: int) -> np.ndarray:
    """Returns the permutation of one epoch, int64 [N].

    The batch across the border to the epoch before shares no example with it: those in its first
    part are moved behind. What the next epoch shares with this one's end is left in place, so
    that no epoch depends on more than one before.
    """
    order = _permutation(seed, epoch, num_examples)
    last = (epoch * num_examples) % batch_size if epoch else 0
    if last and num_examples >= 2 * batch_size:
        earlier = _permutation(seed, epoch - 1, num_examples)[-last:]
        movable = num_examples - ((epoch + 1) * num_examples) % batch_size
        shared = np.isin(order[:movable], earlier)
        order[:movable] = np.concatenate([order[:movable][~shared], order[:movable][shared]])
    return order


def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    # Sorting by splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
    # OOPSLA 2014): NumPy's own streams may change with its version, a resumed run must not.
    key = _mix(_mix(np.array([seed & (2**64 - 1)], np.uint64)) + np.uint64(epoch))
    counters = np.arange(1, num_examples + 1, dtype=np.uint64)
    return np.argsort(_mix(key + counters * np.uint64(0x9E3779B97F4A7C15)), kind="stable")


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""Groups documents of different lengths into batches of few static shapes.

N = documents of a window, L = tokens.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DEFAULT_BUCKETS = (16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How documents are grouped; none of it changes an embedding beyond rounding.

    Attributes:
        buckets: Lengths in tokens that batches are padded to, ascending; the last is the longest
            document accepted.
        batch_tokens: Tokens in a batch for each device, padding included: a batch of length L
            has about `batch_tokens` / L rows. The default keeps a batch in the cache of a CPU
            core; an accelerator wants many times more.
        max_rows: Most rows in a batch for each device; by default `batch_tokens` alone limits them.
        window: Documents tokenised and sorted by length at a time; bounds the host memory.
        compute_dtype: "float32", or "bfloat16" for half the memory and, on an accelerator, more
            speed at a precision of about two decimals; a CPU is slower with it. The floating
            parameters are cast once per call; embeddings are returned as float32 either way.
    """

    buckets: tuple[int, ...] = DEFAULT_BUCKETS
    batch_tokens: int = 1024
    max_rows: int = 2**31 - 1
    window: int = 8192
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuses sizes that are not positive, buckets out of order and unknown dtypes."""
        if self.compute_dtype not in _COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype must be one of {', '.join(_COMPUTE_DTYPES)}, got "
                f"{self.compute_dtype!r}"
            )
        if min(self.batch_tokens, self.max_rows, self.window) < 1:
            raise ValueError("batch_tokens, max_rows and window must be positive")
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"buckets must be ascending lengths, got {self.buckets}")
        if self.buckets[0] < 1:
            raise ValueError(f"buckets must be positive lengths, got {self.buckets}")


class Batch(NamedTuple):
    """Which documents are encoded together, and in which static shape."""

    documents: NDArray[np.intp]  # at most `rows` positions
    rows: int
    length: int  # tokens


class PaddedWindow(NamedTuple):
    """Documents ready for the device: planned and padded."""

    rows: Sequence[int] | NDArray[np.int64]  # of the corpus
    ids: NDArray[np.int32]  # [len(rows), longest bucket in use], padded
    lengths: NDArray[np.int64]  # [len(rows)]
    batches: list[Batch]


def plan_batches(
    lengths: Sequence[int] | NDArray[np.integer],
    options: EncodeOptions,
    *,
    rows: Sequence[int] | NDArray[np.int64] | None = None,
    num_devices: int = 1,
) -> list[Batch]:
    """Groups documents by length, longest first, so that little of a batch is padding.

    Args:
        lengths: Of each document in tokens.
        options: Sizes of batches.
        rows: Of the corpus that they are, for messages; None: the first ones.
        num_devices: What the rows of each batch are a multiple of.

    Returns:
        Batches that hold every document once. Only the last has rows to spare.

    Raises:
        ValueError: A document is longer than the last bucket.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        if longest > options.buckets[-1]:
            row = order[start] if rows is None else rows[order[start]]
            raise ValueError(
                f"document {row} has {longest} tokens, more than the longest length "
                f"{options.buckets[-1]}; cut it when tokenising"
            )
        length = next(bucket for bucket in options.buckets if bucket >= longest)
        count = max(1, min(options.batch_tokens // length, options.max_rows))
        left = len(order) - start
        # Few documents, such as the questions of one step, do not pay for a full batch.
        while count >= 4 and count * num_devices >= 4 * left:
            count //= 4
        count *= num_devices
        batches.append(Batch(order[start : start + count], count, length))
        start += count
    return batches


def prepare_window(
    token_ids: Sequence[Sequence[int]],
    rows: Sequence[int] | NDArray[np.int64],
    options: EncodeOptions,
    *,
    pad_id: int,
    num_devices: int = 1,
) -> PaddedWindow:
    """Plans the batches of one window and makes one padded array of its token ids.

    Args:
        token_ids: Of each document of the window, at least one.
        rows: Of the corpus that they are.
        options: Sizes of batches.
        pad_id: Id that fills up a row.
        num_devices: What the rows of each batch are a multiple of.

    Raises:
        ValueError: Another number of documents than rows, or one longer than the last bucket.
    """
    if len(token_ids) != len(rows):
        raise ValueError(f"tokenize returned {len(token_ids)} rows for {len(rows)} texts")
    lengths = np.fromiter(map(len, token_ids), np.int64, len(token_ids))
    batches = plan_batches(lengths, options, rows=rows, num_devices=num_devices)
    longest = batches[0].length
    ids = np.full((len(rows), longest), pad_id, np.int32)
    # One assignment for all rows: a Python loop over rows would hold up a fast accelerator.
    ids[np.arange(longest) < lengths[:, None]] = np.fromiter(
        itertools.chain.from_iterable(token_ids), np.int32, lengths.sum()
    )
    return PaddedWindow(rows, ids, lengths, batches)

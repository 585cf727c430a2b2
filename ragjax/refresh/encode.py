"""Turns a corpus into embeddings: length-sorted batches of few static shapes, compiled once.

    embeddings = encode_corpus(encoder.encode, encoder.params, texts, tokenize, pad_id=0)

`encode(params, tokens) -> [B, D]` is any pure function of parameters and `Tokens`. Its compiled
form is kept for the life of the process, so a refresh with new parameters compiles nothing.
N = documents, D = embedding size.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from ragjax.index import base, store

Document = TypeVar("Document")
DEFAULT_BUCKETS = (16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Batches handed to the device before the oldest result is waited for.
_IN_FLIGHT = 2


class Tokens(NamedTuple):
    """Token ids and their mask, as every encoder takes them."""

    ids: Array  # [B, L] int32
    mask: Array  # [B, L] bool, True = real token


Encode = Callable[[Any, Any], Array]
Tokenize = Callable[[Sequence[Document]], Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How documents are grouped; none of it changes an embedding beyond rounding.

    Attributes:
        buckets: lengths in tokens that batches are padded to, ascending; the last is the longest
            document accepted.
        batch_tokens: tokens in a batch, padding included: a batch of length L has about
            `batch_tokens` / L rows. The default keeps a batch in the cache of a CPU core; an
            accelerator wants many times more.
        max_rows: most rows in a batch.
        window: documents tokenised and sorted by length at a time; bounds the host memory.
    """

    buckets: tuple[int, ...] = DEFAULT_BUCKETS
    batch_tokens: int = 1024
    max_rows: int = 64
    window: int = 8192

    def __post_init__(self) -> None:
        """Refuses sizes that are not positive and buckets out of order."""
        if min(self.batch_tokens, self.max_rows, self.window) < 1:
            raise ValueError("batch_tokens, max_rows and window must be positive.")
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"buckets must be ascending lengths, got {self.buckets}.")
        if self.buckets[0] < 1:
            raise ValueError(f"buckets must be positive lengths, got {self.buckets}.")


class EncodeProgress(NamedTuple):
    """How far an encoding is, reported after each batch."""

    done: int  # documents encoded
    total: int  # documents in all
    fraction: float  # of the work, long documents counting for more
    seconds: float  # since the start of this call
    texts_per_second: float  # on average over the documents of this call
    remaining_seconds: float  # estimate
    num_shapes: int  # different [rows, length] run by this call


Progress = Callable[[EncodeProgress], None]


def encode_corpus(
    encode: Encode,
    params: Any,
    documents: Sequence[Document],
    tokenize: Tokenize,
    *,
    pad_id: int,
    options: EncodeOptions | None = None,
    make_tokens: Callable[[Array, Array], Any] = Tokens,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Encodes documents; one window is tokenised in a thread while the last is on the device.

    Args:
        encode: pure function `(params, tokens) -> [B, D]`, not jitted.
        params: its parameters.
        documents: N documents, read by index.
        tokenize: token ids, cut to length, of a list of documents.
        pad_id: id that fills up a row.
        options: sizes of batches.
        make_tokens: makes what `encode` takes from ids and mask `[B, L]`.
        progress: called after each batch, in this thread.

    Returns:
        `[N, D]` float32 in the order of the documents.

    Raises:
        ValueError: no documents, one longer than the last bucket, or an embedding that is not
            finite (the message names the documents).
    """
    options = options or EncodeOptions()
    windows = [
        range(start, min(start + options.window, len(documents)))
        for start in range(0, len(documents), options.window)
    ]
    job = _Job(encode, params, pad_id, options, make_tokens, progress, len(documents))
    return np.concatenate(list(job.run(documents, tokenize, windows)))


def encode_token_ids(
    encode: Encode,
    params: Any,
    token_ids: Sequence[Sequence[int]],
    *,
    pad_id: int,
    options: EncodeOptions | None = None,
    make_tokens: Callable[[Array, Array], Any] = Tokens,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Encodes documents that are token ids already; see `encode_corpus`."""
    return encode_corpus(
        encode,
        params,
        token_ids,
        list,
        pad_id=pad_id,
        options=options,
        make_tokens=make_tokens,
        progress=progress,
    )


def encode_to_store(
    encode: Encode,
    params: Any,
    documents: Sequence[Document],
    tokenize: Tokenize,
    writer: store.EmbeddingWriter,
    *,
    pad_id: int,
    options: EncodeOptions | None = None,
    make_tokens: Callable[[Array, Array], Any] = Tokens,
    progress: Progress | None = None,
) -> store.EmbeddingStore:
    """Encodes the shards a store still misses and publishes it.

    A killed call repeated with the same arguments keeps every finished shard and ends with the
    same bytes. `options.window` is not used: a shard is a window.

    Args:
        encode: as in `encode_corpus`.
        params: as in `encode_corpus`.
        documents: all N documents.
        tokenize: as in `encode_corpus`.
        writer: opened with the spec of this encoder and corpus.
        pad_id: as in `encode_corpus`.
        options: as in `encode_corpus`.
        make_tokens: as in `encode_corpus`.
        progress: as in `encode_corpus`; finished shards count as done.

    Raises:
        ValueError: as `encode_corpus`, or the numbers of documents differ.
    """
    if len(documents) != writer.spec.size:
        raise ValueError(f"The store is for {writer.spec.size} documents, got {len(documents)}.")
    shards = writer.missing()
    windows = [writer.rows(shard) for shard in shards]
    options = options or EncodeOptions()
    job = _Job(encode, params, pad_id, options, make_tokens, progress, len(documents))
    for shard, embeddings in zip(shards, job.run(documents, tokenize, windows), strict=True):
        writer.write(shard, embeddings)
    return writer.publish()


def tqdm_progress(description: str) -> Progress:
    """Returns a progress callback that draws a bar with texts per second and remaining time."""
    import tqdm

    bar: tqdm.tqdm | None = None

    def show(progress: EncodeProgress) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm.tqdm(total=progress.total, desc=description, unit=" texts")
        # Long documents come first: counting work instead of documents keeps the estimate honest.
        bar.update(round(progress.fraction * progress.total) - bar.n)
        if progress.done == progress.total:
            bar.close()

    return show


class Batch(NamedTuple):
    """Which documents are encoded together, and in which static shape."""

    documents: NDArray[np.intp]  # at most `rows` positions
    rows: int
    length: int  # tokens


def plan_batches(
    lengths: Sequence[int], options: EncodeOptions, *, first_row: int = 0
) -> list[Batch]:
    """Groups documents by length, longest first, so that little of a batch is padding.

    Args:
        lengths: of each document in tokens.
        options: sizes of batches.
        first_row: number of the first document in the corpus, for messages.

    Returns:
        Batches that hold every document once. Only the last has rows to spare.

    Raises:
        ValueError: a document is longer than the last bucket.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        if longest > options.buckets[-1]:
            raise ValueError(
                f"Document {first_row + order[start]} has {longest} tokens, more than the longest "
                f"length {options.buckets[-1]}; cut it when tokenising."
            )
        length = next(bucket for bucket in options.buckets if bucket >= longest)
        rows = max(1, min(options.batch_tokens // length, options.max_rows))
        left = len(order) - start
        # Few documents, such as the questions of one step, do not pay for a full batch.
        while rows >= 4 * left:
            rows //= 4
        batches.append(Batch(order[start : start + rows], rows, length))
        start += rows
    return batches


class _Job:
    """One call's encoder, options and progress."""

    def __init__(
        self,
        encode: Encode,
        params: Any,
        pad_id: int,
        options: EncodeOptions,
        make_tokens: Callable[[Array, Array], Any],
        progress: Progress | None,
        total: int,
    ) -> None:
        if not total:
            raise ValueError("There are no documents to encode.")
        self._encode = _compiled(encode, make_tokens)
        self._params = jax.device_put(params)
        self._pad_id = pad_id
        self._options = options
        self._progress = progress
        self._total = total
        self._already = 0
        self._done = 0
        self._shapes: set[tuple[int, int]] = set()
        self._started = time.monotonic()

    def run(
        self, documents: Sequence[Document], tokenize: Tokenize, windows: Sequence[range]
    ) -> Iterator[NDArray[np.float32]]:
        """Yields the embeddings of each window, tokenising the next one meanwhile."""
        self._already = self._done = self._total - sum(map(len, windows))

        def prepare(window: range) -> list[Sequence[int]]:
            return list(tokenize([documents[row] for row in window]))

        with concurrent.futures.ThreadPoolExecutor(1, "tokenize") as pool:
            pending = collections.deque(pool.submit(prepare, window) for window in windows[:1])
            for number, window in enumerate(windows):
                token_ids = pending.popleft().result()
                if number + 1 < len(windows):
                    pending.append(pool.submit(prepare, windows[number + 1]))
                yield self._encode_window(token_ids, window)

    def _encode_window(
        self, token_ids: Sequence[Sequence[int]], window: range
    ) -> NDArray[np.float32]:
        """Encodes the documents of one window, a few batches in flight at a time."""
        if len(token_ids) != len(window):
            raise ValueError(f"tokenize returned {len(token_ids)} rows for {len(window)} texts.")
        lengths = [len(ids) for ids in token_ids]
        total_tokens = sum(lengths) or 1
        finished = self._done
        tokens_done = 0
        parts: list[NDArray[np.float32]] = []
        batches = plan_batches(lengths, self._options, first_row=window.start)
        for batch, result in self._results(token_ids, batches):
            parts.append(result[: len(batch.documents)])
            tokens_done += sum(lengths[row] for row in batch.documents)
            self._done += len(batch.documents)
            self._report(finished + tokens_done / total_tokens * len(window))
        embeddings = np.empty((len(window), parts[0].shape[1]), np.float32)
        embeddings[np.concatenate([batch.documents for batch in batches])] = np.concatenate(parts)
        return base.check_embeddings(embeddings, name="embeddings", first_row=window.start)

    def _results(
        self, token_ids: Sequence[Sequence[int]], batches: Sequence[Batch]
    ) -> Iterator[tuple[Batch, NDArray[np.float32]]]:
        """Yields each batch with its `[rows, D]`, the device working one batch ahead."""
        in_flight: collections.deque[tuple[Batch, Array]] = collections.deque()
        for batch in batches:
            in_flight.append((batch, self._dispatch(token_ids, batch)))
            if len(in_flight) == _IN_FLIGHT:
                first, result = in_flight.popleft()
                yield first, np.asarray(result, np.float32)
        for batch, result in in_flight:
            yield batch, np.asarray(result, np.float32)

    def _dispatch(self, token_ids: Sequence[Sequence[int]], batch: Batch) -> Array:
        """Starts one batch on the device."""
        ids = np.full((batch.rows, batch.length), self._pad_id, np.int32)
        mask = np.zeros((batch.rows, batch.length), np.bool_)
        for row, document in enumerate(batch.documents):
            tokens = token_ids[document]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        self._shapes.add((batch.rows, batch.length))
        return self._encode(self._params, ids, mask)

    def _report(self, work: float) -> None:
        """Tells the caller how far the work is; `work` is in documents of average length."""
        if self._progress is None:
            return
        seconds = time.monotonic() - self._started
        self._progress(
            EncodeProgress(
                done=self._done,
                total=self._total,
                fraction=work / self._total,
                seconds=seconds,
                texts_per_second=(self._done - self._already) / max(seconds, 1e-9),
                remaining_seconds=(self._total - work) * seconds / max(work - self._already, 1e-9),
                num_shapes=len(self._shapes),
            )
        )


@functools.lru_cache(maxsize=32)
def _compiled(
    encode: Encode, make_tokens: Callable[[Array, Array], Any]
) -> Callable[[Any, Any, Any], Array]:
    """Returns the jitted form of an encoder; the same one each time, so it compiles once."""
    return jax.jit(lambda params, ids, mask: encode(params, make_tokens(ids, mask)))

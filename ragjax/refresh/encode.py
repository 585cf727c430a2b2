"""Turns a corpus into embeddings: length-sorted batches of few static shapes, compiled once.

    embeddings = encode_corpus(encoder.encode, encoder.params, texts, tokenize, pad_id=0)

`encode(params, tokens) -> [B, D]` is any pure function of parameters and `Tokens`. Its compiled
form is kept for the life of the process, so a refresh with new parameters compiles nothing. A
thread tokenises and pads one window of documents while the device encodes the one before.
N = documents, D = embedding size.
"""

import collections
import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from ragjax.index import base, store
from ragjax.refresh.batches import Batch, EncodeOptions, Window, prepare_window

Document = TypeVar("Document")
# Batches handed to the device before the oldest result is waited for.
_IN_FLIGHT = 2


class Cancelled(Exception):
    """An encoding or a build was given up because its result is no longer wanted."""


class Tokens(NamedTuple):
    """Token ids and their mask, as every encoder takes them."""

    ids: Array  # [B, L] int32
    mask: Array  # [B, L] bool, True = real token


Encode = Callable[[Any, Any], Array]
Tokenize = Callable[[Sequence[Document]], Sequence[Sequence[int]]]


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
    devices: Sequence[jax.Device] | None = None,
    cancelled: threading.Event | None = None,
    rows: range | None = None,
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
        devices: of this process; each batch is divided by rows among them, each gets a copy of
            the parameters, and no other device is touched. None: where the parameters are.
        cancelled: read before each batch; once set, the call is given up.
        rows: which documents, a range of step 1; None: all. N is their number.

    Returns:
        `[N, D]` float32 in the order of the documents.

    Raises:
        Cancelled: `cancelled` was set.
        ValueError: no documents, one longer than the last bucket, an embedding that is not
            finite (the message names the documents), no devices or one of them twice.
    """
    options = options or EncodeOptions()
    rows = range(len(documents)) if rows is None else rows
    windows = [
        rows[start : start + options.window] for start in range(0, len(rows), options.window)
    ]
    placement = _Placement.on(devices)
    job = _Job(encode, params, pad_id, options, make_tokens, progress, len(rows), placement)
    return np.concatenate(list(job.run(documents, tokenize, windows, cancelled)))


def encode_token_ids(
    encode: Encode,
    params: Any,
    token_ids: Sequence[Sequence[int]],
    *,
    pad_id: int,
    options: EncodeOptions | None = None,
    make_tokens: Callable[[Array, Array], Any] = Tokens,
    progress: Progress | None = None,
    devices: Sequence[jax.Device] | None = None,
    cancelled: threading.Event | None = None,
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
        devices=devices,
        cancelled=cancelled,
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
    devices: Sequence[jax.Device] | None = None,
    cancelled: threading.Event | None = None,
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
        devices: as in `encode_corpus`.
        cancelled: as in `encode_corpus`; the finished shards stay for the next call.

    Raises:
        Cancelled: `cancelled` was set.
        ValueError: as `encode_corpus`, or the numbers of documents differ.
    """
    if len(documents) != writer.spec.size:
        raise ValueError(f"The store is for {writer.spec.size} documents, got {len(documents)}.")
    shards = writer.missing()
    windows = [writer.rows(shard) for shard in shards]
    options = options or EncodeOptions()
    placement = _Placement.on(devices)
    job = _Job(encode, params, pad_id, options, make_tokens, progress, len(documents), placement)
    results = job.run(documents, tokenize, windows, cancelled)
    for shard, embeddings in zip(shards, results, strict=True):
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


class _Placement(NamedTuple):
    """Where parameters and batches lie."""

    mesh: Mesh | None  # None: where the parameters are, or the default device
    num_devices: int

    @classmethod
    def on(cls, devices: Sequence[jax.Device] | None) -> "_Placement":
        """Divides rows among these devices, in this order, and copies the rest to each."""
        if devices is None:
            return cls(None, 1)
        if not devices or len(set(devices)) != len(devices):
            raise ValueError(f"devices must be distinct and at least one, got {list(devices)}.")
        mesh = Mesh(np.asarray(devices), ("rows",), axis_types=(AxisType.Auto,))
        return cls(mesh, len(devices))

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Replaces a mesh the caller may have set, which would refuse arrays on other devices."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def place(self, params: Any, compute_dtype: str) -> Any:
        """Puts parameters on the devices; one leaf at a time, so that casting adds only that."""
        sharding = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

        def place(leaf: Any) -> Array:
            placed = jax.device_put(leaf, sharding)
            floating = jnp.issubdtype(placed.dtype, jnp.floating)
            return placed.astype(compute_dtype) if floating else placed

        with self.context():
            return jax.tree.map(place, params)

    def divide(self, batch: Any) -> Any:
        """Puts arrays `[rows, ...]` on the devices, by rows."""
        if self.mesh is None:
            return batch
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec("rows")))


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
        placement: _Placement,
    ) -> None:
        if not total:
            raise ValueError("There are no documents to encode.")
        self._encode = _compiled(encode, make_tokens)
        self._placement = placement
        self._params = placement.place(params, options.compute_dtype)
        self._pad_id = pad_id
        self._options = options
        self._progress = progress
        self._total = total
        self._already = 0
        self._done = 0
        self._shapes: set[tuple[int, int]] = set()
        self._started = time.monotonic()

    def run(
        self,
        documents: Sequence[Document],
        tokenize: Tokenize,
        windows: Sequence[range],
        cancelled: threading.Event | None,
    ) -> Iterator[NDArray[np.float32]]:
        """Yields the embeddings of each window, a thread preparing the next one meanwhile."""
        self._already = self._done = self._total - sum(map(len, windows))

        def prepare(rows: range) -> Window:
            return prepare_window(
                tokenize([documents[row] for row in rows]),
                rows,
                self._options,
                pad_id=self._pad_id,
                num_devices=self._placement.num_devices,
            )

        with concurrent.futures.ThreadPoolExecutor(1, "tokenize") as pool:
            pending = collections.deque(_submit(pool, prepare, rows) for rows in windows[:1])
            for number in range(len(windows)):
                window = pending.popleft().result()
                if number + 1 < len(windows):
                    pending.append(_submit(pool, prepare, windows[number + 1]))
                yield self._encode_window(window, cancelled)

    def _encode_window(
        self, window: Window, cancelled: threading.Event | None
    ) -> NDArray[np.float32]:
        """Encodes the documents of one window, a few batches in flight at a time."""
        size = len(window.rows)
        total_tokens = int(window.lengths.sum()) or 1
        finished = self._done
        tokens_done = 0
        parts: list[NDArray[np.float32]] = []
        for batch, result in self._results(window, cancelled):
            parts.append(result[: len(batch.documents)])
            tokens_done += int(window.lengths[batch.documents].sum())
            self._done += len(batch.documents)
            self._report(finished + tokens_done / total_tokens * size)
        embeddings = np.empty((size, parts[0].shape[1]), np.float32)
        order = np.concatenate([batch.documents for batch in window.batches])
        embeddings[order] = np.concatenate(parts)
        return base.check_embeddings(embeddings, name="embeddings", first_row=window.rows.start)

    def _results(
        self, window: Window, cancelled: threading.Event | None
    ) -> Iterator[tuple[Batch, NDArray[np.float32]]]:
        """Yields each batch with its `[rows, D]`, the device working one batch ahead."""
        in_flight: collections.deque[tuple[Batch, Array]] = collections.deque()
        for batch in window.batches:
            if cancelled is not None and cancelled.is_set():
                raise Cancelled("The encoding was cancelled.")
            in_flight.append((batch, self._dispatch(window, batch)))
            if len(in_flight) == _IN_FLIGHT:
                first, result = in_flight.popleft()
                yield first, np.asarray(result, np.float32)
        for batch, result in in_flight:
            yield batch, np.asarray(result, np.float32)

    def _dispatch(self, window: Window, batch: Batch) -> Array:
        """Starts one batch on the devices."""
        size = len(batch.documents)
        ids = np.full((batch.rows, batch.length), self._pad_id, np.int32)
        ids[:size] = window.ids[batch.documents, : batch.length]
        lengths = np.zeros((batch.rows, 1), np.int64)
        lengths[:size, 0] = window.lengths[batch.documents]
        mask = np.arange(batch.length) < lengths
        self._shapes.add((batch.rows, batch.length))
        with self._placement.context():
            return self._encode(self._params, *self._placement.divide((ids, mask)))

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


def _submit(
    pool: concurrent.futures.ThreadPoolExecutor, prepare: Callable[[range], Window], rows: range
) -> concurrent.futures.Future[Window]:
    """Hands a window to the pool; a pool that takes no more was closed by the ending program."""
    try:
        return pool.submit(prepare, rows)
    except RuntimeError as error:
        # The interpreter closes pools while its main thread still lives: nothing else tells.
        raise Cancelled("The program ends.") from error


@functools.lru_cache(maxsize=32)
def _compiled(
    encode: Encode, make_tokens: Callable[[Array, Array], Any]
) -> Callable[[Any, Any, Any], Array]:
    """Returns the jitted form of an encoder; the same one each time, so it compiles once."""
    return jax.jit(lambda params, ids, mask: encode(params, make_tokens(ids, mask)))

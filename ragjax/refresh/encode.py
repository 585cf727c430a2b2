"""Turns a corpus into embeddings: length-sorted batches of few static shapes, compiled once.

    embeddings = encode_corpus(task, encoder.params)

The compiled form of an encoder is kept for the life of the process, so a refresh with new
parameters compiles nothing. A thread tokenises and pads one window of documents while the device
encodes the one before. N = documents, D = embedding size.
"""

import collections
import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from ragjax.index import base, objects, shards, store
from ragjax.refresh.batches import Batch, EncodeOptions, PaddedWindow, prepare_window
from ragjax.refresh.task import (
    Cancelled,
    DocRows,
    EncodeProgress,
    EncodeTask,
    OnProgress,
    Tokens,
    embedding_size,
)
from ragjax.storage.processes import host, put

# Batches handed to the device before the oldest result is waited for.
_IN_FLIGHT = 2


def encode_corpus(
    task: EncodeTask,
    params: Any,
    *,
    rows: DocRows | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: OnProgress | None = None,
    cancelled: threading.Event | None = None,
) -> NDArray[np.float32]:
    """Encodes documents; one window is tokenised in a thread while the last is on the device.

    Args:
        task: The documents and their encoder.
        params: Its parameters.
        rows: Which documents; None: all. N is their number.
        devices: Of this process; each batch is divided by rows among them, each gets a copy of
            the parameters, and no other device is touched. None: where the parameters are, divided
            likewise where several devices have a copy.
        progress: Called after each batch, in this thread.
        cancelled: Read before each batch; once set, the call is given up.

    Returns:
        `[N, D]` float32 in the order of the rows.

    Raises:
        Cancelled: `cancelled` was set.
        ValueError: No documents, one longer than the last bucket, an embedding that is not
            finite (the message names the documents), no devices or one of them twice.
    """
    job = _Job(task, params, rows, devices, progress, cancelled)
    starts = range(0, job.total, task.options.window)
    windows = [range(start, min(start + starts.step, job.total)) for start in starts]
    return np.concatenate(list(job.run(windows)))


def encode_token_ids(
    encode: Callable[[Any, Any], Array],
    params: Any,
    token_ids: Sequence[Sequence[int]],
    *,
    pad_id: int,
    options: EncodeOptions | None = None,
    make_tokens: Callable[[Array, Array], Any] = Tokens,
) -> NDArray[np.float32]:
    """Encodes texts that are token ids already.

    Args:
        encode: As in `EncodeTask`.
        params: Its parameters.
        token_ids: Of N texts.
        pad_id: As in `EncodeTask`.
        options: Sizes of batches.
        make_tokens: As in `EncodeTask`.

    Returns:
        `[N, D]` float32.

    Raises:
        ValueError: As `encode_corpus`.
    """
    options = options or EncodeOptions()
    task = EncodeTask(
        encode=encode, documents=token_ids, pad_id=pad_id, options=options, make_tokens=make_tokens
    )
    return encode_corpus(task, params)


def encode_to_store(
    task: EncodeTask,
    params: Any,
    writer: shards.EmbeddingWriter,
    *,
    rows: DocRows | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: OnProgress | None = None,
    cancelled: threading.Event | None = None,
) -> store.EmbeddingStore:
    """Encodes the shards a store still misses and publishes it.

    A killed call repeated with the same arguments keeps every finished shard and ends with the
    same bytes. `task.options.window` is not used: a shard is a window.

    Args:
        task: The documents and their encoder.
        params: Its parameters.
        writer: Opened with the spec of this encoder and corpus.
        rows: Documents of the store, in its order; None: all.
        devices: As in `encode_corpus`.
        progress: As in `encode_corpus`; finished shards count as done.
        cancelled: As in `encode_corpus`; the finished shards stay for the next call.

    Raises:
        Cancelled: `cancelled` was set.
        ValueError: As `encode_corpus`, or the numbers of documents differ.
    """
    encode_shards(
        task, params, writer, writer.missing(),
        rows=rows, devices=devices, progress=progress, cancelled=cancelled,
    )  # fmt: skip
    return writer.publish()


def encode_shards(
    task: EncodeTask,
    params: Any,
    writer: shards.ShardWriter | objects.ObjectWriter,
    numbers: Sequence[int],
    *,
    rows: DocRows | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: OnProgress | None = None,
    cancelled: threading.Event | None = None,
) -> None:
    """Encodes some shards of a store and writes them, as `encode_to_store` does.

    Args:
        task: The documents and their encoder.
        params: Its parameters.
        writer: Of the store.
        numbers: Of the shards.
        rows: As in `encode_to_store`.
        devices: As in `encode_corpus`.
        progress: As in `encode_corpus`; documents of other shards count as done.
        cancelled: As in `encode_corpus`.

    Raises:
        Cancelled, ValueError: As `encode_to_store`.
        FileNotFoundError: The store was published or removed meanwhile.
    """
    job = _Job(task, params, rows, devices, progress, cancelled)
    if job.total != writer.spec.size:
        raise ValueError(f"the store is for {writer.spec.size} documents, got {job.total}")
    results = job.run([writer.rows(number) for number in numbers])
    for number, embeddings in zip(numbers, results, strict=True):
        writer.write(number, embeddings)


def tqdm_progress(description: str) -> OnProgress:
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
    given: bool = False  # the parameters lie on the mesh already, copied or divided

    @classmethod
    def on(cls, devices: Sequence[jax.Device] | None, params: Any) -> "_Placement":
        """Divides rows among these devices, in this order, and copies the rest to each.

        None: those that the parameters lie on, where these stay as they are. Left to follow the
        parameters, each of them would encode every row.
        """
        if devices is None:
            mesh = _mesh_of(params)
            return cls(mesh, 1 if mesh is None else mesh.size, given=True)
        if not devices or len(set(devices)) != len(devices):
            raise ValueError(f"devices must be distinct and at least one, got {list(devices)}")
        mesh = Mesh(np.asarray(devices), ("rows",), axis_types=(AxisType.Auto,))
        return cls(mesh, len(devices))

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Replaces a mesh the caller may have set, which would refuse arrays on other devices."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def place(self, params: Any, compute_dtype: str) -> Any:
        """Puts parameters on the devices; one leaf at a time, so that casting adds only that."""
        everywhere = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

        def place(leaf: Any) -> Array:
            stays = self.given and isinstance(leaf, Array)
            placed = jax.device_put(leaf, leaf.sharding if stays else everywhere)
            floating = jnp.issubdtype(placed.dtype, jnp.floating)
            return placed.astype(compute_dtype) if floating else placed

        with self.context():
            return jax.tree.map(place, params)

    def divide(self, batch: Any) -> Any:
        """Puts arrays `[rows, ...]` on the devices, by rows."""
        if self.mesh is None:
            return batch
        axes = PartitionSpec(self.mesh.axis_names)
        return jax.tree.map(lambda leaf: put(leaf, NamedSharding(self.mesh, axes)), batch)


def _mesh_of(params: Any) -> Mesh | None:
    """Returns the mesh of several devices that all parameters lie on; None: there is none."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, Array)]
    found = [leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    meshes = {mesh for mesh in found if isinstance(mesh, Mesh)}
    if len(found) < len(leaves) or len(meshes) != 1:
        return None
    mesh = meshes.pop()
    return mesh if mesh.size > 1 else None


class _Job:
    """One call: what is encoded, where, and how far it is."""

    def __init__(
        self,
        task: EncodeTask,
        params: Any,
        rows: DocRows | None,
        devices: Sequence[jax.Device] | None,
        progress: OnProgress | None,
        cancelled: threading.Event | None,
    ) -> None:
        self._rows = range(len(task.documents)) if rows is None else rows
        self.total = len(self._rows)
        if not self.total:
            raise ValueError("there are no documents to encode")
        self._task, self._progress, self._cancelled = task, progress, cancelled
        self._encode = _compiled(task.encode, task.make_tokens)
        self._placement = _Placement.on(devices, params)
        self._params = self._placement.place(params, task.options.compute_dtype)
        self._already = self._done = 0
        self._shapes: set[tuple[int, int]] = set()
        self._started = time.monotonic()

    def run(self, windows: Sequence[range]) -> Iterator[NDArray[np.float32]]:
        """Yields the embeddings of each window, a thread preparing the next one meanwhile."""
        self._already = self._done = self.total - sum(map(len, windows))
        task = self._task

        def prepare(window: range) -> PaddedWindow:
            rows = self._rows[window.start : window.stop]
            token_ids = task.tokenize([task.documents[int(row)] for row in rows])
            return prepare_window(
                token_ids,
                rows,
                task.options,
                pad_id=task.pad_id,
                num_devices=self._placement.num_devices,
            )

        with concurrent.futures.ThreadPoolExecutor(1, "tokenize") as pool:
            pending = collections.deque(_submit(pool, prepare, window) for window in windows[:1])
            for number in range(len(windows)):
                window = pending.popleft().result()
                if number + 1 < len(windows):
                    pending.append(_submit(pool, prepare, windows[number + 1]))
                yield self._encode_window(window)

    def _encode_window(self, window: PaddedWindow) -> NDArray[np.float32]:
        """Encodes the documents of one window, a few batches in flight at a time."""
        size = len(window.rows)
        total_tokens = int(window.lengths.sum()) or 1
        finished = self._done
        tokens_done = 0
        parts: list[NDArray[np.float32]] = []
        for batch, result in self._results(window):
            parts.append(result[: len(batch.documents)])
            tokens_done += int(window.lengths[batch.documents].sum())
            self._done += len(batch.documents)
            self._report(finished + tokens_done / total_tokens * size)
        embeddings = np.empty((size, parts[0].shape[1]), np.float32)
        order = np.concatenate([batch.documents for batch in window.batches])
        embeddings[order] = np.concatenate(parts)
        return base.check_embeddings(embeddings, name="embeddings", rows=window.rows)

    def _results(self, window: PaddedWindow) -> Iterator[tuple[Batch, NDArray[np.float32]]]:
        """Yields each batch with its `[rows, D]`, the device working one batch ahead."""
        in_flight: collections.deque[tuple[Batch, Array]] = collections.deque()
        for batch in window.batches:
            if self._cancelled is not None and self._cancelled.is_set():
                raise Cancelled("the encoding was cancelled")
            in_flight.append((batch, self._dispatch(window, batch)))
            if len(in_flight) == _IN_FLIGHT:
                first, result = in_flight.popleft()
                yield first, host(result).astype(np.float32, copy=False)
        for batch, result in in_flight:
            yield batch, host(result).astype(np.float32, copy=False)

    def _dispatch(self, window: PaddedWindow, batch: Batch) -> Array:
        """Starts one batch on the devices."""
        size = len(batch.documents)
        ids = np.full((batch.rows, batch.length), self._task.pad_id, np.int32)
        ids[:size] = window.ids[batch.documents, : batch.length]
        lengths = np.zeros((batch.rows, 1), np.int64)
        lengths[:size, 0] = window.lengths[batch.documents]
        mask = np.arange(batch.length) < lengths
        self._shapes.add((batch.rows, batch.length))
        with self._placement.context():
            result = self._encode(self._params, *self._placement.divide((ids, mask)))
        embedding_size(result, rows=batch.rows)
        return result

    def _report(self, work: float) -> None:
        """Tells the caller how far the work is; `work` is in documents of average length."""
        if self._progress is None:
            return
        seconds, num_shapes = time.monotonic() - self._started, len(self._shapes)
        self._progress(
            EncodeProgress.measured(
                self._already, self._done, self.total,
                work=work, seconds=seconds, num_shapes=num_shapes,
            )
        )  # fmt: skip


def _submit(
    pool: concurrent.futures.ThreadPoolExecutor,
    prepare: Callable[[range], PaddedWindow],
    window: range,
) -> concurrent.futures.Future[PaddedWindow]:
    """Hands a window to the pool; a pool that takes no more was closed by the ending program."""
    try:
        return pool.submit(prepare, window)
    except RuntimeError as error:
        # The interpreter closes pools while its main thread still lives: nothing else tells.
        raise Cancelled("the program ends") from error


@functools.lru_cache(maxsize=32)
def _compiled(
    encode: Callable[[Any, Any], Array], make_tokens: Callable[[Array, Array], Any]
) -> Callable[[Any, Any, Any], Array]:
    """Returns the jitted form of an encoder; the same one each time, so it compiles once."""
    return jax.jit(lambda params, ids, mask: encode(params, make_tokens(ids, mask)))

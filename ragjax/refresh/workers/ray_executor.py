"""Encoding by Ray actors, one on each accelerator (or CPU) of a cluster, warm between refreshes.

    executor = RayExecutor()        # in the cluster of RAY_ADDRESS, or in one started here

The trainer sends the token ids of a shard and gets its embeddings; the actors see neither the
corpus nor the folder. The shard of an actor that is lost goes to another one, another actor takes
its place, and machines that join the cluster take work at once.
"""

import collections
import importlib
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragjax.index import EmbeddingStore, EmbeddingWriter
from ragjax.refresh.task import Cancelled, EncodeProgress, EncodeRequest, EncodeTask
from ragjax.refresh.threads import ThreadExecutor
from ragjax.refresh.workers.ray_pool import Params, RayPool, ShardError

_LOG = logging.getLogger(__name__)
# What an actor takes, the first of which the cluster has.
_KINDS = ("GPU", "TPU", "CPU")


class RayExecutor:
    """Has the actors of a Ray cluster encode, and writes what they return.

    The parameters go to the object store once a refresh, and each actor keeps them. The trainer's
    devices do nothing for it.
    """

    def __init__(
        self,
        *,
        actors: int = 0,
        resources: Mapping[str, float] | None = None,
        start_seconds: float = 300.0,
        max_shard_failures: int = 4,
        report: Callable[[str], None] = _LOG.warning,
    ) -> None:
        """Connects to the cluster that RAY_ADDRESS names, or starts one on the CPUs of this host.

        Args:
            actors: How many at most; 0: as many as the resources of the cluster allow.
            resources: What an actor takes, as `{"GPU": 1}`; None: one GPU, TPU chip or CPU,
                whichever of these the cluster has first.
            start_seconds: Longest time without an actor that can encode; a tenth of it where all
                are refused.
            max_shard_failures: Lost actors, or errors, in one shard until the encoding fails.
            report: Called with one sentence when something needs attention.

        Raises:
            ValueError: A number out of range, or Ray is not installed.
            ConnectionError: There is no cluster at RAY_ADDRESS.
        """
        if actors < 0 or start_seconds <= 0 or max_shard_failures < 1:
            raise ValueError(
                "actors must be at least 0, start_seconds positive and max_shard_failures at least"
                f" 1, got {actors}, {start_seconds:g} and {max_shard_failures}"
            )
        self._ray = _load_ray()
        self._actors, self._start_seconds = actors, start_seconds
        self._max_shard_failures, self._report = max_shard_failures, report
        self._resources = None if resources is None else dict(resources)
        self._connected = _connect(self._ray)
        self._pool: RayPool | None = None

    @property
    def workers(self) -> list[str]:
        """The processes that can encode, for people."""
        return [] if self._pool is None else sorted(self._pool.names.values())

    def copy_params(self, params: Any) -> Any:
        """Copies the parameters on their device; the next step may then donate the originals."""
        return ThreadExecutor().copy_params(params)

    def encode(self, task: EncodeTask, request: EncodeRequest) -> EmbeddingStore:
        """Has the actors encode the documents of the request, and publishes the store.

        Raises:
            Cancelled: `request.cancelled` was set; finished shards stay for the next call.
            ValueError: Embeddings are not finite; the message names the documents.
            RuntimeError: No actor could be started, or a shard failed too often.
        """
        writer = EmbeddingWriter.open(request.folder, request.spec)
        if writer.missing():
            if self._pool is None or self._pool.task is not task:
                self._drop()
                if self._resources is None:
                    has = self._ray.cluster_resources()
                    kind = next((kind for kind in _KINDS if has.get(kind, 0) >= 1), _KINDS[-1])
                    self._resources = {kind: 1}
                self._pool = RayPool(
                    self._ray, task, self._resources, self._actors, report=self._report
                )
            self._run(self._pool, task, request, writer)
        return writer.publish()

    def close(self) -> None:
        """Ends the actors, and the cluster where it was started here."""
        self._drop()
        if self._connected:
            self._connected = False
            self._ray.shutdown()

    def _drop(self) -> None:
        if self._pool is not None and self._ray.is_initialized():
            self._pool.close()
        self._pool = None

    def _run(
        self, pool: RayPool, task: EncodeTask, request: EncodeRequest, writer: EmbeddingWriter
    ) -> None:
        """Returns when every shard is written."""
        ray = self._ray
        params = ray.put(Params.of(request.params))
        todo = collections.deque(writer.missing())
        failures: collections.Counter[int] = collections.Counter()
        shards: dict[Any, int] = {}  # under way, by what will be their embeddings
        show = _Progress(request, writer)
        idle_since, told = time.monotonic(), False
        pool.begin()
        while todo or shards:
            pool.grow()
            while todo and (actor := pool.free()) is not None:
                shard = todo.popleft()
                rows, token_ids = _shard(task, request, writer, shard)
                shards[pool.give(actor, [params], rows, token_ids)] = shard
            for done in pool.wait():
                shard = shards.pop(done)
                try:
                    writer.write(shard, pool.take(done))
                    show()
                except (ray.exceptions.RayError, ShardError) as error:
                    failures[shard] += 1
                    if failures[shard] >= self._max_shard_failures:
                        raise RuntimeError(
                            f"Shard {shard} failed {failures[shard]} times; the last time: {error}"
                        ) from error
                    todo.appendleft(shard)
            if request.cancelled.is_set():
                raise Cancelled("The encoding was cancelled")
            if pool.names:
                idle_since, told = time.monotonic(), False
            waited = time.monotonic() - idle_since
            if waited > self._start_seconds / (10 if pool.all_refused else 1):
                raise RuntimeError(f"No actor could encode for {waited:.0f} s: {pool.describe()}")
            if waited > self._start_seconds / 10 and not told:
                told = True
                self._report(f"waiting for an actor: {pool.describe()}")


class _Progress:
    """Tells how many documents are encoded."""

    def __init__(self, request: EncodeRequest, writer: EmbeddingWriter) -> None:
        self._request, self._writer = request, writer
        self._already, self._started = self._done(), time.monotonic()

    def __call__(self) -> None:
        done, size = self._done(), self._writer.spec.size
        seconds = time.monotonic() - self._started
        self._request.progress(
            EncodeProgress.measured(
                self._already, done, size, work=done, seconds=seconds, num_shapes=0
            )
        )

    def _done(self) -> int:
        writer = self._writer
        return writer.spec.size - sum(len(writer.rows(shard)) for shard in writer.missing())


def _shard(
    task: EncodeTask, request: EncodeRequest, writer: EmbeddingWriter, shard: int
) -> tuple[NDArray[np.int64], list[list[int]]]:
    """Returns the rows `[R]` and the token ids of the documents of a shard."""
    places = writer.rows(shard)
    if request.rows is None:
        rows = np.arange(places.start, places.stop, dtype=np.int64)
    else:
        rows = np.asarray(request.rows[places.start : places.stop], np.int64)
    token_ids = task.tokenize([task.documents[int(row)] for row in rows])
    return rows, [list(ids) for ids in token_ids]


def _load_ray() -> Any:
    """Returns the package.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError(f"Ray is not installed ({error}): pip install 'ragjax[ray]'") from error


def _connect(ray: Any) -> bool:
    """Joins or starts a cluster; False where this process is in one."""
    if ray.is_initialized():
        return False
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    address = os.environ.get("RAY_ADDRESS") or "local"
    # The accelerators of this host are the trainer's.
    alone = {"include_dashboard": False, "num_gpus": 0} if address == "local" else {}
    with warnings.catch_warnings():
        # JAX warns of forks; those of Ray run another program at once.
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **alone)
    if main:
        signal.signal(signal.SIGTERM, handler)  # which Ray took for itself
    return True

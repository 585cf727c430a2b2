"""Encoding in a thread of the trainer's process, on its own devices or on spare ones."""

import functools
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ragjax.index import EmbeddingStore, shards
from ragjax.refresh.encode import encode_to_store
from ragjax.refresh.shares import IncompleteError, Share, encode_share
from ragjax.refresh.task import Cancelled, EncodeRequest, EncodeTask
from ragjax.storage.processes import host, is_first, several

# Between two looks at whether the others have finished.
_POLL_SECONDS = 0.2


class ThreadExecutor:
    """Encodes in the refresher's own thread.

    Without devices the encoding shares the trainer's, batch by batch; with devices that the
    training mesh does not hold it takes nothing from training but host time. Where several
    processes make a run, each encodes its share of the documents, and all index the same store.
    """

    def __init__(
        self, devices: Sequence[jax.Device] | None = None, *, shared: Path | None = None
    ) -> None:
        """Chooses where to encode.

        Args:
            devices: Local devices to shard the batches over; None: where the parameters are.
            shared: Folder that all processes of a run see, for the stores that they write together;
                None: each encodes all documents.

        Raises:
            ValueError: An empty list, a device twice, or one of another process.
        """
        if devices is not None:
            unknown = [device for device in devices if device not in jax.local_devices()]
            if not devices or len(set(devices)) != len(devices) or unknown:
                raise ValueError(
                    f"devices must be distinct local devices ({len(jax.local_devices())} here), "
                    f"got {list(devices)}"
                )
        self.devices = None if devices is None else tuple(devices)
        self._shared = shared

    def copy_params(self, params: Any) -> Any:
        """Copies the parameters on their device, or to the host where it has only a part of them.

        The next step may then donate the originals.
        """
        copied = host if several() else functools.partial(jnp.array, copy=True)
        return jax.tree.map(copied, params)

    def encode(self, task: EncodeTask, request: EncodeRequest) -> EmbeddingStore:
        """Encodes the documents of the request and publishes the store; see `Executor`."""
        if self._shared is not None and several():
            return self._encode_together(task, request, self._shared)
        return encode_to_store(
            task,
            request.params,
            shards.EmbeddingWriter.open(request.folder, request.spec),
            rows=request.rows,
            devices=self.devices,
            progress=request.progress,
            cancelled=request.cancelled,
        )

    def _encode_together(
        self, task: EncodeTask, request: EncodeRequest, shared: Path
    ) -> EmbeddingStore:
        """Encodes the share of this process, waits for the others', and takes all of them."""
        name = hashlib.sha256(str(request.spec).encode()).hexdigest()[:16]
        if is_first():  # all have the earlier ones by now
            for path in shared.glob("*"):
                if not path.name.startswith(name):
                    shutil.rmtree(path, ignore_errors=True)
        ours = request._replace(folder=shared / name)
        while True:
            try:
                share = Share(jax.process_index(), jax.process_count())
                return encode_share(task, ours, share, devices=self.devices).linked(request.folder)
            except IncompleteError as others:
                if request.cancelled.wait(_POLL_SECONDS):
                    raise Cancelled(str(others)) from others

    def close(self) -> None:
        """Has nothing to give up."""

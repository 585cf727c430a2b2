"""Encoding in a thread of the trainer's process, on its own devices or on spare ones."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ragjax.index import EmbeddingStore, shards
from ragjax.refresh.encode import encode_to_store
from ragjax.refresh.task import EncodeRequest, EncodeTask
from ragjax.storage.processes import host, several


class ThreadExecutor:
    """Encodes in the refresher's own thread.

    Without devices the encoding shares the trainer's, batch by batch; with devices that the
    training mesh does not hold it takes nothing from training but host time.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        """Chooses where to encode.

        Args:
            devices: Local devices to shard the batches over; None: where the parameters are.

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

    def copy_params(self, params: Any) -> Any:
        """Copies the parameters on their device, or to the host where it has only a part of them.

        The next step may then donate the originals.
        """
        copied = host if several() else functools.partial(jnp.array, copy=True)
        return jax.tree.map(copied, params)

    def encode(self, task: EncodeTask, request: EncodeRequest) -> EmbeddingStore:
        """Encodes the documents of the request and publishes the store; see `Executor`."""
        return encode_to_store(
            task,
            request.params,
            shards.EmbeddingWriter.open(request.folder, request.spec),
            rows=request.rows,
            devices=self.devices,
            progress=request.progress,
            cancelled=request.cancelled,
        )

    def close(self) -> None:
        """Has nothing to give up."""

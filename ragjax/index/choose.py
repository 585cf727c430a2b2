"""Which dense index fits a corpus: by its size, the memory, and what is installed."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from ragjax.index import base, exact, scann

_LOG = logging.getLogger(__name__)
_EXACT_AT_MOST = 1_000_000
_MEMORY_SHARE = 0.25
_FLOAT_BYTES = 4
_UNKNOWN_MEMORY = 8 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexChoice:
    """A kind of dense index and why it was taken.

    Attributes:
        name: "exact" or "scann".
        build: Makes the index from `[N, D]` document embeddings.
        reason: One sentence to print.
    """

    name: str
    build: Callable[[NDArray[np.float32]], base.Index]
    reason: str


def choose_index(
    size: int,
    dim: int,
    *,
    memory_bytes: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> IndexChoice:
    """Chooses a dense index: exact while the embeddings fit the device, ScaNN beyond.

    Exact search has recall 1 and nothing to rebuild, so it is taken up to a million documents if
    the embeddings fill at most a quarter of the memory.

    Args:
        size: Number of documents.
        dim: Size of an embedding.
        memory_bytes: Memory of the device that searches; default: asked of the device, or for a
            CPU of the operating system.
        devices: Devices that would share an exact index; None: the first one has it.

    Raises:
        ValueError: `size` or `dim` is not positive.
    """
    if size < 1 or dim < 1:
        raise ValueError(f"An index needs documents and dimensions, got {size} and {dim}")
    memory = _device_memory(devices) if memory_bytes is None else memory_bytes
    build = functools.partial(exact.ExactIndex, devices=devices)
    needed = size * dim * _FLOAT_BYTES
    facts = f"{size:,} documents x {dim} dimensions = {needed / 2**20:,.0f} MiB"
    fits = needed <= _MEMORY_SHARE * memory
    if size <= _EXACT_AT_MOST and fits:
        return IndexChoice(
            name="exact",
            build=build,
            reason=f"exact index: {facts}, at most a quarter of {memory / 2**20:,.0f} MiB.",
        )
    why = (
        f"more than {_EXACT_AT_MOST:,} documents"
        if fits
        else f"more than a quarter of {memory / 2**20:,.0f} MiB"
    )
    problem = scann.scann_problem()
    if problem is None:
        return IndexChoice(
            name="scann", build=scann.ScannIndex.build, reason=f"ScaNN index: {facts}, {why}."
        )
    _LOG.warning("%s", problem)
    return IndexChoice(
        name="exact",
        build=build,
        reason=f"exact index though {facts}, {why}: {problem}",
    )


def _device_memory(devices: Sequence[jax.Device] | None) -> int:
    """Returns the bytes of the devices together, or of the machine where they are its CPU."""
    devices = devices or jax.devices()[:1]
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) * len(devices)
    if not hasattr(os, "sysconf"):
        return _UNKNOWN_MEMORY
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

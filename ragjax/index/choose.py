"""Which dense index fits a corpus: by its size, the memory, and what is installed."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from ragjax.index import base, exact, scann

IndexKind = Literal["auto", "exact", "scann"]
_LOG = logging.getLogger(__name__)
_EXACT_AT_MOST = 1_000_000
_MEMORY_SHARE = 0.25
_BYTES: dict[exact.IndexDtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
_UNKNOWN_MEMORY = 8 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexChoice:
    """A kind of dense index and why it was taken.

    Attributes:
        name: "exact" or "scann".
        build: Makes the index from `[N, D]` document embeddings, an array or those of a store.
        reason: One sentence to print.
    """

    name: str
    build: Callable[[Any], base.Index]
    reason: str


def choose_index(
    size: int,
    dim: int,
    *,
    kind: IndexKind = "auto",
    memory_bytes: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> IndexChoice:
    """Chooses a dense index: exact while the embeddings fit the device, ScaNN beyond.

    Exact search has recall 1 and nothing to rebuild, so it is taken if the embeddings fill at most
    a quarter of the memory: on a CPU up to a million documents, in float32; on an accelerator any
    number, in bfloat16 or int8 where float32 is too much.

    Args:
        size: Number of documents.
        dim: Size of an embedding.
        kind: "exact" or "scann" where it is chosen by then.
        memory_bytes: Memory of the device that searches; default: asked of the device, or for a
            CPU of the operating system.
        devices: Devices that would share an exact index; None: the first one has it.

    Raises:
        ValueError: `size` or `dim` is not positive.
        ImportError: `kind` is "scann", which does not work here; the message says why.
    """
    if size < 1 or dim < 1:
        raise ValueError(f"An index needs documents and dimensions, got {size} and {dim}")
    memory = _device_memory(devices) if memory_bytes is None else memory_bytes
    dtype = exact_dtype(size, dim, memory_bytes=memory, devices=devices)
    build = functools.partial(exact.ExactIndex, devices=devices, dtype=dtype)
    needed = size * dim * _BYTES[dtype]
    held = "" if dtype == "float32" else f" in {dtype}"
    facts = f"{size:,} documents x {dim} dimensions{held} = {needed / 2**20:,.0f} MiB"
    if kind == "exact":
        return IndexChoice(name="exact", build=build, reason=f"exact index, as asked: {facts}.")
    problem = scann.scann_problem()
    if kind == "scann":
        if problem is not None:
            raise ImportError(problem)
        build = scann.ScannIndex.build
        return IndexChoice(name="scann", build=build, reason=f"ScaNN index, as asked: {facts}.")
    fits = needed <= _MEMORY_SHARE * memory
    if fits and (size <= _EXACT_AT_MOST or not _on_cpu(devices)):
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


def exact_dtype(
    size: int,
    dim: int,
    *,
    memory_bytes: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> exact.IndexDtype:
    """Returns how an exact index holds the documents; see `choose_index`.

    On an accelerator it is the widest that fits a quarter of the memory, or the narrowest; a CPU
    searches in float32.
    """
    if _on_cpu(devices):
        return "float32"
    memory = _device_memory(devices) if memory_bytes is None else memory_bytes
    fitting = (
        dtype for dtype, bytes in _BYTES.items() if size * dim * bytes <= _MEMORY_SHARE * memory
    )
    return next(fitting, "int8")


def _on_cpu(devices: Sequence[jax.Device] | None) -> bool:
    return (devices or jax.local_devices())[0].platform == "cpu"


def _device_memory(devices: Sequence[jax.Device] | None) -> int:
    """Returns the bytes of the devices together, or of the machine where they are its CPU."""
    devices = devices or jax.local_devices()[:1]
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) * len(devices)
    if not hasattr(os, "sysconf"):
        return _UNKNOWN_MEMORY
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

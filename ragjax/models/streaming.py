"""Fills a model's parameters one at a time from stored tensors and places them on their devices.

The host holds the parameters that live in its memory, the parameter being filled and one tensor
per reading thread, never a second copy of the checkpoint.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from ragjax.models.safetensors_files import StoredTensor

# A sharding or device for all parameters, a nested dict of them like the parameters, or
# (path, shape) -> sharding.
Shardings = Any
_THREADS = 2  # one reads while the other transposes
_ALIGNMENT = 64  # bytes; jax takes over a numpy array so aligned without copying it
_TILE = 16  # rows


class Placement(NamedTuple):
    """Of which dtype parameters are, and where they go."""

    dtype: Any = np.float32  # or "keep": as the file has them
    shardings: Shardings = None  # see `sharding_of`; None: the default device


_DEFAULT = Placement()
_PLACEMENT = contextvars.ContextVar("placement", default=_DEFAULT)


@contextmanager
def loading_as(*, dtype: Any = np.float32, shardings: Shardings = None) -> Iterator[None]:
    """Say of which dtype the parameters loaded inside the block are, and where they go.

    Args:
      dtype: of the parameters; "keep" leaves float32, bfloat16 and float16 tensors as they are.
      shardings: None for the default device, or what `sharding_of` takes: a model larger than
        one device, or than the host, is loaded straight into its place.
    """
    token = _PLACEMENT.set(Placement(dtype, shardings))
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


def current_placement() -> Placement:
    """Return what the innermost `loading_as` block says."""
    return _PLACEMENT.get()


class Part(NamedTuple):
    """One tensor and where it goes in its parameter."""

    tensor: Any  # StoredTensor or what np.asarray reads
    transform: Callable[[np.ndarray], np.ndarray]
    layer: int | None  # index on axis 0 of the parameter; None: the whole parameter


class _Piece(NamedTuple):
    """The part of a parameter that one device, or several alike, hold."""

    index: tuple[slice, ...]  # in the parameter
    values: np.ndarray
    devices: list[Any]


def transformed_shape(part: Part) -> tuple[int, ...] | None:
    """Return the shape that a tensor has in its parameter, without reading it.

    Returns:
      The shape, None where the transform cannot take a tensor of this shape.
    """
    try:
        return tuple(_probe(part).shape)
    except (ValueError, IndexError, TypeError):
        return None


class Loader:
    """Fills parameters; keeps its threads and their buffers from one to the next."""

    def __init__(self, pool: ThreadPoolExecutor):
        """Use `loader()` instead, which ends the threads."""
        self._pool, self._scratch = pool, threading.local()

    def fill(
        self, shape: tuple[int, ...], dtype: Any, parts: Sequence[Part], sharding: Any = None
    ) -> jax.Array:
        """Fill one parameter.

        Args:
          shape: of the parameter.
          dtype: of the parameter; values are cast.
          parts: one for each index of axis 0, or a single one for the whole.
          sharding: a `jax.sharding.Sharding` or device; None leaves the parameter uncommitted on
            the default device. Only what this process's devices hold is read.

        Returns:
          The parameter, on its devices.
        """
        pieces = list(_pieces(shape, np.dtype(dtype), sharding))
        list(self._pool.map(lambda part: self._copy(part, pieces), parts))
        if sharding is None or isinstance(sharding, jax.Device):
            array = jax.device_put(pieces[0].values, sharding)
        else:
            shards = [
                jax.device_put(piece.values, device) for piece in pieces for device in piece.devices
            ]
            array = jax.make_array_from_single_device_arrays(shape, sharding, shards)
        return array.block_until_ready()  # so that the host's copy is free before the next one

    def _copy(self, part: Part, pieces: Sequence[_Piece]) -> None:
        """Read one tensor and copy it into every piece that holds some of it."""
        targets = [
            (target, rest)
            for piece in pieces
            for target, rest in [_target(piece, part.layer)]
            if target is not None
        ]
        if not targets:
            return
        tensor = part.tensor
        if isinstance(tensor, StoredTensor) and _is_whole(part, targets):
            tensor.read(targets[0][0].reshape(-1).view(np.uint8))
            return
        if isinstance(tensor, StoredTensor):
            tensor = tensor.read(self._buffer(tensor.nbytes))
        values = part.transform(np.asarray(tensor))
        for target, rest in targets:
            _copy_into(target, values[rest])

    def _buffer(self, nbytes: int) -> np.ndarray:
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None or buffer.nbytes < nbytes:
            # The old one goes first: two of them would be a tensor too many.
            self._scratch.buffer = buffer = None
            self._scratch.buffer = buffer = np.empty(nbytes, np.uint8)
        return buffer


@contextmanager
def loader() -> Iterator[Loader]:
    """Give a `Loader` whose threads and buffers end with the block."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ragjax-loading") as pool:
        yield Loader(pool)


def sharding_of(shardings: Shardings, path: str, shape: tuple[int, ...]) -> Any:
    """Return the placement of one parameter.

    Args:
      shardings: None, a `jax.sharding.Sharding` or device for all, a nested dict of them like
        the parameters, or a function `(path, shape) -> sharding`, `path` joined by "/".
      path: of the parameter.
      shape: of the parameter.

    Raises:
      ValueError: a nested dict has nothing for this parameter.
    """
    if isinstance(shardings, Mapping):
        for name in path.split("/"):
            if not isinstance(shardings, Mapping) or name not in shardings:
                raise ValueError(f"shardings: nothing for parameter {path} (no {name!r})")
            shardings = shardings[name]
        return shardings
    if callable(shardings):
        return shardings(path, shape)
    return shardings


def _probe(part: Part) -> np.ndarray:
    """Transform zeros of the tensor's shape; untouched zeros take no memory."""
    return part.transform(np.zeros(part.tensor.shape, part.tensor.dtype))


def _pieces(shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> Iterator[_Piece]:
    if sharding is None or isinstance(sharding, jax.Device):
        yield _Piece(tuple(slice(0, size) for size in shape), _aligned(shape, dtype), [])
        return
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        devices.setdefault(tuple(bounds), []).append(device)
    for bounds, alike in devices.items():
        index = tuple(slice(*bound) for bound in bounds)
        yield _Piece(index, _aligned([end - start for start, end in bounds], dtype), alike)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _target(piece: _Piece, layer: int | None) -> tuple[np.ndarray | None, tuple[slice, ...]]:
    """Return where a tensor goes in a piece, and which part of the tensor does."""
    if layer is None:
        return piece.values, piece.index
    first, *rest = piece.index
    if not first.start <= layer < first.stop:
        return None, ()
    return piece.values[layer - first.start, ...], tuple(rest)  # a view also where it is a number


def _is_whole(part: Part, targets: Sequence[tuple[np.ndarray, Any]]) -> bool:
    """Say whether the file's bytes are the target's: same order, same dtype, all of it."""
    target = targets[0][0]
    if len(targets) > 1 or target.dtype != part.tensor.dtype or target.ndim == 0:
        return False
    zeros = np.zeros(part.tensor.shape, part.tensor.dtype)
    probe = part.transform(zeros)
    same = probe.ctypes.data == zeros.ctypes.data and probe.strides == zeros.strides
    return same and target.shape == probe.shape and target.flags.c_contiguous


def _copy_into(target: np.ndarray, values: np.ndarray) -> None:
    """Copy; several times faster than assignment where `values` is a transposed matrix."""
    if values.ndim != 2 or values.strides[0] != values.itemsize or values.flags.c_contiguous:
        target[...] = values
        return
    if target.dtype == values.dtype and target.itemsize in (2, 4):
        whole = np.dtype(f"u{target.itemsize}")  # numpy moves bfloat16 slower than integers
        target, values = target.view(whole), values.T.view(whole).T
    for start in range(0, values.shape[1], _TILE):
        rows = values.T[start : start + _TILE].astype(target.dtype, copy=False)
        target[:, start : start + _TILE] = rows.T

"""Fills a model's parameters one at a time from stored tensors and places them on their devices.

The host holds the parameters that live in its memory, the parameter being filled and, where its
tensors need more than a transposition, one tensor; never a second copy of the checkpoint.
"""

import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from ragjax.models.files.safetensors import StoredTensor

# A sharding or device for all parameters, a nested dict of them like the parameters, or
# (path, shape) -> sharding.
Shardings = Any
_ALIGNMENT = 64  # bytes; jax takes over a numpy array so aligned without copying it
_TILE = 16  # rows of a matrix that are turned at once
_CHUNK = 2**20  # bytes read at once of a matrix to turn: they stay in the processor's cache


class Placement(NamedTuple):
    """Of which dtype parameters are, and where they go."""

    dtype: Any = np.float32  # or "keep": as the file has them
    shardings: Shardings = None  # see `sharding_of`; None: the default device


_DEFAULT = Placement()
_PLACEMENT = contextvars.ContextVar("placement", default=_DEFAULT)


@contextmanager
def loading_as(*, dtype: Any = np.float32, shardings: Shardings = None) -> Iterator[None]:
    """Says of which dtype the parameters loaded inside the block are, and where they go.

    Args:
        dtype: Of the parameters; "keep" leaves float32, bfloat16 and float16 tensors as they are.
        shardings: What `sharding_of` takes: a model larger than one device, or than the host, is
            loaded straight into its place. None: as a block around this one says, else the default
            device.
    """
    if shardings is None:
        shardings = current_placement().shardings
    token = _PLACEMENT.set(Placement(dtype, shardings))
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


def current_placement() -> Placement:
    """Returns what the innermost `loading_as` block says."""
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
    """Returns the shape that a tensor has in its parameter, without reading it.

    Returns:
        The shape, None where the transform cannot take a tensor of this shape.
    """
    try:
        return tuple(_probe(part).shape)
    except (ValueError, IndexError, TypeError):
        return None


def fill(
    shape: tuple[int, ...], dtype: Any, parts: Sequence[Part], sharding: Any = None
) -> jax.Array:
    """Fills one parameter.

    Args:
        shape: Of the parameter.
        dtype: Of the parameter; values are cast.
        parts: One for each index of axis 0, or a single one for the whole.
        sharding: A `jax.sharding.Sharding` or device; None leaves the parameter uncommitted on the
            default device. Only what this process's devices hold is kept.

    Returns:
        The parameter, on its devices.
    """
    pieces = list(_pieces(shape, np.dtype(dtype), sharding))
    for part in parts:
        _copy(part, pieces)
    if sharding is None or isinstance(sharding, jax.Device):
        array = jax.device_put(pieces[0].values, sharding)
    else:
        shards = [
            jax.device_put(piece.values, device) for piece in pieces for device in piece.devices
        ]
        array = jax.make_array_from_single_device_arrays(shape, sharding, shards)
    return array.block_until_ready()  # so that the host's copy is free before the next one


def sharding_of(shardings: Shardings, path: str, shape: tuple[int, ...]) -> Any:
    """Returns the placement of one parameter.

    Args:
        shardings: None, a `jax.sharding.Sharding` or device for all, a nested dict of them like
            the parameters, or a function `(path, shape) -> sharding`, `path` joined by "/".
        path: Of the parameter.
        shape: Of the parameter.

    Raises:
        ValueError: A nested dict has nothing for this parameter.
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
    """Transforms zeros of the tensor's shape; untouched zeros take no memory."""
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


def _target(piece: _Piece, layer: int | None) -> tuple[np.ndarray, tuple[slice, ...]] | None:
    """Returns where a tensor goes in a piece, and which part of the tensor does."""
    if layer is None:
        return piece.values, piece.index
    first, *rest = piece.index
    if not first.start <= layer < first.stop:
        return None
    return piece.values[layer - first.start, ...], tuple(rest)  # a view also where it is a number


def _copy(part: Part, pieces: Sequence[_Piece]) -> None:
    """Reads one tensor and copies it into every piece that holds some of it."""
    found = [_target(piece, part.layer) for piece in pieces]
    targets = [target for target in found if target is not None]
    if not targets:
        return
    tensor, turned = part.tensor, None
    if isinstance(tensor, StoredTensor) and tensor.shape:
        turned = _is_turned(part)
    if turned is None:
        values = part.transform(np.asarray(tensor))
        for target, rest in targets:
            target[...] = values[rest]
    elif not turned and _is_all(targets, tensor):
        tensor.read(targets[0][0].reshape(-1).view(np.uint8))
    else:
        for start, rows in tensor.rows(_CHUNK, _TILE):
            for target, rest in targets:
                _copy_rows(target, rest, start, rows, turned=turned)


def _is_turned(part: Part) -> bool | None:
    """Says whether a transform transposes a matrix (True), does nothing (False), or else (None)."""
    zeros = np.zeros(part.tensor.shape, part.tensor.dtype)
    probe = part.transform(zeros)
    if probe.ctypes.data != zeros.ctypes.data or probe.dtype != zeros.dtype:
        return None
    if (probe.shape, probe.strides) == (zeros.shape, zeros.strides):
        return False
    transposed = (zeros.T.shape, zeros.T.strides)
    return True if zeros.ndim == 2 and (probe.shape, probe.strides) == transposed else None


def _is_all(targets: Sequence[tuple[np.ndarray, Any]], tensor: StoredTensor) -> bool:
    """Says whether the file's bytes are those of the only target."""
    target = targets[0][0]
    same = target.dtype == tensor.dtype and target.shape == tensor.shape
    return len(targets) == 1 and same and target.flags.c_contiguous


def _copy_rows(
    target: np.ndarray, rest: tuple[slice, ...], start: int, rows: np.ndarray, *, turned: bool
) -> None:
    """Copies what a target holds of some rows of the file.

    Args:
        target: To fill.
        rest: The part of the transformed tensor that `target` is.
        start: Number of the first row.
        rows: From there on.
        turned: True: rows of the file are columns of the parameter.
    """
    held = rest[1] if turned else rest[0]
    first, last = max(start, held.start), min(start + len(rows), held.stop)
    if first >= last:
        return
    values = rows[first - start : last - start]
    if turned:
        columns = target[:, first - held.start : last - held.start]
        _transpose_into(columns, values[:, rest[0]])
    else:
        target[first - held.start : last - held.start] = values[(slice(None), *rest[1:])]


def _transpose_into(target: np.ndarray, values: np.ndarray) -> None:
    """Assigns `values.T`, several times faster: a few rows at a time, cast before they turn."""
    if target.dtype == values.dtype and target.itemsize in (2, 4):
        whole = np.dtype(f"u{target.itemsize}")  # numpy moves bfloat16 slower than integers
        target, values = target.view(whole), values.view(whole)
    for start in range(0, len(values), _TILE):
        tile = values[start : start + _TILE].astype(target.dtype, copy=False)
        target[:, start : start + _TILE] = tile.T

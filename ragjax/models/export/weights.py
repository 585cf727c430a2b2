"""Writes tensors as safetensors, one at a time, and proves that the files hold them.

weights = plan_weights(named_tensors(params, table), dtype="bfloat16", max_shard_size=5 * 10**9)
write_weights(weights, folder)
check_weights(weights, folder)
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ragjax.storage import whole_file, write_text

# Floats that a file may hold, by the names that people use and those of the format.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_MAX_LISTED = 5


class Shard(NamedTuple):
    """One safetensors file of a model."""

    file: str  # name in the folder
    names: tuple[str, ...]  # tensors in it, in the order in which their bytes follow
    header: bytes
    size: int  # bytes of the file


class Weights(NamedTuple):
    """What the safetensors files of a model are going to hold."""

    tensors: Mapping[str, np.ndarray]  # each access may compute its tensor
    dtype: str  # a key of DTYPES
    shards: tuple[Shard, ...]
    index: str | None  # contents of model.safetensors.index.json where there are several shards


def plan_weights(
    tensors: Mapping[str, np.ndarray], *, dtype: str = "float32", max_shard_size: int = 5 * 10**9
) -> Weights:
    """Looks at every tensor once and lays out the files.

    Args:
        tensors: Tensor name → float array.
        dtype: A key of DTYPES; what the files hold.
        max_shard_size: Bytes of tensors in one file; a larger tensor gets a file of its own.

    Raises:
        ValueError: NaN or infinity in a tensor, also where a value is too large for `dtype`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
    shapes: dict[str, tuple[int, ...]] = {}
    bad: list[str] = []
    for name, tensor in tensors.items():
        shapes[name] = tuple(tensor.shape)
        if not np.isfinite(_as_written(tensor, dtype)).all():
            finite = np.isfinite(tensor).all()
            bad.append(
                f"{name} has values beyond the range of {dtype}"
                if finite
                else f"{name} holds NaN or infinity"
            )
    if bad:
        more = f" and {len(bad) - _MAX_LISTED} more" if len(bad) > _MAX_LISTED else ""
        raise ValueError(f"nothing is written: {'; '.join(bad[:_MAX_LISTED])}{more}")
    groups = _groups(shapes, jnp.dtype(dtype).itemsize, max_shard_size)
    shards = tuple(
        _shard(_file_name(number, len(groups)), group, shapes, dtype)
        for number, group in enumerate(groups)
    )
    return Weights(tensors, dtype, shards, _index(shards) if len(shards) > 1 else None)


def write_weights(weights: Weights, folder: Path) -> None:
    """Writes the files, one tensor in memory at a time, and waits until they are on disk.

    Raises:
        DiskFullError: There is no room.
    """
    for shard in weights.shards:
        with whole_file(folder / shard.file, num_bytes=shard.size) as file:
            file.write(shard.header)
            for name in shard.names:
                file.write(_payload(weights.tensors[name], weights.dtype))
    if weights.index is not None:
        write_text(folder / "model.safetensors.index.json", weights.index)


def check_weights(weights: Weights, folder: Path) -> int:
    """Reads the files back with the safetensors package and compares every bit.

    Returns:
        The number of tensors compared.

    Raises:
        OSError: A file does not hold what it was to hold.
    """
    compared = 0
    for shard in weights.shards:
        path = folder / shard.file
        try:
            with safe_open(path, framework="np") as file:
                found = set(file.keys())
                for name in shard.names:
                    problem = (
                        "is missing"
                        if name not in found
                        else _difference(
                            file.get_tensor(name), _as_written(weights.tensors[name], weights.dtype)
                        )
                    )
                    if problem:
                        raise OSError(
                            f"{path}: tensor {name} {problem}; nothing is published, and the disk "
                            "or the safetensors package is to be looked at"
                        )
                    compared += 1
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be read back ({error})") from error
    return compared


def _as_written(tensor: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the tensor in C order and in the dtype of the file."""
    with np.errstate(over="ignore"):  # what overflows becomes infinite, which `plan_weights` finds
        return np.asarray(tensor, jnp.dtype(dtype), order="C")


def _payload(tensor: np.ndarray, dtype: str) -> memoryview:
    return _as_written(tensor, dtype).reshape(-1).view(np.uint8).data


def _difference(found: np.ndarray, expected: np.ndarray) -> str | None:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return (
            f"reads back as {found.dtype} {found.shape}, written was {expected.dtype} "
            f"{expected.shape}"
        )
    # As integers: NaN equals itself then, and 0.0 is not -0.0.
    kind = f"u{expected.dtype.itemsize}"
    bits = [np.ascontiguousarray(array).reshape(-1).view(kind) for array in (found, expected)]
    differing = int(np.count_nonzero(bits[0] != bits[1]))
    return f"reads back with {differing} of {expected.size} values changed" if differing else None


def _groups(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_shard_size: int
) -> list[list[str]]:
    """Fills the files in the order of the tensors."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * itemsize
        if groups[-1] and held + size > max_shard_size:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _file_name(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _shard(file: str, names: list[str], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Shard:
    """Lays out one file: length of the header, header, the tensors' bytes without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        size = int(np.prod(shapes[name], dtype=np.int64)) * jnp.dtype(dtype).itemsize
        entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    header = struct.pack("<Q", len(text)) + text
    return Shard(file, tuple(names), header, len(header) + start)


def _index(shards: tuple[Shard, ...]) -> str:
    total = sum(shard.size - len(shard.header) for shard in shards)
    places = {name: shard.file for shard in shards for name in shard.names}
    value = {"metadata": {"total_size": total}, "weight_map": places}
    return json.dumps(value, indent=2) + "\n"

"""Opens the safetensors files of a model folder without trusting a byte of them.

Headers are checked in full when a folder is opened; a tensor's bytes are read when it is asked
for, through the file instead of a memory map, whose pages would count as this process's memory.
`safetensors.safe_open` only maps files: huggingface/safetensors pull request #759, an option to
read them instead, was closed without being merged.
"""

import logging
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ragjax.models.files.config import parse_json, read_bytes

logger = logging.getLogger(__name__)

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "BOOL": np.dtype(np.bool_),
}
_QUANTIZED_DTYPES = re.compile(r"(F8|F6_|F4|I8|U8|I4|U4).*")
_QUANTIZED_NAMES = re.compile(
    r".*\.(qweight|qzeros|g_idx|weight_scale|weight_scale_inv|SCB|absmax|quant_map|quant_state.*)"
)
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_AHEAD = 2**22  # bytes that the disk reads while those before are copied
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Tensor by tensor, so that nothing depends on what class transformers would make of the folder;
# cloned, as safetensors refuses tensors that share memory.
_CONVERSION = (
    "import sys, pathlib, torch; from safetensors.torch import save_file; "
    "folder = pathlib.Path(sys.argv[1]); "
    "save_file({name: tensor.clone().contiguous() "
    "for file in sorted(folder.glob('pytorch_model*.bin')) "
    "for name, tensor in torch.load(file, map_location='cpu', weights_only=True).items()}, "
    "folder / 'model.safetensors', metadata={'format': 'pt'})"
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape and dtype are known, its values are read at each access."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, buffer: np.ndarray) -> np.ndarray:
        """Reads the values into the front of a buffer.

        Args:
            buffer: One axis of uint8, contiguous, at least `nbytes` long.

        Returns:
            The tensor, a view of `buffer`.

        Raises:
            ValueError: The file has become shorter since it was opened.
        """
        wanted = buffer[: self.nbytes]
        with open(self.path, "rb", buffering=0) as file:
            for start in range(0, self.nbytes, _AHEAD):
                self._read_into(file, start, wanted[start : start + _AHEAD])
        return wanted.view(self.dtype).reshape(self.shape)

    def rows(self, nbytes: int, multiple: int) -> Iterator[tuple[int, np.ndarray]]:
        """Reads some indices of axis 0 at a time.

        Args:
            nbytes: About as much is read at a time.
            multiple: So many indices, or a multiple of it, are.

        Yields:
            The first index, and the values from there on, in a buffer that the next ones overwrite.

        Raises:
            ValueError: The file has become shorter since it was opened.
        """
        size = self.nbytes // max(1, self.shape[0])
        count = max(1, nbytes // max(1, size * multiple)) * multiple
        buffer = np.empty(min(count, self.shape[0]) * size, np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            for start in range(0, self.shape[0], count):
                found = min(count, self.shape[0] - start)
                part = buffer[: found * size]
                self._read_into(file, start * size, part)
                yield start, part.view(self.dtype).reshape(found, *self.shape[1:])

    def _read_into(self, file: Any, start: int, part: np.ndarray) -> None:
        """Reads `part` from byte `start` of the tensor on; the disk goes on with what follows."""
        view, done = part.data, 0
        file.seek(self.offset + start)
        while done < len(part):
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"{self.path}: ends inside tensor {self.name!r}")
            done += count
        if hasattr(os, "posix_fadvise"):
            following = self.offset + start + len(part)
            os.posix_fadvise(file.fileno(), following, _AHEAD, os.POSIX_FADV_WILLNEED)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the values as a new array."""
        array = self.read(np.empty(self.nbytes, np.uint8))
        return array if dtype is None else array.astype(dtype, copy=False)


def read_safetensors(folder: Path) -> Mapping[str, Any]:
    """Opens the safetensors file(s) of a Hugging Face folder; tensors are read when asked for.

    Args:
        folder: Holds `model.safetensors`, or `model.safetensors.index.json` and its shards, or
            exactly one file `*.safetensors`. Files may be links, as in the hub's cache.

    Returns:
        Mapping from tensor name to `StoredTensor`: `.shape` and `.dtype` cost nothing, each
        `np.asarray` reads that tensor from disk (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        FileNotFoundError: No safetensors file, or a shard is missing. Where only PyTorch files
            (`.bin`, `.pt`) are there, the message says how to convert them.
        ValueError: A file is damaged, disagrees with the index, or holds quantised (int8, fp8,
            GPTQ, ...) tensors.
    """
    files = weight_files(Path(folder))
    unread = {path.name for path in Path(folder).glob("*.safetensors")} - {p.name for p in files}
    if unread:
        read = next(iter(files)).name
        logger.warning("%s: not read beside %s: %s", folder, read, ", ".join(sorted(unread)))
    tensors: dict[str, StoredTensor] = {}
    for path, listed in files.items():
        found = read_header(path)
        for name, tensor in found.items():
            if name in tensors:
                raise ValueError(f"{path}: tensor {name!r} is also in {tensors[name].path.name}")
            tensors[name] = tensor
        if listed is not None and listed != found.keys():
            name = sorted(listed ^ found.keys())[0]
            where = "is not in this shard" if name in listed else "is not listed for this shard"
            raise ValueError(
                f"{path}: tensor {name!r} {where}, unlike model.safetensors.index.json"
            )
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of one safetensors file.

    Returns:
        Tensor name → where it lies. The tensors fill the rest of the file exactly.

    Raises:
        ValueError: The header is not what the format demands, lies about the file, or describes
            a tensor that ragjax does not read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise _damaged(path, f"a header of {length} bytes in a file of {size} bytes")
        header = parse_json(file.read(length), f"{path}: header")
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise _damaged(path, f"tensor {tensor.name!r} does not begin where the one before ends")
        end += tensor.nbytes
    if end != size:
        raise _damaged(path, f"the tensors end at byte {end}, the file at byte {size}")
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """Checks one tensor's entry in the header; `start` is the first byte after the header."""
    entry = entry if isinstance(entry, dict) else {}
    kind, shape = entry.get("dtype"), _sizes(entry.get("shape"))
    offsets = _sizes(entry.get("data_offsets"))
    if not isinstance(kind, str) or shape is None or offsets is None or len(offsets) != 2:
        raise _damaged(
            path, f"tensor {name!r} needs a dtype, a shape and two data_offsets, got {entry!r:.200}"
        )
    if _QUANTIZED_DTYPES.fullmatch(kind) or _QUANTIZED_NAMES.fullmatch(name):
        raise ValueError(
            f"{path}: tensor {name!r} is quantised ({kind:.20}), which ragjax does not read; use "
            "the float32, bfloat16 or float16 version of the checkpoint"
        )
    if kind not in _DTYPES:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {kind!r:.50}")
    tensor = StoredTensor(path, name, tuple(shape), _DTYPES[kind], start + offsets[0])
    # Beside a size of 0 the others are unbounded, and numpy cannot count so far.
    countable = len(shape) <= 32 and math.prod(size or 1 for size in shape) < 2**56
    if not countable or tensor.nbytes != offsets[1] - offsets[0]:
        raise _damaged(
            path, f"tensor {name!r} of {kind} {shape!r:.100} does not fit data_offsets {offsets}"
        )
    return tensor


def _sizes(value: Any) -> list[int] | None:
    """Returns a JSON value that is a list of whole numbers, 0 or more; None if it is not."""
    whole = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return value if whole else None


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: not a readable safetensors file ({what}); download it again")


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Returns the files to read, with the tensors that an index lists for each."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if index.is_file():
        return {path: names for path, names in _shards(index)}
    others = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if len(others) == 1:
        return {others[0]: None}
    if others:
        raise FileNotFoundError(
            f"{folder}: {len(others)} files *.safetensors but no model.safetensors.index.json"
        )
    pickled = sorted(path.name for suffix in _PICKLES for path in folder.glob(suffix))
    if pickled:
        named = [name for name in pickled if has_pytorch_model([name])]
        remedy = conversion_command(folder) if named else "safetensors.torch.save_file"
        raise FileNotFoundError(
            f"{folder}: only PyTorch weights ({(named or pickled)[0]}), which ragjax does not read "
            f"because loading them runs code; where torch is installed, convert with `{remedy}`"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def has_pytorch_model(names: Iterable[str]) -> bool:
    """Says whether `conversion_command` can convert a folder of files with these names."""
    return any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in names)


def conversion_command(folder: Path | str) -> str:
    """Returns a shell command that makes model.safetensors of `pytorch_model*.bin` in a folder.

    It needs torch and safetensors where it runs, and runs no code of the model.
    """
    return f'python -c "{_CONVERSION}" {shlex.quote(str(folder))}'


def _shards(index: Path) -> Iterator[tuple[Path, set[str]]]:
    try:
        listed = parse_json(read_bytes(index), str(index))["weight_map"]
        shard_of = listed.items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{index}: expected a JSON object with a "weight_map" object ({error})'
        ) from error
    if not listed:
        raise ValueError(f'{index}: its "weight_map" lists no tensor')
    shards: dict[str, set[str]] = {}
    for name, shard in shard_of:
        if not isinstance(shard, str):
            raise ValueError(f"{index}: the shard of tensor {name!r} is {shard!r:.100}, not a name")
        shards.setdefault(shard, set()).add(name)
    for shard, names in sorted(shards.items()):
        if not is_plain_name(shard):
            raise ValueError(f"{index}: shard {shard!r:.200} is not a plain file name")
        path = index.parent / shard
        if not path.is_file():
            raise FileNotFoundError(f"{path}: shard named in {index.name} is missing")
        yield path, names


def is_plain_name(name: str) -> bool:
    """Says whether a name stays in its folder on every system: no path, drive or NUL in it."""
    return bool(name) and name not in (".", "..") and not re.search(r"[/\\:\x00]", name)

"""Reads the metadata and the tensors of GGUF files without trusting a byte of them.

Every count and length is compared with the size of the file before anything is read or
allocated. The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

`gguf.GGUFReader` can take the place of this reader once a release of the gguf package has both of
its fixes for hostile headers: ggml-org/llama.cpp #27188 (a file of 43 bytes with an array length of
2^63 hangs version 0.19.0) and #25401 (number of dimensions, overflow).
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

FLOATS = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype("u2")}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
QUANTIZED += ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
QUANTIZED += ("IQ4_NL", "IQ4_XS")
_SCALARS = ["B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d"]  # by type number
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 2**24  # of an array; the largest vocabularies have 2**18
_MAX_ENTRIES = 2**20  # metadata fields, and tensors
_MAX_DIMENSIONS = 4
_CHUNK = 2**20  # bytes dequantised at once


class GgufFile(NamedTuple):
    """What a GGUF file, or all parts of a split one, hold."""

    fields: dict[str, Any]  # metadata: numbers, strings, bools and lists of them
    tensors: dict[str, Any]  # GgufTensor


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file; its values are read, and dequantised to float32, at each access."""

    path: Path
    name: str
    shape: tuple[int, ...]  # as numpy counts: the last axis is contiguous
    kind: GGMLQuantizationType
    offset: int  # of its first byte in the file
    byte_order: Literal["<", ">"]
    dtype = np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the values as a new float32 array."""
        values = np.empty(math.prod(self.shape), np.float32)
        block, size = GGML_QUANT_SIZES[self.kind]
        count, done = _CHUNK // size * size, 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.nbytes, count):
                data = _take(self.path, file, min(count, self.nbytes - start))
                piece = self._dequantize(data)
                values[done : done + piece.size] = piece
                done += piece.size
        values = values.reshape(self.shape)
        return values if dtype is None else values.astype(dtype, copy=False)

    def _dequantize(self, data: bytes) -> np.ndarray:
        if (plain := FLOATS.get(self.kind.name)) is not None:
            values = np.frombuffer(data, plain.newbyteorder(self.byte_order))
            if self.kind.name == "BF16":
                return (values.astype(np.uint32) << 16).view(np.float32)
            return values.astype(np.float32)
        # As one row of blocks: of many, gguf takes 16 at a time in Python.
        row = np.frombuffer(data, np.uint8)[None]
        with np.errstate(all="ignore"):  # a scale may be infinite in a file that nobody can use
            return dequantize(row, self.kind)[0]


def read_gguf_file(path: Path) -> GgufFile:
    """Reads and checks the metadata and the list of tensors.

    Args:
        path: The file; of a split file (`NAME-00001-of-00003.gguf`) any part, the others beside
            it.

    Returns:
        The metadata (of the first part) and the tensors (of all parts); none of them is read.

    Raises:
        FileNotFoundError: The file or a part of it is missing.
        ValueError: It is damaged, or holds a tensor that ragjax cannot read.
    """
    parts = split_parts(path)
    first = _read_part(parts[0])
    count = first.fields.get("split.count", 1)
    if count not in (0, len(parts)):
        raise ValueError(
            f"{parts[0]}: is one of {count} parts; put all beside each other as llama.cpp names "
            "them (NAME-00001-of-0000N.gguf), or merge them with llama-gguf-split --merge"
        )
    tensors = dict(first.tensors)
    for part in parts[1:]:
        for name, tensor in _read_part(part).tensors.items():
            if name in tensors:
                raise ValueError(f"{part}: tensor {name!r} is also in {tensors[name].path.name}")
            tensors[name] = tensor
    expected = first.fields.get("split.tensors.count", len(tensors))
    if len(parts) > 1 and expected != len(tensors):
        raise ValueError(f"{path}: the parts hold {len(tensors)} tensors, not {expected}")
    return GgufFile(first.fields, tensors)


def split_parts(path: Path) -> list[Path]:
    """Returns all parts of a split file in their order; a whole file is its only part.

    Raises:
        FileNotFoundError: A part is missing.
    """
    parts = [path.parent / name for name in split_names(path.name)]
    for part in parts:
        if not part.is_file():
            what = f", a part of {path.name}" if part != path else ""
            raise FileNotFoundError(f"{part}: no such file{what}")
    return parts


def _read_part(path: Path) -> GgufFile:
    with open(path, "rb", buffering=2**20) as file:
        return _Header(path, file).read()


class _Header:
    """The beginning of a file, read forwards; never further than the file goes."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._left = self._size = path.stat().st_size
        self._order: Literal["<", ">"] = "<"

    def read(self) -> GgufFile:
        if self._size < 24 or self._bytes(4) != b"GGUF":
            raise self._damaged("it does not begin with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:  # the bytes of a small number, the other way round
            self._order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise self._damaged(f"version {version}; 2 and 3 are supported")
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        self._check_count(num_tensors, 24, _MAX_ENTRIES, "tensors")
        self._check_count(num_fields, 13, _MAX_ENTRIES, "metadata fields")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self._string()
            if name in fields:
                raise self._damaged(f"the field {name!r:.100} is there twice")
            fields[name] = self._value(self._number("I"), name)
        entries = [self._entry() for _ in range(num_tensors)]
        return GgufFile(fields, self._placed(entries, fields.get("general.alignment", 32)))

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name!r:.100} has {dimensions} dimensions")
        sizes = [self._number("Q") for _ in range(dimensions)]
        return name, tuple(reversed(sizes)), self._number("I"), self._number("Q")

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: Any
    ) -> dict[str, GgufTensor]:
        """Turns offsets in the data into places in the file, and checks that they can be."""
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r:.100}, not a power of two")
        start = -(-(self._size - self._left) // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._damaged(f"tensor {name!r:.100} is there twice")
            order = self._order
            tensor = GgufTensor(
                self._path, name, shape, self._kind(name, kind), start + offset, order
            )
            tensors[name] = tensor
            if not all(shape) or math.prod(shape) > 8 * self._size:
                raise self._damaged(f"tensor {name!r:.100} of shape {shape} is not in the file")
            if shape[-1] % GGML_QUANT_SIZES[tensor.kind][0]:
                raise self._damaged(f"tensor {name!r:.100} has rows of {shape[-1]} values")
            if offset % alignment or tensor.offset + tensor.nbytes > self._size:
                raise self._damaged(f"tensor {name!r:.100} at {offset} is not in the file")
        end = start
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._damaged(f"tensor {tensor.name!r:.100} overlaps another")
            end = tensor.offset + tensor.nbytes
        return tensors

    def _kind(self, name: str, number: int) -> GGMLQuantizationType:
        known = {kind.value: kind for kind in GGMLQuantizationType}
        if number not in known:
            raise self._damaged(f"tensor {name!r:.100} is of the unknown type {number}")
        kind = known[number]
        if kind.name not in FLOATS and kind.name not in QUANTIZED:
            raise ValueError(
                f"{self._path}: tensor {name!r:.100} is quantised as {kind.name}, which ragjax "
                f"does not read; use a file of {', '.join([*FLOATS, *QUANTIZED])}"
            )
        if self._order == ">" and kind.name not in FLOATS:
            raise ValueError(
                f"{self._path}: tensor {name!r:.100} is quantised as {kind.name} in a big-endian "
                "file; convert it with `gguf-convert-endian FILE little` of the gguf package"
            )
        return kind

    def _value(self, kind: int, name: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(name)
        if kind >= len(_SCALARS):
            raise self._damaged(f"the field {name!r:.100} is of the unknown type {kind}")
        return self._number(_SCALARS[kind])

    def _array(self, name: str) -> list[Any]:
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            self._check_count(count, 8, _MAX_ITEMS, f"strings in {name!r:.100}")
            return self._strings(count)
        if kind >= len(_SCALARS) or kind == _ARRAY:
            raise self._damaged(f"the field {name!r:.100} is an array of type {kind}")
        code = _SCALARS[kind]
        size = struct.calcsize(code)
        self._check_count(count, size, _MAX_ITEMS, f"values in {name!r:.100}")
        return list(struct.unpack(f"{self._order}{count}{code}", self._bytes(count * size)))

    def _strings(self, count: int) -> list[str]:
        """Reads the strings of a vocabulary: as `_string`, but hundreds of thousands of them."""
        read, length_of = self._file.read, struct.Struct(f"{self._order}Q").unpack
        strings, left = [], self._left
        for _ in range(count):
            (length,) = length_of(read(8)) if left >= 8 else (left,)
            left -= 8 + length
            if left < 0:
                raise self._damaged("a string is longer than the file")
            try:
                strings.append(read(length).decode("utf-8"))
            except UnicodeDecodeError as error:
                raise self._damaged(f"a string is not UTF-8: {error}") from error
        self._left = left
        return strings

    def _check_count(self, count: int, size: int, most: int, what: str) -> None:
        if count > most or count * size > self._left:
            raise self._damaged(f"{count} {what} in a file of {self._size} bytes")

    def _string(self) -> str:
        length = self._number("Q")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"a string is not UTF-8: {error}") from error

    def _number(self, code: str) -> Any:
        data = self._bytes(struct.calcsize(code))
        return struct.unpack(self._order + code, data)[0]

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            raise self._damaged(f"{count} bytes wanted, {self._left} left in the file")
        self._left -= count
        return _take(self._path, self._file, count)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: damaged or not a GGUF file ({what})")


def _take(path: Path, file: Any, count: int) -> bytes:
    """Reads exactly so many bytes; unbuffered files may return fewer at once."""
    pieces: list[bytes] = []
    while count:
        piece = file.read(count)
        if not piece:
            raise ValueError(f"{path}: ends before its last tensor does")
        pieces.append(piece)
        count -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


def split_names(name: str) -> list[str]:
    """Returns the names of all parts of a split file by the name of one; of others, that name."""
    match = _SPLIT_NAME.fullmatch(name)
    if not match or not 1 <= int(match["part"]) <= int(match["count"]):
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]

"""Reads a GGUF file: the configuration, the dequantised tensors and the tokenizer inside it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.gguf_config import parse_config
from ragjax.models.gguf_tokenizer import bos_id, build_tokenizer, eos_ids

# Architecture in the file: whether llama.cpp reordered the rows of q and k when it was written.
_PERMUTED = {"llama": True, "qwen2": False}


class GgufModel(NamedTuple):
    """Everything a language model needs, as the file holds it."""

    config: DecoderConfig
    tensors: Mapping[str, np.ndarray]  # float32, dequantised at each access
    permuted: bool  # True: rows of q and k pair neighbouring entries
    tokenizer: Tokenizer
    bos_id: int | None  # None: texts start without one
    eos_ids: tuple[int, ...]
    pad_id: int | None


def read_gguf(path: Path) -> GgufModel:
    """Opens a GGUF file of a Llama-family decoder.

    Args:
        path: The file.

    Returns:
        Configuration, tensors and tokenizer.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its architecture, tokenizer or quantisation is not
            supported.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged or not a GGUF file ({error})") from error
    architecture = fields.get("general.architecture")
    if architecture not in _PERMUTED:
        raise ValueError(
            f"{path}: architecture {architecture!r}; supported GGUF architectures: "
            f"{', '.join(_PERMUTED)}"
        )
    tensors = _GgufTensors(path, {tensor.name: tensor for tensor in reader.tensors})
    tokenizer = build_tokenizer(path, fields)
    pad_id = fields.get("tokenizer.ggml.padding_token_id")
    return GgufModel(
        config=parse_config(path, architecture, fields, tensors),
        tensors=tensors,
        permuted=_PERMUTED[architecture],
        tokenizer=tokenizer,
        bos_id=bos_id(fields),
        eos_ids=eos_ids(tokenizer, fields),
        pad_id=None if pad_id is None else int(pad_id),
    )


class _GgufTensors(Mapping[str, np.ndarray]):
    """Tensors by name; dequantised to float32 when asked for, so one at a time is in memory."""

    def __init__(self, path: Path, tensors: dict[str, Any]) -> None:
        self._path, self._tensors = path, tensors

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, KeyError) as error:
            raise ValueError(
                f"{self._path}: tensor {name!r} is quantised as {tensor.tensor_type.name}, which "
                "the gguf package cannot read; use a F32, F16, BF16, Q8_0, Q4_0 or Q4_1 file"
            ) from error
        return np.asarray(values, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

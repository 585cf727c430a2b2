"""Reads a GGUF file: the configuration, the dequantised tensors and the tokenizer inside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.files.chat import ChatTemplate
from ragjax.models.files.config import check_sizes
from ragjax.models.files.gguf.config import parse_config
from ragjax.models.files.gguf.file import read_gguf_file
from ragjax.models.files.gguf.tokenizer import (
    bos_id,
    build_tokenizer,
    chat_template,
    eos_ids,
    token_id,
)

# Architecture in the file: whether llama.cpp reordered the rows of q and k when it was written.
PERMUTED = {"llama": True, "qwen2": False, "qwen3": False, "gemma3": False}


class GgufModel(NamedTuple):
    """Everything a language model needs, as the file holds it."""

    config: DecoderConfig
    tensors: Mapping[str, Any]  # GgufTensor; float32, dequantised at each np.asarray
    permuted: bool  # True: rows of q and k pair neighbouring entries
    tokenizer: Tokenizer
    bos_id: int | None  # None: texts start without one
    eos_ids: tuple[int, ...]
    pad_id: int | None
    chat: ChatTemplate | None


def read_gguf(path: Path) -> GgufModel:
    """Opens a GGUF file of a decoder; its tensors are read when asked for.

    Args:
        path: The file; of a split file (`NAME-00001-of-00003.gguf`) any part.

    Returns:
        Configuration, tensors and tokenizer.

    Raises:
        FileNotFoundError: There is no such file, or a part of it is missing.
        ValueError: The file is damaged, or its architecture, tokenizer or quantisation is not
            supported.
    """
    fields, tensors = read_gguf_file(path)
    architecture = fields.get("general.architecture")
    if architecture not in PERMUTED:
        raise ValueError(
            f"{path}: architecture {architecture!r:.100}; supported GGUF architectures: "
            f"{', '.join(PERMUTED)}"
        )
    tokenizer = build_tokenizer(path, fields)
    config = parse_config(path, architecture, fields, tensors)
    check_sizes(config, str(path))
    return GgufModel(
        config=config,
        tensors=tensors,
        permuted=PERMUTED[architecture],
        tokenizer=tokenizer,
        bos_id=bos_id(path, fields),
        eos_ids=eos_ids(path, fields),
        pad_id=token_id(path, fields, "padding_token_id"),
        chat=chat_template(path, fields),
    )

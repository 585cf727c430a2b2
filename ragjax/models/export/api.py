"""Exports models to folders that other programs serve from.

export_encoder(encoder, "out/encoder", params=trained)          # sentence-transformers
export_language_model(lm, "out/lm", params=trained, dtype="bfloat16")   # transformers
export_language_model(lm, "out/gguf", params=trained, formats=["gguf-q8_0"])   # llama.cpp

A folder appears whole, by one rename, after every tensor was read back and found equal, bit for
bit, to what was to be written.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from ragjax.models.encoder import TextEncoder
from ragjax.models.export.base import BaseModel, read_base
from ragjax.models.export.card import UNKNOWN_LICENSE, Card, chosen_license
from ragjax.models.export.dpr_as_bert import as_bert
from ragjax.models.export.encoder import encoder_files, encoder_weights
from ragjax.models.export.folder import Exported, ModelFolder, publish
from ragjax.models.export.gguf_file import GgufType, plan_gguf
from ragjax.models.export.language_model import language_model_files
from ragjax.models.export.onnx_file import OnnxType, check_installed, plan_onnx
from ragjax.models.export.weights import plan_weights
from ragjax.models.language_model import LanguageModel
from ragjax.models.layers.stacks import Params
from ragjax.models.lora import merge

Format = Literal["safetensors", "gguf-f16", "gguf-q8_0", "onnx", "onnx-int8"]
MAX_SHARD_SIZE = 5 * 10**9  # bytes
_SAFETENSORS: tuple[Format, ...] = ("safetensors",)
_GGUF: Mapping[str, GgufType] = {"gguf-f16": "F16", "gguf-q8_0": "Q8_0"}
_ONNX: Mapping[str, OnnxType] = {"onnx": "float32", "onnx-int8": "int8"}

logger = logging.getLogger(__name__)


def export_encoder(
    encoder: TextEncoder,
    folder: str | Path,
    *,
    params: Params | None = None,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card | None = None,
    formats: Sequence[Format] = _SAFETENSORS,
) -> Exported:
    """Writes a text encoder as a sentence-transformers folder.

    The layout is the old one, which sentence-transformers still reads, and transformers.

    Args:
        encoder: Architecture, tokenizer, pooling and prompts.
        folder: Must not exist, or be empty.
        params: Trained parameters of the encoder (one tower); None: `encoder.params`. Adapters are
            merged.
        dtype: "float32", "bfloat16" or "float16".
        max_shard_size: Bytes of tensors in one file.
        card: What the model card says beyond what the files know.
        formats: "safetensors", "onnx" (float32) and "onnx-int8", the last two for the families of
            BERT and RoBERTa, with the pooling and what follows it inside.

    Raises:
        ImportError: Packages that write a format are not installed.
        ValueError: The folder is not empty, the parameters hold NaN or are of another model, or a
            format has no such model.
        OSError: The folder cannot be written, or reads back differently; it is not there then.
    """
    contents = plan_encoder(
        encoder,
        params=params,
        dtype=dtype,
        max_shard_size=max_shard_size,
        card=card,
        formats=formats,
    )
    return publish(contents, Path(folder))


def plan_encoder(
    encoder: TextEncoder,
    *,
    params: Params | None = None,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card | None = None,
    formats: Sequence[Format] = _SAFETENSORS,
) -> ModelFolder:
    """Makes what `export_encoder` writes, with the size of every file; arguments as there."""
    check_formats(formats, is_lm=False)
    check_packages(formats)
    base, card = _base_and_card(encoder.source, card)
    params = merge(encoder.params if params is None else params)
    # Hugging Face's classes for DPR hide what sentence-transformers pools.
    encoder = as_bert(dataclasses.replace(encoder, params=params))
    tensors = encoder_weights(encoder)
    weights = {
        place: plan_weights(named, dtype=dtype, max_shard_size=max_shard_size)
        for place, named in tensors.items()
        if place or "safetensors" in formats
    }
    kinds = tuple(_ONNX[name] for name in formats if name in _ONNX)
    models = plan_onnx(encoder, tensors[""], kinds=kinds) if kinds else {}
    files = encoder_files(
        encoder, base, card, dtype=dtype, weights="safetensors" in formats, models=[*models]
    )
    return ModelFolder(files, weights, models)


def export_language_model(
    lm: LanguageModel,
    folder: str | Path,
    *,
    params: Params | None = None,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card | None = None,
    formats: Sequence[Format] = _SAFETENSORS,
) -> Exported:
    """Writes a language model as a transformers folder.

    Args:
        lm: Architecture and tokenizer.
        folder: Must not exist, or be empty.
        params: Trained parameters, the layers in one stack or several; None: `lm.params`. Adapters
            are merged.
        dtype: "float32", "bfloat16" or "float16".
        max_shard_size: Bytes of tensors in one file.
        card: What the model card says beyond what the files know.
        formats: "safetensors", "gguf-f16" and "gguf-q8_0"; GGUF of causal decoders only. A folder
            of GGUF files alone holds nothing of transformers.

    Raises:
        ValueError: The folder is not empty, the parameters hold NaN or are of another model, or a
            format has no such model or tokenizer.
        OSError: The folder cannot be written, or reads back differently; it is not there then.
    """
    contents = plan_language_model(
        lm, params=params, dtype=dtype, max_shard_size=max_shard_size, card=card, formats=formats
    )
    return publish(contents, Path(folder))


def plan_language_model(
    lm: LanguageModel,
    *,
    params: Params | None = None,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card | None = None,
    formats: Sequence[Format] = _SAFETENSORS,
) -> ModelFolder:
    """Makes what `export_language_model` writes, with every file's size; arguments as there."""
    check_formats(formats, is_lm=True)
    base, card = _base_and_card(lm.source, card)
    params = merge(lm.params if params is None else params)
    license = chosen_license(card, base)
    models = {
        f"model-{kind}.gguf": plan_gguf(
            lm, base, params, kind=kind, license=None if license == UNKNOWN_LICENSE else license
        )
        for name in formats
        if (kind := _GGUF.get(name))
    }
    whole = "safetensors" in formats
    files = language_model_files(lm, base, card, dtype=dtype, weights=whole, models=[*models])
    if not whole:
        kept = ("README.md", *base.notices)
        return ModelFolder({name: files[name] for name in kept}, {}, models)
    tensors = lm.family.save_params(lm.config, params)
    weights = plan_weights(tensors, dtype=dtype, max_shard_size=max_shard_size)
    return ModelFolder(files, {"": weights}, models)


def check_formats(formats: Sequence[str], *, is_lm: bool) -> None:
    """Checks that a kind of model is written in these formats.

    Args:
        formats: As for `export_encoder` and `export_language_model`.
        is_lm: True: of a language model; False: of a text encoder.

    Raises:
        ValueError: There is none, or one that does not hold such a model.
    """
    known = ("safetensors", *(_GGUF if is_lm else _ONNX))
    if wrong := [name for name in formats if name not in known] or (not formats and ["none"]):
        what = "a language model" if is_lm else "a text encoder"
        raise ValueError(f"formats {wrong[0]}: {what} is written as {', '.join(known)}")


def check_packages(formats: Sequence[str]) -> None:
    """Raises ImportError, with what to install, where a format cannot be written here."""
    if any(name in _ONNX for name in formats):
        check_installed()


def _base_and_card(source: str, card: Card | None) -> tuple[BaseModel, Card]:
    base, card = read_base(source), card or Card()
    if chosen_license(card, base) == UNKNOWN_LICENSE:
        logger.warning(
            "%s: its files declare no licence, so the model card says `license: unknown`; give the "
            "base model's licence if you know it",
            source,
        )
    return base, card

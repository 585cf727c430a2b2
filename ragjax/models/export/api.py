"""Exports models to folders that other programs serve from.

export_encoder(encoder, "out/encoder", params=trained)          # sentence-transformers
export_language_model(lm, "out/lm", params=trained, dtype="bfloat16")   # transformers

A folder appears whole, by one rename, after every tensor was read back and found equal, bit for
bit, to what was to be written.
"""

import dataclasses
import logging
from pathlib import Path

from ragjax.models.encoder import TextEncoder
from ragjax.models.export.base import BaseModel, read_base
from ragjax.models.export.card import UNKNOWN_LICENSE, Card, chosen_license
from ragjax.models.export.dpr_as_bert import as_bert
from ragjax.models.export.encoder import encoder_files, encoder_weights
from ragjax.models.export.folder import Exported, ModelFolder, publish
from ragjax.models.export.language_model import language_model_files
from ragjax.models.export.weights import plan_weights
from ragjax.models.language_model import LanguageModel
from ragjax.models.layers.stacks import Params
from ragjax.models.lora import merge

MAX_SHARD_SIZE = 5 * 10**9  # bytes

logger = logging.getLogger(__name__)


def export_encoder(
    encoder: TextEncoder,
    folder: str | Path,
    *,
    params: Params | None = None,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card | None = None,
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

    Raises:
        ValueError: The folder is not empty, or the parameters hold NaN or are of another model.
        OSError: The folder cannot be written, or reads back differently; it is not there then.
    """
    contents = plan_encoder(
        encoder, params=params, dtype=dtype, max_shard_size=max_shard_size, card=card
    )
    return publish(contents, Path(folder))


def plan_encoder(
    encoder: TextEncoder,
    *,
    params: Params | None = None,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card | None = None,
) -> ModelFolder:
    """Makes what `export_encoder` writes, with the size of every file; arguments as there."""
    base, card = _base_and_card(encoder.source, card)
    params = merge(encoder.params if params is None else params)
    # Hugging Face's classes for DPR hide what sentence-transformers pools.
    encoder = as_bert(dataclasses.replace(encoder, params=params))
    tensors = encoder_weights(encoder)
    weights = {
        place: plan_weights(named, dtype=dtype, max_shard_size=max_shard_size)
        for place, named in tensors.items()
    }
    return ModelFolder(encoder_files(encoder, base, card, dtype=dtype), weights)


def export_language_model(
    lm: LanguageModel,
    folder: str | Path,
    *,
    params: Params | None = None,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card | None = None,
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

    Raises:
        ValueError: The folder is not empty, or the parameters hold NaN or are of another model.
        OSError: The folder cannot be written, or reads back differently; it is not there then.
    """
    contents = plan_language_model(
        lm, params=params, dtype=dtype, max_shard_size=max_shard_size, card=card
    )
    return publish(contents, Path(folder))


def plan_language_model(
    lm: LanguageModel,
    *,
    params: Params | None = None,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card | None = None,
) -> ModelFolder:
    """Makes what `export_language_model` writes, with every file's size; arguments as there."""
    base, card = _base_and_card(lm.source, card)
    params = merge(lm.params if params is None else params)
    tensors = lm.family.save_params(lm.config, params)
    weights = plan_weights(tensors, dtype=dtype, max_shard_size=max_shard_size)
    return ModelFolder(language_model_files(lm, base, card, dtype=dtype), {"": weights})


def _base_and_card(source: str, card: Card | None) -> tuple[BaseModel, Card]:
    base, card = read_base(source), card or Card()
    if chosen_license(card, base) == UNKNOWN_LICENSE:
        logger.warning(
            "%s: its files declare no licence, so the model card says `license: unknown`; give the "
            "base model's licence if you know it",
            source,
        )
    return base, card

"""The text files of a language model's folder, as transformers writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ragjax.models.export.base import BaseModel
from ragjax.models.export.card import Card, Use, format_card
from ragjax.models.export.tokenizer import (
    check_tokenizer,
    to_json,
    tokenizer_files,
    with_first_token,
)
from ragjax.models.language_model import LanguageModel

# Not of this checkpoint any more, or not to be trusted.
_DROPPED = ("auto_map", "quantization_config", "transformers_version", "_name_or_path", "dtype")


def language_model_files(
    lm: LanguageModel,
    base: BaseModel,
    card: Card,
    *,
    dtype: str,
    weights: bool = True,
    models: Sequence[str] = (),
) -> dict[str, str]:
    """Makes every file but the weights.

    Args:
        lm: Architecture and tokenizer.
        base: What the base model's files say.
        card: What the caller knows.
        dtype: Of the weights.
        weights: Whether the folder holds safetensors, for the model card.
        models: GGUF files in it, likewise.

    Returns:
        File name → contents.
    """
    check_tokenizer(lm.tokenizer, lm.config.vocab_size)
    config = model_config(base, lm.family, lm.config, dtype=dtype)
    ids = token_ids(lm, base)
    names = {
        f"{role}_token": lm.tokenizer.id_to_token(index[0] if isinstance(index, list) else index)
        for role, index in ids.items()
    }
    config |= {f"{role}_token_id": index for role, index in ids.items()}
    generation = {k: v for k, v in base.generation_config.items() if k not in _DROPPED}
    for name in ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        if config.get(name) is not None:
            generation.setdefault(name, config[name])
    generation |= {f"{role}_token_id": index for role, index in ids.items()}
    return {
        **base.notices,
        "config.json": to_json(config),
        "generation_config.json": to_json(generation),
        **tokenizer_files(
            with_first_token(lm.tokenizer, lm.bos_id),
            base,
            tokens=names,
            max_length=lm.max_length,
        ),
        "README.md": format_card(
            card, base, _use(lm, config, weights, models), kind="a language model"
        ),
    }


def model_config(base: BaseModel, family: Any, config: Any, *, dtype: str) -> dict[str, Any]:
    """Makes the contents of config.json.

    Args:
        base: What the base model's files say.
        family: `EncoderFamily` or `LMFamily`.
        config: Sizes of the exported model.
        dtype: Of the weights.

    Returns:
        The base model's own file where it describes this model, else what the family writes.
    """
    plain: dict[str, Any] = family.format_config(config)
    if base.config.get("model_type") == plain["model_type"] and _describes(base, family, config):
        kept = {name: value for name, value in base.config.items() if name not in _DROPPED}
        plain = kept | {"architectures": plain["architectures"]}
    # Older versions of transformers know only this name for it, newer ones both.
    return plain | {"torch_dtype": dtype}


def auto_class(lm: LanguageModel) -> str:
    """Returns the class of transformers that loads the exported folder."""
    return "AutoModelForSeq2SeqLM" if lm.family.has_encoder else "AutoModelForCausalLM"


def _describes(base: BaseModel, family: Any, config: Any) -> bool:
    # transformers 5 moves some fields of config.json to generation_config.json.
    declared = {name: value for name, value in base.config.items() if value is not None}
    try:
        return family.parse_config({**base.generation_config, **declared}) == config
    except ValueError:
        return False


def token_ids(lm: LanguageModel, base: BaseModel) -> dict[str, Any]:
    """Returns the ids of the special tokens by role: bos, eos (one or a list of them), pad."""
    ids: dict[str, Any] = {"pad": lm.pad_id}
    if lm.eos_ids:
        ids["eos"] = lm.eos_ids[0] if len(lm.eos_ids) == 1 else list(lm.eos_ids)
    bos = lm.bos_id
    for declared in (base.generation_config, base.config):
        bos = declared.get("bos_token_id") if bos is None else bos
    if isinstance(bos, int):
        ids["bos"] = bos
    return ids


def _use(lm: LanguageModel, config: Mapping[str, Any], weights: bool, models: Sequence[str]) -> Use:
    auto = auto_class(lm)
    task = "text2text-generation" if lm.family.has_encoder else "text-generation"
    examples = {
        "transformers": (
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f'model = {auto}.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        ),
        "ragjax": (
            'from ragjax.models import load_language_model\n\nlm = load_language_model("FOLDER")'
        ),
    }
    gguf = {
        f"llama.cpp, `{file}`": f'from llama_cpp import Llama\n\nlm = Llama("FOLDER/{file}")'
        for file in models
    }
    return Use(
        library="transformers" if weights else "gguf",
        pipeline=task,
        tags=("ragjax", "retrieval-augmented-generation", *(("gguf",) if models else ())),
        summary=(
            f"A language model of type `{config['model_type']}` for up to {lm.max_length:,} tokens."
            + _reads(lm)
        ),
        examples={**(examples if weights else {}), **gguf},
    )


def _reads(lm: LanguageModel) -> str:
    """Says which text a language model was trained to read, "" where it is the usual one."""
    if lm.prompt is None:
        return ""
    text = f"{lm.prompt.context}{lm.prompt.answer}{lm.prompt.end}"
    return f" It reads this text:\n\n```text\n{text}\n```"

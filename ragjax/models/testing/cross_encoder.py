"""Tiny random cross-encoders, written as folders that `load_cross_encoder` reads."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer, processors

from ragjax.models.cross_encoder import head_table
from ragjax.models.files.key_table import named_tensors
from ragjax.models.testing.encoder import tiny_encoder, write_json
from ragjax.storage import write_bytes, write_text


def write_tiny_cross_encoder(
    folder: Path, seed: int = 0, family: str = "bert", **settings: Any
) -> Path:
    """Writes a cross-encoder of two or three layers with random weights.

    Args:
        folder: Made where it does not exist.
        seed: Of the weights.
        family: "bert", "roberta" or "modernbert".
        **settings: Further fields of its `config.json`.

    Returns:
        `folder`, as sentence-transformers' `CrossEncoder` writes it.
    """
    encoder = tiny_encoder(seed, family)
    keys = encoder.family.classifier
    if keys is None:
        raise ValueError(f"family {family!r} has no cross-encoders")
    biased = [f"{name}.bias" for name in (keys.dense, keys.output) if name != "head.dense"]
    table, shapes = head_table(keys, encoder.config.hidden_size, biased)
    rng = np.random.default_rng(seed)
    head = {
        part: {
            name: jnp.asarray(rng.normal(name == "scale", 0.4, leaf.shape), jnp.float32)
            for name, leaf in leaves.items()
        }
        for part, leaves in shapes.items()
    }
    prefix = {"bert": "bert.", "roberta": "roberta.", "modernbert": "model."}[family]
    tower = named_tensors(encoder.params, encoder.family.key_table(encoder.config))
    tensors = {f"{prefix}{name}": tower[name] for name in tower}
    for name, tensor in named_tensors(head, table).items():
        tensors[f"{prefix}{name}" if name.startswith("pooler.") else name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "model.safetensors", save(tensors))
    write_text(folder / "tokenizer.json", _of_pairs(encoder.tokenizer).to_str(pretty=True))
    config = encoder.family.format_config(encoder.config)
    architecture = config["architectures"][0].removesuffix("Model")
    config |= {
        "architectures": [f"{architecture}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": encoder.pad_id,
        # Those of ModernBERT, which are beyond this vocabulary, where nothing is said.
        **{f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")},
    }
    write_json(folder / "config.json", config | settings)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    special |= {"sep_token": "[SEP]", "tokenizer_class": "PreTrainedTokenizerFast"}
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if keys.typed else [])]
    special |= {"model_input_names": inputs}
    write_json(
        folder / "tokenizer_config.json", {**special, "model_max_length": encoder.max_length}
    )
    return folder


def _of_pairs(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer with a template for two texts."""
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer

"""A tiny random text encoder and its tokenizer, built in memory: no files, no network."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from ragjax.models.bert import FAMILY, KEY_TABLE, Bert, BertConfig
from ragjax.models.encoder import TextEncoder, build_encoder
from ragjax.models.nnx_trees import abstract

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'-_()"
_MAX_POSITIONS = 64  # tokens


def tiny_encoder(seed: int = 0) -> TextEncoder:
    """Make a BERT of two layers with random weights and a tokenizer of letters and digits.

    Any text can be tokenised: lower-cased, one token per character (`[UNK]` for others).

    Args:
      seed: of the weights; equal seeds give bit-equal weights.

    Returns:
      An encoder of normalised mean-pooled embeddings `[B, 16]`.
    """
    tokenizer = _tokenizer()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        max_positions=_MAX_POSITIONS,
    )
    return build_encoder(
        FAMILY,
        config,
        _random_params(config, seed),
        tokenizer,
        pad_id=0,
        pooling="mean",
        normalized=True,
        max_length=_MAX_POSITIONS,
        source=f"tiny_encoder({seed})",
    )


def write_tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """Write `tiny_encoder(seed)` as a sentence-transformers folder that `load_encoder` reads.

    Args:
      folder: made where it does not exist.
      seed: of the weights.

    Returns:
      `folder`.
    """
    encoder = tiny_encoder(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(huggingface_tensors(encoder.params), folder / "model.safetensors")
    encoder.tokenizer.save(str(folder / "tokenizer.json"))
    settings = encoder.family.format_config(encoder.config) | {"pad_token_id": encoder.pad_id}
    _write_json(folder / "config.json", settings)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    _write_json(folder / "modules.json", modules)
    pooling = {"word_embedding_dimension": encoder.embedding_size, "pooling_mode_mean_tokens": True}
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length})
    _write_json(folder / "tokenizer_config.json", {"pad_token": "[PAD]"})
    return folder


def huggingface_tensors(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Name a BERT's parameters as Hugging Face does, layer by layer: `KEY_TABLE` backwards.

    Args:
      params: parameters of `ragjax.models.bert.Bert`.

    Returns:
      Tensor name → C-contiguous float32 array (safetensors writes others wrongly).
    """
    tensors = {}
    for pattern, rule in KEY_TABLE.items():
        leaf = params
        for part in rule.path.split("/"):
            leaf = leaf[part]
        pieces = list(leaf) if "{}" in pattern else [leaf]
        for layer, piece in enumerate(pieces):
            array = rule.transform(np.asarray(piece))  # the only transform is its own inverse
            tensors[pattern.replace("{}", str(layer))] = np.ascontiguousarray(array)
    return tensors


def _random_params(config: BertConfig, seed: int) -> dict[str, Any]:
    """Draw parameters with numpy: the module's own initialisation compiles for seconds."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        constants = {"scale": 1.0, "bias": 0.0}
        if (name := path[-1].key) in constants:
            return jnp.full(leaf.shape, constants[name])
        # BERT's deviation of 0.02 leaves all embeddings almost parallel.
        return jnp.asarray(rng.normal(0.0, 0.2, leaf.shape), jnp.float32)

    _, shapes = abstract(lambda: Bert(config, rngs=nnx.Rngs(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def _tokenizer() -> Tokenizer:
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return tokenizer


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")

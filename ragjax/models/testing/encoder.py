"""Tiny random text encoders and their tokenizer, built in memory: no files, no network."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.encoder import EncoderOptions, TextEncoder, build_encoder
from ragjax.models.encoders import bert, causal, dpr, modernbert, roberta
from ragjax.models.families import EncoderFamily
from ragjax.models.files.key_table import named_tensors
from ragjax.models.layers.stacks import Params
from ragjax.storage import write_bytes, write_text

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'-_()"
_MAX_POSITIONS = 64  # tokens
_SIZES: dict[str, Any] = {
    "vocab_size": len(_SPECIAL) + len(_CHARACTERS),
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 32,
    "max_positions": _MAX_POSITIONS,
}


class _Tiny(NamedTuple):
    """A family and what is special about its tiny model."""

    family: EncoderFamily
    config: Any
    normalized: bool = True


_FAMILIES = {
    "bert": _Tiny(bert.FAMILY, bert.BertConfig(**_SIZES)),
    # Compared by dot product, and not in a sentence-transformers folder.
    "dpr": _Tiny(dpr.FAMILY, dpr.DprConfig(**_SIZES, projection_size=12), normalized=False),
    "roberta": _Tiny(
        roberta.FAMILY, roberta.RobertaConfig(**_SIZES, type_vocab_size=1, padding_id=0)
    ),
    "modernbert": _Tiny(
        modernbert.FAMILY,
        modernbert.ModernBertConfig(
            **_SIZES | {"num_layers": 3}, global_layers=(True, False, True), local_attention=8
        ),
    ),
    "qwen3": _Tiny(
        causal.FAMILY,
        DecoderConfig(**_SIZES, num_kv_heads=1, head_dim=8, model_type="qwen3"),
    ),
}


def tiny_encoder(seed: int = 0, family: str = "bert") -> TextEncoder:
    """Makes an encoder of two or three layers with random weights and a tokenizer of characters.

    Any text can be tokenised: lower-cased, one token per letter or digit (`[UNK]` for others).

    Args:
        seed: Of the weights; equal seeds give bit-equal weights.
        family: "bert", "dpr", "roberta", "modernbert" or "qwen3".

    Returns:
        An encoder with the pooling of its family: mean-pooled and normalised embeddings `[B, 16]`,
        but CLS `[B, 12]` for "dpr" (not normalised) and the last token for "qwen3".

    Raises:
        ValueError: Unknown family.
    """
    if family not in _FAMILIES:
        raise ValueError(f"family {family!r} is not one of {', '.join(_FAMILIES)}")
    tiny = _FAMILIES[family]
    name = f"tiny_encoder({seed})" if family == "bert" else f"tiny_encoder({seed}, {family!r})"
    pooling = tiny.family.default_pooling
    options = EncoderOptions(pad_id=0, pooling=pooling, max_length=_MAX_POSITIONS, source=name)
    params = random_params(tiny.family, tiny.config, seed)
    return build_encoder(
        tiny.family, tiny.config, params, _tokenizer(), options, normalized=tiny.normalized
    )


def write_tiny_encoder(folder: Path, seed: int = 0, family: str = "bert") -> Path:
    """Writes `tiny_encoder(seed, family)` as a folder that `load_encoder` reads.

    Args:
        folder: Made where it does not exist.
        seed: Of the weights.
        family: As for `tiny_encoder`; a sentence-transformers folder for all but "dpr".

    Returns:
        `folder`.
    """
    return write_encoder(folder, tiny_encoder(seed, family), dpr=family == "dpr")


def write_encoder(folder: Path, encoder: TextEncoder, *, dpr: bool = False) -> Path:
    """Writes any encoder that normalises its embeddings as a folder, or one of DPR's."""
    folder.mkdir(parents=True, exist_ok=True)
    table = encoder.family.key_table(encoder.config)
    write_bytes(folder / "model.safetensors", save(dict(named_tensors(encoder.params, table))))
    write_text(folder / "tokenizer.json", encoder.tokenizer.to_str(pretty=True))
    settings = encoder.family.format_config(encoder.config) | {"pad_token_id": encoder.pad_id}
    write_json(folder / "config.json", settings)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": encoder.max_length}
    write_json(folder / "tokenizer_config.json", special)
    if dpr:
        return folder
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    switches = {"mean": "pooling_mode_mean_tokens", "lasttoken": "pooling_mode_lasttoken"}
    pooling = {
        "word_embedding_dimension": encoder.embedding_size,
        "pooling_mode_mean_tokens": False,
        switches[encoder.pooling]: True,
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length})
    return folder


def random_params(family: EncoderFamily, config: Any, seed: int, *, vary: bool = False) -> Params:
    """Draws parameters with numpy: a module's own initialisation compiles for seconds.

    Args:
        family: Architecture.
        config: Its sizes.
        seed: Equal seeds give bit-equal parameters.
        vary: True = biases and the scales of norms are random too, for comparisons.

    Returns:
        Nested dict of float32 arrays.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        constants = {"scale": 1.0, "bias": 0.0}
        constant = constants.get(path[-1].key)
        if constant is not None and not vary:
            return jnp.full(leaf.shape, constant)
        # BERT's deviation of 0.02 leaves all embeddings almost parallel.
        return jnp.asarray(rng.normal(constant or 0.0, 0.2, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, family.abstract(config)[1])


def write_json(path: Path, value: Any) -> None:
    """Writes a file of a model folder, and the folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1))


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

"""BART as a family: what loading, training, generation and export need of it.

Contexts and targets both are `<s> … </s>`; the decoder starts from </s>.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.models import seq2seq, seq2seq_checkpoint
from ragjax.models.bart_model import BartConfig
from ragjax.models.bert import MAX_LAYERS, integer_field
from ragjax.models.families import LMFamily
from ragjax.models.safetensors import KeyRule, transpose
from ragjax.models.seq2seq import DECODER, ENCODER, Params
from ragjax.models.seq2seq_cache import CachedSeq2Seq
from ragjax.models.seq2seq_fields import token_id
from ragjax.models.seq2seq_training import merge_trainable, split_trainable

MODEL_TYPES = ("bart",)
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
_ATTENTIONS = {"self_attn": "attention", "encoder_attn": "cross_attention"}
_NORMS = {
    "self_attn_layer_norm": "attention_norm",
    "encoder_attn_layer_norm": "cross_norm",
    "final_layer_norm": "feed_forward_norm",
}
# Markers of the first converted checkpoints.
_IGNORED = ("encoder.version", "decoder.version")


def parse_config(config: Mapping[str, Any]) -> BartConfig:
    """Reads the fields of a `config.json` of model type `bart`.

    Args:
        config: The parsed file.

    Returns:
        The sizes.

    Raises:
        ValueError: A field is missing, is not of its type, or asks for what is not supported.
    """
    # What the first checkpoints could ask for, and later code no longer runs.
    expected = {
        "tie_word_embeddings": True,
        "normalize_before": False,
        "add_final_layer_norm": False,
        "static_position_embeddings": False,
        "normalize_embedding": True,
    }
    for name, value in expected.items():
        if (found := config.get(name, value)) != value:
            raise ValueError(f"{name} = {found!r} is not supported; only {value!r} is")
    return BartConfig(
        vocab_size=integer_field(config, "vocab_size"),
        hidden_size=integer_field(config, "d_model"),
        num_layers=integer_field(config, "decoder_layers", most=MAX_LAYERS),
        num_encoder_layers=integer_field(config, "encoder_layers", most=MAX_LAYERS),
        num_heads=integer_field(config, "decoder_attention_heads"),
        num_encoder_heads=integer_field(config, "encoder_attention_heads"),
        intermediate_size=integer_field(config, "decoder_ffn_dim"),
        encoder_intermediate_size=integer_field(config, "encoder_ffn_dim"),
        max_positions=integer_field(config, "max_position_embeddings"),
        decoder_start_id=token_id(config, "decoder_start_token_id", 2) or 0,
        forced_first_id=token_id(config, "forced_bos_token_id", None),
        activation=str(config.get("activation_function", "gelu")),
        scale_embedding=bool(config.get("scale_embedding", False)),
    )


def format_config(config: BartConfig) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `parse_config` reads as `config`."""
    return {
        "model_type": "bart",
        "architectures": ["BartForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "decoder_layers": config.num_layers,
        "encoder_layers": config.num_encoder_layers,
        "decoder_attention_heads": config.num_heads,
        "encoder_attention_heads": config.num_encoder_heads,
        "decoder_ffn_dim": config.intermediate_size,
        "encoder_ffn_dim": config.encoder_intermediate_size,
        "max_position_embeddings": config.max_positions,
        "decoder_start_token_id": config.decoder_start_id,
        "forced_bos_token_id": config.forced_first_id,
        "activation_function": config.activation,
        "scale_embedding": config.scale_embedding,
        "tie_word_embeddings": config.tie_embeddings,
    }


def key_table() -> dict[str, KeyRule]:
    """Returns where each tensor but the embeddings goes, by its canonical name."""
    table = {}
    for side in (ENCODER, DECODER):
        stem, path = f"{side}.layers.{{}}.", f"{side}/layers/"
        linears = {"fc1": "feed_forward/up", "fc2": "feed_forward/down"}
        for theirs, ours in _ATTENTIONS.items():
            if side == DECODER or ours == "attention":
                linears |= {f"{theirs}.{p}": f"{ours}/{to}" for p, to in _PROJECTIONS.items()}
        for theirs, ours in linears.items():
            table[f"{stem}{theirs}.weight"] = KeyRule(f"{path}{ours}/kernel", transpose)
            table[f"{stem}{theirs}.bias"] = KeyRule(f"{path}{ours}/bias")
        norms = {stem + theirs: path + ours for theirs, ours in _NORMS.items()}
        if side == ENCODER:
            del norms[f"{stem}encoder_attn_layer_norm"]
        norms[f"{side}.layernorm_embedding"] = f"{side}/embedding_norm"
        for theirs, ours in norms.items():
            table[f"{theirs}.weight"] = KeyRule(f"{ours}/scale")
            table[f"{theirs}.bias"] = KeyRule(f"{ours}/bias")
        table[f"{side}.embed_positions.weight"] = KeyRule(f"{side}/positions/embedding")
    return table


def load_params(
    config: BartConfig, tensors: Mapping[str, np.ndarray], *, source: str | Path
) -> Params:
    """Fills the parameters; see `seq2seq_checkpoint.load_params`.

    The tensors may be those of the bare model (as facebook/bart-base has them) or of the model
    with its unembedding, whose names begin with "model.".
    """
    return seq2seq_checkpoint.load_params(
        config,
        tensors,
        key_table(),
        ignored=_IGNORED,
        canonical_key=lambda name: name.removeprefix("model."),
        source=source,
    )


def save_params(config: BartConfig, params: Params) -> dict[str, np.ndarray]:
    """Names the parameters as a Hugging Face folder does: the inverse of `load_params`."""
    tensors = seq2seq_checkpoint.save_params(config, params, key_table())
    bias = tensors.pop("final_logits_bias", np.zeros((1, config.vocab_size), np.float32))
    return {"final_logits_bias": bias} | {f"model.{name}": t for name, t in tensors.items()}


FAMILY = LMFamily(
    model_types=MODEL_TYPES,
    parse_config=parse_config,
    format_config=format_config,
    load_params=load_params,
    save_params=save_params,
    token_log_probs=seq2seq.token_log_probs,
    make_decoder=CachedSeq2Seq,
    split_trainable=split_trainable,
    merge_trainable=merge_trainable,
    has_encoder=True,
)

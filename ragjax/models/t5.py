"""T5 and Flan-T5 as a family: what loading, training, generation and export need of them.

Contexts and targets both end with </s>; the decoder starts from the pad token.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ragjax.models import seq2seq, seq2seq_checkpoint
from ragjax.models.families import LMFamily
from ragjax.models.safetensors import KeyRule, transpose
from ragjax.models.seq2seq import DECODER, ENCODER, Params
from ragjax.models.seq2seq_cache import CachedSeq2Seq
from ragjax.models.seq2seq_training import merge_trainable, split_trainable
from ragjax.models.t5_config import MODEL_TYPES, format_config, parse_config
from ragjax.models.t5_model import T5Config

_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output"}
# Old files have a table for cross-attention too, which no version of the model reads.
_IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def key_table(config: T5Config) -> dict[str, KeyRule]:
    """Returns where each tensor but the embeddings goes, by its name in a Hugging Face folder."""
    table = {}
    for side in (ENCODER, DECODER):
        parts = {"SelfAttention": ("attention", _PROJECTIONS)}
        if side == DECODER:
            parts["EncDecAttention"] = ("cross_attention", _PROJECTIONS)
        names = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
        parts["DenseReluDense"] = ("feed_forward", {**names, "wo": "down"})
        norms = {"attention": "attention_norm", "cross_attention": "cross_norm"}
        for place, (theirs, (ours, linears)) in enumerate(parts.items()):
            stem = f"{side}.block.{{}}.layer.{place}"
            for name, linear in linears.items():
                rule = KeyRule(f"{side}/layers/{ours}/{linear}/kernel", transpose)
                table[f"{stem}.{theirs}.{name}.weight"] = rule
            norm = norms.get(ours, "feed_forward_norm")
            table[f"{stem}.layer_norm.weight"] = KeyRule(f"{side}/layers/{norm}/scale")
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table[bias] = KeyRule(f"{side}/relative_bias/embedding")
        table[f"{side}.final_layer_norm.weight"] = KeyRule(f"{side}/final_norm/scale")
    return table


def load_params(
    config: T5Config, tensors: Mapping[str, np.ndarray], *, source: str | Path
) -> Params:
    """Fills the parameters; see `seq2seq_checkpoint.load_params`."""
    return seq2seq_checkpoint.load_params(
        config, tensors, key_table(config), ignored=_IGNORED, source=source
    )


def save_params(config: T5Config, params: Params) -> dict[str, np.ndarray]:
    """Names the parameters as a Hugging Face folder does: the inverse of `load_params`."""
    return seq2seq_checkpoint.save_params(config, params, key_table(config))


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

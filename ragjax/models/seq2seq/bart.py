"""BART as a family: what loading, training, generation and export need of it.

Contexts and targets both are `<s> … </s>`; the decoder starts from </s>.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ragjax.models.encoders import bert
from ragjax.models.files.config import read_sizes, token_id, write_fields
from ragjax.models.files.key_table import KeyRule, transpose
from ragjax.models.layers.norms import LayerNorm
from ragjax.models.layers.stacks import apply
from ragjax.models.seq2seq.checkpoint import Names, make_family
from ragjax.models.seq2seq.layers import Attention, FeedForward, Layer, LayerParts
from ragjax.models.seq2seq.model import DECODER, ENCODER, Params, Seq2SeqConfig

ACTIVATIONS = {name: bert.ACTIVATIONS[name] for name in ("gelu", "gelu_new", "relu")}
# The first two rows of the position tables are left over from an older numbering and not used.
POSITION_OFFSET = 2


@dataclass(frozen=True, kw_only=True)
class BartConfig(Seq2SeqConfig):
    """Sizes of a BART model; hashable. Common fields are described in `Seq2SeqConfig`.

    Attributes:
        num_heads: Heads of the decoder's attentions; divides `hidden_size`.
        num_encoder_heads: Heads of the encoder's attention; likewise.
        intermediate_size: Width of the decoder's feed-forward layer.
        encoder_intermediate_size: Width of the encoder's.
        activation: A key of `ACTIVATIONS`.
        scale_embedding: True: token embeddings are multiplied by √hidden_size.
    """

    num_heads: int
    num_encoder_heads: int
    intermediate_size: int
    encoder_intermediate_size: int
    activation: str = "gelu"
    scale_embedding: bool = False

    def __post_init__(self) -> None:
        """Refuses sizes that no BART can have.

        Raises:
            ValueError: A size is not positive, the heads do not divide the width, or the
                activation is not supported.
        """
        heads = ("num_heads", "num_encoder_heads")
        self.check_sizes(*heads, "intermediate_size", "encoder_intermediate_size")
        for name in heads:
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"d_model = {self.hidden_size} must be a multiple of {name} = "
                    f"{getattr(self, name)}"
                )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation_function = {self.activation!r} is not supported; one of "
                f"{', '.join(ACTIVATIONS)} is"
            )

    def make_layer(self, side: str, rngs: nnx.Rngs) -> Layer:
        """See `Seq2SeqConfig`."""
        decoder = side == DECODER
        heads = self.num_heads if decoder else self.num_encoder_heads
        width = self.hidden_size // heads
        attention = functools.partial(
            Attention, self.hidden_size, heads, width, scale=width**-0.5, use_bias=True, rngs=rngs
        )
        return Layer(
            LayerParts(
                attention=attention(),
                cross_attention=attention() if decoder else None,
                feed_forward=FeedForward(
                    self.hidden_size,
                    self.intermediate_size if decoder else self.encoder_intermediate_size,
                    ACTIVATIONS[self.activation],
                    gated=False,
                    use_bias=True,
                    rngs=rngs,
                ),
                make_norm=lambda: LayerNorm(self.hidden_size),
                norm_first=False,
            )
        )

    @property
    def position_limit(self) -> int | None:
        """See `Seq2SeqConfig`."""
        return self.max_positions

    def init_outer(self, side: str, key: Array) -> Params:
        """See `Seq2SeqConfig`."""
        shape = (self.max_positions + POSITION_OFFSET, self.hidden_size)
        norm = {"scale": jnp.ones(self.hidden_size), "bias": jnp.zeros(self.hidden_size)}
        return {
            "positions": {"embedding": 0.02 * jax.random.normal(key, shape)},
            "embedding_norm": norm,
        }

    def enter(self, outer: Params, side: str, embedded: Array, positions: Array) -> Array:
        """See `Seq2SeqConfig`.

        Raises:
            ValueError: There are more slots than positions.
        """
        if embedded.shape[1] > self.max_positions:  # the table would be read at its end, silently
            what = "context" if side == ENCODER else "target"
            raise ValueError(
                f"{embedded.shape[1]} tokens per {what}, but the model has {self.max_positions} "
                f"positions; use shorter {what}s"
            )
        if self.scale_embedding:
            embedded = embedded * jnp.asarray(self.hidden_size**0.5, embedded.dtype)
        table = outer["positions"]["embedding"]
        embedded = embedded + table[positions + POSITION_OFFSET]
        return apply(lambda: LayerNorm(self.hidden_size), outer["embedding_norm"], embedded)


_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
_ATTENTIONS = {"self_attn": "attention", "encoder_attn": "cross_attention"}
_NORMS = {
    "self_attn_layer_norm": "attention_norm",
    "encoder_attn_layer_norm": "cross_norm",
    "final_layer_norm": "feed_forward_norm",
}


# Size: field of config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_layers": "decoder_layers",
    "num_encoder_layers": "encoder_layers",
    "num_heads": "decoder_attention_heads",
    "num_encoder_heads": "encoder_attention_heads",
    "intermediate_size": "decoder_ffn_dim",
    "encoder_intermediate_size": "encoder_ffn_dim",
    "max_positions": "max_position_embeddings",
}


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
        **read_sizes(config, _SIZES),
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
        **write_fields(config, _SIZES),
        "decoder_start_token_id": config.decoder_start_id,
        "forced_bos_token_id": config.forced_first_id,
        "activation_function": config.activation,
        "scale_embedding": config.scale_embedding,
        "tie_word_embeddings": config.tie_embeddings,
    }


def key_table(config: BartConfig) -> dict[str, KeyRule]:
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


# Tensors may be those of the bare model (as facebook/bart-base has them).
FAMILY = make_family(
    ("bart",),
    parse_config,
    format_config,
    Names(
        key_table,
        # Markers of the first converted checkpoints.
        ignored=("encoder.version", "decoder.version"),
        prefix="model.",
        has_final_bias=True,
    ),
)

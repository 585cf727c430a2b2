"""BART as a family: what loading, training, generation and export need of it.

Contexts and targets both are `<s> … </s>`; the decoder starts from </s>.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ragjax.models.encoders import bert
from ragjax.models.families import LMFamily
from ragjax.models.files.config import MAX_LAYERS, integer_field, token_id
from ragjax.models.files.key_table import KeyRule, transpose
from ragjax.models.layers import stacks
from ragjax.models.seq2seq import checkpoint as seq2seq_checkpoint
from ragjax.models.seq2seq import model as seq2seq
from ragjax.models.seq2seq.cache import CachedSeq2Seq
from ragjax.models.seq2seq.layers import Attention, FeedForward, Layer, LayerParts
from ragjax.models.seq2seq.model import DECODER, ENCODER, Params, Seq2SeqConfig
from ragjax.models.trainable import SEQ2SEQ

ACTIVATIONS = {name: bert.ACTIVATIONS[name] for name in ("gelu", "gelu_new", "relu")}
# The first two rows of the position tables are left over from an older numbering and not used.
POSITION_OFFSET = 2
_NORM_EPS = 1e-5


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
                make_norm=lambda: _make_norm(self.hidden_size),
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
        norm = stacks.merge(_norm_structure(self.hidden_size), outer["embedding_norm"])
        return norm(embedded + table[positions + POSITION_OFFSET])

    def leave(self, outer: Params, side: str, hidden: Array) -> Array:
        """See `Seq2SeqConfig`."""
        return hidden

    def position_bias(
        self, outer: Params, side: str, query_slots: Array, key_slots: Array
    ) -> Array | None:
        """See `Seq2SeqConfig`."""
        return None

    @property
    def output_scale(self) -> float:
        """See `Seq2SeqConfig`."""
        return 1.0


class LayerNorm(nnx.Module):
    """Scales each vector to mean 0 and variance 1 in float32, then by learned weights."""

    def __init__(self, size: int) -> None:
        """Creates a unit scale and a zero bias of `size` entries."""
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, hidden: Array) -> Array:
        """Normalises the last axis; the result has the dtype of the input."""
        wide = hidden.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        axes = (1,) * (hidden.ndim - 1) + (-1,)
        scale, bias = (part[...].reshape(axes) for part in (self.scale, self.bias))
        normalised = centred * jax.lax.rsqrt(variance + _NORM_EPS)
        return (normalised * scale + bias).astype(hidden.dtype)


def _make_norm(size: int) -> LayerNorm:
    return LayerNorm(size)


@functools.lru_cache
def _norm_structure(size: int) -> object:
    return stacks.abstract(lambda: _make_norm(size))[0]


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
    layout=SEQ2SEQ,
    has_encoder=True,
)

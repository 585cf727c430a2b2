"""What BART does in its own way: learned positions, and norms after each residual.

Shapes: R rows, T slots, E hidden, H heads.

References:
    Lewis et al., 2020, "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language
    Generation, Translation, and Comprehension", section 2.1.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ragjax.models import bert, nnx_trees
from ragjax.models.seq2seq import DECODER, ENCODER, Params, Seq2SeqConfig
from ragjax.models.seq2seq_layers import Attention, FeedForward, Layer, LayerParts

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
        norm = nnx_trees.merge(_norm_structure(self.hidden_size), outer["embedding_norm"])
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
    return nnx_trees.abstract(lambda: _make_norm(size))[0]

"""T5 and Flan-T5 as a family: what loading, training, generation and export need of them.

Contexts and targets both end with </s>; the decoder starts from the pad token.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ragjax.models.encoders import bert
from ragjax.models.files.config import (
    integer_field,
    number_field,
    read_sizes,
    token_id,
    write_fields,
)
from ragjax.models.files.key_table import KeyRule, transpose
from ragjax.models.layers.norms import RMSNorm
from ragjax.models.layers.stacks import apply
from ragjax.models.seq2seq.checkpoint import Names, make_family
from ragjax.models.seq2seq.layers import Attention, FeedForward, Layer, LayerParts
from ragjax.models.seq2seq.model import DECODER, ENCODER, Params, Seq2SeqConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **{name: bert.ACTIVATIONS[name] for name in ("relu", "gelu", "gelu_new")},
    "silu": jax.nn.silu,
}


@dataclass(frozen=True, kw_only=True)
class T5Config(Seq2SeqConfig):
    """Sizes of a T5 model; hashable. Common fields are described in `Seq2SeqConfig`.

    Attributes:
        head_dim: Width of one head; `num_heads * head_dim` need not be `hidden_size`.
        num_heads: Heads of every attention.
        intermediate_size: Width of the feed-forward layer.
        activation: A key of `ACTIVATIONS`.
        gated: True: the feed-forward layer is gated (T5 1.1, Flan-T5).
        num_buckets: Groups that distances between tokens are sorted into.
        max_distance: From this distance in tokens on, all share the last group.
        layer_norm_eps: Added to the mean square before the root.
        tie_embeddings: True: the unembedding is the embedding table, and the decoder's output is
            scaled by 1/√hidden_size (T5 1.0). False: neither (T5 1.1, Flan-T5).
        unembedding_may_be_shared: With `tie_embeddings=False`: where the file has no unembedding,
            it is equal to the embedding table. Matters for reading files alone.
    """

    head_dim: int
    num_heads: int
    intermediate_size: int
    activation: str = "relu"
    gated: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    layer_norm_eps: float = 1e-6
    # Says nothing about the model that was read: equal models are equal, whatever wrote them.
    unembedding_may_be_shared: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses sizes that no T5 can have.

        Raises:
            ValueError: A size is not positive, or there are too few buckets for the distances.
        """
        self.check_sizes("head_dim", "num_heads", "intermediate_size")
        if self.num_buckets < 4 or self.num_buckets % 2 or self.max_distance <= self.num_buckets:
            raise ValueError(
                "relative_attention_num_buckets must be even, at least 4 and below "
                f"relative_attention_max_distance, got {self.num_buckets} and {self.max_distance}"
            )

    def make_layer(self, side: str, rngs: nnx.Rngs) -> Layer:
        """See `Seq2SeqConfig`."""
        # Scores are not scaled in T5: the queries are initialised smaller instead.
        query_init = nnx.initializers.normal((self.hidden_size * self.head_dim) ** -0.5)
        attention = functools.partial(
            Attention,
            self.hidden_size,
            self.num_heads,
            self.head_dim,
            scale=1.0,
            use_bias=False,
            query_init=query_init,
            rngs=rngs,
        )
        return Layer(
            LayerParts(
                attention=attention(),
                cross_attention=attention() if side == DECODER else None,
                feed_forward=FeedForward(
                    self.hidden_size,
                    self.intermediate_size,
                    ACTIVATIONS[self.activation],
                    gated=self.gated,
                    use_bias=False,
                    rngs=rngs,
                ),
                make_norm=self._make_norm,
                norm_first=True,
            )
        )

    def _make_norm(self) -> RMSNorm:
        return RMSNorm(self.hidden_size, epsilon=self.layer_norm_eps)

    def init_outer(self, side: str, key: Array) -> Params:
        """See `Seq2SeqConfig`."""
        shape = (self.num_buckets, self.num_heads)
        return {
            "relative_bias": {"embedding": self.hidden_size**-0.5 * jax.random.normal(key, shape)},
            "final_norm": {"scale": jnp.ones(self.hidden_size)},
        }

    def leave(self, outer: Params, side: str, hidden: Array) -> Array:
        """See `Seq2SeqConfig`."""
        return apply(self._make_norm, outer["final_norm"], hidden)

    def position_bias(
        self, outer: Params, side: str, query_slots: Array, key_slots: Array
    ) -> Array | None:
        """See `Seq2SeqConfig`."""
        # Differences of slots are those of positions, on whichever side a row is padded.
        buckets = relative_buckets(
            key_slots[None, :] - query_slots[:, None],
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
            both_ways=side == ENCODER,
        )
        table = outer["relative_bias"]["embedding"].astype(jnp.float32)
        return table[buckets].transpose(2, 0, 1)[None]

    @property
    def output_scale(self) -> float:
        """See `Seq2SeqConfig`."""
        return self.hidden_size**-0.5 if self.tie_embeddings else 1.0


def relative_buckets(
    offsets: Array, *, num_buckets: int, max_distance: int, both_ways: bool
) -> Array:
    """Sorts offsets between tokens into groups: near ones exactly, far ones logarithmically.

    Args:
        offsets: `[T, S]` int32, position of the attended token minus that of the attending one.
        num_buckets: Groups.
        max_distance: From this distance on, all share the last group.
        both_ways: True: half of the groups are for tokens that follow. False: these share the
            group of distance 0, as a causal mask hides them.

    Returns:
        `[T, S]` int32 below `num_buckets`.
    """
    buckets = num_buckets // 2 if both_ways else num_buckets
    by_distance = jnp.asarray(_distance_buckets(buckets, max_distance))
    distance = jnp.abs(offsets) if both_ways else jnp.maximum(-offsets, 0)
    group = by_distance[jnp.minimum(distance, max_distance)]
    return group + jnp.where(offsets > 0, buckets, 0) if both_ways else group


def _distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the group of each distance 0 … `max_distance`."""
    # On the host and in float32: at distances where the logarithm is a whole number, another
    # rounding would choose another group than the checkpoint was trained with.
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
    far = np.minimum(exact + ratio.astype(np.int32), num_buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


# Size: field of config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "head_dim": "d_kv",
    "intermediate_size": "d_ff",
    "num_encoder_layers": "num_layers",
    "num_layers": "num_decoder_layers",
    "num_heads": "num_heads",
    "num_buckets": "relative_attention_num_buckets",
}
_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    # Relative positions have no end; this is the length of the pre-training texts.
    "n_positions": 512,
}
_FARTHEST = 10**6  # tokens; a larger number is a damaged file, and would be counted up to


def parse_config(config: Mapping[str, Any]) -> T5Config:
    """Reads the fields of a `config.json` of model type `t5`.

    Args:
        config: The parsed file.

    Returns:
        The sizes.

    Raises:
        ValueError: A field is missing, is not of its type, or asks for what is not supported.
    """
    gated, activation = _feed_forward(str(config.get("feed_forward_proj", "relu")))
    # transformers 5 stores the scaling apart, and says that every model is tied: then the file of
    # one that is not scaled has an unembedding only where it differs from the embedding table.
    tied_table = config.get("tie_word_embeddings") is not False
    tied = bool(config.get("scale_decoder_outputs", tied_table))
    pad = token_id(config, "pad_token_id", 0)
    given = {name: value for name, value in config.items() if value is not None}
    sizes = {**_DEFAULTS, "num_decoder_layers": given.get("num_layers"), **given}
    return T5Config(
        **read_sizes(sizes, _SIZES),
        max_distance=integer_field(sizes, "relative_attention_max_distance", most=_FARTHEST),
        layer_norm_eps=number_field(config, "layer_norm_epsilon", 1e-6),
        max_positions=integer_field(sizes, "n_positions"),
        decoder_start_id=token_id(config, "decoder_start_token_id", pad) or 0,
        gated=gated,
        activation=activation,
        tie_embeddings=tied,
        unembedding_may_be_shared=tied_table and not tied,
    )


def format_config(config: T5Config) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `parse_config` reads as `config`."""
    activation = config.activation
    if config.gated:
        activation = "gelu" if activation == "gelu_new" else activation
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        **write_fields(config, _SIZES),
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.layer_norm_eps,
        "n_positions": config.max_positions,
        "decoder_start_token_id": config.decoder_start_id,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _feed_forward(name: str) -> tuple[bool, str]:
    """Returns whether the feed-forward block is gated, and its activation."""
    gated, activation = name.startswith("gated-"), name.removeprefix("gated-")
    if name == "gated-gelu":
        activation = "gelu_new"  # what T5 1.1 was trained with
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"feed_forward_proj = {name!r} is not supported; one of {', '.join(ACTIVATIONS)} is, "
            "or gated- and one of them"
        )
    return gated, activation


_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output"}


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


FAMILY = make_family(
    ("t5",),
    parse_config,
    format_config,
    # Old files have a table for cross-attention too, which no version of the model reads.
    Names(
        key_table,
        ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    ),
)

"""What T5 and Flan-T5 do in their own way: relative positions, RMS norms, gated feed-forward.

Shapes: R rows, T query slots, S key slots, E hidden, H heads.

References:
    Raffel et al., 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer", section 2.1.
    Shazeer, 2020, "GLU Variants Improve Transformer" (the feed-forward block of T5 1.1).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ragjax.models import bert, nnx_trees
from ragjax.models.decoder_layers import RMSNorm
from ragjax.models.seq2seq import DECODER, ENCODER, Params, Seq2SeqConfig
from ragjax.models.seq2seq_layers import Attention, FeedForward, Layer, LayerParts

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
                make_norm=lambda: _make_norm(self),
                norm_first=True,
            )
        )

    def init_outer(self, side: str, key: Array) -> Params:
        """See `Seq2SeqConfig`."""
        shape = (self.num_buckets, self.num_heads)
        return {
            "relative_bias": {"embedding": self.hidden_size**-0.5 * jax.random.normal(key, shape)},
            "final_norm": {"scale": jnp.ones(self.hidden_size)},
        }

    def enter(self, outer: Params, side: str, embedded: Array, positions: Array) -> Array:
        """See `Seq2SeqConfig`."""
        return embedded

    def leave(self, outer: Params, side: str, hidden: Array) -> Array:
        """See `Seq2SeqConfig`."""
        return nnx_trees.merge(_norm_structure(self), outer["final_norm"])(hidden)

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


def _make_norm(config: T5Config) -> RMSNorm:
    return RMSNorm(config.hidden_size, epsilon=config.layer_norm_eps)


@functools.lru_cache
def _norm_structure(config: T5Config) -> object:
    return nnx_trees.abstract(lambda: _make_norm(config))[0]

"""What all encoder-decoder models here share: encoding contexts, scoring targets.

Shapes: R rows, L context slots, T target slots, S slots that are attended to, N layers, E hidden,
H heads, D head width, V vocabulary. Parameters are a nested dict of arrays:

    {"embed": {"embedding": [V, E]},
     "encoder": {"layers": {...}, ...}, "decoder": {"layers": {...}, ...},
     "unembed": {"kernel": [E, V]},                     (absent where embeddings are tied)
     "final_bias": {"bias": [1, V]}}                    (absent where it is zero)

The leaves of "layers" are identical layers stacked on axis 0, which `stacks.over_stacks` runs. A
side's "layers" may also be a tuple of such stacks, run in turn (`ragjax.models.trainable`).

References:
    Vaswani et al., 2017, "Attention Is All You Need", section 3.
"""

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ragjax.models.inputs import LMBatch, check_batch
from ragjax.models.layers import stacks
from ragjax.models.layers.stacks import over_stacks
from ragjax.models.layers.vocabulary import score
from ragjax.models.seq2seq.layers import KeyValues, Layer

ENCODER, DECODER = "encoder", "decoder"
Params = dict[str, Any]
# (layer, what asks the cross-attention [R, T, E], its keys and values [R, H, L, D]) -> any pytree.
Observer = Callable[[Layer, Array, KeyValues], Any]


class Memory(NamedTuple):
    """Contexts as the decoder's cross-attention reads them."""

    # The encoder's output [R, L, E], or `remember` of it: leaves [N, R, H, L, D].
    states: Any
    mask: Array  # [R, L] bool, True = token of the context


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(abc.ABC):
    """Sizes of an encoder-decoder model and what its family does in its own way; hashable.

    Attributes:
        vocab_size: Rows of the embedding table.
        hidden_size: Width of the residual stream.
        num_layers: Layers of the decoder.
        num_encoder_layers: Layers of the encoder.
        max_positions: Longest context and longest target in tokens.
        decoder_start_id: Token that the decoder reads before the first target.
        forced_first_id: The only token that a generated answer may begin with, or None. Scores
            are not touched by it.
        tie_embeddings: True: the unembedding is the embedding table.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_encoder_layers: int
    max_positions: int
    decoder_start_id: int
    forced_first_id: int | None = None
    tie_embeddings: bool = True

    def check_sizes(self, *names: str) -> None:
        """Refuses fields below 1.

        Raises:
            ValueError: One of the named fields, or of the common ones, is not positive, or a token
                id is outside the vocabulary.
        """
        common = ("vocab_size", "hidden_size", "num_layers", "num_encoder_layers", "max_positions")
        for name in (*common, *names):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decoder_start_id", "forced_first_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name} must be a token id below vocab_size = {self.vocab_size}, got {value}"
                )

    @abc.abstractmethod
    def make_layer(self, side: str, rngs: nnx.Rngs) -> Layer:
        """Makes one layer of `ENCODER` or `DECODER` with random weights."""

    @abc.abstractmethod
    def init_outer(self, side: str, key: Array) -> Params:
        """Draws the parameters of a side that stand outside its layers."""

    def enter(self, outer: Params, side: str, embedded: Array, positions: Array) -> Array:
        """Turns token embeddings `[R, T, E]` at positions `[R, T]` into the first hidden states."""
        return embedded

    def leave(self, outer: Params, side: str, hidden: Array) -> Array:
        """Turns the last layer's hidden states `[R, T, E]` into the side's output."""
        return hidden

    def position_bias(
        self, outer: Params, side: str, query_slots: Array, key_slots: Array
    ) -> Array | None:
        """Returns what positions add to self-attention's scores, `[1, H, T, S]`, or None."""
        return None

    @property
    def position_limit(self) -> int | None:
        """Most slots that a side has positions for; None: as many as there are."""
        return None

    @property
    def output_scale(self) -> float:
        """Factor of the decoder's output before the unembedding."""
        return 1.0


def init_params(config: Seq2SeqConfig, key: Array) -> Params:
    """Draws random float32 parameters, in the layout of the module docstring.

    Args:
        config: Sizes.
        key: A `jax.random` key.

    Returns:
        Nested dict of arrays.
    """
    embed_key, unembed_key, *side_keys = jax.random.split(key, 4)
    shape = (config.vocab_size, config.hidden_size)
    params: Params = {"embed": {"embedding": 0.02 * jax.random.normal(embed_key, shape)}}
    sizes = {ENCODER: config.num_encoder_layers, DECODER: config.num_layers}
    for (side, num_layers), side_key in zip(sizes.items(), side_keys, strict=True):
        keys = jax.random.split(side_key, num_layers + 1)

        def init_layer(layer_key: Array, side: str = side) -> Params:
            return stacks.split(config.make_layer(side, nnx.Rngs(layer_key)))[1]

        layers = jax.vmap(init_layer)(keys[1:])
        params[side] = {**config.init_outer(side, keys[0]), "layers": layers}
    if not config.tie_embeddings:
        params["unembed"] = {"kernel": 0.02 * jax.random.normal(unembed_key, shape[::-1])}
    return params


def token_log_probs(
    config: Seq2SeqConfig, params: Params, batch: LMBatch, *, remat: bool = False
) -> Array:
    """Scores the target tokens given their context: log p(y_t | c, y_<t).

    The encoder reads the context, wherever it is padded; the decoder reads `decoder_start_id` and
    the targets. Exactly the given target ids are scored: tokenise them as the model was trained
    (T5: ending with </s>; BART: <s> … </s>), and contexts likewise.

    Args:
        config: Sizes.
        params: Parameters.
        batch: Contexts padded on either side and right-padded targets, `[R, L]` and `[R, T]`.
        remat: True: recompute each layer in the backward pass instead of keeping its
            intermediate values (less memory, about a third more work).

    Returns:
        `[R, T]` float32 in nats, exactly 0 where `target_mask` is False.

    Raises:
        ValueError: The shapes do not fit together.

    Gradients:
        With respect to `params`; a row whose context is empty still has a finite gradient.
    """
    check_batch(batch)
    encoded = encode(config, params, batch.context_ids, batch.context_mask, remat=remat)
    memory = Memory(encoded, batch.context_mask)
    return target_log_probs(
        config, params, memory, batch.target_ids, batch.target_mask, remat=remat
    )


def encode(
    config: Seq2SeqConfig, params: Params, ids: Array, mask: Array, *, remat: bool = False
) -> Array:
    """Reads contexts.

    Args:
        config: Sizes.
        params: Parameters.
        ids: `[R, L]` int32.
        mask: `[R, L]` bool, True = real token; the real tokens of a row stand together.
        remat: True: recompute each layer in the backward pass.

    Returns:
        `[R, L, E]`, in the dtype of the parameters; padded slots are finite and without meaning.
    """
    outer = params[ENCODER]
    # Counted from the first real token: the same on whichever side a row is padded.
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    slots = jnp.arange(ids.shape[1])
    bias = config.position_bias(outer, ENCODER, slots, slots)
    graphdef = _layer_structure(config, ENCODER)
    attended = mask[:, None, None, :]

    def apply(hidden: Array, inputs: Any) -> tuple[Array, None]:
        layer = stacks.merge(graphdef, inputs[0])
        return layer.encode(hidden, mask=attended, bias=bias), None

    hidden = config.enter(outer, ENCODER, _embed(params, ids), positions)
    hidden, _ = over_stacks(apply, hidden, outer["layers"], remat=remat)
    return config.leave(outer, ENCODER, hidden)


def target_log_probs(
    config: Seq2SeqConfig,
    params: Params,
    memory: Memory,
    target_ids: Array,
    target_mask: Array,
    *,
    remat: bool = False,
) -> Array:
    """Scores targets after contexts that have been encoded.

    Args:
        config: Sizes.
        params: Parameters.
        memory: The contexts.
        target_ids: `[R, T]` int32, right-padded.
        target_mask: `[R, T]` bool, True = token counts.
        remat: True: recompute each layer in the backward pass.

    Returns:
        `[R, T]` float32 in nats, 0 where masked.
    """
    ids = shift_right(config, target_ids)
    hidden = decode(config, params, ids, memory=memory, remat=remat)[0]
    return score(params, hidden, target_ids, target_mask)


def decode(
    config: Seq2SeqConfig,
    params: Params,
    ids: Array,
    *,
    memory: Memory,
    past: KeyValues | None = None,
    past_length: Array | None = None,
    remat: bool = False,
    observe: Observer | None = None,
) -> tuple[Array, KeyValues, Any]:
    """Runs the decoder over tokens that follow those of `past`.

    Args:
        config: Sizes.
        params: Parameters.
        ids: `[R, T]` int32, what the decoder reads.
        memory: The contexts.
        past: Keys and values of earlier slots, leaves `[N, R, H, C, D]`, or None.
        past_length: `[]` int32, how many of the C slots are filled; with `past`.
        remat: True: recompute each layer in the backward pass.
        observe: Looks at each layer's cross-attention.

    Returns:
        Output `[R, T, E]` ready for the unembedding, keys and values of the T slots with leaves
        `[N, R, H, T, D]`, and what `observe` returned, stacked over the layers on axis 0.
    """
    outer, length = params[DECODER], ids.shape[1]
    first = jnp.zeros((), jnp.int32) if past_length is None else past_length
    slots = first + jnp.arange(length)
    allowed, key_slots = jnp.tril(jnp.ones((length, length), bool)), slots
    if past is not None:
        earlier = jnp.arange(past.keys.shape[3])
        filled = jnp.broadcast_to((earlier < first)[None, :], (length, earlier.shape[0]))
        allowed = jnp.concatenate([filled, allowed], axis=1)
        key_slots = jnp.concatenate([earlier, slots])
    bias = config.position_bias(outer, DECODER, slots, key_slots)
    graphdef = _layer_structure(config, DECODER)
    given = memory.states if isinstance(memory.states, KeyValues) else None
    attended = memory.mask[:, None, None, :]

    def apply(hidden: Array, inputs: Any) -> tuple[Array, Any]:
        layer_params, (layer_past, layer_memory) = inputs
        layer = stacks.merge(graphdef, layer_params)
        if layer_memory is None:
            layer_memory = layer.remember(memory.states)
        result = layer.decode(
            hidden,
            allowed=allowed[None, None],
            bias=bias,
            past=layer_past,
            memory=layer_memory,
            memory_mask=attended,
        )
        seen = observe(layer, result.cross_input, layer_memory) if observe else None
        return result.hidden, (result.known, seen)

    positions = jnp.broadcast_to(slots[None, :], ids.shape)
    hidden = config.enter(outer, DECODER, _embed(params, ids), positions)
    hidden, (new, seen) = over_stacks(apply, hidden, outer["layers"], (past, given), remat=remat)
    hidden = config.leave(outer, DECODER, hidden)
    return hidden * jnp.asarray(config.output_scale, hidden.dtype), new, seen


def remember(config: Seq2SeqConfig, params: Params, memory: Memory) -> Memory:
    """Projects the encoder's output to the keys and values of every layer's cross-attention.

    Args:
        config: Sizes.
        params: Parameters.
        memory: Contexts, their states `[R, L, E]`.

    Returns:
        The same contexts with states `[N, R, H, L, D]`.
    """
    graphdef = _layer_structure(config, DECODER)

    def project(carry: None, inputs: Any) -> tuple[None, KeyValues]:
        return carry, stacks.merge(graphdef, inputs[0]).remember(memory.states)

    return memory._replace(states=over_stacks(project, None, params[DECODER]["layers"])[1])


def shift_right(config: Seq2SeqConfig, target_ids: Array) -> Array:
    """Returns what the decoder reads to predict `target_ids` `[R, T]`: the start token first."""
    start = jnp.full((target_ids.shape[0], 1), config.decoder_start_id, target_ids.dtype)
    return jnp.concatenate([start, target_ids[:, :-1]], axis=1)


def _embed(params: Params, ids: Array) -> Array:
    return params["embed"]["embedding"][ids]


@functools.lru_cache
def _layer_structure(config: Seq2SeqConfig, side: str) -> Any:
    return stacks.abstract(lambda: config.make_layer(side, nnx.Rngs(0)))[0]

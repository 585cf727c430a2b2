"""A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, gated feed-forward.

Shapes: R rows, L context slots, T target slots, S slots that are attended to, N layers, H hidden,
D head width, V vocabulary. Parameters are a nested dict of arrays:

    {"embed": {"embedding": [V, H]}, "layers": {...}, "final_norm": {"scale": [H]},
     "unembed": {"kernel": [H, V]}}                     (no "unembed" where embeddings are tied)

The leaves of `params["layers"]` are the identical layers stacked on axis 0, and `lax.scan` runs
over them: one layer is compiled, whatever N is. `params["layers"]` may also be a tuple of such
stacks, scanned in turn: differentiating with respect to the last of them does no backward work for
the earlier ones (`split_trainable`).

References:
    Touvron et al., 2023, "LLaMA: Open and Efficient Foundation Language Models", section 2.2.
    Ainslie et al., 2023, "GQA: Training Generalized Multi-Query Transformer Models".
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ragjax.models import nnx_trees
from ragjax.models.inputs import LMBatch
from ragjax.models.llama_config import LlamaConfig, RotaryScaling

# Logits are materialised for this many (token, vocabulary entry) pairs at a time: 64 MiB.
_LOGIT_CHUNK_ELEMENTS = 2**24
# Finite, so that a slot that may attend to nothing yields numbers (which a mask then drops)
# instead of NaN, whose gradient no mask can drop.
_MASKED_SCORE = -1e9


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles of each slot."""

    cos: Array  # [R, T, D / 2] float32
    sin: Array  # [R, T, D / 2] float32


class KeyValues(NamedTuple):
    """Keys (rotated) and values of one layer, or of all layers with a leading axis N."""

    keys: Array  # [R, kv_heads, S, D]
    values: Array  # [R, kv_heads, S, D]


class RMSNorm(nnx.Module):
    """Scales each vector to unit root mean square, then by a learned weight."""

    def __init__(self, size: int, *, epsilon: float) -> None:
        """Creates a unit scale of `size` entries."""
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, hidden: Array) -> Array:
        """Normalises the last axis, in float32."""
        wide = hidden.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normalised = (wide * lax.rsqrt(mean_square + self.epsilon)).astype(hidden.dtype)
        return normalised * _expand(self.scale[...], normalised.ndim)


class LlamaLayer(nnx.Module):
    """One decoder layer: grouped-query attention and a gated feed-forward, both residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        """Creates random weights of the configuration's sizes."""
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.config = config
        self.attention_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.query = linear(config.hidden_size, queries, use_bias=config.qkv_bias)
        self.key = linear(config.hidden_size, keys, use_bias=config.qkv_bias)
        self.value = linear(config.hidden_size, keys, use_bias=config.qkv_bias)
        self.output = linear(queries, config.hidden_size, use_bias=False)
        self.feed_forward_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.gate = linear(config.hidden_size, config.intermediate_size, use_bias=False)
        self.up = linear(config.hidden_size, config.intermediate_size, use_bias=False)
        self.down = linear(config.intermediate_size, config.hidden_size, use_bias=False)

    def __call__(
        self, hidden: Array, rotary: Rotary, allowed: Array, past: KeyValues | None = None
    ) -> tuple[Array, KeyValues]:
        """Applies the layer.

        Args:
            hidden: `[R, T, H]`.
            rotary: Angles of the T slots.
            allowed: `[R, T, S]` bool; True where slot t may attend to slot s. The S slots are those
                of `past` followed by the T new ones.
            past: Keys and values of earlier slots, or None.

        Returns:
            The new hidden states `[R, T, H]`, and the keys and values of the T slots.
        """
        normalised = self.attention_norm(hidden)
        queries = _rotate(self._split_heads(self.query(normalised)), rotary)
        new = KeyValues(
            _rotate(self._split_heads(self.key(normalised)), rotary),
            self._split_heads(self.value(normalised)),
        )
        hidden = hidden + self.output(_attend(queries, new, past, allowed))
        normalised = self.feed_forward_norm(hidden)
        gated = jax.nn.silu(self.gate(normalised)) * self.up(normalised)
        return hidden + self.down(gated), new

    def _split_heads(self, projected: Array) -> Array:
        rows, slots, _ = projected.shape
        return projected.reshape(rows, slots, -1, self.config.head_dim).swapaxes(1, 2)


def init_params(config: LlamaConfig, key: Array) -> dict[str, Any]:
    """Draws random float32 parameters, in the layout of the module docstring.

    Args:
        config: Sizes.
        key: A `jax.random` key.

    Returns:
        Nested dict of arrays.
    """
    embed_key, unembed_key, layers_key = jax.random.split(key, 3)

    def init_layer(layer_key: Array) -> dict[str, Any]:
        return nnx_trees.split(LlamaLayer(config, rngs=nnx.Rngs(layer_key)))[1]

    shape = (config.vocab_size, config.hidden_size)
    params: dict[str, Any] = {
        "embed": {"embedding": 0.02 * jax.random.normal(embed_key, shape)},
        "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": {"scale": jnp.ones(config.hidden_size)},
    }
    if not config.tie_embeddings:
        params["unembed"] = {"kernel": 0.02 * jax.random.normal(unembed_key, shape[::-1])}
    return params


def token_log_probs(
    config: LlamaConfig, params: dict[str, Any], batch: LMBatch, *, remat: bool = False
) -> Array:
    """Scores the target tokens given their context: log p(y_t | c, y_<t).

    The unembedding runs at the target positions only, a bounded number of them at a time.

    Args:
        config: Sizes.
        params: Parameters.
        batch: Left-padded contexts and right-padded targets, `[R, L]` and `[R, T]`.
        remat: True: recompute each layer in the backward pass instead of keeping its
            intermediate values (less memory, about a third more work).

    Returns:
        `[R, T]` float32 in nats, exactly 0 where `target_mask` is False.

    Raises:
        ValueError: The shapes do not fit together.

    Gradients:
        With respect to `params`; a row whose context is empty still has a finite gradient.
    """
    _check_batch(batch)
    context_length = batch.context_ids.shape[1]
    ids = jnp.concatenate([batch.context_ids, batch.target_ids[:, :-1]], axis=1)
    mask = jnp.concatenate([batch.context_mask, batch.target_mask[:, :-1]], axis=1)
    hidden, _ = run_layers(
        config, params, ids, positions=mask_positions(mask), allowed=causal(mask), remat=remat
    )
    log_probs = _target_log_probs(params, hidden[:, context_length - 1 :], batch.target_ids)
    return jnp.where(batch.target_mask, log_probs, 0.0)


def run_layers(
    config: LlamaConfig,
    params: dict[str, Any],
    ids: Array,
    *,
    positions: Array,
    allowed: Array,
    past: KeyValues | None = None,
    remat: bool = False,
) -> tuple[Array, KeyValues]:
    """Runs the embedding, all layers and the final norm.

    Args:
        config: Sizes.
        params: Parameters.
        ids: `[R, T]` int32.
        positions: `[R, T]` int32, the rotary position of each slot.
        allowed: `[R, T, S]` bool, True where slot t may attend to slot s; the S slots are those of
            `past` followed by the T new ones.
        past: Keys and values of earlier slots, leaves `[N, R, kv_heads, S - T, D]`, or None.
        remat: True: recompute each layer in the backward pass.

    Returns:
        Hidden states `[R, T, H]` ready for the unembedding, and the keys and values of the T slots
        with leaves `[N, R, kv_heads, T, D]`.
    """
    graphdef = _layer_structure(config)
    rotary = rotary_angles(config, positions)

    def apply_layer(hidden: Array, inputs: tuple[Any, KeyValues | None]) -> Any:
        layer_params, layer_past = inputs
        return nnx_trees.merge(graphdef, layer_params)(hidden, rotary, allowed, layer_past)

    body = jax.checkpoint(apply_layer) if remat else apply_layer
    hidden = params["embed"]["embedding"][ids]
    news, start = [], 0
    for stack in layer_stacks(params):
        size = jax.tree.leaves(stack)[0].shape[0]
        part = jax.tree.map(lambda leaf: leaf[start : start + size], past)  # noqa: B023
        hidden, new = lax.scan(body, hidden, (stack, part))
        news.append(new)
        start += size
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *news)
    return _rms_norm(config, params["final_norm"], hidden), joined


def logits(params: dict[str, Any], hidden: Array) -> Array:
    """Multiplies hidden states `[..., H]` by the unembedding.

    Args:
        params: Parameters; without "unembed" the embedding table is used (tied).
        hidden: `[..., H]`, as `run_layers` returns it.

    Returns:
        `[..., V]` float32.
    """
    if "unembed" in params:
        return jnp.matmul(hidden, params["unembed"]["kernel"], preferred_element_type=jnp.float32)
    contracted = (((hidden.ndim - 1,), (1,)), ((), ()))
    table = params["embed"]["embedding"]
    return lax.dot_general(hidden, table, contracted, preferred_element_type=jnp.float32)


def mask_positions(mask: Array) -> Array:
    """Numbers the real tokens of each row from 0; padding on the left gets position 0.

    Args:
        mask: `[R, T]` bool, True = real token.

    Returns:
        `[R, T]` int32.
    """
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def causal(mask: Array) -> Array:
    """Lets each slot attend to the real tokens up to and including itself.

    Args:
        mask: `[R, T]` bool, True = real token.

    Returns:
        `[R, T, T]` bool.
    """
    length = mask.shape[1]
    return mask[:, None, :] & jnp.tril(jnp.ones((1, length, length), bool))


def rotary_angles(config: LlamaConfig, positions: Array) -> Rotary:
    """Computes the rotary angles of each slot, `position / theta^(2 i / D)` for i < D/2.

    Args:
        config: Sizes.
        positions: `[R, T]` int32.

    Returns:
        Cosines and sines `[R, T, D / 2]`.

    References:
        Su et al., 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", 3.2.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        frequencies = _stretch(config.rope_scaling, frequencies)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def layer_stacks(params: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Returns the stacks of layers in the order in which they run."""
    layers = params["layers"]
    return tuple(layers) if isinstance(layers, tuple | list) else (layers,)


def _stretch(scaling: RotaryScaling, frequencies: Array) -> Array:
    wavelengths = 2 * jnp.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = (scaling.original_positions / wavelengths - low) / (high - low)
    kept = jnp.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _rotate(heads: Array, rotary: Rotary) -> Array:
    # Hugging Face checkpoints pair entry i with entry i + D/2, not with its neighbour.
    first, second = jnp.split(heads, 2, axis=-1)
    cos = rotary.cos[:, None].astype(heads.dtype)
    sin = rotary.sin[:, None].astype(heads.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attend(queries: Array, new: KeyValues, past: KeyValues | None, allowed: Array) -> Array:
    """Returns the attended values `[R, T, heads * D]` of queries `[R, heads, T, D]`."""
    rows, heads, slots, width = queries.shape
    groups = new.keys.shape[1]
    # The query heads that share a key head become further query slots of it: one product each.
    queries = queries.reshape(rows, groups, heads // groups * slots, width) * width**-0.5
    parts = (new,) if past is None else (past, new)
    # Earlier keys are not concatenated with the new ones: that would copy the cache at each step.
    scores = jnp.concatenate(
        [jnp.einsum("rgqd,rgsd->rgqs", queries, part.keys) for part in parts], axis=-1
    ).astype(jnp.float32)
    scores = scores.reshape(rows, heads, slots, -1)
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, _MASKED_SCORE), axis=-1)
    weights = weights.astype(queries.dtype).reshape(rows, groups, heads // groups * slots, -1)
    split = 0 if past is None else past.keys.shape[2]
    weight_parts = (weights,) if past is None else (weights[..., :split], weights[..., split:])
    attended = functools.reduce(
        jnp.add,
        [
            jnp.einsum("rgqs,rgsd->rgqd", part_weights, part.values)
            for part_weights, part in zip(weight_parts, parts, strict=True)
        ],
    )
    return attended.reshape(rows, heads, slots, width).swapaxes(1, 2).reshape(rows, slots, -1)


def _target_log_probs(params: dict[str, Any], hidden: Array, target_ids: Array) -> Array:
    """Returns log p(target) `[R, T]` from the hidden states `[R, T, H]` that predict them."""
    rows, slots, width = hidden.shape
    vocab_size = params["embed"]["embedding"].shape[0]
    flat_hidden, flat_ids = hidden.reshape(-1, width), target_ids.reshape(-1)
    chunk = max(1, _LOGIT_CHUNK_ELEMENTS // vocab_size)
    if flat_ids.size <= chunk:
        return _log_probs(params, flat_hidden, flat_ids).reshape(rows, slots)
    padding = -flat_ids.size % chunk
    chunks = (
        jnp.pad(flat_hidden, ((0, padding), (0, 0))).reshape(-1, chunk, width),
        jnp.pad(flat_ids, (0, padding)).reshape(-1, chunk),
    )
    # Logits of a chunk are computed again in the backward pass: keeping them is what chunks avoid.
    score = jax.checkpoint(lambda part: _log_probs(params, *part))
    log_probs = lax.map(score, chunks).reshape(-1)
    return log_probs[: flat_ids.size].reshape(rows, slots)


def _log_probs(params: dict[str, Any], hidden: Array, target_ids: Array) -> Array:
    scores = logits(params, hidden)  # [n, V]
    chosen = jnp.take_along_axis(scores, target_ids[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(scores, axis=1)


def _rms_norm(config: LlamaConfig, norm_params: dict[str, Any], hidden: Array) -> Array:
    graphdef, _ = nnx_trees.abstract(
        lambda: RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
    )
    return nnx_trees.merge(graphdef, norm_params)(hidden)


@functools.lru_cache
def _layer_structure(config: LlamaConfig) -> Any:
    return nnx_trees.abstract(lambda: LlamaLayer(config, rngs=nnx.Rngs(0)))[0]


def _expand(vector: Array, ndim: int) -> Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


def _check_batch(batch: LMBatch) -> None:
    for name in ("context", "target"):
        ids, mask = getattr(batch, f"{name}_ids"), getattr(batch, f"{name}_mask")
        if ids.ndim != 2 or ids.shape != mask.shape or ids.shape[1] < 1:
            raise ValueError(
                f"{name}_ids and {name}_mask must both have one shape [rows, length >= 1], got "
                f"{ids.shape} and {mask.shape}"
            )
    if batch.context_ids.shape[0] != batch.target_ids.shape[0]:
        raise ValueError(
            f"as many contexts as targets are needed, got {batch.context_ids.shape[0]} and "
            f"{batch.target_ids.shape[0]} rows"
        )

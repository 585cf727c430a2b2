"""A causal decoder: RMSNorm, rotary positions, grouped-query attention, gated feed-forward.

Shapes: R rows, L context slots, T target slots, S slots that are attended to, N layers, H hidden,
D head width, V vocabulary. Parameters are a nested dict of arrays:

    {"embed": {"embedding": [V, H]}, "layers": {...}, "final_norm": {"scale": [H]},
     "unembed": {"kernel": [H, V]}}                     (no "unembed" where embeddings are tied)

Llama, Mistral, Qwen2, Qwen3 and Gemma 3 are this decoder under different configurations
(`ragjax.models.decoder.config.FAMILIES`). The leaves of `params["layers"]` are the layers stacked
on axis 0, and `stacks.over_stacks` runs them: of many layers one is compiled, and where some
layers see a sliding window, a stacked flag selects the mask and the angles. `params["layers"]` may
also be a tuple of such stacks, run in turn: differentiating with respect to the last of them does
no backward work for the earlier ones (`split_trainable`).

References:
    Touvron et al., 2023, "LLaMA: Open and Efficient Foundation Language Models", section 2.2.
    Ainslie et al., 2023, "GQA: Training Generalized Multi-Query Transformer Models".
    Jiang et al., 2023, "Mistral 7B", section 2 (sliding window).
    Gemma Team, 2025, "Gemma 3 Technical Report", section 2.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.layers import DecoderLayer, KeyValues
from ragjax.models.decoder.packing import GROUP, PackedBatch
from ragjax.models.inputs import LMBatch, check_batch
from ragjax.models.layers import stacks
from ragjax.models.layers.norms import RMSNorm
from ragjax.models.layers.rotary import Rotary, rotary_angles
from ragjax.models.layers.stacks import over_stacks
from ragjax.models.layers.vocabulary import score


def init_params(config: DecoderConfig, key: Array) -> dict[str, Any]:
    """Draws random float32 parameters, in the layout of the module docstring.

    Args:
        config: Sizes.
        key: A `jax.random` key.

    Returns:
        Nested dict of arrays.
    """
    embed_key, unembed_key, layers_key = jax.random.split(key, 3)

    def init_layer(layer_key: Array) -> dict[str, Any]:
        return stacks.split(DecoderLayer(config, rngs=nnx.Rngs(layer_key)))[1]

    shape = (config.vocab_size, config.hidden_size)
    params: dict[str, Any] = {
        "embed": {"embedding": 0.02 * jax.random.normal(embed_key, shape)},
        "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": {"scale": jnp.full(config.hidden_size, 1.0 - config.family.norm_offset)},
    }
    if not config.tie_embeddings:
        params["unembed"] = {"kernel": 0.02 * jax.random.normal(unembed_key, shape[::-1])}
    return params


def token_log_probs(
    config: DecoderConfig, params: dict[str, Any], batch: LMBatch, *, remat: bool = False
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
    check_batch(batch)
    context_length = batch.context_ids.shape[1]
    ids = jnp.concatenate([batch.context_ids, batch.target_ids[:, :-1]], axis=1)
    mask = jnp.concatenate([batch.context_mask, batch.target_mask[:, :-1]], axis=1)
    hidden, _ = run_layers(
        config, params, ids, positions=mask_positions(mask), allowed=causal(mask), remat=remat
    )
    predictors = hidden[:, context_length - 1 :]
    return score(params, predictors, batch.target_ids, batch.target_mask)


def packed_token_log_probs(
    config: DecoderConfig,
    params: dict[str, Any],
    batch: PackedBatch,
    *,
    remat: bool = False,
    below: Array | None = None,
) -> Array:
    """Scores several (question, answer) suffixes per document, reading each document once.

    Args:
        config: Sizes.
        params: Parameters.
        batch: Rows as `ragjax.models.decoder.packing.pack_row` lays them out, `[R, L]` and
            `[R, P]`.
        remat: True: recompute each layer in the backward pass.
        below: `[R, L, H]` of `packed_states`, which are not computed again.

    Returns:
        `[R, P]` float32 in nats, equal to `token_log_probs` of the unpacked rows, and exactly 0
        where `target_mask` is False.
    """
    hidden, _ = run_layers(
        config,
        params,
        batch.ids,
        positions=batch.positions,
        allowed=_packed_attention(batch.segments),
        remat=remat,
        below=below,
    )
    hidden = jnp.take_along_axis(hidden, batch.predictors[:, :, None], axis=1)
    return score(params, hidden, batch.target_ids, batch.target_mask)


def packed_states(config: DecoderConfig, params: dict[str, Any], batch: PackedBatch) -> Array:
    """Computes what the lowest stack of layers makes of rows, whatever the layers above it are.

    Args:
        config: Sizes.
        params: Parameters whose "layers" are several stacks, as of `merge_trainable`.
        batch: Rows `[R, L]`.

    Returns:
        Hidden states `[R, L, H]`.
    """
    lowest = {**params, "layers": params["layers"][0]}
    return run_layers(
        config,
        lowest,
        batch.ids,
        positions=batch.positions,
        allowed=_packed_attention(batch.segments),
        normed=False,
    )[0]


def run_layers(
    config: DecoderConfig,
    params: dict[str, Any],
    ids: Array,
    *,
    positions: Array,
    allowed: Array,
    past: KeyValues | None = None,
    past_positions: Array | None = None,
    remat: bool = False,
    below: Array | None = None,
    normed: bool = True,
) -> tuple[Array, KeyValues]:
    """Runs the embedding, all layers and the final norm.

    Args:
        config: Sizes.
        params: Parameters.
        ids: `[R, T]` int32.
        positions: `[R, T]` int32, the rotary position of each slot.
        allowed: `[R, T, S]` bool, True where slot t may attend to slot s; the S slots are those of
            `past` followed by the T new ones. Sliding layers see the nearest of them.
        past: Keys `[N, R, kv_heads, D, S - T]` and values `[N, R, kv_heads, S - T, D]` of earlier
            slots, or None.
        past_positions: `[R, S - T]` int32, rotary positions of those slots; None without `past`.
        remat: True: recompute each layer in the backward pass.
        below: `[R, T, H]`, what the lowest of several stacks of layers has made of `ids`; None: it
            is run.
        normed: Whether the final norm follows the layers.

    Returns:
        Hidden states `[R, T, H]` ready for the unembedding, and the keys `[N, R, kv_heads, D, T]`
        and values `[N, R, kv_heads, T, D]` of the T slots.
    """
    graphdef = _layer_structure(config)
    full, local = _layer_views(config, positions, allowed, past_positions)
    flags = jnp.asarray(config.sliding_layers) if local is not full else None

    def apply_layer(hidden: Array, inputs: Any) -> Any:
        layer_params, (layer_past, slides) = inputs
        view = full if slides is None else _select(slides, local, full)
        layer = stacks.merge(graphdef, layer_params)
        return layer(hidden, view.rotary, view.allowed, layer_past)

    layers, hidden = params["layers"], below
    if hidden is None:
        hidden = _embed(config, params, ids)
    else:
        done = jax.tree.leaves(layers[0])[0].shape[0]
        layers, flags = layers[1:], None if flags is None else flags[done:]
    hidden, new = over_stacks(apply_layer, hidden, layers, (past, flags), remat=remat)
    return _rms_norm(config, params["final_norm"], hidden) if normed else hidden, new


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


class _View(NamedTuple):
    """What the layers of one kind see."""

    rotary: Rotary
    allowed: Array  # [R, T, S] bool


def _layer_views(
    config: DecoderConfig, positions: Array, allowed: Array, past_positions: Array | None
) -> tuple[_View, _View]:
    """Returns what layers with full attention and sliding layers see; one object if the same."""
    angles = functools.partial(rotary_angles, positions, config.head_dim)
    rotary = angles(theta=config.rope_theta, scaling=config.rope_scaling)
    full = _View(rotary, allowed)
    local_rotary, near = rotary, allowed
    if config.local_rope_theta is not None:
        local_rotary = angles(theta=config.local_rope_theta)
    # Positions count real tokens, so the window is right beside padding, in packed rows and in the
    # cache; among S slots no two positions lie S apart, and a wider window excludes nothing.
    if config.sliding_window is not None and config.sliding_window < allowed.shape[-1]:
        keys = positions
        if past_positions is not None:
            keys = jnp.concatenate([past_positions, positions], axis=1)
        near = allowed & (positions[:, :, None] - keys[:, None, :] < config.sliding_window)
    local = _View(local_rotary, near)
    if all(config.sliding_layers) and config.sliding_layers:
        return local, local
    unchanged = local_rotary is rotary and near is allowed
    return full, full if unchanged or not config.sliding_layers else local


def _select(slides: Array, local: _View, full: _View) -> _View:
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(slides, a, b), local, full)


def _embed(config: DecoderConfig, params: dict[str, Any], ids: Array) -> Array:
    table = params["embed"]["embedding"]
    if config.embedding_scale == 1.0:
        return table[ids]
    # The factor is rounded to the dtype of the table, as in the model's training.
    return table[ids] * jnp.asarray(config.embedding_scale, table.dtype)


def _packed_attention(segments: Array) -> Array:
    group = segments // GROUP
    documents = jnp.where(segments % GROUP == 1, group, -1)  # of a slot of a document
    own = segments[:, None, :] == segments[:, :, None]
    return causal(segments > 0) & (own | (documents[:, None, :] == group[:, :, None]))


def _rms_norm(config: DecoderConfig, norm_params: dict[str, Any], hidden: Array) -> Array:
    make_norm = functools.partial(
        RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, offset=config.family.norm_offset
    )
    return stacks.apply(make_norm, norm_params, hidden)


@functools.lru_cache
def _layer_structure(config: DecoderConfig) -> Any:
    return stacks.abstract(lambda: DecoderLayer(config, rngs=nnx.Rngs(0)))[0]

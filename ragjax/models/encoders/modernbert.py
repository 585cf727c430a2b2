"""The ModernBERT encoder: rotary positions, local and global attention by turns, gated units.

Shapes: B texts, L tokens, D hidden size, H heads, N layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ragjax.models.encoders.bert import ACTIVATIONS, SIZES
from ragjax.models.families import ClassifierKeys, EncoderFamily
from ragjax.models.files.config import integer_field, number_field, read_sizes, write_fields
from ragjax.models.files.key_table import KeyRule, transpose
from ragjax.models.inputs import Tokens
from ragjax.models.layers.attention import attend
from ragjax.models.layers.linear import Linear
from ragjax.models.layers.norms import layer_norm
from ragjax.models.layers.rotary import Rotary, rotate
from ragjax.models.layers.stacks import scan_layers, stacked

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_EVERY = "global_attn_every_n_layers"


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig:
    """Sizes of a ModernBERT encoder."""

    vocab_size: int  # tokens
    hidden_size: int  # floats per token
    num_layers: int
    num_heads: int
    intermediate_size: int  # floats per token inside the feed-forward block
    max_positions: int  # tokens per text
    global_layers: tuple[bool, ...]  # for each layer, True = a token attends to all others
    local_attention: int = 128  # tokens, half of them on each side, in the other layers
    global_theta: float = 160_000.0  # base of the rotary frequencies in global layers
    local_theta: float = 10_000.0  # and in local ones
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = "gelu"  # a key of bert.ACTIVATIONS

    def __post_init__(self) -> None:
        """Checks that the sizes fit together."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"hidden_activation {self.activation!r} is not supported, one of "
                f"{sorted(ACTIVATIONS)} is"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not an even multiple of num_attention_heads "
                f"{self.num_heads}"
            )
        if len(self.global_layers) != self.num_layers:
            raise ValueError(
                f"layer_types names {len(self.global_layers)} layers, num_hidden_layers is "
                f"{self.num_layers}"
            )


def parse_config(config: Mapping[str, Any]) -> ModernBertConfig:
    """Reads the fields of a Hugging Face `config.json` of model type `modernbert`.

    Both forms are read: the fields that transformers 4 wrote (`global_attn_every_n_layers`,
    `global_rope_theta`, `local_rope_theta`) and those of transformers 5 (`layer_types` and
    `rope_parameters` per type of layer).

    Raises:
        ValueError: A field is missing, is not of its type, or asks for what is not supported.
    """
    sizes = read_sizes(config, SIZES)
    return ModernBertConfig(
        **sizes,
        global_layers=_global_layers(config, sizes["num_layers"]),
        local_attention=integer_field({"local_attention": 128, **config}, "local_attention"),
        global_theta=_theta(config, _GLOBAL, "global_rope_theta", 160_000.0),
        local_theta=_theta(config, _LOCAL, "local_rope_theta", 10_000.0),
        norm_eps=number_field(config, "norm_eps", 1e-5),
        norm_bias=bool(config.get("norm_bias", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        activation=str(config.get("hidden_activation", "gelu")),
    )


def format_config(config: ModernBertConfig) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `parse_config` reads as `config`.

    transformers 5 reads `layer_types` and `rope_parameters`, transformers 4 the other three.
    """
    thetas = {_GLOBAL: config.global_theta, _LOCAL: config.local_theta}
    every = (*config.global_layers[1:], True).index(True) + 1
    return {
        "model_type": "modernbert",
        "architectures": ["ModernBertModel"],
        **write_fields(config, SIZES),
        "layer_types": [_GLOBAL if full else _LOCAL for full in config.global_layers],
        "global_attn_every_n_layers": every,
        "local_attention": config.local_attention,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
        },
        "global_rope_theta": config.global_theta,
        "local_rope_theta": config.local_theta,
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_activation": config.activation,
    }


class ModernBert(nnx.Module):
    """ModernBERT without its heads: token ids in, normalised hidden states out.

    References:
        Warner et al., "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast,
        Memory Efficient, and Long Context Finetuning and Inference", 2024, section 2.1.
    """

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        """Makes randomly initialised parameters (normal, standard deviation 0.02).

        Args:
            config: Sizes.
            rngs: Source of the random keys.
        """
        init = nnx.initializers.normal(0.02)
        self.config = config
        self.words = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=init, rngs=rngs
        )
        self.embedding_norm = _layer_norm(config, rngs)
        self.layers = stacked(
            lambda key: ModernBertLayer(config, rngs=nnx.Rngs(key)),
            rngs.params(),
            config.num_layers,
        )
        # The first layer has no norm before its attention, so this stack is one shorter.
        self.attention_norms = (
            stacked(lambda key: _layer_norm(config, nnx.Rngs(key)), rngs.params(), count)
            if (count := config.num_layers - 1)
            else None
        )
        self.final_norm = _layer_norm(config, rngs)

    def __call__(self, tokens: Tokens, *, remat: bool = False) -> Array:
        """Computes the hidden states.

        Args:
            tokens: Ids `[B, L]` int32 below `vocab_size`, mask `[B, L]` bool; L at most
                `max_positions`.
            remat: True = recompute each layer in the backward pass.

        Returns:
            `[B, L, D]`, in the dtype of the parameters; positions outside the mask are finite and
            without meaning.
        """
        length, limit = tokens.ids.shape[1], self.config.max_positions
        if length > limit:
            raise ValueError(f"{length} tokens per text, but the model has {limit} positions")
        width = self.config.hidden_size // self.config.num_heads
        angles = [
            _rotary(t, length, width) for t in (self.config.global_theta, self.config.local_theta)
        ]
        near = _window(length, self.config.local_attention // 2)[None, None]

        def step(layer: ModernBertLayer, hidden: Array, kind: _Kind) -> Array:
            mask = tokens.mask[:, None, None, :] & (kind.is_global | near)
            rotary = jax.tree.map(
                lambda full, local: jnp.where(kind.is_global, full, local), *angles
            )
            return layer(hidden, mask, rotary, kind)

        hidden = self.embedding_norm(self.words.embedding[tokens.ids])
        hidden = scan_layers(self.layers, step, hidden, inputs=self._kinds(), remat=remat)
        return self.final_norm(hidden)

    def _kinds(self) -> "_Kind":
        """Returns what tells the layers apart, stacked; the first has a norm of ones, unused."""

        def with_first(parameter: Any) -> Array:
            values = parameter[...]
            return jnp.concatenate([jnp.ones_like(values[:1]), values])

        size = (self.config.num_layers, self.config.hidden_size)
        norms = self.attention_norms
        scale = jnp.ones(size) if norms is None else with_first(norms.scale)
        has_bias = norms is not None and self.config.norm_bias
        return _Kind(
            is_global=jnp.asarray(self.config.global_layers),
            is_first=jnp.arange(self.config.num_layers) == 0,
            norm_scale=scale,
            norm_bias=with_first(norms.bias) if has_bias else jnp.zeros_like(scale),
        )


class _Kind(NamedTuple):
    """What tells one layer from another; leading axis N while stacked."""

    is_global: Array  # [] bool
    is_first: Array  # [] bool, True = no norm before the attention
    norm_scale: Array  # [D]
    norm_bias: Array  # [D]


class ModernBertLayer(nnx.Module):
    """Self-attention and a gated feed-forward block, each normalised before and added after."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        """Makes randomly initialised weights."""

        def linear(inputs: int, outputs: int, use_bias: bool) -> Linear:
            init = nnx.initializers.normal(0.02)
            return Linear(inputs, outputs, use_bias=use_bias, kernel_init=init, rngs=rngs)

        size, inner = config.hidden_size, config.intermediate_size
        self.config = config
        self.query_key_value = linear(size, 3 * size, config.attention_bias)
        self.attention_output = linear(size, size, config.attention_bias)
        self.feed_forward_norm = _layer_norm(config, rngs)
        self.gated = linear(size, 2 * inner, config.mlp_bias)
        self.output = linear(inner, size, config.mlp_bias)

    def __call__(self, hidden: Array, mask: Array, rotary: Rotary, kind: _Kind) -> Array:
        """Transforms hidden states `[B, L, D]`; the mask is broadcastable to `[B, 1, L, L]`."""
        normalized = _normalize(hidden, kind.norm_scale, kind.norm_bias, self.config.norm_eps)
        attended = self._attend(jnp.where(kind.is_first, hidden, normalized), mask, rotary)
        hidden = hidden + self.attention_output(attended)
        inner, gate = jnp.split(self.gated(self.feed_forward_norm(hidden)), 2, axis=-1)
        return hidden + self.output(ACTIVATIONS[self.config.activation](inner) * gate)

    def _attend(self, hidden: Array, mask: Array, rotary: Rotary) -> Array:
        heads = (*hidden.shape[:2], 3, self.config.num_heads, -1)
        query, key, value = jnp.moveaxis(self.query_key_value(hidden).reshape(heads), 2, 0)
        attended = attend(rotate(query, rotary), rotate(key, rotary), value, mask=mask)
        return attended.reshape(hidden.shape)


def _normalize(hidden: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalises as `nnx.LayerNorm` does, in float32, with parameters `[D]` given by hand."""
    wide = hidden.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normalized = centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return (normalized * scale[None, None] + bias[None, None]).astype(hidden.dtype)


def _rotary(theta: float, length: int, width: int) -> Rotary:
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None]
    return Rotary(jnp.cos(angles)[None], jnp.sin(angles)[None])  # [1, L, D / H / 2] each


def _window(length: int, reach: int) -> Array:
    """Returns `[L, L]` bool, True where two slots are at most `reach` apart."""
    slots = jnp.arange(length)
    return jnp.abs(slots[:, None] - slots[None]) <= reach


def _layer_norm(config: ModernBertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layer_norm(
        config.hidden_size, epsilon=config.norm_eps, use_bias=config.norm_bias, rngs=rngs
    )


def key_table(config: ModernBertConfig) -> dict[str, KeyRule]:
    """Returns where each tensor goes; names without the "model." of checkpoints with a head."""
    linear = {
        "attn.Wqkv": ("query_key_value", config.attention_bias),
        "attn.Wo": ("attention_output", config.attention_bias),
        "mlp.Wi": ("gated", config.mlp_bias),
        "mlp.Wo": ("output", config.mlp_bias),
    }
    norms = {
        "embeddings.norm": ("embedding_norm", 0),
        "layers.{}.mlp_norm": ("layers/feed_forward_norm", 0),
        "final_norm": ("final_norm", 0),
    }
    if config.num_layers > 1:
        norms["layers.{}.attn_norm"] = ("attention_norms", 1)
    table = {"embeddings.tok_embeddings.weight": KeyRule("words/embedding")}
    for name, (path, biased) in linear.items():
        table[f"layers.{{}}.{name}.weight"] = KeyRule(f"layers/{path}/kernel", transpose)
        if biased:
            table[f"layers.{{}}.{name}.bias"] = KeyRule(f"layers/{path}/bias")
    for name, (path, first) in norms.items():
        table[f"{name}.weight"] = KeyRule(f"{path}/scale", first_layer=first)
        if config.norm_bias:
            table[f"{name}.bias"] = KeyRule(f"{path}/bias", first_layer=first)
    return table


def _global_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    types = config.get("layer_types")
    if types is None:
        every = integer_field({_EVERY: 3, **config}, _EVERY)
        return tuple(layer % every == 0 for layer in range(num_layers))
    if not isinstance(types, list) or any(kind not in (_GLOBAL, _LOCAL) for kind in types):
        raise ValueError(f"layer_types must be a list of {_GLOBAL!r} and {_LOCAL!r}, got {types!r}")
    return tuple(kind == _GLOBAL for kind in types)


def _theta(config: Mapping[str, Any], kind: str, old_field: str, default: float) -> float:
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get(kind) if isinstance(parameters, Mapping) else parameters
    scaling = parameters or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_parameters must hold an object for {kind}, got {scaling!r}")
    if (rope := scaling.get("rope_type", "default")) != "default":
        raise ValueError(f"rope_type {rope!r} is not supported, default is")
    return number_field(
        {old_field: scaling.get("rope_theta", config.get(old_field) or default)}, old_field, default
    )


FAMILY = EncoderFamily(
    model_types=("modernbert",),
    parse_config=parse_config,
    format_config=format_config,
    make_module=ModernBert,
    key_table=key_table,
    canonical_key=lambda name: name.removeprefix("model."),
    ignored_keys=("head.*", "decoder.*", "classifier.*"),
    classifier=ClassifierKeys(dense="head.dense", norm="head.norm", output="classifier"),
)

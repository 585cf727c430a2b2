"""The sizes and constants of a causal decoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ragjax.models.layers.rotary import FactorScaling, RotaryScaling, YarnScaling

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
# No published decoder comes near; a damaged file must not ask for a billion layers.
MAX_LAYERS, _MAX_SIZE, _MAX_FLOAT = 4096, 2**31 - 1, 3e38


class DecoderFamily(NamedTuple):
    """What sets the checkpoints of one `model_type` apart from Llama's."""

    architecture: str  # class of transformers that reads the checkpoint
    query_key_norm: bool = False  # queries and keys are normalised per head
    sandwich_norms: bool = False  # attention and feed-forward outputs are normalised, too
    norm_offset: float = 0.0  # added to the stored scales of all norms
    scaled_embeddings: bool = False  # embeddings are multiplied by √hidden_size
    activation: str = "silu"  # where the configuration does not say
    activation_field: str = "hidden_act"
    bias_fields: tuple[str, ...] = ()  # those of attention_bias and mlp_bias that are read
    fixed_qkv_bias: bool = False  # query, key and value have biases, and the output has none
    # Fields that published files leave out because they are transformers' defaults.
    defaults: Mapping[str, Any] = {}


FAMILIES: dict[str, DecoderFamily] = {
    "llama": DecoderFamily("LlamaForCausalLM", bias_fields=("attention_bias", "mlp_bias")),
    "mistral": DecoderFamily(
        "MistralForCausalLM",
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": DecoderFamily(
        "Qwen2ForCausalLM",
        fixed_qkv_bias=True,
        defaults={"max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "qwen3": DecoderFamily(
        "Qwen3ForCausalLM",
        query_key_norm=True,
        bias_fields=("attention_bias",),
        defaults={"max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
    ),
    "gemma3_text": DecoderFamily(
        "Gemma3ForCausalLM",
        query_key_norm=True,
        sandwich_norms=True,
        norm_offset=1.0,
        scaled_embeddings=True,
        activation="gelu_pytorch_tanh",
        activation_field="hidden_activation",
        bias_fields=("attention_bias",),
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of one decoder; hashable, so jitted functions can take it as a static argument.

    Attributes:
        vocab_size: Rows of the embedding table.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated feed-forward layer.
        num_layers: Number of layers, all of one shape.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads` (grouped-query attention).
        head_dim: Width of one head; even.
        model_type: Key of `FAMILIES`: the layer's norms, and how a checkpoint names things.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Stretching of the rotary frequencies, or None.
        local_rope_theta: Base, never stretched, in the sliding layers; None: as everywhere.
        rms_norm_eps: Added to the mean square before the root.
        max_positions: Longest sequence in tokens that the model was made for.
        tie_embeddings: True: the unembedding is the embedding table.
        qkv_bias: True: the query, key and value projections add a bias.
        output_bias: True: the attention's output projection adds a bias.
        feed_forward_bias: True: the three feed-forward projections add biases.
        activation: "silu" or "gelu_pytorch_tanh", of the feed-forward gate.
        query_scalar: Attention scores are divided by its root; None: `head_dim`.
        sliding_window: Tokens that a sliding layer sees, the current one included.
        sliding_layers: One flag per layer, True = attends within the window; empty: none does.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_type: str = "llama"
    rope_theta: float = 10000.0
    rope_scaling: RotaryScaling | None = None
    local_rope_theta: float | None = None
    rms_norm_eps: float = 1e-5
    max_positions: int = 2048
    tie_embeddings: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    activation: str = "silu"
    query_scalar: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        """Refuses what no decoder can have.

        Raises:
            ValueError: A size or constant is out of range, or two fields contradict each other.
        """
        _check_sizes(self)
        _check_constants(self)
        _check_windows(self)
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {self.model_type!r} is not supported; {', '.join(FAMILIES)} are"
            )
        expected = self.qkv_bias if "attention_bias" in self.family.bias_fields else False
        if self.output_bias != expected or (
            self.qkv_bias and not (expected or self.family.fixed_qkv_bias)
        ):
            raise ValueError(
                f"qkv_bias={self.qkv_bias} and output_bias={self.output_bias} do not occur in "
                f"{self.model_type} checkpoints; qwen2 has the first without the second"
            )

    @property
    def family(self) -> DecoderFamily:
        """What the model type decides."""
        return FAMILIES[self.model_type]

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings."""
        return self.hidden_size**0.5 if self.family.scaled_embeddings else 1.0

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        return (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5


def _check_sizes(config: DecoderConfig) -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        limit = MAX_LAYERS if name == "num_layers" else _MAX_SIZE
        if getattr(config, name) > limit:
            raise ValueError(f"{name} must be at most {limit}, got {getattr(config, name)}")
    if config.num_kv_heads < 1 or config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_heads={config.num_heads} must be a multiple of num_kv_heads={config.num_kv_heads}"
        )
    if not 2 <= config.head_dim <= _MAX_SIZE or config.head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {config.head_dim}")
    if not 1 <= config.max_positions <= _MAX_SIZE:
        raise ValueError(f"max_positions must be positive, got {config.max_positions}")


def _check_constants(config: DecoderConfig) -> None:
    for name in ("rope_theta", "local_rope_theta", "query_scalar"):
        value = getattr(config, name)
        if value is not None and not 0 < value < _MAX_FLOAT:
            raise ValueError(f"{name} must be positive and a float32, got {value}")
    if isinstance(config.rope_scaling, YarnScaling) and config.rope_theta <= 1:
        raise ValueError(f"rope_theta must exceed 1 under YaRN, got {config.rope_theta}")
    if not 0 <= config.rms_norm_eps < math.inf:
        raise ValueError(f"rms_norm_eps must not be negative, got {config.rms_norm_eps}")
    scaling = config.rope_scaling
    if isinstance(scaling, FactorScaling) and len(scaling.factors) != config.head_dim // 2:
        raise ValueError(
            f"rotary frequency factors: {len(scaling.factors)} of them, but heads of width "
            f"{config.head_dim} need {config.head_dim // 2}"
        )
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {config.activation!r}")


def _check_windows(config: DecoderConfig) -> None:
    if len(config.sliding_layers) not in (0, config.num_layers):
        raise ValueError(
            f"sliding_layers must have one flag for each of {config.num_layers} layers, got "
            f"{len(config.sliding_layers)}"
        )
    if any(config.sliding_layers) != (config.sliding_window is not None):
        raise ValueError(
            f"sliding_window={config.sliding_window} needs a layer that slides, and the other way "
            f"round; sliding_layers={config.sliding_layers}"
        )
    allowed = {"llama": (0,), "mistral": (0, config.num_layers)}.get(config.model_type)
    if allowed is not None and sum(config.sliding_layers) not in allowed:
        raise ValueError(
            f"sliding_layers={config.sliding_layers} do not occur in {config.model_type} "
            "checkpoints: in llama no layer slides, in mistral all or none"
        )
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {config.sliding_window}")

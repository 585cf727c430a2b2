"""The sizes and constants of a causal decoder, read from a Hugging Face configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ragjax.models.layers.rotary import FactorScaling, RotaryScaling, YarnScaling, parse_scaling

# "gemma3" is the checkpoint with a vision tower: its text model is read, the rest ignored.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3")
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_SLIDING, _FULL = "sliding_attention", "full_attention"
# No published decoder comes near; a damaged file must not ask for a billion layers.
_MAX_LAYERS, _MAX_SIZE, _MAX_FLOAT = 4096, 2**31 - 1, 3e38


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
    sliding_layers: tuple[bool, ...] = field(default=())

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


def parse_huggingface_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the contents of a Hugging Face `config.json`.

    Args:
        config: The parsed JSON object, its `model_type` one of `MODEL_TYPES`.

    Returns:
        The sizes of the decoder.

    Raises:
        ValueError: A field is missing, is not a number, or asks for what this decoder does not
            compute.
    """
    config = _text_config(config)
    model_type = config["model_type"]
    settings = {**FAMILIES[model_type].defaults, **config}
    try:
        return _parse(settings, model_type, FAMILIES[model_type])
    except KeyError as error:
        raise ValueError(f"no field {error}, which a {model_type} decoder needs") from error
    except (TypeError, ZeroDivisionError, OverflowError, AttributeError) as error:
        raise ValueError(f"a size is not a positive number ({error})") from error


def format_huggingface_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `parse_huggingface_config` reads as `config`."""
    family = config.family
    scaling = config.rope_scaling
    settings: dict[str, Any] = {
        "model_type": config.model_type,
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and scaling.to_huggingface(),
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        family.activation_field: config.activation,
    }
    if isinstance(scaling, FactorScaling):
        settings["rope_scaling"]["original_max_position_embeddings"] = config.max_positions
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.feed_forward_bias}
    settings |= {name: biases[name] for name in family.bias_fields}
    return settings | _format_windows(config)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the part that describes the text model, its `model_type` a key of `FAMILIES`."""
    if config["model_type"] != "gemma3":
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError("no field 'text_config', which a gemma3 checkpoint needs")
    outer = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
    return {**outer, **text, "model_type": "gemma3_text"}


def _parse(settings: Mapping[str, Any], model_type: str, family: DecoderFamily) -> DecoderConfig:
    _refuse_unsupported(settings)
    hidden_size, num_heads = int(settings["hidden_size"]), int(settings["num_attention_heads"])
    num_layers = int(settings["num_hidden_layers"])
    head_dim = int(settings.get("head_dim") or hidden_size // num_heads)
    biases = {name: bool(settings.get(name, False)) for name in ("attention_bias", "mlp_bias")}
    read = {name: biases[name] and name in family.bias_fields for name in biases}
    is_gemma = model_type == "gemma3_text"
    query_scalar = float(settings["query_pre_attn_scalar"] if is_gemma else head_dim)
    theta, local_theta, scaling = _parse_rotary(settings)
    window, sliding_layers = _parse_windows(settings, model_type, num_layers)
    return DecoderConfig(
        vocab_size=int(settings["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(settings["intermediate_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(settings.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        model_type=model_type,
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=(local_theta or theta) if is_gemma else None,
        rms_norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
        max_positions=int(settings.get("max_position_embeddings", 2048)),
        tie_embeddings=bool(settings.get("tie_word_embeddings", False)),
        qkv_bias=read["attention_bias"] or family.fixed_qkv_bias,
        output_bias=read["attention_bias"],
        feed_forward_bias=read["mlp_bias"],
        activation=_parse_activation(settings, family),
        query_scalar=None if query_scalar == head_dim else query_scalar,
        sliding_window=window,
        sliding_layers=sliding_layers,
    )


def _parse_activation(settings: Mapping[str, Any], family: DecoderFamily) -> str:
    found = settings.get(family.activation_field) or family.activation
    if found not in _ACTIVATIONS:
        raise ValueError(
            f"{family.activation_field} = {found!r} is not supported; "
            f"{' and '.join(_ACTIVATIONS)} are"
        )
    return found


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    for name in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    ):
        if settings.get(name):
            raise ValueError(f"{name} = {settings[name]!r} is not supported; only null is")
    if not settings.get("is_causal", True):
        raise ValueError(
            f"is_causal = {settings['is_causal']!r} is not supported; only causal attention is"
        )


def _parse_rotary(
    settings: Mapping[str, Any],
) -> tuple[float, float | None, RotaryScaling | None]:
    """Returns the base, the base of sliding layers, and the stretching of all others."""
    # transformers 5 writes everything into `rope_parameters`, per kind of layer where a model has
    # two; earlier versions used three fields.
    parameters = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    local = settings.get("rope_local_base_freq")
    if _FULL in parameters or _SLIDING in parameters:
        sliding = parameters.get(_SLIDING) or {}
        if sliding.get("rope_type", "default") != "default":
            raise ValueError(
                f"rotary positions of sliding layers scaled by {sliding['rope_type']!r} are not "
                "supported; default is"
            )
        local = sliding.get("rope_theta", local)
        parameters = parameters.get(_FULL) or {}
    theta = float(parameters.get("rope_theta") or settings.get("rope_theta", 10000.0))
    scaling = parse_scaling(
        parameters,
        max_positions=int(settings.get("max_position_embeddings", 2048)),
        original_positions=settings.get("original_max_position_embeddings"),
    )
    return theta, None if local is None else float(local), scaling


def _parse_windows(
    settings: Mapping[str, Any], model_type: str, num_layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """Returns the window and which layers it holds in, by the rules of each model type."""
    if not 0 < num_layers <= _MAX_LAYERS:
        return None, ()
    used = settings.get("use_sliding_window", False) if model_type in ("qwen2", "qwen3") else True
    window = settings.get("sliding_window") if used else None
    if model_type == "mistral":
        layers = (window is not None,) * num_layers
    elif model_type == "llama" or (window is None and model_type != "gemma3_text"):
        layers = ()
    elif (kinds := settings.get("layer_types")) is not None:
        unknown = sorted({str(kind) for kind in kinds} - {_SLIDING, _FULL})
        if unknown or len(kinds) != num_layers:
            raise ValueError(
                f"layer_types must name {_SLIDING} or {_FULL} for each of {num_layers} layers, "
                f"got {len(kinds)} entries" + (f", among them {unknown[0]!r}" if unknown else "")
            )
        layers = tuple(kind == _SLIDING for kind in kinds)
    elif model_type == "gemma3_text":
        every = int(settings["sliding_window_pattern"])
        layers = tuple((layer + 1) % every != 0 for layer in range(num_layers))
    else:
        first = int(settings.get("max_window_layers", 28))
        layers = tuple(layer >= first for layer in range(num_layers))
    return (int(window), layers) if any(layers) else (None, ())  # pyrefly: ignore[bad-argument-type]  (set)


def _format_windows(config: DecoderConfig) -> dict[str, Any]:
    if config.model_type == "llama":
        return {}
    if config.model_type == "mistral":
        return {"sliding_window": config.sliding_window}
    sliding = config.sliding_layers or (False,) * config.num_layers
    kinds = [_SLIDING if layer else _FULL for layer in sliding]
    if config.model_type == "gemma3_text":
        scalar = config.head_dim if config.query_scalar is None else config.query_scalar
        return {
            "sliding_window": config.sliding_window,
            "layer_types": kinds,
            "rope_local_base_freq": config.local_rope_theta or config.rope_theta,
            # transformers wants a whole number here.
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        }
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        # Versions without `layer_types` count the layers below the first sliding one.
        "max_window_layers": sliding.index(True) if any(sliding) else config.num_layers,
        "layer_types": kinds,
    }


def _check_sizes(config: DecoderConfig) -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        limit = _MAX_LAYERS if name == "num_layers" else _MAX_SIZE
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
    if config.activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {_ACTIVATIONS}, got {config.activation!r}")


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

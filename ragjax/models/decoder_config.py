"""The sizes and constants of a Llama-family decoder, read from a Hugging Face configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How the rotary frequencies of a long-context checkpoint are stretched (Llama 3.1 and later).

    Frequencies whose wavelength exceeds `original_positions / low_frequency_factor` are divided by
    `factor`, those below `original_positions / high_frequency_factor` stay, the rest interpolate.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of one decoder; hashable, so jitted functions can take it as a static argument.

    Attributes:
        vocab_size: Rows of the embedding table.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated feed-forward layer.
        num_layers: Number of identical layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads` (grouped-query attention).
        head_dim: Width of one head; even.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Stretching of the rotary frequencies, or None.
        rms_norm_eps: Added to the mean square before the root.
        max_positions: Longest sequence in tokens for which the model is exact.
        tie_embeddings: True: the unembedding is the embedding table.
        qkv_bias: True: the query, key and value projections add a bias (Qwen2).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RotaryScaling | None = None
    rms_norm_eps: float = 1e-5
    max_positions: int = 2048
    tie_embeddings: bool = True
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        """Refuses sizes that no decoder can have.

        Raises:
            ValueError: A size is not positive, the query heads do not divide into the key heads,
                or the head width is odd.
        """
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and positive, got {self.head_dim}")


def parse_huggingface_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the contents of a Hugging Face `config.json`.

    A sliding attention window (Mistral 7B v0.1) caps `max_positions` instead: within the window
    sliding and full attention are the same.

    Args:
        config: The parsed JSON object, its `model_type` one of `MODEL_TYPES`.

    Returns:
        The sizes of the decoder.

    Raises:
        ValueError: A field is missing, is not a number, or asks for what this decoder does not
            compute.
    """
    _refuse_unsupported(config)
    model_type = config["model_type"]
    try:
        hidden_size, num_heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        theta, scaling = _parse_rotary(config)
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        max_positions = int(config.get("max_position_embeddings", 2048))
        return DecoderConfig(
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_positions=min(max_positions, int(window)) if window else max_positions,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",
        )
    except KeyError as error:
        raise ValueError(f"no field {error}, which a {model_type} decoder needs") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"a size is not a positive number ({error})") from error


def format_huggingface_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `parse_huggingface_config` reads as `config`."""
    kind = ("qwen2", "Qwen2ForCausalLM") if config.qkv_bias else ("llama", "LlamaForCausalLM")
    scaling = config.rope_scaling
    return {
        "model_type": kind[0],
        "architectures": [kind[1]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_positions,
        },
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    expected = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False}
    for name, value in expected.items():
        if config["model_type"] == "qwen2" and name == "attention_bias":
            continue
        if (found := config.get(name, value)) != value:
            raise ValueError(f"{name} = {found!r} is not supported; only {value!r} is")


def _parse_rotary(config: Mapping[str, Any]) -> tuple[float, RotaryScaling | None]:
    # transformers 5 writes both into `rope_parameters`; earlier versions used two fields.
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, RotaryScaling(
            factor=float(parameters["factor"]),
            low_frequency_factor=float(parameters["low_freq_factor"]),
            high_frequency_factor=float(parameters["high_freq_factor"]),
            original_positions=int(parameters["original_max_position_embeddings"]),
        )
    raise ValueError(
        f"rotary positions scaled by {kind!r} are not supported; default and llama3 are"
    )

"""Reads the configuration of a causal decoder from a Hugging Face `config.json`, and writes it."""

from collections.abc import Mapping
from typing import Any

from ragjax.models.decoder.config import (
    ACTIVATIONS,
    FAMILIES,
    MAX_LAYERS,
    DecoderConfig,
    DecoderFamily,
)
from ragjax.models.files.config import write_fields
from ragjax.models.layers.rotary import FactorScaling, RotaryScaling, parse_scaling

# "gemma3" is the checkpoint with a vision tower: its text model is read, the rest ignored.
MODEL_TYPES = (*FAMILIES, "gemma3")
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Field of `DecoderConfig`: field of config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
}


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
        **write_fields(config, _SIZES),
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
    if found not in ACTIVATIONS:
        raise ValueError(
            f"{family.activation_field} = {found!r} is not supported; "
            f"{' and '.join(ACTIVATIONS)} are"
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
    if not 0 < num_layers <= MAX_LAYERS:
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

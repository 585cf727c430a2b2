"""Reads the sizes of a decoder from the metadata of a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.layers.rotary import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    RotaryScaling,
    YarnScaling,
    yarn_attention_factor,
)

# What llama.cpp assumes of Gemma 3 because the file does not say it.
_GEMMA3_PATTERN, _GEMMA3_LOCAL_THETA, _GEMMA3_27B_LAYERS = 6, 10000.0, 62
_REFUSED = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.scaling.yarn_log_multiplier",
    "expert_count",
)


def parse_config(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> DecoderConfig:
    """Reads the sizes; `tensors` say whether the unembedding is tied and biases are there.

    Args:
        path: The file, for messages.
        architecture: "llama" (also Mistral and SmolLM2), "qwen2", "qwen3" or "gemma3".
        fields: The metadata.
        tensors: Tensor name to array.

    Returns:
        The sizes of the decoder.

    Raises:
        ValueError: A field is missing or damaged, or asks for what the decoder does not compute.
    """
    try:
        return _parse(path, _Fields(path, architecture, fields), tensors)
    except (TypeError, OverflowError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"{path}: a size in the metadata is not a number ({error})") from error
    except ValueError as error:
        named = str(error).startswith(str(path))
        raise (error if named else ValueError(f"{path}: {error}")) from error


class _Fields:
    """The metadata of one architecture."""

    def __init__(self, path: Path, architecture: str, fields: Mapping[str, Any]) -> None:
        self.path, self.architecture, self.fields = path, architecture, fields

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.architecture}.{name}", default)

    def need(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise ValueError(f"{self.path}: the metadata has no {self.architecture}.{name}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.need(name) if default is None else self.get(name, default)
        # The file stores float32: 1e-05, not 9.999999747378752e-06, is what was meant.
        return float(str(np.float32(value)))


def _parse(path: Path, fields: _Fields, tensors: Mapping[str, np.ndarray]) -> DecoderConfig:
    hidden_size, num_heads = (
        int(fields.need(name)) for name in ("embedding_length", "attention.head_count")
    )
    num_layers, head_dim = int(fields.need("block_count")), _head_dim(fields)
    _refuse_unsupported(fields, head_dim)
    is_gemma = fields.architecture == "gemma3"
    window, sliding_layers = _windows(fields, num_layers)
    theta = fields.number("rope.freq_base", 1e6 if is_gemma else 10000.0)
    query_scalar = local_theta = None
    if is_gemma:
        local_theta = fields.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA)
        if num_layers == _GEMMA3_27B_LAYERS and hidden_size // num_heads != head_dim:
            query_scalar = hidden_size / num_heads
    biases = [f"blk.0.{name}.bias" in tensors for name in ("attn_q", "attn_output", "ffn_up")]
    return DecoderConfig(
        vocab_size=len(fields.fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden_size,
        intermediate_size=int(fields.need("feed_forward_length")),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(fields.get("attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        model_type=_model_type(fields.architecture, biases, sliding=window is not None),
        rope_theta=theta,
        rope_scaling=_rotary_scaling(fields, tensors, theta, head_dim),
        local_rope_theta=local_theta,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        max_positions=int(fields.need("context_length")),
        tie_embeddings="output.weight" not in tensors,
        qkv_bias=biases[0],
        output_bias=biases[1],
        feed_forward_bias=biases[2],
        activation="gelu_pytorch_tanh" if is_gemma else "silu",
        query_scalar=query_scalar,
        sliding_window=window,
        sliding_layers=sliding_layers,
    )


def _head_dim(fields: _Fields) -> int:
    default = int(fields.need("embedding_length")) // int(fields.need("attention.head_count"))
    return int(fields.get("attention.key_length", default))


def _refuse_unsupported(fields: _Fields, head_dim: int) -> None:
    for name in _REFUSED:
        if value := fields.get(name):
            raise ValueError(
                f"{fields.path}: {fields.architecture}.{name} = {value} is not supported"
            )
    for name in ("rope.dimension_count", "attention.value_length"):
        if (value := fields.get(name, head_dim)) != head_dim:
            raise ValueError(
                f"{fields.path}: {fields.architecture}.{name} = {value} is not supported; only the "
                f"width of the heads, {head_dim}, is"
            )


def _model_type(architecture: str, biases: list[bool], *, sliding: bool) -> str:
    if architecture == "gemma3":
        return "gemma3_text"
    if architecture != "llama":
        return architecture
    # Converters file Llama's relatives under "llama"; Qwen2 is Llama with biases on q, k and v.
    return "qwen2" if biases[:2] == [True, False] else "mistral" if sliding else "llama"


def _windows(fields: _Fields, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    window = fields.get("attention.sliding_window")
    if not window or not 0 < num_layers <= 4096:
        return None, ()
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, list | tuple):
        layers = tuple(bool(slides) for slides in pattern)
    elif pattern is not None or fields.architecture == "gemma3":
        every = int(pattern or _GEMMA3_PATTERN)
        layers = tuple((layer + 1) % every != 0 for layer in range(num_layers))
    elif fields.architecture == "llama":
        layers = (True,) * num_layers
    else:
        raise ValueError(
            f"{fields.path}: {fields.architecture}.attention.sliding_window = {window} without "
            "attention.sliding_window_pattern does not say which layers slide"
        )
    return (int(window), layers) if any(layers) else (None, ())


def _rotary_scaling(
    fields: _Fields, tensors: Mapping[str, np.ndarray], theta: float, head_dim: int
) -> RotaryScaling | None:
    kind = fields.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        if kind not in ("none", "linear", "llama3") or fields.get("rope.scaling.factor", 1.0) != 1:
            raise ValueError(
                f"{fields.path}: rotary scaling {kind!r} beside rotary frequency factors is not "
                "supported"
            )
        return _from_factors(tensors["rope_freqs.weight"], theta, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        factor = fields.number("rope.scaling.factor")
        return LinearScaling(factor=factor) if factor != 1.0 else None
    if kind == "yarn":
        factor = fields.number("rope.scaling.factor")
        sharpening = fields.number("rope.scaling.attn_factor", 1.0)
        sharpening *= fields.number("rope.scaling.yarn_attn_factor", 1.0)
        return YarnScaling(
            factor=factor,
            original_positions=int(fields.need("rope.scaling.original_context_length")),
            attention_factor=sharpening * yarn_attention_factor(factor),
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    raise ValueError(
        f"{fields.path}: rotary scaling {kind!r} is not supported in GGUF files; none, linear, "
        "yarn and the frequency factors of Llama 3.1 are"
    )


def _from_factors(factors: np.ndarray, theta: float, head_dim: int) -> RotaryScaling | None:
    """Returns the factors, as the constants they were made from where those are Llama 3's."""
    values = np.asarray(factors, np.float32).reshape(-1)
    if values.shape != (head_dim // 2,) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"rope_freqs.weight must hold {head_dim // 2} positive numbers, got shape "
            f"{values.shape}"
        )
    if (values == 1).all():
        return None
    published = Llama3Scaling(
        factor=float(values.max()),
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
        original_positions=8192,
    )
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    expected = frequencies / published.stretch(frequencies, theta)
    # The same to float32's rounding, and transformers knows these constants by name.
    if np.allclose(values, expected, rtol=2e-6, atol=0):
        return published
    return FactorScaling(factors=tuple(float(value) for value in values))

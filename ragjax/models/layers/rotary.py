"""Rotary positions of a causal decoder and the ways in which checkpoints stretch them.

Shapes: R rows, T slots, D head width.

References:
    Su et al., 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", 3.2.
    Peng et al., 2023, "YaRN: Efficient Context Window Extension of Large Language Models", 3.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles of each slot."""

    cos: Array  # [R, T, D / 2] float32
    sin: Array  # [R, T, D / 2] float32


@dataclass(frozen=True, kw_only=True)
class _Scaling:
    """Constants that must all be positive."""

    rope_type: ClassVar[str]  # what Hugging Face calls this scaling
    # Fields of this class that it calls something else.
    names: ClassVar[Mapping[str, str]] = {"original_positions": "original_max_position_embeddings"}

    def __post_init__(self) -> None:
        """Refuses what cannot be computed with.

        Raises:
            ValueError: A constant is not positive and finite.
        """
        for constant in fields(self):
            value = getattr(self, constant.name)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, bool) and not 0 < number < math.inf:
                    raise ValueError(
                        f"{constant.name} of the rotary scaling must be positive, got {number}"
                    )

    def to_huggingface(self) -> dict[str, Any]:
        """Returns the fields of a Hugging Face configuration."""
        own = {self.names.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        return {"rope_type": self.rope_type} | own


@dataclass(frozen=True, kw_only=True)
class LinearScaling(_Scaling):
    """All frequencies are divided by `factor` (Gemma 3's layers of full attention)."""

    rope_type = "linear"
    factor: float

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the stretched frequencies `[D / 2]`."""
        return frequencies / np.float32(self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(_Scaling):
    """Low frequencies are divided, high ones stay (Llama 3.1 and later).

    Frequencies whose wavelength exceeds `original_positions / low_frequency_factor` are divided by
    `factor`, those below `original_positions / high_frequency_factor` stay, the rest interpolate.
    """

    rope_type = "llama3"
    names: ClassVar[Mapping[str, str]] = {
        **_Scaling.names,
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    }
    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the stretched frequencies `[D / 2]`."""
        wavelengths = 2 * math.pi / frequencies
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((self.original_positions / wavelengths - low) / (high - low), 0.0, 1.0)
        return (frequencies * (kept + (1 - kept) / self.factor)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class YarnScaling(_Scaling):
    """Frequencies that turn rarely are divided, and the scores sharpened (Qwen2.5, Qwen3).

    Frequencies that turn more than `beta_fast` times within `original_positions` stay, those that
    turn less than `beta_slow` times are divided by `factor`, the rest interpolate. Cosines and
    sines are multiplied by `attention_factor`.
    """

    rope_type = "yarn"
    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # True: the bounds between the three kinds are whole numbers

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the stretched frequencies `[D / 2]`."""
        half = frequencies.size

        def place(turns: float) -> float:
            return (
                half * math.log(self.original_positions / (turns * 2 * math.pi)) / math.log(theta)
            )

        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        # As in the reference code: a ramp of no width would divide by zero.
        width = high - low if high != low else 0.001
        divided = np.clip((np.arange(half, dtype=np.float32) - low) / width, 0.0, 1.0)
        return (frequencies * (1 - divided + divided / self.factor)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class FactorScaling(_Scaling):
    """Each frequency is divided by a factor of its own, as GGUF files store it."""

    rope_type = "longrope"
    factors: tuple[float, ...]  # D / 2 of them

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the stretched frequencies `[D / 2]`."""
        return frequencies / np.asarray(self.factors, np.float32)

    def to_huggingface(self) -> dict[str, Any]:
        """Returns the fields of a Hugging Face configuration."""
        # "longrope" has one list for short and one for long texts: the same list is for all.
        factors = list(self.factors)
        return {
            "rope_type": self.rope_type,
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
        }


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling | FactorScaling


def rotary_angles(
    positions: Array, head_dim: int, *, theta: float, scaling: RotaryScaling | None = None
) -> Rotary:
    """Computes the rotary angles of each slot, `position · theta^(-2 i / D)` for i < D/2.

    Args:
        positions: `[R, T]` int32.
        head_dim: Width D of one head; even.
        theta: Base of the frequencies.
        scaling: How they are stretched, or None.

    Returns:
        Cosines and sines `[R, T, D / 2]` float32.
    """
    # float32 and this order of operations, as in the models' training code: at position 100,000
    # a frequency that is one rounding error off turns by another angle.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    if scaling is not None:
        frequencies = scaling.stretch(frequencies, theta)
    angles = positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies)[None, None, :]
    factor = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    return Rotary(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(heads: Array, rotary: Rotary) -> Array:
    """Turns queries or keys by the angles of their slots.

    Args:
        heads: `[R, T, heads, D]`; entry i is paired with entry i + D/2, as in Hugging Face files.
        rotary: Angles of the T slots.

    Returns:
        The same shape and dtype; computed in float32.
    """
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(heads.dtype)


def parse_scaling(
    parameters: Mapping[str, Any], *, max_positions: int, original_positions: Any = None
) -> RotaryScaling | None:
    """Reads the `rope_scaling` or `rope_parameters` of a Hugging Face configuration.

    Args:
        parameters: Its fields; `rope_type` (or `type`) names the kind.
        max_positions: The configuration's `max_position_embeddings`.
        original_positions: The configuration's own `original_max_position_embeddings`, which
            overrides the one in `parameters`, or None.

    Returns:
        How the frequencies are stretched; None: they are not.

    Raises:
        ValueError: The kind is not supported, or a number is out of range.
        KeyError: A field is missing.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if float(parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor = {parameters['partial_rotary_factor']!r} is not supported; "
            "only 1.0 is"
        )
    if not isinstance(kind, str) or kind not in _PARSERS:
        raise ValueError(
            f"rotary positions scaled by {kind!r} are not supported; {', '.join(_PARSERS)} are"
        )
    if original_positions is not None:
        parameters = {**parameters, "original_max_position_embeddings": original_positions}
    return _PARSERS[kind](parameters, max_positions)


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """Returns the factor of cosines and sines that YaRN recommends, `1 + scale · 0.1 ln factor`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _parse_llama3(parameters: Mapping[str, Any], max_positions: int) -> RotaryScaling:
    scaling = Llama3Scaling(
        factor=float(parameters["factor"]),
        low_frequency_factor=float(parameters["low_freq_factor"]),
        high_frequency_factor=float(parameters["high_freq_factor"]),
        original_positions=_original_positions(parameters, max_positions),
    )
    if scaling.high_frequency_factor <= scaling.low_frequency_factor:
        raise ValueError(
            f"high_freq_factor = {scaling.high_frequency_factor} must exceed low_freq_factor = "
            f"{scaling.low_frequency_factor}"
        )
    return scaling


def _parse_yarn(parameters: Mapping[str, Any], max_positions: int) -> RotaryScaling:
    original = _original_positions(parameters, max_positions)
    if parameters.get("factor") is None:
        factor = max_positions / original
    else:
        factor = float(parameters["factor"])
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        scales = (parameters.get("mscale"), parameters.get("mscale_all_dim"))
        attention_factor = yarn_attention_factor(factor)
        if all(scales):
            above, below = (yarn_attention_factor(factor, float(scale)) for scale in scales)  # pyrefly: ignore[bad-argument-type]  (both set)
            attention_factor = above / below
    return YarnScaling(
        factor=factor,
        original_positions=original,
        attention_factor=float(attention_factor),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
    )


def _parse_factors(parameters: Mapping[str, Any], max_positions: int) -> RotaryScaling:
    factors = tuple(float(factor) for factor in parameters["short_factor"])
    same = list(factors) == [float(factor) for factor in parameters["long_factor"]]
    if not same or parameters.get("attention_factor") != 1.0:
        raise ValueError(
            "rotary positions scaled by 'longrope' are supported only where short_factor and "
            "long_factor are equal and attention_factor is 1.0: this decoder has one set of "
            "frequencies"
        )
    return FactorScaling(factors=factors)


_PARSERS: dict[str, Callable[[Mapping[str, Any], int], RotaryScaling | None]] = {
    "default": lambda parameters, _: None,
    "linear": lambda parameters, _: LinearScaling(factor=float(parameters["factor"])),
    "llama3": _parse_llama3,
    "yarn": _parse_yarn,
    "longrope": _parse_factors,
}


def _original_positions(parameters: Mapping[str, Any], max_positions: int) -> int:
    found = int(parameters.get("original_max_position_embeddings") or max_positions)
    if found < 1:
        raise ValueError(f"original_max_position_embeddings must be at least 1, got {found}")
    return found

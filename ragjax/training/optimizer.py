"""Optimisers: AdamW with warm-up, a schedule, clipping and one learning rate per tower."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

# Scales, biases and embeddings of one vector are not decayed (BERT, GPT-2 and T5 recipes agree).
_UNDECAYED_NAMES = ("bias", "scale", "norm")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a tower or a language model is updated.

    Attributes:
        learning_rate: Peak learning rate, reached after warm-up.
        warmup_steps: Steps of linear warm-up from zero.
        schedule: Course after warm-up: `linear` and `cosine` end at zero, `constant` stays.
        weight_decay: Decoupled weight decay of matrices (not of biases and norms).
        clip_norm: Largest global gradient norm; longer gradients are scaled down to it.
        adam_b1: Decay of the first moment.
        adam_b2: Decay of the second moment.
    """

    learning_rate: float
    warmup_steps: int = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    adam_b1: float = 0.9
    adam_b2: float = 0.999

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        for name in ("learning_rate", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be > 0, got {self.clip_norm}")
        for name in ("adam_b1", "adam_b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
        config: Peak, warm-up and course.
        total_steps: Steps of the whole run, warm-up included.

    Returns:
        A function from step (int) to learning rate (float).

    Raises:
        ValueError: If warm-up is longer than the run.
    """
    if config.warmup_steps > total_steps:
        raise ValueError(
            f"warmup_steps={config.warmup_steps} is more than the {total_steps} steps of the run"
            " (questions / batch size * epochs); lower warmup_steps or train longer"
        )
    peak, rest = config.learning_rate, max(1, total_steps - config.warmup_steps)
    if config.schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    else:
        after = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return after
    # Step 0 already moves: a warm-up that starts at exactly zero wastes the first batch.
    warmup = optax.linear_schedule(
        peak / config.warmup_steps, peak, max(1, config.warmup_steps - 1)
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig,
    *,
    total_steps: int,
    learning_rates: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """Builds AdamW with clipping, a schedule and one learning rate per tower.

    The gradient is clipped by its norm over all towers together, then each tower's update is scaled
    by its own schedule.

    Args:
        config: Options; its `learning_rate` serves the towers not named in `learning_rates`.
        total_steps: Steps of the whole run.
        learning_rates: Peak learning rate by top-level key of the parameters, for example
            `{"query": 2e-5, "doc": 1e-5}`.

    Returns:
        An optax transformation over the trainable parameters.
    """
    rates = dict(learning_rates or {})

    def adamw(rate: float) -> optax.GradientTransformation:
        scheduled = learning_rate_schedule(_with_rate(config, rate), total_steps)
        return optax.adamw(
            scheduled,
            b1=config.adam_b1,
            b2=config.adam_b2,
            weight_decay=config.weight_decay,
            mask=_decayed,
        )

    def labels(params: Any) -> Any:
        return {
            key: jax.tree.map(lambda _, key=key: key if key in rates else "*", value)
            for key, value in params.items()
        }

    clip = optax.clip_by_global_norm(config.clip_norm)
    if not rates:
        return optax.chain(clip, adamw(config.learning_rate))
    transforms: dict[Any, optax.GradientTransformation] = {"*": adamw(config.learning_rate)}
    transforms |= {key: adamw(rate) for key, rate in rates.items()}
    return optax.chain(clip, optax.partition(transforms, labels))


def _with_rate(config: OptimizerConfig, rate: float) -> OptimizerConfig:
    if rate < 0:
        raise ValueError(f"learning rates must be >= 0, got {rate}")
    return dataclasses.replace(config, learning_rate=rate)


def _decayed(params: Any) -> Any:
    def keep(path: tuple, leaf: Any) -> bool:
        names = [str(getattr(entry, "key", entry)).lower() for entry in path]
        return leaf.ndim >= 2 and not any(
            word in name for name in names for word in _UNDECAYED_NAMES
        )

    return jax.tree_util.tree_map_with_path(keep, params)

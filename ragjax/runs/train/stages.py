"""A stage of training: its optimizer and its resumable loop."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from ragjax.data import num_steps
from ragjax.runs.options.dual import LMConfig, RetrieverConfig
from ragjax.runs.options.end_to_end import TrainingConfig
from ragjax.runs.options.shared import TowersConfig
from ragjax.runs.trainable import SplitModel, SplitModels, SplitTowers
from ragjax.runs.workspace import Workspace
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.loop import HostWork, LoopConfig, run_steps
from ragjax.training.mesh import spread_rows
from ragjax.training.optimizer import OptimizerConfig, make_optimizer
from ragjax.training.steps import LossFn, TrainState, init_state, make_train_step

StageConfig = LMConfig | RetrieverConfig | TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How long a stage runs and how it updates parameters.

    Attributes:
        name: Of its checkpoints and metrics.
        num_steps: Steps to its end.
        seed: Of the random key of the first state.
        config: Warm-up, weight decay and clipping.
        learning_rate: Peak learning rate, or that of each model by name.
        index_version: Index that the stage starts from, noted in its checkpoints; None: not noted.
        accumulate: As in `make_train_step`.
        weight: As in `make_train_step`.
    """

    name: str
    num_steps: int
    seed: int
    config: StageConfig
    learning_rate: float | Mapping[str, float]
    index_version: int | None = None
    accumulate: int = 1
    weight: Callable[[Any], jax.Array] | None = None


def run_stage(
    workspace: Workspace,
    stage: Stage,
    split: SplitModel | SplitTowers | SplitModels,
    loss: LossFn,
    batch_at: Callable[[int], Any],
    *,
    host: HostWork | None = None,
    describe_batch: Callable[[int], str] | None = None,
    watch: Callable[[int, Any], None] | None = None,
) -> Any:
    """Runs a stage to its end, from its last checkpoint if there is one.

    Args:
        workspace: Folder, metrics and the stop flag.
        stage: Length and updates.
        split: The parameters before the stage.
        loss: For `make_train_step`.
        batch_at: Step to its batch.
        host: As in `run_steps`.
        describe_batch: As in `run_steps`.
        watch: Called with the steps done and the trainable parameters of that moment, as
            `after_step` of `run_steps`.

    Returns:
        The trainable parameters after the last step.
    """
    optimizer = stage_optimizer(stage)
    layout = workspace.layout
    mapped = layout.devices if layout.mapped else None
    step = make_train_step(
        loss, optimizer, accumulate=stage.accumulate, weight=stage.weight, mapped=mapped
    )

    def spread(state: TrainState, batch: Any, frozen: Any) -> tuple[TrainState, dict]:
        # Under pmap the step itself gives out the rows.
        return step(state, batch if mapped else spread_rows(batch, state.params), frozen)

    version = {} if stage.index_version is None else {"index_version": stage.index_version}
    return run_steps(
        LoopConfig(
            stage=stage.name,
            num_steps=stage.num_steps,
            checkpoint_seconds=60 * workspace.config.checkpoint_minutes,
        ),
        spread,
        layout.place(init_state(split.trainable, optimizer, stage.seed)),
        batch_at,
        frozen=layout.place(split.frozen),
        checkpointer=Checkpointer(workspace.folder / "checkpoints" / stage.name),
        log=workspace.metrics,
        stop=workspace.stop,
        info=version | {"num_steps": stage.num_steps},
        host=host,
        describe_batch=describe_batch,
        after_step=None if watch is None else lambda done, state: watch(done, state.params),
    ).params


def stage_optimizer(stage: Stage) -> optax.GradientTransformation:
    """Returns the optimizer of a stage."""
    rate, config = stage.learning_rate, stage.config
    rates = rate if isinstance(rate, Mapping) else {"": rate}
    options = OptimizerConfig(
        learning_rate=max(rates.values()),
        warmup_steps=int(config.warmup_fraction * stage.num_steps),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    return make_optimizer(
        options,
        total_steps=stage.num_steps,
        learning_rates=rates if isinstance(rate, Mapping) else None,
    )


def tower_rates(config: TowersConfig, towers: Iterable[str]) -> dict[str, float]:
    """Returns the peak learning rate of each of these towers."""
    rates = dict.fromkeys(towers, config.learning_rate)
    if "doc" in rates and config.doc_learning_rate >= 0:
        rates["doc"] = config.doc_learning_rate
    return rates


def stage_steps(config: StageConfig, num_examples: int) -> int:
    """Returns the steps of a stage over so many examples."""
    steps = num_steps(num_examples=num_examples, batch_size=config.batch_size, epochs=config.epochs)
    return max(steps, config.fewest_steps)

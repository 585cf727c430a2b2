"""What the training stages of a run share: the optimizer's options and the resumable loop."""

from collections.abc import Callable
from typing import Any

from ragjax.runs.options.dual import LMConfig, RetrieverConfig
from ragjax.runs.workspace import Workspace
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.loop import HostWork, LoopConfig, run_steps
from ragjax.training.optimizer import OptimizerConfig
from ragjax.training.steps import TrainState


def optimizer_config(config: LMConfig | RetrieverConfig, steps: int) -> OptimizerConfig:
    """Returns the optimizer's options for those of a stage of so many steps."""
    return OptimizerConfig(
        learning_rate=config.learning_rate,
        warmup_steps=int(config.warmup_fraction * steps),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )


def run_stage(
    workspace: Workspace,
    stage: str,
    steps: int,
    step_fn: Callable[..., tuple[TrainState, dict]],
    state: TrainState,
    batch_at: Callable[[int], Any],
    *,
    frozen: Any,
    index_version: int,
    host: HostWork | None = None,
) -> TrainState:
    """Runs a stage to its end, from its last checkpoint if there is one."""
    info = {"index_version": index_version, "num_steps": steps}
    return run_steps(
        LoopConfig(
            stage=stage, num_steps=steps, checkpoint_every=workspace.config.checkpoint_every
        ),
        step_fn,
        state,
        batch_at,
        frozen=frozen,
        checkpointer=Checkpointer(workspace.folder / "checkpoints" / stage),
        log=workspace.metrics,
        stop=workspace.stop,
        info=info,
        host=host,
    )

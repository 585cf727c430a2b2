"""The language-model stage of dual training: fine-tuning on retrieved documents."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragjax.index import SearchResult
from ragjax.runs.compare.choice import prefer
from ragjax.runs.options.dual import LMConfig
from ragjax.runs.train.best import BestStep, save_kept
from ragjax.runs.train.dev_nll import DevNll
from ragjax.runs.train.reading import lm_steps, readings
from ragjax.runs.train.stages import Stage, run_stage
from ragjax.runs.trainable import LM_KEPT, SplitModel, average_params, split_lm
from ragjax.runs.workspace import Workspace
from ragjax.training.lm import answer_tokens, make_lm_loss

# Dev questions that judge, at least: log-likelihoods differ far more than the ranks of documents.
_FEWEST = 8
# Times that the stage is measured.
_MEASURED = 2


def train_lm(
    workspace: Workspace,
    config: LMConfig,
    candidates: SearchResult,
    dev: SearchResult | None = None,
) -> dict[str, Any] | None:
    """Fine-tunes the language model on the training questions behind their documents.

    With `keep` "best" the stage is measured on dev questions, and its best step, averaged with the
    base model by the factor that is best there, is kept.

    Args:
        workspace: Data and models.
        config: Options of the stage.
        candidates: `[Q, K]` documents of the training questions, best first.
        dev: The same of the dev questions; None: the last step is kept.

    Returns:
        The adapted parameters, as `SplitModel.joined` has them (`ragjax.models.lora.merge` folds
        adapters in). None: the base model is
        kept, because adapting it did not help on dev or there was nothing to adapt it by.
    """
    lm, seed = workspace.lm, workspace.config.seed
    read = readings(workspace, config, candidates)
    if not read:
        workspace.note("no question to adapt the language model by: the base one is kept")
        return None
    steps = lm_steps(workspace, config, read)
    split = split_lm(config, lm.family, lm.params, seed=seed)
    scored = lm.family.packed_token_log_probs or lm.family.token_log_probs
    log_probs = functools.partial(scored, lm.config, remat=config.remat)
    stage = Stage(
        name="lm",
        num_steps=steps.num_steps,
        seed=seed,
        config=config,
        learning_rate=config.learning_rate,
        index_version=0,
        accumulate=config.accumulate,
        weight=answer_tokens,
    )
    loss = make_lm_loss(workspace.cast_lm(log_probs), split.merge)
    train = functools.partial(run_stage, workspace, stage, split, loss, steps.batch_at)
    judge = None
    if workspace.config.keep == "best" and dev is not None:
        judge = DevNll(workspace, config, split, dev)
        if judge.count < _FEWEST:
            workspace.log(
                f"note: {judge.count} dev questions, too few to judge the language model by: its"
                " last step is kept"
            )
            judge = None
    if judge is None:
        return split.joined(train())
    best = BestStep(workspace, "lm", judge)
    before = best.measure("before", split.trainable)
    train(watch=best.watch("lm", steps.num_steps, times=_MEASURED))
    return _kept(workspace, split, best, before)


def _kept(
    workspace: Workspace, split: SplitModel, best: BestStep, before: NDArray[np.float64]
) -> dict[str, Any] | None:
    """Averages the best step with the base model by the factor that is best on dev."""
    name, trained = best.restore(split.trainable)
    figures = {0.0: before, 1.0: best.figures[name]}

    def measure(factor: float) -> float:
        params = average_params(split.trainable, trained, factor)
        figures[factor] = best.measure(f"{name}, factor {factor:g}", params)
        return float(figures[factor].mean())

    # Along the line between the two, the likelihood has one maximum: one side is enough.
    measure(0.25 if measure(0.5) > figures[1.0].mean() else 0.75)
    factor = max(figures, key=lambda one: figures[one].mean())
    if not prefer(figures[factor], before, fewest=_FEWEST):
        factor = 0.0
    _say(workspace, figures, name, factor)
    kept = average_params(split.trainable, trained, factor)
    save_kept(workspace, LM_KEPT, kept, {"factor": factor, "step": name})
    return split.joined(kept) if factor else None


def _say(
    workspace: Workspace, figures: Mapping[float, NDArray[np.float64]], name: str, factor: float
) -> None:
    shown = ", ".join(f"{one:g}: {-figures[one].mean():.3f}" for one in sorted(figures))
    workspace.log(
        f"language model: NLL per token on {len(figures[0.0])} dev questions by the share of the"
        f" trained weights: {shown}"
    )
    workspace.note(
        f"the language model is adapted: {factor:.0%} of the weights of {name}, chosen on dev"
        if factor
        else "adapting the language model did not help on dev; the base language model is kept"
    )

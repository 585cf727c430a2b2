"""Trainable and frozen parameters: top layers, all layers, or LoRA adapters beside the weights.

Only the trainable part of a model is updated and saved.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ragjax.models import lora
from ragjax.models.families import LMFamily
from ragjax.models.trainable import (
    ENCODER,
    Layout,
    join_layers,
    merge_trainable,
    split_trainable,
)
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.options.shared import LearningConfig, TowersConfig
from ragjax.training.mesh import copy_to_all

END_TO_END = "end_to_end"
"""Stage that trains both models; its checkpoints hold `SplitModels.trainable`."""
LM_KEPT = "lm-kept"
"""Checkpoint of what was kept of the stage "lm"; where there is none, its last step was."""

Merge = Callable[[Any, Any], Any]  # (trainable, frozen) of one model -> its parameters


class SplitModel(NamedTuple):
    """The parameters of one model."""

    trainable: Any
    frozen: Any
    merge: Merge | None  # copies nothing; works while tracing; None: all of the model is frozen

    def merged(self, trainable: Any) -> Any:
        """Returns the parameters of the model for these trainable ones."""
        return self.merge(trainable, self.frozen) if self.merge else self.frozen

    def joined(self, trainable: Any) -> Any:
        """Returns them with all layers in one stack, as the base model has them.

        What is compiled for the base model then serves both. Adapters stay beside the weights, in
        several stacks.
        """
        merged, adapters = self.merged(trainable), self.merge is _merge_adapters
        return merged if adapters else join_layers(merged)


def folded(params: Any) -> Any:
    """Returns parameters as the base model has them: without adapters, all layers in one stack.

    What scores or generates with them is the base model's program, and a token that is generated
    copies no cache: between several stacks it would be taken apart and put together each time.

    Args:
        params: As of `SplitModel.joined`. Where they have adapters, the result takes as much memory
            as the weights.
    """
    return join_layers(lora.merge(params))


class SplitTowers(NamedTuple):
    """The towers of a retriever; by name, as `ragjax.training.lsr.towers` takes them."""

    trainable: dict[str, Any]
    frozen: dict[str, Any]  # the frozen part of each tower; all of a tower that is not trained
    merge: Merge | None  # of one tower; None: towers are trained as a whole

    def merged(self, trainable: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of all towers as a checkpoint has them.

        Adapters are folded into the weights and the layers are one stack again, so whatever encodes
        with the result does not depend on what was trained.

        Args:
            trainable: Current trainable parameters; other models in it are ignored. Its buffers may
                be part of the result.
        """
        trained = {name: trainable[name] for name in self.trainable}
        if self.merge is None:
            return {**self.frozen, **trained}
        rest = {name: self.frozen[name] for name in trained}
        return self.frozen | _merged_towers(self.merge, trained, rest)


class Trained(NamedTuple):
    """Parameters of both models after training."""

    towers: dict[str, Any]
    lm_params: Any


class SplitModels(NamedTuple):
    """The parameters of both models."""

    towers: SplitTowers
    lm: SplitModel

    @property
    def trainable(self) -> dict[str, Any]:
        """The trained towers, and "lm" where the language model is trained."""
        return self.towers.trainable | ({"lm": self.lm.trainable} if self.lm.merge else {})

    @property
    def frozen(self) -> dict[str, Any]:
        """The frozen parts, "lm" and "towers"."""
        return {"lm": self.lm.frozen, "towers": self.towers.frozen}

    def merged(self, trainable: Mapping[str, Any]) -> Trained:
        """Returns the parameters of both models for these trainable ones."""
        return Trained(self.towers.merged(trainable), self.lm.merged(trainable.get("lm")))


def split_lm(config: LearningConfig, family: LMFamily, params: Any, *, seed: int) -> SplitModel:
    """Splits a language model's parameters as the options say.

    Args:
        config: Layers to train, and whether by adapters.
        family: Of the model.
        params: Its parameters.
        seed: Of the adapters' random initial values.

    Raises:
        ValueError: The model has fewer layers.
    """
    embeddings = config.train_layers == 0 and config.lora_rank == 0
    return _split(config, params, family.layout, seed, embeddings=embeddings)


def split_towers(config: TowersConfig, towers: Mapping[str, Any], *, seed: int) -> SplitTowers:
    """Splits the towers: those that are not trained, and the frozen part of the others.

    Args:
        config: Towers to train, layers of each, and whether by adapters.
        towers: Parameters of `shared`, or of `query` and `doc`.
        seed: Of the adapters' random initial values, which differ between towers.
    """
    names = {"query": ("query",), "none": ()}.get(config.train, tuple(towers))
    trained = {name: tower for name, tower in towers.items() if name in names}
    frozen = {name: tower for name, tower in towers.items() if name not in names}
    if not trained or not (config.train_layers or config.lora_rank):
        return SplitTowers(trained, frozen, None)
    split = {
        name: _split(config, tower, ENCODER, 2 * seed + number)
        for number, (name, tower) in enumerate(trained.items())
    }
    return SplitTowers(
        {name: part.trainable for name, part in split.items()},
        frozen | {name: part.frozen for name, part in split.items()},
        next(iter(split.values())).merge,
    )


def split_models(
    config: RagConfig, family: LMFamily, lm_params: Any, tower_params: Mapping[str, Any]
) -> SplitModels:
    """Splits both models of an end-to-end run as its options say."""
    lm = SplitModel(None, lm_params, None)
    if config.trains_lm:
        lm = split_lm(config.language_model, family, lm_params, seed=config.seed)
    return SplitModels(split_towers(config.retriever, tower_params, seed=config.seed), lm)


def average_params(before: Any, after: Any, factor: float) -> Any:
    r"""Averages weights before and after training (WiSE-FT).

    .. math::
        \theta = \theta_{before} + factor \cdot (\theta_{after} - \theta_{before})

    Args:
        before: Parameters before training, all of them or the trainable ones.
        after: The same after it. Of adapters the product is averaged, not its two factors: `up` is
            scaled, since it was 0 before.
        factor: 0 returns `before`, 1 returns `after`, both as they are.

    References:
        Wortsman et al., "Robust fine-tuning of zero-shot models", 2022, section 3.
    """
    if factor in (0, 1):
        return after if factor else before

    def average(path: Any, old: Any, new: Any) -> Any:
        names = [getattr(part, "key", None) for part in path]
        if "lora" in names:
            return new * factor if names[-1] == "up" else new
        return (old + factor * (new - old)).astype(old.dtype)

    return jax.tree_util.tree_map_with_path(average, before, after)


def _split(
    config: LearningConfig, params: Any, layout: Layout, seed: int, *, embeddings: bool = False
) -> SplitModel:
    trainable, frozen = split_trainable(
        params, layout, config.train_layers or None, embeddings=embeddings
    )
    if not config.lora_rank:
        return SplitModel(trainable, frozen, merge_trainable)
    adapters = lora.init_adapters(
        trainable, rank=config.lora_rank, alpha=config.lora_alpha, key=jax.random.key(seed)
    )
    return SplitModel(copy_to_all(adapters, params), (trainable, frozen), _merge_adapters)


def _merge_adapters(adapters: Any, rest: Any) -> Any:
    weights, frozen = rest
    return merge_trainable(lora.attach(weights, adapters), frozen)


@functools.partial(jax.jit, static_argnums=0)
def _merged_towers(
    merge: Merge, trainable: dict[str, Any], frozen: dict[str, Any]
) -> dict[str, Any]:
    return {name: folded(merge(part, frozen[name])) for name, part in trainable.items()}

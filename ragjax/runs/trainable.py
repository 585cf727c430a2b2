"""What of a model learns: some or all of its layers, or adapters beside their weights.

A model's parameters come apart into what learns, which alone is updated and saved, and the rest.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ragjax.models import lora
from ragjax.models.families import LMFamily
from ragjax.models.trainable import ENCODER, join_layers, merge_trainable, split_trainable
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.options.shared import LearningConfig, TowersConfig

Merge = Callable[[Any, Any], Any]  # (trainable, frozen) of one model -> its parameters


class Parts(NamedTuple):
    """The parameters of one model, taken apart."""

    trainable: Any
    frozen: Any
    merge: Merge  # copies nothing; works while tracing


def lm_parts(config: LearningConfig, family: LMFamily, params: Any, *, seed: int) -> Parts:
    """Takes a language model apart as the options say.

    Args:
        config: How many layers learn, and whether by adapters.
        family: Of the model.
        params: Its parameters.
        seed: Of the adapters' random half.

    Raises:
        ValueError: The model has fewer layers.
    """
    embeddings = config.train_layers == 0 and config.lora_rank == 0
    learning, frozen = split_trainable(
        params, family.layout, config.train_layers or None, embeddings=embeddings
    )
    return _with_adapters(config, learning, frozen, seed)


def tower_parts(config: TowersConfig, params: Any, *, seed: int) -> Parts:
    """Takes the encoder of one tower apart; see `lm_parts`."""
    learning, frozen = split_trainable(params, ENCODER, config.train_layers or None)
    return _with_adapters(config, learning, frozen, seed)


class Towers(NamedTuple):
    """The towers of a retriever, taken apart; by name, as `ragjax.training.lsr.towers` takes it."""

    trainable: dict[str, Any]
    frozen: dict[str, Any]  # what of each tower does not learn; all of a tower that does not
    merge: Merge | None  # of one tower; None: towers learn as a whole


def retriever_parts(config: TowersConfig, towers: Mapping[str, Any], *, seed: int) -> Towers:
    """Takes the towers apart: those that are not trained, and what of the others is not.

    Args:
        config: Which towers learn, how many layers of them, and whether by adapters.
        towers: Parameters of `shared`, or of `query` and `doc`.
        seed: Of the adapters' random halves; another one for each tower follows from it.
    """
    trained = {"query": ("query",), "none": ()}.get(config.train, tuple(towers))
    learning = [name for name in towers if name in trained]
    frozen = {name: tower for name, tower in towers.items() if name not in learning}
    if not learning or not (config.train_layers or config.lora_rank):
        return Towers({name: towers[name] for name in learning}, frozen, None)
    parts = {
        name: tower_parts(config, towers[name], seed=2 * seed + number)
        for number, name in enumerate(learning)
    }
    return Towers(
        {name: part.trainable for name, part in parts.items()},
        frozen | {name: part.frozen for name, part in parts.items()},
        parts[learning[0]].merge,
    )


def whole_towers(parts: Towers, trainable: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of all towers as a checkpoint has them.

    Adapters are folded into the weights and the layers are one stack again, so whatever encodes
    with the result knows nothing of what learnt.

    Args:
        parts: The towers, taken apart.
        trainable: What learns, at this moment; its buffers may be part of the result.
    """
    if parts.merge is None:
        return {**parts.frozen, **trainable}
    rest = {name: parts.frozen[name] for name in trainable}
    return parts.frozen | _whole(parts.merge, dict(trainable), rest)


@functools.partial(jax.jit, static_argnums=0)
def _whole(merge: Merge, trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    return {
        name: join_layers(lora.merge(merge(part, frozen[name]))) for name, part in trainable.items()
    }


def _with_adapters(config: LearningConfig, learning: Any, frozen: Any, seed: int) -> Parts:
    if not config.lora_rank:
        return Parts(learning, frozen, merge_trainable)
    adapters = lora.init_adapters(
        learning, rank=config.lora_rank, alpha=config.lora_alpha, key=jax.random.key(seed)
    )
    return Parts(adapters, (learning, frozen), _merge_adapters)


def _merge_adapters(adapters: Any, rest: Any) -> Any:
    learning, frozen = rest
    return merge_trainable(lora.attach(learning, adapters), frozen)


END_TO_END = "end_to_end"


class Trained(NamedTuple):
    """Both models after training."""

    towers: dict[str, Any]
    lm_params: Any


class SplitModels(NamedTuple):
    """Both models, taken apart into what learns and the rest."""

    trainable: dict[str, Any]  # "lm" where it learns, and the towers that learn
    frozen: dict[str, Any]  # "lm" and "towers"
    merge_lm: Callable[[Any, Any], Any] | None
    towers: Any  # `ragjax.runs.trainable.Towers`

    def whole_towers(self, trainable: Any) -> dict[str, Any]:
        """Returns the parameters of all towers for what learns at this moment."""
        mine = {name: part for name, part in trainable.items() if name != "lm"}
        return whole_towers(self.towers, mine)

    def whole_lm(self, trainable: Any) -> Any:
        """Returns the parameters of the language model for what learns at this moment."""
        if "lm" not in trainable:
            return self.frozen["lm"]
        assert self.merge_lm is not None, "a language model that learns was taken apart"
        return self.merge_lm(trainable["lm"], self.frozen["lm"])


def split_models(
    config: RagConfig, family: LMFamily, lm_params: Any, tower_params: dict[str, Any]
) -> SplitModels:
    """Takes both models apart as the options say."""
    tower_parts = retriever_parts(config.retriever, tower_params, seed=config.seed)
    trainable = dict(tower_parts.trainable)
    if not config.language_model.train:
        frozen = {"lm": lm_params, "towers": tower_parts.frozen}
        return SplitModels(trainable, frozen, None, tower_parts)
    lm = lm_parts(config.language_model, family, lm_params, seed=config.seed)
    return SplitModels(
        trainable | {"lm": lm.trainable},
        {"lm": lm.frozen, "towers": tower_parts.frozen},
        lm.merge,
        tower_parts,
    )

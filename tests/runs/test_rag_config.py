import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from ragjax.runs.options.end_to_end import (
    ObjectiveConfig,
    RagConfig,
    ReaderConfig,
    TowersConfig,
    TrainingConfig,
)
from ragjax.runs.options.files import load_config_file
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.options.shared import EvaluationConfig

FROZEN = RefreshConfig(mode="frozen")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RagConfig(refresh=RefreshConfig()), ["refresh.mode off", "frozen"]),
        (lambda: RagConfig(retriever=TowersConfig(train="query")), ["query_only"]),
        (
            lambda: RagConfig(refresh=RefreshConfig(mode="query_only")),
            ["--retriever.train query"],
        ),
        (
            lambda: RagConfig(retriever=TowersConfig(train="none")),
            ["async", "--refresh.mode frozen"],
        ),
        (lambda: ObjectiveConfig(marginal_weight=0), ["all weights are 0"]),
        (lambda: ObjectiveConfig(lsr_weight=-1), ["lsr_weight", "-1"]),
        (lambda: ObjectiveConfig(temperature=0), ["temperature"]),
        (
            lambda: RagConfig(objective=ObjectiveConfig(score="attention", lsr_weight=1)),
            ["--language_model.reader fusion"],
        ),
        (
            lambda: RagConfig(language_model=ReaderConfig(reader="fusion")),
            ["--objective.marginal emdr2"],
        ),
        (
            lambda: RagConfig(objective=ObjectiveConfig(marginal="emdr2")),
            ["--objective.lm_weight", "no-train"],
        ),
        (
            lambda: RagConfig(
                objective=ObjectiveConfig(lm_weight=1), language_model=ReaderConfig(train=False)
            ),
            ["lm_weight=1"],
        ),
        (
            lambda: RagConfig(
                language_model=ReaderConfig(train=False),
                retriever=TowersConfig(train="none"),
                refresh=FROZEN,
            ),
            ["neither"],
        ),
        (
            lambda: RagConfig(objective=ObjectiveConfig(marginal_weight=0, lm_weight=1)),
            ["nothing trains the retriever"],
        ),
        (
            lambda: RagConfig(training=TrainingConfig(accumulate=2)),
            ["--objective.negatives none"],
        ),
        (lambda: TrainingConfig(accumulate=3), ["accumulate=3", "batch_size=8"]),
        (lambda: TrainingConfig(devices=3), ["devices=3", "batch_size=8"]),
        (lambda: TrainingConfig(documents=0), ["documents", "1"]),
        (lambda: TrainingConfig(warmup_fraction=2), ["warmup_fraction"]),
    ],
)
def test_options_at_odds_are_refused_with_the_remedy(make, words):
    with pytest.raises(ValueError) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_the_stand_in_carries_what_the_shared_parts_read():
    config = RagConfig(
        data="d",
        seed=3,
        evaluation=EvaluationConfig(documents=2, mode="ensemble"),
        training=TrainingConfig(documents=5, batch_size=4, epochs=2),
        language_model=ReaderConfig(learning_rate=1e-3, train_layers=2, lora_rank=4, remat=True),
        retriever=TowersConfig(
            scale=10, train="both", doc_learning_rate=0.5, doc_tokens=64, lora_rank=2
        ),
    )
    other = config.stand_in()
    assert (other.data, other.seed, other.evaluation) == ("d", 3, config.evaluation)
    assert other.refresh.mode == "async"
    model, retriever = other.language_model, other.retriever
    assert (model.learning_rate, model.train_layers, model.lora_rank, model.remat) == (
        1e-3, 2, 4, True,
    )  # fmt: skip
    assert (retriever.scale, retriever.train, retriever.doc_tokens) == (10, "both", 64)
    assert (retriever.doc_learning_rate, retriever.lora_rank) == (0.5, 2)
    assert (retriever.candidates, retriever.batch_size, retriever.epochs) == (5, 4, 2)


def test_every_option_has_a_help_text():
    for kind in (RagConfig, ObjectiveConfig, TrainingConfig, ReaderConfig, TowersConfig):
        documented = "".join(base.__doc__ or "" for base in kind.__mro__)
        for field in dataclasses.fields(kind):
            # Python 3.13 takes the indentation out of a docstring.
            assert re.search(rf"^ +{field.name}: ", documented, re.M), f"{kind}.{field.name}"


RECIPES = Path(__file__).parents[2] / "experiments" / "recipes" / "end_to_end"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_each_recipe_loads_and_changes_what_it_says(path):
    config = load_config_file(path, RagConfig())
    values = tomllib.loads(path.read_text("utf-8"))
    for section, options in values.items():
        for name, value in options.items():
            assert getattr(getattr(config, section), name) == value
    assert "section" in path.read_text("utf-8")  # each names its source


def test_there_are_recipes():
    assert len(list(RECIPES.glob("*.toml"))) >= 4

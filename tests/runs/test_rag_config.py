import dataclasses
import re

import pytest

from ragjax.runs.options.dual import AdaptConfig, RetrieverConfig
from ragjax.runs.options.end_to_end import (
    ObjectiveConfig,
    RagConfig,
    ReaderConfig,
    TowersConfig,
    TrainingConfig,
)
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.options.shared import RunConfig

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
            lambda: ObjectiveConfig(lsr_weight=1, direction="lsr"),
            ["infinite where p_LSR is 0", "--objective.negatives none"],
        ),
        (lambda: ObjectiveConfig(marginal="gumbel"), ["--objective.negatives none"]),
        (
            lambda: ObjectiveConfig(marginal="reinforce", negatives="none", samples=1),
            ["samples must be at least 2"],
        ),
        (
            lambda: ObjectiveConfig(marginal="gumbel", negatives="none", score="leave_one_out"),
            ["--objective.score log_prob_per_token"],
        ),
        (
            lambda: RagConfig(
                objective=ObjectiveConfig(marginal="gumbel", negatives="none", samples=5)
            ),
            ["objective.samples=5", "of 4 documents"],
        ),
        (
            lambda: RagConfig(objective=ObjectiveConfig(marginal="reinforce", negatives="none")),
            ["--objective.lm_weight", "no_train"],
        ),
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
            ["--objective.lm_weight", "no_train"],
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
        (lambda: TrainingConfig(documents=0), ["documents", "1"]),
        (lambda: TrainingConfig(warmup_fraction=2), ["warmup_fraction"]),
    ],
)
def test_options_at_odds_are_refused_with_the_remedy(make, words):
    with pytest.raises(ValueError) as error:
        make()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("config", "lm", "retriever", "towers"),
    [
        (RunConfig(), False, False, ("shared",)),
        (AdaptConfig(), True, True, ("shared",)),
        (AdaptConfig(stages=("lm",)), True, False, ("shared",)),
        (AdaptConfig(stages=("retriever",)), False, True, ("shared",)),
        (AdaptConfig(retriever=RetrieverConfig(train="both")), True, True, ("query", "doc")),
        (RagConfig(), True, True, ("shared",)),
        (
            RagConfig(retriever=TowersConfig(train="query"), refresh=FROZEN),
            True, True, ("query", "doc"),
        ),
        (RagConfig(retriever=TowersConfig(train="none"), refresh=FROZEN), True, False, ("shared",)),
        (RagConfig(language_model=ReaderConfig(train=False)), False, True, ("shared",)),
    ],
)  # fmt: skip
def test_shared_code_reads_what_is_trained_from_every_config(config, lm, retriever, towers):
    assert (config.trains_lm, config.trains_retriever) == (lm, retriever)
    assert config.retriever.tower_names == towers


def test_every_option_has_a_help_text():
    for kind in (RagConfig, ObjectiveConfig, TrainingConfig, ReaderConfig, TowersConfig):
        documented = "".join(base.__doc__ or "" for base in kind.__mro__)
        for field in dataclasses.fields(kind):
            # Python 3.13 takes the indentation out of a docstring.
            assert re.search(rf"^ +{field.name}: ", documented, re.M), f"{kind}.{field.name}"

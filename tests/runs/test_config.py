import dataclasses

import pytest
from programs import load_script

from ragjax.runs import (
    AdaptConfig,
    EvaluateConfig,
    LMConfig,
    RagConfig,
    RetrieverConfig,
    RunConfig,
)
from ragjax.runs.options.files import load_config_file


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "name,text",
    [
        ("c.toml", 'seed = 3\n[retriever]\nlearning_rate = 1e-4\ntrain = "query"\n'),
        ("c.yaml", "seed: 3\nretriever:\n  learning_rate: 1e-4\n  train: query\n"),
        ("c.json", '{"seed": 3.0, "retriever": {"learning-rate": 1e-4, "train": "query"}}'),
    ],
)
def test_three_formats_say_the_same(tmp_path, name, text):
    config = load_config_file(write(tmp_path, name, text), AdaptConfig())
    assert config.seed == 3 and isinstance(config.seed, int)
    assert config.retriever.learning_rate == 1e-4 and config.retriever.train == "query"
    assert config.language_model == AdaptConfig().language_model


def test_a_misspelt_key_gets_the_nearest_name(tmp_path):
    path = write(tmp_path, "c.toml", "[retriever]\nlerning_rate = 1.0\n")
    with pytest.raises(ValueError, match=r"c\.toml: unknown key retriever\.lerning_rate.*learning"):
        load_config_file(path, AdaptConfig())


@pytest.mark.parametrize(
    "text,match",
    [
        ("seed: many", "seed = 'many': expected a whole number"),
        ("seed: 1.5", "expected a whole number"),
        ("lm: no", "expected text; put it in quotes"),
        ("retriever: {objective: kl}", "expected one of pdist, lsr"),
        ("retriever: {temperature: 0}", "temperature must be greater than 0, got 0"),
        ("retriever: 3", "must hold keys and values"),
        ("seed: [1", "c.yaml"),
    ],
)
def test_wrong_values_name_file_key_and_what_was_expected(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        load_config_file(write(tmp_path, "c.yaml", text), AdaptConfig())


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.toml, \.yaml"):
        load_config_file(write(tmp_path, "c.ini", "seed=1"), AdaptConfig())


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: RetrieverConfig(temperature=0.0), "temperature must be greater than 0"),
        (lambda: RetrieverConfig(learning_rate=-1e-5), "learning_rate must be at least 0"),
        (lambda: RetrieverConfig(warmup_fraction=1.5), "warmup_fraction must be between 0 and 1"),
        (lambda: RetrieverConfig(objective="lsr"), "--retriever.negatives none"),
        (lambda: LMConfig(batch_size=0), "batch_size must be at least 1"),
        (lambda: AdaptConfig(stages=("lm", "lm")), "stages names a stage twice"),
        (lambda: AdaptConfig(output=""), "output"),
        (lambda: RetrieverConfig(temperature=float("nan")), "temperature"),
    ],
)
def test_values_out_of_range_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("config", [AdaptConfig(), RagConfig(), EvaluateConfig()])
def test_documents_read_for_an_answer_are_one_flag_of_every_script(config):
    parse_flags = load_script("experiments/_program.py").parse_flags
    options = parse_flags(config, None, ["--documents=3"]).options
    assert getattr(options, "evaluation", options).documents == 3
    if isinstance(config, RunConfig):
        longer = parse_flags(config, None, ["--evaluation.documents=3"]).options
        assert longer == options
    assert load_script("experiments/ask.py").Flags(documents=3).documents == 3


def test_the_fingerprint_follows_what_decides_the_result_and_nothing_else():
    base = AdaptConfig()
    assert dataclasses.replace(base, output="elsewhere").fingerprint() == base.fingerprint()
    assert dataclasses.replace(base, seed=1).fingerprint() != base.fingerprint()

import dataclasses
import json
from pathlib import Path

import pytest
from programs import load_script

from ragjax import runs
from ragjax.runs import (
    AdaptConfig,
    EvaluateConfig,
    LMConfig,
    RagConfig,
    RetrieverConfig,
    RunConfig,
)
from ragjax.runs.folder import config_record
from ragjax.runs.options.checks import Options, check_all, checked_later
from ragjax.runs.options.files import load_config_file
from ragjax.runs.program import parse_flags


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
        ("seed: [1", "c.yaml: line 1: expected"),
        ("seed: .inf", r"c.yaml: seed = inf: expected a whole number"),
        ("encode_tokens: 1e400", "encode_tokens = '1e400': expected a whole number"),
        ("seed: .nan", "seed = nan: expected a whole number"),
        ("seed: 9007199254740994.0", "expected a whole number"),
        ("seed: -1", r"c.yaml: seed must be from 0 to 2\^63 - 1, got -1"),
        ("seed: 9223372036854775808", "seed must be"),
        ("encode_tokens: 2147483648", r"encode_tokens must be less than 2\^31"),
        ("retriever: {learning_rate: .inf}", "retriever.learning_rate = inf: expected a finite"),
        ("retriever: {temperature: 1e-50}", "retriever.temperature must .* float32"),
        ("refresh: {mode: off}", "c.yaml: refresh.mode = False: .*put the word in quotes"),
        ("seed: 1\nseed: 2", "c.yaml: the key seed is there twice"),
        ("retriever: {train: both, train: query}", "c.yaml: the key train is there twice"),
        ("encode-tokens: 1\nencode_tokens: 2", "encode_tokens is there twice, with - and"),
        ("stages: []", "c.yaml: stages names no model to train"),
        ("data_options: {fields: text}", "data_options.fields 'text': expected id=docid"),
    ],
)
def test_wrong_values_name_file_key_and_what_was_expected(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        load_config_file(write(tmp_path, "c.yaml", text), AdaptConfig())


@pytest.mark.parametrize(
    "name,data,match",
    [
        ("c.yaml", b"seed: 1\ndata: caf\xe9\n", "c.yaml: byte 0xe9 in line 2 is not UTF-8"),
        ("c.json", b'{"seed": 1, "seed": 2}', "c.json: the key seed is there twice"),
        (
            "c.json",
            b'{"encode_tokens": 1e400}',
            "c.json: encode_tokens = inf: expected",
        ),
        ("c.json", b"[" * 100_000, "c.json: maximum recursion depth"),
        ("c.toml", b"seed = 1\nseed = 2", "c.toml: .*seed = 2"),
        ("c.toml", b"seed = nan\n", "c.toml: seed = nan: expected a whole number"),
    ],
)
def test_a_file_that_cannot_be_taken_is_one_sentence_with_its_name(tmp_path, name, data, match):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=match) as error:
        load_config_file(tmp_path / name, AdaptConfig())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63 - 1])
def test_large_whole_numbers_keep_every_digit(tmp_path, seed):
    for name, text in [("c.json", f'{{"seed": {seed}}}'), ("c.yaml", f"seed: '{seed}'")]:
        assert load_config_file(write(tmp_path, name, text), AdaptConfig()).seed == seed


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path):
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"seed": 3}')
    assert load_config_file(tmp_path / "c.json", AdaptConfig()).seed == 3


@pytest.mark.parametrize("config", [AdaptConfig(seed=5), RagConfig(seed=5), EvaluateConfig(seed=5)])
def test_the_file_that_a_run_wrote_is_a_config_file_of_its_script(tmp_path, config):
    path = write(
        tmp_path, "config.json", json.dumps(config_record(config, "digest", mode="concat"))
    )
    assert parse_flags(type(config)(), None, [f"--config={path}"]).options == config
    other = RagConfig() if isinstance(config, AdaptConfig) else AdaptConfig()
    with pytest.raises(ValueError, match=r"config.json: options of experiments/.* not those of"):
        load_config_file(path, other)


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
        (lambda: RetrieverConfig(learning_rate=float("inf")), "learning_rate must be a finite"),
        (lambda: AdaptConfig(seed=-1), "seed must be from 0"),
        (lambda: EvaluateConfig(seed=2**63), "seed must be from 0"),
        (lambda: EvaluateConfig(run="r", documents=0), "documents must be at least 1"),
        (lambda: AdaptConfig(dev_fraction=1.0), "dev_fraction must be at least 0 and below 1"),
        (lambda: AdaptConfig(stages=()), "stages names no model to train"),
        (lambda: AdaptConfig(stages=("lm",), score_cache="x"), "score_cache holds scores"),
        (
            lambda: AdaptConfig(data=Path("manual")),
            r"data must be a string, got \w*Path\('manual'\)",
        ),
        (lambda: AdaptConfig(questions="q.csv"), r"questions must be QuestionsConfig\(...\), got"),
        (lambda: RagConfig(training={"epochs": 2}), r"training must be TrainingConfig\(...\)"),
    ],
)
def test_values_out_of_range_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "config,flags,start",
    [
        (AdaptConfig(), ["--seed=-1"], "--seed must be from 0 to"),
        (AdaptConfig(), ["--seed=9223372036854775808"], "--seed must be"),
        (AdaptConfig(), ["--stages"], "--stages names no model to train"),
        (AdaptConfig(), ["--retriever.learning_rate=inf"], "--retriever.learning_rate must be"),
        (AdaptConfig(), ["--retriever.objective=lsr"], "--retriever.objective=lsr is"),
        (AdaptConfig(), ["--refresh.every=x"], "--refresh.every: Cannot read 'x'"),
        (AdaptConfig(), ["--data_options.fields=text"], "--data_options.fields 'text': expected"),
        (AdaptConfig(), ["--data_options.fields=a=b"], "--data_options.fields: unknown name 'a'"),
        (AdaptConfig(), ["--refresh.mode=async", "--stages=lm"], "--refresh.mode async is for"),
        (RagConfig(), ["--devices=-1"], "--devices must be at least 0"),
        (RagConfig(), ["--objective.marginal_weight=0"], "--objective: all weights are 0"),
        (RagConfig(), ["--training.accumulate=2"], "--training.accumulate=2 splits a step"),
        (EvaluateConfig(), ["--run=r", "--encode_tokens=0"], "--encode_tokens must be at least 1"),
        (EvaluateConfig(), ["--fields=text"], "--fields 'text': expected"),
        (EvaluateConfig(), ["--support_threshold=nan"], "--support_threshold must be"),
    ],
)
def test_a_flag_out_of_range_is_named_as_it_was_given(config, flags, start):
    with pytest.raises(ValueError) as error:
        parse_flags(config, None, flags)
    assert str(error.value).startswith(start)


def replaced(options, path, text):
    name, *rest = path
    old = getattr(options, name)
    new = replaced(old, rest, text) if rest else int(text) if text.isdigit() else float(text)
    return dataclasses.replace(options, **{name: new})


def test_every_number_among_the_flags_is_checked_for_what_no_computation_takes():
    def numbers(options, group=""):
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if dataclasses.is_dataclass(value):
                yield from numbers(value, f"{group}{field.name}.")
            elif "float" in str(field.type):
                yield from ((f"--{group}{field.name}", text) for text in ("nan", "inf", "1e39"))
            elif "int" in str(field.type):
                yield f"--{group}{field.name}", str(2**63)

    for config in (AdaptConfig(), RagConfig(), EvaluateConfig()):
        for flag, text in numbers(config):
            with pytest.raises(ValueError) as error:
                with checked_later():
                    changed = replaced(config, flag.removeprefix("--").split("."), text)
                check_all(changed, mark="--")
            assert str(error.value).startswith(flag), (flag, text)


@pytest.mark.parametrize("config", [AdaptConfig(), RagConfig()])
def test_every_group_of_options_is_imported_from_one_place(config):
    groups = [type(value) for value in vars(config).values() if isinstance(value, Options)]
    assert groups and all(getattr(runs, group.__name__) is group for group in groups)


@pytest.mark.parametrize("config", [AdaptConfig(), RagConfig(), EvaluateConfig()])
def test_documents_read_for_an_answer_are_one_flag_of_every_script(config):
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

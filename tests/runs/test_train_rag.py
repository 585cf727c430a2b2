"""experiments/train_rag.py as its user meets it: files, refusals, forecast, continuing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from programs import load_script

from ragjax.models.inputs import Tokens
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.program import parse_flags
from ragjax.runs.report.card import run_card
from ragjax.runs.saved import adapted_encoder, adapted_language_model, open_run


@pytest.fixture(scope="module")
def script():
    return load_script("experiments/train_rag.py")


@pytest.fixture(scope="module")
def finished(tiny_run):
    return tiny_run("train_rag").folder


@pytest.mark.slow
def test_a_run_writes_what_it_promises(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert {"closed_book", "bm25", "before", "after", "hybrid"} <= set(metrics)
    assert np.isfinite(metrics["after"]["answer_nll"]["value"])
    dev = json.loads((finished / "dev.json").read_text())
    assert set(dev["systems"]) == {"before", "after"}
    assert "marginal_nll" in {d["metric"] for d in dev["differences"]}
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if s["stage"] == "end_to_end"] == [0, 1]
    page = (finished / "report.html").read_text("utf-8")
    assert "marginal" in page and "End-to-end training" in page
    assert json.loads((finished / "config.json").read_text())["program"] == "train_rag"


@pytest.mark.slow
def test_a_finished_run_repeated_gives_the_same_bytes(script, tiny_rag_flags, finished, tmp_path):
    names = ("metrics.json", "differences.json", "predictions.jsonl", "dev.json", "report.html")
    before = {name: (finished / name).read_bytes() for name in names}
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert script.main([*tiny_rag_flags, f"--output={run}", "--refresh.every=1"]) == 0
    assert {name: (run / name).read_bytes() for name in names} == before


@pytest.mark.slow
def test_what_a_run_trained_can_be_opened(finished, tiny_inputs):
    run = open_run(finished)
    assert isinstance(run.config, RagConfig) and run.config.training.documents == 2
    assert run.config.trains_lm and run.config.trains_retriever and "after" in run.metrics
    encoder, lm = adapted_encoder(run, "encoder"), adapted_language_model(run)
    ids = np.full((1, 4), 5, np.int32)
    texts = Tokens(ids, np.ones_like(ids, bool))
    base, base_lm = run.models.base_encoder, run.models.base_language_model
    old, new = (base.encode(params, texts) for params in (base.params, encoder.params))
    assert 0 < np.abs(np.asarray(old) - np.asarray(new)).max() < 0.1
    assert lm.params is not base_lm.params
    assert run_card(run, encoder, "encoder", license=None).program == "experiments/train_rag.py"


@pytest.mark.slow
def test_a_run_that_has_not_ended_says_what_finishes_it(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "cut"))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="the same experiments/train_rag.py command finishes"):
        adapted_encoder(open_run(run), "encoder")


@pytest.mark.slow
def test_other_options_do_not_continue_it(script, tiny_rag_flags, finished, capsys):
    code = script.main([*tiny_rag_flags, f"--output={finished}", "--refresh.every=1", "--seed=3"])
    assert code == 2 and "seed: 0 there, 3 here" in capsys.readouterr().err


def refuse(script, capsys, flags):
    """Returns what is said of bad input, in one line; options at odds are told by the parser."""
    try:
        code = script.main(flags)
    except SystemExit as left:
        code = left.code
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    return " ".join(word for word in error.split() if word.strip("\u2502\u2500"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--objective.marginal=emdr2"], "--objective.lm_weight"),
        (["--refresh.mode=off"], "--refresh.mode frozen"),
        (["--devices=16"], "--devices 16: there are 1 devices"),
        (["--training.same_source=drop"], "names the document it was made from"),
        (["--language_model.train_layers=9"], "9: "),
        (
            ["--language_model.reader=fusion", "--objective.marginal=emdr2",
             "--objective.lm_weight=1"],
            "causal decoder",
        ),
        (["--data=nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(script, capsys, tiny_rag_flags, tmp_path, more, words):
    output = tmp_path / "out"
    assert words in refuse(script, capsys, [*tiny_rag_flags, f"--output={output}", *more])
    assert not (output / "config.json").exists()  # the next try is not in its own way


def test_a_dry_run_forecasts_and_writes_nothing(script, tiny_rag_flags, tmp_path, capsys):
    folder = tmp_path / "out"
    more = [f"--output={folder}", "--refresh.every=1", "--dry_run"]
    assert script.main([*tiny_rag_flags, *more]) == 0
    out = capsys.readouterr().out
    assert "documents to encode" in out and "refresh: every 1 steps" in out
    assert 'refresh.every="1"' in out and "seed=" not in out  # what is no default
    assert not folder.exists()
    folder.mkdir()
    (folder / "letter.txt").touch()
    assert script.main([*tiny_rag_flags, *more]) == 2
    out, error = capsys.readouterr()
    assert "documents to encode" in out
    assert f"{folder} is not empty (letter.txt) and holds no run; choose another" in error


def test_flags_override_a_config_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[objective]\nmarginal = "token"\nlsr_weight = 2.0\n')
    flags = [f"--config={path}", "--objective.lsr_weight=3"]
    parsed = parse_flags(RagConfig(), None, flags).options
    assert (parsed.objective.marginal, parsed.objective.lsr_weight) == ("token", 3.0)

"""The export script: what a run adapted comes out, and nothing half done does."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_script

from ragjax.data import pad_right
from ragjax.models import Tokens, load_encoder, load_language_model
from ragjax.runs.compare.answers import Request, ScoredAnswer, answer_requests
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.files import from_dict, to_dict
from ragjax.runs.saved import adapted_encoder, adapted_language_model, open_run
from ragjax.runs.workspace import open_workspace
from ragjax.training.loop import StopFlag
from ragjax.training.score_cache import ResultCache


@pytest.fixture(scope="module")
def export():
    """The script's `main`, on a list of flags."""
    return load_script("experiments/export.py").main


def embed(encoder, texts):
    rows = [encoder.tokenizer.encode(text).ids for text in texts]
    padded = pad_right(rows, length=encoder.max_length, pad_id=encoder.pad_id)
    tokens = Tokens(jnp.asarray(padded.ids), jnp.asarray(padded.mask))
    return np.asarray(jax.jit(encoder.encode)(encoder.params, tokens))


def assert_scores_are_those_of_the_run(run, query_encoder, doc_encoder):
    """Each score that the run wrote down is the dot product of the exported towers."""
    config = open_run(run).config
    corpus = {}
    for line in (Path(config.data) / "corpus.jsonl").read_text().splitlines():
        row = json.loads(line)
        corpus[row["_id"]] = f"{row['title']}\n{row['text']}"
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    docs = dict(zip(corpus, embed(doc_encoder, corpus.values()), strict=True))
    queries = embed(query_encoder, [line["question"] for line in lines])
    for line, query in zip(lines, queries, strict=True):
        found = line["systems"]["after"]
        expected = [docs[doc] @ query for doc in found["doc_ids"]]
        np.testing.assert_allclose(found["doc_scores"], expected, atol=1e-5)


@pytest.mark.slow
def test_a_shared_encoder_comes_out_as_the_run_evaluated_it(export, tiny_run, tmp_path, capsys):
    run, output = tiny_run("adapt").folder, tmp_path / "encoder"
    flags = [f"--run={run}", "--what=encoder", f"--output={output}", "--base_license=mit"]
    code = export([*flags, "--models=adapted"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "every bit equal" in shown.out and f"SentenceTransformer('{output}')" in shown.out
    encoder = load_encoder(str(output))
    assert_scores_are_those_of_the_run(run, encoder, encoder)
    base = load_encoder(open_run(run).config.encoder)
    assert np.abs(embed(encoder, ["a"]) - embed(base, ["a"])).max() > 1e-5
    text = (output / "README.md").read_text("utf-8")
    metrics = json.loads((run / "metrics.json").read_text())
    value = metrics["after"]["recall@5"]
    assert f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in text
    for part in ("license: mit", '"train": "shared"', "10 test questions", "| bm25 |"):
        assert part in text
    assert "exact_match" not in text.partition("## Metrics")[2]
    assert "un-adapted model" not in text


@pytest.mark.slow
def test_what_a_run_ships_is_exported_with_a_note_where_that_is_un_adapted(
    export, tiny_run, tmp_path, capsys
):
    run, output = tmp_path / "run", tmp_path / "encoder"
    shutil.copytree(tiny_run("adapt").folder, run)
    served = json.loads((run / "served.json").read_text())
    told = {"retriever": "base", "documents": "hybrid_before"}
    told["reason"] = "adaptation of the retriever did not help here; shipped: un-adapted hybrid"
    (run / "served.json").write_text(json.dumps(served | told))
    assert export([f"--run={run}", "--what=encoder", f"--output={output}"]) == 0
    shown = capsys.readouterr().out
    assert "did not help here; shipped: un-adapted hybrid" in shown and "--models adapted" in shown
    base = load_encoder(open_run(run).config.encoder)
    np.testing.assert_array_equal(embed(load_encoder(str(output)), ["a"]), embed(base, ["a"]))
    assert "This is the un-adapted model" in (output / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_two_towers_with_adapters_come_out_merged(export, tiny_run, tmp_path, capsys):
    run = tiny_run("adapt-lora").folder
    towers = {}
    for what in ("query_encoder", "doc_encoder"):
        flags = [f"--run={run}", f"--what={what}", f"--output={tmp_path / what}"]
        assert export([*flags, "--models=adapted"]) == 0
        towers[what] = load_encoder(str(tmp_path / what))
        assert "One of two encoders" in (tmp_path / what / "README.md").read_text()
    assert_scores_are_those_of_the_run(run, *towers.values())
    assert np.abs(np.subtract(*(embed(tower, ["a"]) for tower in towers.values()))).max() > 1e-5
    capsys.readouterr()
    assert export([f"--run={run}", "--what=encoder", f"--output={tmp_path / 'x'}"]) == 2
    assert "this run has two encoders (retriever.train both)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapt", "adapt-lora"])
def test_the_language_model_answers_as_in_the_run(export, tiny_run, tmp_path, name):
    run, output = tiny_run(name).folder, tmp_path / "lm"
    assert export([f"--run={run}", "--what=language_model", f"--output={output}"]) == 0
    config = dataclasses.replace(open_run(run).config, lm=str(output))
    workspace = open_workspace(config, tmp_path, stop=StopFlag(), log=lambda _: None)
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "answer_nll" in line["systems"]["after"]["metrics"]]
    questions = {question.id: question for question in workspace.questions["test"]}
    requests = [Request(questions[line["id"]], (), ()) for line in lines]
    teacher = workspace.base_lm()
    answers = answer_requests(
        workspace, teacher, requests, ResultCache(tmp_path / "c", ScoredAnswer)
    )
    written = [line["systems"]["closed_book_lm_half"]["metrics"]["answer_nll"] for line in lines]
    assert len(lines) == 6
    np.testing.assert_allclose([answer.nll for answer in answers], written, atol=1e-4)
    base = [line["systems"]["closed_book"]["metrics"]["answer_nll"] for line in lines]
    assert np.abs(np.subtract(base, written)).max() > 1e-2
    text = (output / "README.md").read_text("utf-8")
    assert "| answer_nll |" in text.replace("f1 | ", "| ") or "answer_nll" in text


@pytest.mark.slow
def test_a_run_that_has_not_ended_is_refused(export, tiny_run, tmp_path, capsys):
    run = Path(shutil.copytree(tiny_run("adapt").folder, tmp_path / "cut"))

    def refused(what):
        code = export(
            [f"--run={run}", f"--what={what}", "--models=adapted", f"--output={tmp_path / 'out'}"]
        )
        assert code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    capsys.readouterr()
    checkpoints = run / "checkpoints" / "retriever"
    last = max(checkpoints.iterdir(), key=lambda path: int(path.name))
    files = [path for path in last.rglob("*") if path.is_file() and path.name != "ragjax.json"]
    data = max(files, key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1] + b"\x00")
    assert "stage retriever has no whole checkpoint" in (error := refused("encoder"))
    assert "the same experiments/adapt.py command finishes the run" in error and "sha256" in error
    for step in checkpoints.iterdir():
        (step / "ragjax.json").unlink()
    assert "stage retriever has no whole checkpoint" in refused("encoder")
    shutil.rmtree(checkpoints)
    assert "stage retriever has not begun" in refused("encoder")
    (run / "metrics.json").unlink()
    assert export([f"--run={run}", "--what=language_model", f"--output={tmp_path / 'lm'}"]) == 0
    assert "holds no metrics.json" in capsys.readouterr().out
    assert "This export comes with no measurement" in (tmp_path / "lm" / "README.md").read_text()
    settings = json.loads((run / "config.json").read_text())
    settings["config"]["stages"] = ["retriever"]
    (run / "config.json").write_text(json.dumps(settings))
    assert "this run adapted the retriever only" in (error := refused("language_model"))
    assert f"--source {settings['config']['lm']} --what language_model" in error
    settings["config"]["stages"] = ["lm"]
    (run / "config.json").write_text(json.dumps(settings))
    assert "this run adapted the language model only" in refused("encoder")


def test_a_folder_without_a_run_is_refused(export, tmp_path, capsys):
    flags = ["--what=encoder", f"--output={tmp_path / 'out'}"]
    assert export([f"--run={tmp_path / 'none'}", *flags]) == 2
    assert "no run there (no config.json)" in capsys.readouterr().err
    for text, message in (
        ("[]", "not the config of a run"),
        ('{"config": {"sed": 1}}', "did you mean seed"),
    ):
        (tmp_path / "config.json").write_text(text)
        assert export([f"--run={tmp_path}", *flags]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--what=encoder"], "give one of --run FOLDER"),
        (["--what=encoder", "--run=a", "--source=b"], "give one of --run FOLDER"),
        (["--what=doc_encoder", "--source=b"], "is of a run with two encoders"),
        (["--what=encoder", "--source=b", "--max_shard_gb=0"], "must be at least a byte"),
        (["--what=encoder", "--source=b", "--max_shard_gb=inf"], "--max_shard_gb must be a finite"),
    ],
)
def test_flags_at_odds_are_refused(export, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        export([*flags, f"--output={tmp_path / 'out'}"])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_any_model_is_exported_without_a_run(export, tiny_inputs, tmp_path, capsys):
    source, output = tiny_inputs["lm"], tmp_path / "out"
    flags = [f"--source={source}", "--what=language_model", f"--output={output}"]
    flags += ["--dtype=bfloat16"]
    assert export([*flags, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert not output.exists() and "would hold" in shown
    assert export(flags) == 0
    written = capsys.readouterr().out
    for path in output.iterdir():
        line = f"{path.stat().st_size:>15,} bytes  {path.name}"
        assert line in shown and line in written
    assert f"AutoModelForCausalLM.from_pretrained('{output}')" in written
    again, base = load_language_model(str(output)), load_language_model(source)
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), base.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, rounded)
    assert export(flags) == 2
    assert "is not empty" in capsys.readouterr().err


def test_options_come_back_from_a_run_as_they_were(tmp_path):
    config = AdaptConfig(stages=("retriever",), seed=3, score_cache="x")
    assert from_dict(AdaptConfig(), to_dict(config), tmp_path / "config.json") == config


def test_open_run_reads_what_adapt_writes(tmp_path):
    text = json.dumps({"config": to_dict(AdaptConfig())})
    (tmp_path / "config.json").write_text(text, "utf-8-sig")
    run = open_run(tmp_path)
    assert run.config == AdaptConfig() and run.metrics is None
    with pytest.raises(ValueError, match="two encoders"):
        adapted_encoder(
            dataclasses.replace(run, config=dataclasses.replace(run.config, retriever=_both())),
            "encoder",
        )
    with pytest.raises(ValueError, match="adapted the retriever only"):
        only = dataclasses.replace(run.config, stages=("retriever",))
        adapted_language_model(dataclasses.replace(run, config=only))


def _both():
    return dataclasses.replace(AdaptConfig().retriever, train="both")

"""Training whose compiled step retrieves by calling back to the host."""

import json
import logging

import jax
import numpy as np
import pytest
from conftest import RAG_FLAGS
from programs import load_script

from ragjax.runs import RagConfig, RefreshConfig, TrainingConfig
from ragjax.training.live import LiveRetrieval

FLAGS = (
    *RAG_FLAGS,
    "--training.batch_size=8",
    "--training.epochs=6",
    "--training.no-overlap",
    "--data_options.train_questions=8",
    "--objective.contrastive_weight=0.5",
    "--refresh.mode=async",
    "--refresh.every=1",
    "--refresh.adopt_after=1",  # the same index at the same step in every run
)


@pytest.fixture
def run(tiny_inputs, all_devices, tmp_path):
    """A function that makes a run and returns its exit code and the lines of its metrics."""
    main = load_script("experiments/train_rag.py").main

    def make(name, *more):
        given = [f"--{key}={value}" for key, value in tiny_inputs.items()]
        code = main([*given, *FLAGS, f"--output={tmp_path / name}", *more])
        path = tmp_path / name / "metrics.jsonl"
        return code, list(map(json.loads, path.read_text().splitlines()))

    return make


def assert_same_losses(lines, expected, also="contrastive"):
    assert len(lines) == len(expected) >= 6
    for name in ("loss", also, "retrieval/recall", "grad_norm"):
        np.testing.assert_allclose(
            [line[name] for line in lines], [line[name] for line in expected], rtol=1e-4, atol=1e-5
        )


def steps_compiled(records, name):
    """Returns how often the step was compiled, which is called `_fun` under pmap."""
    found = [record.getMessage() for record in records]
    return sum(text.startswith(f"Finished XLA compilation of jit({name})") for text in found)


@pytest.mark.slow
def test_every_way_to_retrieve_and_to_divide_has_the_same_losses(run, caplog):
    code, expected = run("host", "--devices=1")
    assert code == 0
    versions = [line["index/version"] for line in expected]
    assert versions == [0, 0, 1, 2, 3, 4]
    for name, program, more in (
        ("callback", "step", ["--devices=1"]),
        ("callback on a mesh", "step", ["--fsdp=2"]),
        ("callback under pmap", "_fun", ["--parallel=pmap"]),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            code, lines = run(name, "--retrieval=callback", *more)
        assert code == 0
        assert_same_losses(lines, expected)
        assert [line["index/searched"] for line in lines] == versions
        assert steps_compiled(caplog.records, program) == 1, name


@pytest.mark.slow
def test_a_step_that_retrieves_takes_its_rows_in_parts(run):
    alone = ("--devices=1", "--objective.contrastive_weight=0", "--objective.negatives=none")
    code, expected = run("host", *alone)
    assert code == 0
    code, lines = run("callback", *alone, "--retrieval=callback", "--training.accumulate=2")
    assert code == 0
    assert_same_losses(lines, expected, also="skipped")


@pytest.mark.slow
def test_pmap_searches_a_scann_index_that_is_refreshed_meanwhile(run, caplog):
    pytest.importorskip("scann", reason="ScaNN has no package for this platform")
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        code, lines = run("run", "--retrieval=callback", "--parallel=pmap", "--index=scann")
    assert code == 0
    assert [line["index/searched"] for line in lines] == [0, 0, 1, 2, 3, 4]  # four refreshes
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert steps_compiled(caplog.records, "_fun") == 1


def test_what_fails_in_the_callback_ends_the_run_with_its_own_message(run, monkeypatch, capfd):
    search = LiveRetrieval.search

    def fails(self, snapshot, rows, embeddings):
        if snapshot.version == 1:
            raise ValueError("the index of the tests cannot be searched")
        return search(self, snapshot, rows, embeddings)

    monkeypatch.setattr(LiveRetrieval, "search", fails)
    code, lines = run("run", "--retrieval=callback", "--devices=1")
    assert code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: the index of the tests cannot be searched"]
    monkeypatch.undo()
    code, lines = run("run", "--retrieval=callback", "--devices=1")
    assert code == 0 and [line["step"] for line in lines] == list(range(6))


def test_a_search_that_needs_the_live_encoder_is_refused():
    with pytest.raises(ValueError, match="refresh.mode rerank .* use --retrieval host"):
        RagConfig(
            training=TrainingConfig(retrieval="callback"), refresh=RefreshConfig(mode="rerank")
        )

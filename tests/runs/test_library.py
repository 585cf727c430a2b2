"""Runs from Python: what a call returns, who may write a folder, and how it is stopped."""

import json
import signal
import threading

import numpy as np
import pytest

import ragjax
from ragjax.runs import (
    AdaptConfig,
    EvaluateConfig,
    FinishedRun,
    RagConfig,
    adapt,
    dry_run,
    evaluate,
    open_run,
)
from ragjax.training.loop import Interrupted, StopFlag


def silent(line):
    """Reports to nobody."""


@pytest.fixture(scope="module")
def options(tiny_inputs):
    """Options of a run of a few seconds, as a config file has them."""
    return {
        **tiny_inputs,
        "checkpoint_minutes": 0,
        "data_options": {"train_questions": 8, "test_questions": 6, "answer_questions": 3},
        "language_model": {"questions": 4, "batch_size": 4, "train_layers": 1},
        "retriever": {"candidates": 2, "batch_size": 4},
        "evaluation": {"max_new_tokens": 3, "resamples": 20},
    }


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("library") / "run")
    return adapt(AdaptConfig.from_dict(options | {"output": output}), log=silent)


@pytest.mark.slow
def test_a_call_returns_metrics_models_and_report(run):
    written = json.loads((run.folder / "metrics.json").read_text())
    assert written.items() <= run.metrics.items()
    assert "<html" in run.report.read_text("utf-8")
    models = run.models
    assert models.query_encoder.params is models.doc_encoder.params  # one tower serves both
    for base, trained in (
        (models.base_encoder.params, models.query_encoder.params),
        (models.base_language_model.params, models.language_model.params),
    ):
        assert float(_distance(base, trained)) > 0
    assert models.language_model is models.language_model  # read once


def _distance(base, trained):
    import jax

    sizes = [
        np.sum([np.abs(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree)])
        for tree in (base, trained)
    ]
    return abs(sizes[0] - sizes[1])


@pytest.mark.slow
def test_what_a_call_returns_is_what_its_folder_gives(run):
    again = open_run(run.folder)
    assert (again.folder, again.config, again.metrics) == (run.folder, run.config, run.metrics)


@pytest.mark.slow
def test_a_result_is_shown_in_one_line(run):
    shown = repr(run)
    recall = [run.metrics[name]["recall@5"]["value"] for name in ("before", "after")]
    assert shown.startswith(f"FinishedRun('{run.folder}', recall@5 {recall[0]:.3g} -> ")
    assert "\n" not in shown and len(shown) < 200 + len(str(run.folder))
    empty = FinishedRun(folder=run.folder, metrics=None, config=run.config)
    assert repr(empty) == f"FinishedRun('{run.folder}')"


@pytest.mark.slow
def test_a_run_is_evaluated_from_python(run, tmp_path):
    config = EvaluateConfig(
        run=str(run.folder), output=str(tmp_path / "out"), max_questions=4, answer_questions=2,
        max_new_tokens=2, resamples=20, robustness=False,
    )  # fmt: skip
    made = evaluate(config, log=silent)
    assert made.metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert made.report.is_file() and repr(made).startswith("Evaluation(")


def test_two_calls_on_one_folder_the_second_is_refused(options, tmp_path):
    config = AdaptConfig.from_dict(options | {"output": str(tmp_path / "run")})
    started, stop, ended = threading.Event(), StopFlag(), []

    def first(line):
        started.set()

    def call():
        try:
            adapt(config, stop=stop, log=first)
        except Interrupted as error:
            ended.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        assert started.wait(60)
        with pytest.raises(ValueError, match="run is locked by process .*this one; end the call"):
            adapt(config, log=silent)
    finally:
        stop.signum = signal.SIGINT
        thread.join()
    assert [error.signum for error in ended] == [signal.SIGINT]


def test_outside_the_main_thread_a_call_needs_no_stop_flag(options, tmp_path):
    said = []
    config = AdaptConfig.from_dict(options | {"output": str(tmp_path / "run")})
    thread = threading.Thread(target=lambda: dry_run(config, log=said.append))
    thread.start()
    thread.join()
    assert any("documents to encode" in line for line in said)


def test_a_refused_call_leaves_no_config(options, tmp_path):
    config = AdaptConfig.from_dict(
        options | {"output": str(tmp_path / "run"), "score_cache": str(tmp_path / "none")}
    )
    with pytest.raises(ValueError, match="no such file"):
        adapt(config, log=silent)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"document": 4}}, "options: unknown key training.document; did you mean"),
        ({"training": {"documents": "many"}}, "training.documents = 'many': expected a whole"),
        ({"training": 3}, "training. must hold keys and values"),
        ({"training": {"documents": 0}}, "documents must be at least 1"),
    ],
)
def test_nested_values_that_do_not_fit_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        RagConfig.from_dict(values)


def test_nested_values_become_options():
    config = RagConfig.from_dict({"seed": 3, "training": {"documents": 2}})
    assert (config.seed, config.training.documents, config.training.batch_size) == (3, 2, 8)
    assert config.evaluation == RagConfig().evaluation


def test_the_version_is_that_of_the_package(monkeypatch):
    from importlib import metadata

    assert ragjax.__version__[0].isdigit()

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert ragjax.__version__ == "0+unknown"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ragjax.nothing  # noqa: B018  (it is to raise)

"""The program that adapts both models: what it writes, and that it may be cut anywhere."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import environment, load_script, send_at, start

ADAPT = load_script("experiments/adapt.py")
METRICS = {
    "recall@1", "recall@5", "recall@20", "mrr@10", "ndcg@10", "answer@5",
    "exact_match", "f1", "answer_nll",
}  # fmt: skip
ANSWERS = {"exact_match", "f1", "answer_nll"}


@pytest.fixture(scope="module")
def finished(tiny_run):
    """An uninterrupted run: (flags, output folder, what it printed)."""
    run = tiny_run("adapt")
    return run.flags, run.folder, run.printed


@pytest.mark.slow
def test_a_run_writes_everything_it_promises(finished):
    _, output, out = finished
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics) == ["closed_book", "bm25", "before", "after", "hybrid", "served"]
    assert set(metrics["closed_book"]) - {"n", "applicable"} == ANSWERS
    for name in ("bm25", "before", "after", "hybrid", "served"):
        assert set(metrics[name]) - {"n", "applicable"} == METRICS
        assert metrics[name]["n"] == 10
    for name in METRICS:
        interval = metrics["after"][name]
        assert set(interval) == {"value", "low", "high"}
        assert interval["low"] <= interval["value"] <= interval["high"]
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and len({line["id"] for line in lines}) == 10
    assert set(metrics) - {"served"} <= set(lines[0]["systems"])
    served = json.loads((output / "served.json").read_text())
    assert metrics["served"]["recall@5"] == metrics["hybrid"]["recall@5"]
    assert "shipped: adapted hybrid" in served["reason"] and served["reason"] in out
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lm_steps = [s["step"] for s in steps if s["stage"] == "lm"]
    assert lm_steps == list(range(len(lm_steps))) and 2 <= len(lm_steps) <= 3
    assert [s["step"] for s in steps if s["stage"] == "retriever-1"] == list(range(6))
    assert json.loads((output / "config.json").read_text())["config"]["retriever"]["rounds"] == 2
    assert (output / "checkpoints" / "lm").is_dir() and (output / "index" / "2").is_dir()
    assert "about" in out and "documents to encode" in out  # the forecast came first
    assert out.index("documents to encode") < out.index("== language model")
    # And how well the un-adapted retrievers find, before anything is trained.
    first = out.index("before adapting  dev recall@5  dev mrr@10  test recall@5  test mrr@10")
    assert out.index("== index before") < first < out.index("== language model")
    assert "answers to 6 of 10 test questions (--data_options.answer_questions)" in out
    cells = json.loads((output / "cells.json").read_text())["cells"]
    teachers = json.loads((output / "teachers.json").read_text())
    assert teachers["language_model"] in ("adapted", "base") and teachers["weights"]["prior"] > 0
    read = {"none", "bm25", "before", "hybrid_before", "after", "hybrid"}
    assert {(cell["lm"], cell["documents"]) for cell in cells} == {
        (lm, documents) for lm in ("base", "adapted") for documents in read
    }


@pytest.mark.slow
def test_the_mean_of_the_predictions_is_the_metric(finished):
    _, output, _ = finished
    metrics = json.loads((output / "metrics.json").read_text())
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    for system in ("bm25", "after"):
        values = [line["systems"][system]["metrics"]["recall@5"] for line in lines]
        assert metrics[system]["recall@5"]["value"] == pytest.approx(sum(values) / len(values))


@pytest.mark.slow
def test_a_finished_run_repeated_gives_the_same_bytes(finished, tmp_path):
    flags, whole, _ = finished
    output = Path(shutil.copytree(whole, tmp_path / "again"))
    (output / "metrics.json").unlink()
    assert ADAPT.main([*flags, f"--output={output}"]) == 0
    assert (output / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


@pytest.mark.slow
def test_killed_and_stopped_the_run_ends_with_the_same_bytes(finished, tmp_path, capsys):
    """Every other place of a cut is tested with the part that is cut: steps, scores, answers."""
    flags, whole, _ = finished
    output = tmp_path / "cut"
    flags = [*flags, f"--output={output}"]
    with start("experiments/adapt.py", flags) as process:
        # Meanwhile the folder is taken.
        while not (output / "run.lock").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2)
        assert ADAPT.main(flags) == 2
        assert f"locked by process {process.pid}" in capsys.readouterr().err
        send_at(process, output / "scores" / "0.jsonl", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    with start("experiments/adapt.py", flags) as process:
        step = output / "checkpoints" / "retriever-0" / "1" / "ragjax.json"
        _, err = send_at(process, step, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues this run" in err
    assert ADAPT.main(flags) == 0
    for name in ("served.json", "metrics.json", "differences.json", "predictions.jsonl"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


COUNTING = """
import sys
import jax
from ragjax.runs import AdaptConfig, adapt
from ragjax.runs.program import run_program

missed = []
jax.monitoring.register_event_listener(
    lambda event, **_: event == "/jax/compilation_cache/cache_misses" and missed.append(event)
)
code = run_program(adapt, AdaptConfig(), None, sys.argv[1:])
print("\\ncompiled:", len(missed))
sys.exit(code)
"""


@pytest.mark.slow
def test_a_second_run_elsewhere_compiles_nothing(finished, tmp_path):
    flags, _, _ = finished
    env = environment()
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        env.pop(name, None)
    env["RAGJAX_CACHE"] = str(tmp_path / "cache")
    compiled = []
    for output in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-c", COUNTING, *flags, f"--output={tmp_path / output}"],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert f"kept in {tmp_path / 'cache' / 'compiled'}" in done.stdout  # in the forecast
        compiled.append(int(done.stdout.rpartition("compiled: ")[2]))
    assert compiled[0] > 50 and compiled[1] == 0, compiled

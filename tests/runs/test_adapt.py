import json
import signal
import subprocess
import sys
import time

import pytest
from programs import ROOT, environment

SCRIPT = ROOT / "experiments" / "adapt.py"
METRICS = {
    "recall@1", "recall@5", "recall@20", "mrr@10", "ndcg@10", "answer@5",
    "exact_match", "f1", "answer_nll",
}  # fmt: skip
ANSWERS = {"exact_match", "f1", "answer_nll"}


def start(flags, output, **kwargs):
    command = [sys.executable, str(SCRIPT), *flags, f"--output={output}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), **kwargs,
    )  # fmt: skip


def run(flags, output):
    process = start(flags, output)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_flags):
    """An uninterrupted run: (flags, output folder, what it printed)."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = run(tiny_flags, output)
    assert code == 0, err
    return tiny_flags, output, out


@pytest.mark.slow
def test_a_run_writes_everything_it_promises(finished):
    _, output, out = finished
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics) == ["closed_book", "bm25", "before", "after", "hybrid"]
    assert set(metrics["closed_book"]) - {"n", "applicable"} == ANSWERS
    for name in ("bm25", "before", "after", "hybrid"):
        assert set(metrics[name]) - {"n", "applicable"} == METRICS
        assert metrics[name]["n"] == 10
    for name in METRICS:
        interval = metrics["after"][name]
        assert set(interval) == {"value", "low", "high"}
        assert interval["low"] <= interval["value"] <= interval["high"]
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and len({line["id"] for line in lines}) == 10
    assert set(metrics) <= set(lines[0]["systems"])
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if s["stage"] == "lm"] == [0, 1]
    assert [s["step"] for s in steps if s["stage"] == "retriever-1"] == [0, 1, 2]
    assert json.loads((output / "config.json").read_text())["config"]["retriever"]["rounds"] == 2
    assert (output / "checkpoints" / "lm").is_dir() and (output / "index" / "2").is_dir()
    assert "about" in out and "documents to encode" in out  # the forecast came first
    assert out.index("documents to encode") < out.index("== language model")


@pytest.mark.slow
def test_the_mean_of_the_predictions_is_the_metric(finished):
    _, output, _ = finished
    metrics = json.loads((output / "metrics.json").read_text())
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    for system in ("bm25", "after"):
        values = [line["systems"][system]["metrics"]["recall@5"] for line in lines]
        assert metrics[system]["recall@5"]["value"] == pytest.approx(sum(values) / len(values))


@pytest.mark.slow
def test_a_finished_run_repeated_gives_the_same_bytes(finished):
    flags, output, _ = finished
    before = (output / "metrics.json").read_bytes()
    code, out, err = run(flags, output)
    assert code == 0, err
    assert (output / "metrics.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "landmark",
    ["scores/0.jsonl", "checkpoints/retriever-0/1/ragjax.json", "evaluation/answers.jsonl"],
)
def test_killed_anywhere_the_run_ends_with_the_same_metrics(finished, tmp_path, landmark):
    flags, whole, _ = finished
    output = tmp_path / "cut"
    process = start(flags, output)
    try:
        deadline = time.monotonic() + 300
        while not (output / landmark).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    finally:
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    code, _, err = run(flags, output)
    assert code == 0, err
    for name in ("metrics.json", "differences.json", "predictions.jsonl"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(finished, tmp_path):
    flags, whole, _ = finished
    output = tmp_path / "stopped"
    process = start(flags, output)
    try:
        deadline = time.monotonic() + 300
        while not (output / "checkpoints" / "lm").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
    finally:
        out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues this run" in err
    code, _, err = run(flags, output)
    assert code == 0, err
    assert (output / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


@pytest.mark.slow
def test_two_runs_in_one_folder_the_second_is_refused(finished, tmp_path):
    flags, _, _ = finished
    output = tmp_path / "shared"
    first = start(flags, output)
    try:
        while not (output / "run.lock").exists() and first.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2)
        code, _, err = run(flags, output)
        assert code == 2 and f"locked by process {first.pid}" in err
    finally:
        first.kill()
        first.communicate()

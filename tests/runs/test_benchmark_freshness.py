"""The comparison of ways to keep the index fresh, on a tiny domain."""

import json

import jax
import pytest
from programs import load_script


@pytest.fixture(scope="module")
def script():
    module = load_script("benchmarks/freshness.py")
    cache = jax.config.jax_compilation_cache_dir
    yield module
    jax.config.update("jax_compilation_cache_dir", cache)


def test_an_arm_names_mode_cadence_and_share(script):
    flags = script.Flags(data="d", questions=40, batch_size=4, max_tokens=32)
    config = script.arm_config(flags, "async:7:0.25", 3)
    assert (config.refresh.mode, config.refresh.every, config.refresh.partial) == (
        "async",
        "7",
        0.25,
    )
    assert (config.seed, config.retriever.train, config.retriever.doc_tokens) == (3, "both", 32)
    assert script.arm_config(flags, "query_only", 0).retriever.train == "query"


@pytest.mark.parametrize("arm", ["sometimes", "async:1:1:1", "sync:often"])
def test_an_arm_that_cannot_be_read_is_bad_input(script, arm, tmp_path, capsys):
    assert script.main(["--data", "none", "--output", str(tmp_path), "--arms", arm]) == 2
    assert "error:" in capsys.readouterr().err


def test_the_plot_has_a_line_for_each_arm_and_a_missing_library_is_said(
    script, tmp_path, monkeypatch
):
    points = [{"seconds": 2.0, "refreshes": 1, "mrr@10": 0.5}]
    results = [
        {"arm": "un-adapted", "seed": 0, "points": [], "questions": {"mrr@10": [0.0, 0.4]}},
        {"arm": "sync:1", "seed": 0, "points": points, "questions": {"mrr@10": [0.5]}},
    ]  # fmt: skip
    pytest.importorskip("matplotlib", reason="needs the [notebooks] extra")
    script.plot_quality(results, ["sync:1"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert script.main(["--data", "d", "--plot", "x.png"]) == 2


@pytest.mark.slow
def test_arms_are_trained_once_and_compared(script, tiny_inputs, tmp_path, capsys):
    flags = [
        "--data", tiny_inputs["data"], "--encoder", tiny_inputs["encoder"], "--output",
        str(tmp_path), "--arms", "sync:1", "frozen", "--questions", "16", "--batch_size", "4",
        "--epochs", "1", "--points", "2", "--learning_rate", "1e-2",
    ]  # fmt: skip
    assert script.main(flags) == 0
    out = capsys.readouterr().out
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["arm"] for result in results] == ["un-adapted", "sync:1", "frozen"]
    assert [result["refreshes"] for result in results] == [0, 3, 0]
    assert [point["step"] for point in results[1]["points"]] == [2, 4]
    assert results[1]["staleness_steps"] == 0 and results[2]["staleness_steps"] == 1.5
    assert all(len(result["questions"]["recall@5"]) == 26 for result in results)
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["arm", "un-adapted", "sync:1", "frozen"]
    assert "+0.000 [+0.000, +0.000]" in rows[2]
    assert not any(path.is_dir() and "sync" in path.name for path in tmp_path.iterdir())
    assert script.main(flags) == 0  # nothing is repeated
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3

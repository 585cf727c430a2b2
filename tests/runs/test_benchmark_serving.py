"""The benchmark of the server runs whole on a tiny run, and loses nothing."""

import json

import pytest
from programs import environment, load_script

pytest.importorskip("uvicorn", reason="needs the [serve] extra")


@pytest.fixture
def benchmark(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return load_script("benchmarks/serving.py")


@pytest.mark.slow
def test_every_search_is_answered_as_it_is_alone(benchmark, tiny_run, tmp_path, capsys):
    output = tmp_path / "found.json"
    flags = [f"--run={tiny_run('train_rag').folder}", "--clients=8", "--requests=200",
             "--server=--limits.batch=4 --documents=2", f"--output={output}"]  # fmt: skip
    assert benchmark.main(flags) == 0
    found = json.loads(output.read_text())
    assert (found["lost"], found["mixed_up"], found["exit_code"]) == (0, 0, 143)
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]
    assert "200 searches, 8 clients: 0 lost, 0 mixed up" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--clients=0", "--requests=0", "--topk=0"])
def test_sizes_out_of_range_are_refused(benchmark, capsys, flag):
    assert benchmark.main(["--run=x", flag]) == 2
    assert f"error: {flag.split('=')[0]} must be at least 1" in capsys.readouterr().err

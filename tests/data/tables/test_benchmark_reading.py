"""The benchmark of reading runs whole, at a size that a test can afford."""

import json

import pytest
from programs import load_script


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmarks/reading.py")


@pytest.mark.slow
def test_every_kind_is_read_and_opened_again(benchmark, tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="needs the [parquet] extra")
    assert benchmark.main(["--passages", "3000", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "reading.json").read_text())
    assert found.keys() == benchmark._KINDS.keys() and all(kind in shown for kind in found)
    assert all(one["again"]["seconds"] < one["first"]["seconds"] for one in found.values())


def test_a_size_without_passages_is_refused(benchmark, capsys):
    assert benchmark.main(["--passages", "0"]) == 2
    assert "passages must be at least 1" in capsys.readouterr().err

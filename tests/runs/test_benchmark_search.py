"""The benchmark of indexes runs whole on few vectors, and finds what exact search finds."""

import json

import pytest
from programs import load_script


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmarks/search.py")


def test_three_indexes_are_compared_at_equal_recall(benchmark, tmp_path, capsys):
    pytest.importorskip("faiss", reason="needs the [parity] extra")
    output = tmp_path / "rows.json"
    flags = ["--size=3000", "--dim=16", "--queries=40", "--rounds=2", f"--output={output}"]
    assert benchmark.main(flags) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["index"] for row in rows] == ["ScaNN", "faiss IVF-PQ", "faiss HNSW"]
    assert rows[0]["recall"] == 1.0  # so few documents are searched exactly
    assert all(row["recall"] > 0.9 for row in rows)
    assert all(row["batch_ms"] > 0 and row["query_ms"] > 0 for row in rows)
    assert capsys.readouterr().out.count("searched") == 3


@pytest.mark.parametrize("flag", ["--size=0", "--dim=12", "--rounds=0"])
def test_sizes_out_of_range_are_refused(benchmark, capsys, flag):
    assert benchmark.main([flag]) == 2
    assert f"error: {flag.split('=')[0]} must be" in capsys.readouterr().err

"""The benchmark of scale runs whole, at a size that a test can afford."""

import json

import pytest
from programs import load_script

_ENCODE = "encode and index"


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmarks/scale.py")


@pytest.mark.slow
def test_every_stage_is_measured_and_opening_again_makes_nothing(benchmark, tmp_path, capsys):
    sizes = ["1000", "10000"]
    assert benchmark.main(["--sizes", *sizes, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "scale.json").read_text())
    assert list(found) == sizes
    for calls in found.values():
        assert calls["first"].keys() == calls["again"].keys()
        assert all(stage in shown for stage in calls["first"])
        for stage in ("copies", "tokens", "BM25"):
            assert calls["again"][stage]["seconds"] < calls["first"][stage]["seconds"]
    # Beside 256 bytes of embeddings a passage; compiled programs and libraries aside.
    most = {size: max(stage["mib"] for stage in found[size]["first"].values()) for size in sizes}
    assert most["10000"] - most["1000"] < 120


def test_growth_is_the_slope_between_the_largest_sizes(benchmark):
    assert benchmark.exponent([10, 100, 1000], [5.0, 1.0, 10.0]) == pytest.approx(1)
    # Three times the seconds for ten times as many: the processor worked as much for each.
    measured = {1000: (0.4, 5.0), 10_000: (1.2, 50.0)}
    cells = {
        str(n): {_ENCODE: {"seconds": wall, "cpu": cpu, "mib": 7.0, "forecast": n / 5e3}}
        for n, (wall, cpu) in measured.items()
    }
    table = benchmark.format_table({n: {"first": c, "again": c} for n, c in cells.items()}, 10**6)
    assert table.count("1.00") == 2 and table.count("2 min") == 2
    assert table.endswith("2 s of 10,000 (1 measured, with the index), 3 min of 1,000,000")


@pytest.mark.parametrize("sizes", [["100"], ["2000", "1000"], ["1000", "1000"]])
def test_sizes_that_cannot_be_compared_are_refused(benchmark, tmp_path, capsys, sizes):
    assert benchmark.main(["--sizes", *sizes, "--output", str(tmp_path)]) == 2
    assert "sizes must be ascending, from 1,000 on" in capsys.readouterr().err

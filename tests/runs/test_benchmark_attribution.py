"""The benchmark of attribution counts what it says, on the tiny domain."""

import json

import numpy as np
import pytest
from programs import load_script


@pytest.fixture(scope="module")
def benchmark():
    """The script's `main`, on a list of flags."""
    return load_script("benchmarks/attribution.py").main


@pytest.fixture(scope="module")
def benchmark_flags(tiny_inputs, tmp_path_factory):
    return [
        *(f"--{name}={value}" for name, value in tiny_inputs.items()),
        f"--cache={tmp_path_factory.mktemp('benchmark')}",
        "--document_tokens=40",
        "--max_new_tokens=4",
        "--questions=6",
        "--documents=3",
        "--resamples=50",
    ]


def test_the_benchmark_counts_gold_passages(benchmark, benchmark_flags, capsys, tmp_path):
    output = tmp_path / "rows.jsonl"
    assert benchmark([*benchmark_flags, "--retriever=bm25", f"--output={output}"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("6 questions of")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 6
    first = np.mean([row["gold"].get("ranked first", False) for row in rows])
    line = next(line for line in shown.splitlines() if line.startswith("ranked first"))
    assert float(line.split()[2]) == pytest.approx(first, abs=1e-3)
    # Every gold passage shares its words with the question: BM25 has it among the first.
    assert sum(bool(row["gold"]) for row in rows) >= 5
    assert all(row["answer"].isdecimal() for row in rows if row["gold"])


def test_the_benchmark_goes_on_with_its_output(benchmark, benchmark_flags, capsys, tmp_path):
    output = tmp_path / "rows.jsonl"
    more = [*benchmark_flags, "--answers=generated", f"--output={output}"]
    assert benchmark([*more, "--questions=2"]) == 0
    lines = output.read_text().splitlines()
    assert benchmark([*more, "--questions=3"]) == 0
    again = output.read_text().splitlines()
    assert again[:2] == lines
    assert len(again) == 3
    assert "3 questions of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run=x"], "give one of --run FOLDER"),
        (["--documents=0"], "--documents must be at least 1, got 0"),
        (["--questions=0"], "--questions must be at least 1, got 0"),
        (["--resamples=0"], "--resamples must be at least 1, got 0"),
    ],
)
def test_bad_input_of_the_benchmark_is_code_2(benchmark, benchmark_flags, capsys, more, message):
    assert benchmark([*benchmark_flags, *more]) == 2
    assert message in capsys.readouterr().err


def test_the_benchmark_needs_judged_questions(benchmark, benchmark_flags, capsys, tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "title": "", "text": "one fish"}\n')
    assert benchmark([*benchmark_flags, f"--data={tmp_path}"]) == 2
    assert "no test questions with answers" in capsys.readouterr().err

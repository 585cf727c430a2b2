import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.evaluation import (
    QuestionRecord,
    RecordWriter,
    bootstrap_interval,
    compare,
    paired_difference,
    read_records,
    summarize,
)


def record(number: int, system: str = "after", **metrics: float) -> QuestionRecord:
    return QuestionRecord(id=f"q{number}", system=system, question="why?", metrics=metrics)


FULL = QuestionRecord(
    id="q1",
    system="after",
    question="Где?\u2028",
    answers=["Москва", "x\ny"],
    prediction="в Москве",
    doc_ids=["d1", "d2"],
    doc_scores=np.array([2.5, 1.0], dtype=np.float32),
    metrics={"f1": np.float32(0.5), "exact_match": float("nan")},
)


def write(path, *records):
    with RecordWriter(path) as writer:
        for item in records:
            writer.write(item)


def test_records_read_back_equal(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write(path, FULL, record(2))
    assert read_records(path) == [FULL, record(2)]
    assert path.read_bytes().count(b"\n") == 2
    assert "Москва" in path.read_text(encoding="utf-8")


@settings(derandomize=True, deadline=None, max_examples=50)
@given(text=st.text(st.integers(0, 0x10FFFF).map(chr)))  # lone surrogates too
def test_any_text_survives(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("records") / "predictions.jsonl"
    original = QuestionRecord(id=text, system="after", question=text, prediction=text)
    write(path, original)
    assert read_records(path) == [original]


def test_lone_surrogates_survive(tmp_path):
    original = QuestionRecord(id="q", system="after", question="\ud800x")
    write(tmp_path / "p.jsonl", original)
    assert read_records(tmp_path / "p.jsonl") == [original]


def test_values_that_do_not_apply_stay_out_of_the_file(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write(path, FULL)
    content = path.read_text(encoding="utf-8")
    assert "NaN" not in content and "exact_match" not in content
    assert FULL.metrics == {"f1": 0.5}


@pytest.mark.parametrize("kept", range(1, 40, 7))
def test_torn_last_line_is_ignored_and_replaced(tmp_path, kept):
    path = tmp_path / "predictions.jsonl"
    write(path, record(1), FULL)
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    path.write_bytes(whole[: first_line + kept])
    assert read_records(path) == [record(1)]
    with RecordWriter(path) as writer:
        assert writer.existing == [record(1)]
        writer.write(FULL)
    assert path.read_bytes() == whole


def test_line_that_lacks_only_its_end_counts_as_torn(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write(path, record(1), FULL)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert read_records(path) == [record(1)]
    write(path, FULL)
    assert path.read_bytes() == whole


def test_a_short_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "predictions.jsonl"
    writer = RecordWriter(path)
    writer.write(record(1))
    before = path.read_bytes()
    whole_write = writer._file.write

    class FullDisk:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, line):
            return whole_write(line[:10])

    file, writer._file = writer._file, FullDisk()
    with pytest.raises(OSError, match="wrote 10 of"):
        writer.write(FULL)
    assert path.read_bytes() == before
    writer.close()


@pytest.mark.parametrize(
    "line",
    [
        "{broken",
        "null",
        '{"id": "q", "system": "s", "question": "?", "metrics": [1]}',
        '{"id": "q"}',
        '{"id": "q", "colour": 1}',
        "\udcff",
        "",
    ],
)
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "predictions.jsonl"
    write(path, record(1))
    with path.open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    for read in (read_records, RecordWriter):
        with pytest.raises(ValueError, match=r"predictions\.jsonl, line 2: expected a record"):
            read(path)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="question 'q1', metric f1: the value is infinite"):
        record(1, f1=math.inf)
    with pytest.raises(ValueError, match="document 'd2': the score is -inf"):
        QuestionRecord(
            id="q", system="s", question="?", doc_ids=["d1", "d2"], doc_scores=[1, -math.inf]
        )
    with pytest.raises(ValueError, match="2 scores for 1 documents"):
        QuestionRecord(id="q", system="s", question="?", doc_ids=["d1"], doc_scores=[1, 2])


def test_summary_holds_interval_per_metric_and_count(rng):
    values = rng.uniform(size=(20, 2))
    records = [
        record(number, f1=f1, **{"recall@1": recall, "zeal": 1.0})
        for number, (f1, recall) in enumerate(values)
    ]
    summary = summarize(records)
    assert list(summary) == ["recall@1", "f1", "zeal", "n"]
    assert summary["n"] == 20
    assert summary["f1"] == bootstrap_interval(values[:, 0])._asdict()
    assert summary["recall@1"] == bootstrap_interval(values[:, 1])._asdict()
    assert set(summary["f1"]) == {"value", "low", "high"}
    json.dumps(summary, allow_nan=False)


def test_summary_says_where_a_metric_applies_to_fewer_questions():
    records = [record(1, f1=1.0, answer_nll=math.nan), record(2, f1=0.0, answer_nll=2.0), record(3)]
    summary = summarize(records, num_resamples=50)
    assert summary["applicable"] == {"f1": 2, "answer_nll": 1}
    assert summary["answer_nll"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert summary["n"] == 3
    assert summarize([record(1)]) == {"n": 1, "applicable": {}} or summarize([record(1)]) == {
        "n": 1
    }


def test_summary_refuses_mixed_and_missing_records():
    with pytest.raises(ValueError, match="'q1' occurs twice .system 'before', then 'after'"):
        summarize([record(1, "before"), record(1, "after")])
    with pytest.raises(ValueError, match="no records"):
        summarize([])


def test_comparison_pairs_by_question(rng):
    after, before = rng.uniform(size=(2, 15))
    systems = {
        "after": [record(n, f1=value) for n, value in enumerate(after)],
        "before": [record(n, "before", f1=value) for n, value in enumerate(before)][::-1],
        "bm25": [record(n, "bm25") for n in range(15)],
        "hybrid": [record(n, "hybrid", f1=1.0) for n in range(15)],
    }
    (comparison,) = compare(systems, num_resamples=200)
    assert comparison[:3] == ("f1", "after", "before")
    assert comparison.difference == paired_difference(after, before, num_resamples=200)


def test_comparison_uses_questions_that_have_both():
    systems = {
        "after": [record(1, f1=1.0), record(2, f1=math.nan), record(3, f1=0.5)],
        "before": [record(1, f1=0.0), record(2, f1=1.0), record(3)],
    }
    (comparison,) = compare(systems)
    assert comparison.difference == (1.0, 1.0, 1.0, 1.0, 1)


def test_comparison_refuses_different_questions():
    systems = {"after": [record(1, f1=1.0)], "before": [record(1, f1=1.0), record(2, f1=1.0)]}
    with pytest.raises(ValueError, match="different questions: 1 occur .* such as 'q2'"):
        compare(systems)

import dataclasses
import json
import math

import numpy as np
import pytest

from ragjax.evaluation import (
    QuestionRecord,
    bootstrap_interval,
    compare,
    paired_difference,
    summarize,
)


def record(number: int, system: str = "after", **metrics: float) -> QuestionRecord:
    return QuestionRecord(id=f"q{number}", system=system, question="why?", metrics=metrics)


def test_a_record_holds_plain_values_and_no_nan():
    full = QuestionRecord(
        id="q1",
        system="after",
        question="Где?",
        answers=["Москва"],
        doc_ids=["d1", "d2"],
        doc_scores=np.array([2.5, 1.0], dtype=np.float32),
        metrics={"f1": np.float32(0.5), "exact_match": float("nan")},
    )
    assert full.metrics == {"f1": 0.5}
    assert full.doc_scores == (2.5, 1.0)
    json.dumps(dataclasses.asdict(full), allow_nan=False)


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

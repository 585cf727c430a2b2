import pytest

from ragjax.evaluation import (
    METRICS,
    Comparison,
    PairedDifference,
    QuestionRecord,
    compare,
    format_difference,
    format_report,
    format_table,
    summarize,
)
from ragjax.evaluation.systems import MAIN_SYSTEMS


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


def test_table_aligns_columns_in_the_usual_order():
    summaries = {
        "after": {"f1": interval(0.4567, 0.4, 0.512), "n": 127},
        "closed_book": {"exact_match": interval(0.0, 0.0, 0.0), "n": 9},
        "mine": {"f1": interval(-0.5, -1.0, 0.0), "zeal": interval(12.34, 9.99, 1234.5), "n": 1},
    }
    assert format_table(summaries).split("\n") == [
        "             closed_book      after            mine",
        "-----------  ---------------  ---------------  -----------------",
        "exact_match  .000 [.00, .00]  -                -",
        "f1           -                .457 [.40, .51]  -.500 [-1.0, .00]",
        "zeal         -                -                12.3 [10, 1234]",
        "n            9                127              1",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.9996, "1.00"), (0.99949, ".999"), (4.6123, "4.61"), (9.996, "10.0"), (123.4, "123")],
)
def test_three_digits_are_kept(number, text):
    table = format_table({"after": {"f1": interval(number, 0.996, 4.61), "n": 1}})
    assert f"{text} [1.0, 4.6]" in table


def test_five_systems_fit_into_a_hundred_columns():
    summary = {name: interval(0.9996, 0.12, 1.0) for name in METRICS} | {"n": 12345}
    summary["answer_nll"] = interval(14.123, 13.01, 15.99)
    table = format_table(dict.fromkeys(MAIN_SYSTEMS, summary))
    assert max(len(line) for line in table.split("\n")) <= 100
    assert len(table.split("\n")) == 2 + len(METRICS) + 1


def test_a_table_needs_a_system():
    with pytest.raises(ValueError, match="no summaries"):
        format_table({})


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        ((0.1234, 0.0511, 0.1899, 0.0021, 127), "+0.123 [+0.051, +0.190], p = 0.002, n = 127"),
        ((-0.1, -0.2, -0.00001, 0.0009, 3), "-0.100 [-0.200, +0.000], p < 0.001, n = 3"),
        ((0.0, 0.0, 0.0, 1.0, 1), "+0.000 [+0.000, +0.000], p = 1.000, n = 1"),
    ],
)
def test_difference_is_one_line(difference, text):
    comparison = Comparison("f1", "after", "before", PairedDifference(*difference))
    assert format_difference(comparison) == f"f1: after - before {text}"


def test_report_explains_itself_in_ascii():
    records = {
        system: [
            QuestionRecord(
                id=str(number),
                system=system,
                question="?",
                metrics={"f1": value + number, "answer_nll": 1.0 if number else float("nan")},
            )
            for number in range(2)
        ]
        for system, value in (("after", 0.5), ("before", 0.25))
    }
    summaries = {system: summarize(items, num_resamples=50) for system, items in records.items()}
    comparisons = compare(records, num_resamples=50)
    report = format_report(summaries, comparisons)
    assert report.isascii() and "nan" not in report.lower()
    assert "lower is better" in report
    assert "answer_nll of after, before: over 1 of 2 questions" in report
    for comparison in comparisons:
        assert format_difference(comparison) in report.split("\n")
    plain = format_report({"after": {"f1": interval(1, 1, 1), "n": 1}})
    assert "lower" not in plain and "Differences" not in plain

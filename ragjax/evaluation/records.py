"""Records per question and system, their summaries and paired comparisons.

Example:
    records = [QuestionRecord(id="q1", system="after", question="...", metrics={"f1": 0.5})]
    summarize(records)["f1"]  # {"value": 0.5, "low": 0.5, "high": 0.5}
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ragjax.data.matching import refuse_string
from ragjax.evaluation.intervals import PairedDifference, bootstrap_interval, paired_difference
from ragjax.evaluation.systems import COMPARED_PAIRS

# The order of reports.
METRICS = (
    "recall@1",
    "recall@5",
    "recall@20",
    "mrr@10",
    "ndcg@10",
    "answer@5",
    "exact_match",
    "f1",
    "answer_nll",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionRecord:
    """The documents, the answer and the metrics of one system for one question.

    Attributes:
        id: Question id.
        system: Name of the system, such as "before".
        question: Text of the question.
        answers: Acceptable answers.
        prediction: Generated answer; None if nothing was generated.
        doc_ids: Retrieved document ids, best first.
        doc_scores: Their scores; empty if not kept.
        metrics: Metric name to value; NaN (not applicable) is left out.

    Raises:
        ValueError: If a metric is infinite, a score is not finite (leave masked slots out), or
            scores and documents differ in number.
        TypeError: The answers or the document ids are one string.
    """

    id: str
    system: str
    question: str
    answers: Sequence[str] = ()
    prediction: str | None = None
    doc_ids: Sequence[str] = ()
    doc_scores: Sequence[float] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Leaves NaN out, and checks that the rest can be written as JSON."""
        for name in ("answers", "doc_ids"):
            refuse_string(getattr(self, name), f"question {self.id!r}, {name}")
        values = {name: float(value) for name, value in self.metrics.items()}
        metrics = {name: value for name, value in values.items() if not math.isnan(value)}
        for name, value in metrics.items():
            if math.isinf(value):
                raise ValueError(f"question {self.id!r}, metric {name}: the value is infinite")
        scores = tuple(float(score) for score in self.doc_scores)
        if scores and len(scores) != len(self.doc_ids):
            raise ValueError(
                f"question {self.id!r}: {len(scores)} scores for {len(self.doc_ids)} documents"
            )
        for doc_id, score in zip(self.doc_ids, scores, strict=False):
            if not math.isfinite(score):
                raise ValueError(f"question {self.id!r}, document {doc_id!r}: the score is {score}")
        object.__setattr__(self, "metrics", metrics)
        object.__setattr__(self, "doc_scores", scores)


class Comparison(NamedTuple):
    """The difference of two systems in one metric, on the questions where both have it."""

    metric: str
    system: str
    baseline: str
    difference: PairedDifference  # system - baseline

    def as_json(self) -> dict[str, Any]:
        """Returns the comparison as a flat JSON object."""
        names = {"metric": self.metric, "system": self.system, "baseline": self.baseline}
        return names | self.difference._asdict()


def summarize(
    records: Iterable[QuestionRecord], *, num_resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Sums up the records of one system: the mean of each metric with its 95 % interval.

    Args:
        records: Records of one system, one per question.
        num_resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        A JSON-ready mapping: per metric that applies to any question
        `{"value": ..., "low": ..., "high": ...}`, in the order of `METRICS`, then others by name;
        `"n"`, the number of questions; and, only if some metric applies to fewer of them,
        `"applicable"`, that metric's number of questions. Every number is finite.

    Raises:
        ValueError: If there are no records or a question occurs twice.
    """
    values = _metric_values(records)
    columns = {name: np.array(list(column.values())) for name, column in values.metrics.items()}
    summary: dict[str, Any] = {
        name: bootstrap_interval(column, num_resamples=num_resamples, seed=seed)._asdict()
        for name, column in columns.items()
    }
    fewer = {name: len(column) for name, column in columns.items() if len(column) < values.n}
    return summary | {"n": values.n} | ({"applicable": fewer} if fewer else {})


def compare(
    records_by_system: Mapping[str, Sequence[QuestionRecord]],
    *,
    pairs: Sequence[tuple[str, str]] = COMPARED_PAIRS,
    metrics: Sequence[str] = METRICS,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> list[Comparison]:
    """Tests the differences of pairs of systems, question by question.

    Args:
        records_by_system: Records per system, one per question.
        pairs: (system, baseline) pairs; a pair with a system that is absent is left out.
        metrics: Metrics to compare; one that no question has under both systems is left out.
        num_resamples: Number of bootstrap samples and of sign patterns.
        seed: Seed of both.

    Returns:
        The comparisons, pair by pair in the order of `metrics`.

    Raises:
        ValueError: If a question occurs twice in a system, or two systems that are compared were
            asked different questions.
        TypeError: `metrics` is one string.
    """
    refuse_string(metrics, "metrics")
    comparisons = []
    for system, baseline in pairs:
        if system not in records_by_system or baseline not in records_by_system:
            continue
        ours, theirs = records_by_system[system], records_by_system[baseline]
        _check_same_questions(system, ours, baseline, theirs)
        our_values, their_values = _metric_values(ours).metrics, _metric_values(theirs).metrics
        for metric in metrics:
            our_column, their_column = our_values.get(metric, {}), their_values.get(metric, {})
            shared = [question for question in our_column if question in their_column]
            if shared:
                difference = paired_difference(
                    np.array([our_column[question] for question in shared]),
                    np.array([their_column[question] for question in shared]),
                    num_resamples=num_resamples,
                    seed=seed,
                )
                comparisons.append(Comparison(metric, system, baseline, difference))
    return comparisons


class _MetricValues(NamedTuple):
    metrics: dict[str, dict[str, float]]  # metric -> question id -> value
    n: int


def _metric_values(records: Iterable[QuestionRecord]) -> _MetricValues:
    by_question: dict[str, QuestionRecord] = {}
    for record in records:
        if record.id in by_question:
            raise ValueError(
                f"question {record.id!r} occurs twice (system {by_question[record.id].system!r}, "
                f"then {record.system!r}): pass the records of one system, one per question"
            )
        by_question[record.id] = record
    if not by_question:
        raise ValueError("there are no records to sum up")
    found = {name for record in by_question.values() for name in record.metrics}
    names = [name for name in METRICS if name in found] + sorted(found - set(METRICS))
    columns = {
        name: {key: r.metrics[name] for key, r in by_question.items() if name in r.metrics}
        for name in names
    }
    return _MetricValues(columns, len(by_question))


def _check_same_questions(
    system: str,
    ours: Sequence[QuestionRecord],
    baseline: str,
    theirs: Sequence[QuestionRecord],
) -> None:
    differing = {record.id for record in ours} ^ {record.id for record in theirs}
    if differing:
        raise ValueError(
            f"{system} and {baseline} were asked different questions: {len(differing)} occur in "
            f"only one of them, such as {min(differing)!r}"
        )

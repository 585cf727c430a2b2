"""Training curves of a report: which logged values belong into one chart, and their axes."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ragjax.evaluation.report.charts import Series, line_chart
from ragjax.evaluation.report.html import details, escape, is_number

Row = Mapping[str, Any]


class _Chart(NamedTuple):
    title: str
    unit: str
    pattern: str  # of the names of the values, whole
    note: str = ""
    smoothed_from: float = 40  # points; a running mean says nothing of a sawtooth or a single peak


# The first chart whose pattern fits takes a value; those of the first list are always open.
_CHARTS = (
    _Chart("Loss", "nats", r"(.*[_/])?loss"),
    _Chart(
        "Entropy over the candidates", "share of the maximum", r"(.*[_/])?entropy",
        "1: all alike, 0: a single document",
    ),
    _Chart("Terms of the loss", "nats", r"marginal|lm|lsr|contrastive|negatives"),
    _Chart("Negative log-likelihood of the answer", "nats per token", r"(.*[_/])?nll"),
    _Chart("Log-likelihood of the answer", "nats", r"(.*[_/])?(log_likelihood|log_prob)"),
    _Chart(
        "Right passage among the retrieved", "share of the questions",
        r"(?!index/)(.*[_/])?(recall|gold|hit|mrr)([@_/].*)?",
    ),
    _Chart(
        "Staleness of the index", "steps", r"(.*[_/])?staleness_steps",
        "steps since the encoder that made it", smoothed_from=math.inf,
    ),
    _Chart("Agreement with the language model", "share of the questions", r"(.*[_/])?agreement",
           "the same best document"),
    _Chart("Gradient norm", "before clipping", r"(.*[_/])?grad(ient)?_norm"),
    _Chart("Time per step", "seconds", r"seconds", "the first step compiles",
           smoothed_from=math.inf),
)  # fmt: skip
_IGNORED = r"stage|step|skipped|.*_seconds(_.*)?|index/(version|refreshing|failures)"


def curves(rows: Sequence[Row]) -> str:
    """Returns the charts of every stage in `metrics.jsonl`.

    Rounds of a stage ("retriever-0", "retriever-1") follow each other on one axis.

    Args:
        rows: One mapping per step: "stage", "step" and values by name; None is a gap, a name that
            is absent was not logged at that step.
    """
    parts = []
    for stage, rounds in _by_stage(rows).items():
        placed, boundaries = _placed(rounds)
        names = list(dict.fromkeys(name for _, row in placed for name in row))
        left = [name for name in names if not re.fullmatch(_IGNORED, name)]
        shown = []
        for chart in _CHARTS:
            mine = [name for name in left if re.fullmatch(chart.pattern, name)]
            left = [name for name in left if name not in mine]
            series = [one for name in mine if (one := _series(name, placed)).x]
            if series:
                shown.append(_drawn(chart, series, boundaries))
        others = [
            _drawn(_Chart(_readable(name), "value", ""), [one], boundaries)
            for name in left
            if len(set((one := _series(name, placed)).y) - {None}) > 1
        ]
        parts.append(f"<h3>{_stage_title(stage, rounds)}</h3>")
        parts.append(f'<div class="charts">{"".join(shown)}</div>')
        if others:
            box = f'<div class="charts">{"".join(others)}</div>'
            parts.append(details(f"Other values logged ({len(others)})", box))
    return "".join(parts)


def _by_stage(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Returns rows by stage without the number of its round, then by round."""
    stages: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        name = str(row.get("stage", "training"))
        base = re.sub(r"-\d+$", "", name)
        stages.setdefault(base, {}).setdefault(name, []).append(row)
    return stages


def _placed(rounds: Mapping[str, Sequence[Row]]) -> tuple[list[tuple[float, Row]], list[float]]:
    """Returns (x, row) of all rounds one after the other, and where a round begins."""
    placed: list[tuple[float, Row]] = []
    boundaries = []
    start = 0.0
    for rows in rounds.values():
        if placed:
            boundaries.append(start)
        known = [
            float(row["step"]) if is_number(row.get("step")) else float(place)
            for place, row in enumerate(rows)
        ]
        placed += [(start + step, row) for step, row in zip(known, rows, strict=True)]
        start += max(known) + 1
    return placed, boundaries


def _series(name: str, placed: Sequence[tuple[float, Row]]) -> Series:
    there = [(x, row[name]) for x, row in placed if name in row]
    values = [float(value) if is_number(value) else None for _, value in there]
    return Series(_readable(name), [x for x, _ in there], values)


def _drawn(chart: _Chart, series: Sequence[Series], boundaries: Sequence[float]) -> str:
    note = chart.note
    if boundaries:
        note = f"{note}; dotted: a new round" if note else "dotted: a new round"
    return line_chart(
        series, title=chart.title, x_label="step", y_label=chart.unit, note=note,
        boundaries=boundaries, smoothed_from=chart.smoothed_from,
    )  # fmt: skip


def _readable(name: str) -> str:
    return name.replace("_", " ").replace("/", ": ")


def _stage_title(stage: str, rounds: Mapping[str, Sequence[Row]]) -> str:
    steps = sum(len(rows) for rows in rounds.values())
    names = {"lm": "Language model", "retriever": "Retriever"}
    title = names.get(stage, _readable(stage)[:1].upper() + _readable(stage)[1:])
    many = f", {len(rounds)} rounds" if len(rounds) > 1 else ""
    return escape(f"{title}: {steps:,} steps{many}")

"""Training curves of a report: which logged values belong into one chart, and their axes."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ragjax.evaluation.report.charts import Series, line_chart
from ragjax.evaluation.report.html import details, escape

Row = Mapping[str, Any]


class _Chart(NamedTuple):
    title: str
    unit: str
    names: tuple[str, ...]  # of the values
    note: str = ""
    smoothed_from: float = 40  # points; a running mean hides a sawtooth or a single peak


# These are always open.
_CHARTS = (
    _Chart("Loss", "nats", ("loss",)),
    _Chart(
        "Entropy over the candidates", "share of the maximum",
        ("target_entropy", "retriever_entropy", "posterior_entropy"),
        "1: all alike, 0: a single document",
    ),
    _Chart("Terms of the loss", "nats", ("marginal", "lm", "lsr", "contrastive", "negatives")),
    _Chart("Negative log-likelihood of the answer", "nats per token", ("marginal_nll",)),
    _Chart("Right passage among the retrieved", "share of the questions", ("retrieval/recall",)),
    _Chart(
        "Staleness of the index", "steps", ("index/staleness_steps",),
        "steps since the encoder that made it", smoothed_from=math.inf,
    ),
    _Chart("Agreement with the language model", "share of the questions", ("agreement",),
           "the same best document"),
    _Chart("Gradient norm", "before clipping", ("grad_norm",)),
    _Chart("Time per step", "seconds", ("seconds",), "the first step compiles",
           smoothed_from=math.inf),
)  # fmt: skip
_IGNORED = re.compile(r"stage|step|skipped|.*_seconds(_.*)?|index/(version|refreshing|failures)")


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
        left = [name for name in names if not _IGNORED.fullmatch(name)]
        shown = []
        for chart in _CHARTS:
            mine = [name for name in left if name in chart.names]
            left = [name for name in left if name not in mine]
            if mine:
                series = [_series(name, placed) for name in mine]
                shown.append(_drawn(chart, series, boundaries))
        others = [
            _drawn(_Chart(_readable(name), "value", ()), [one], boundaries)
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
        name = row["stage"]
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
        placed += [(start + row["step"], row) for row in rows]
        start += max(row["step"] for row in rows) + 1
    return placed, boundaries


def _series(name: str, placed: Sequence[tuple[float, Row]]) -> Series:
    there = [(x, row[name]) for x, row in placed if name in row]
    return Series(_readable(name), [x for x, _ in there], [value for _, value in there])


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

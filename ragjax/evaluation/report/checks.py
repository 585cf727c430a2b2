"""Further evaluations in a report: calibration, dev questions, robustness."""

from collections.abc import Mapping, Sequence
from typing import Any

from ragjax.evaluation.calibration import ReliabilityBin
from ragjax.evaluation.report.charts import reliability_diagram
from ragjax.evaluation.report.html import isolated, number
from ragjax.evaluation.report.results import differences_tables, findings, results_table

_CELL = ("value", "low", "high")
Summaries = Mapping[str, Mapping[str, Any]]


def calibration_section(calibration: Mapping[str, Summaries]) -> str:
    """Returns reliability diagrams, and the calibration metrics of the systems side by side.

    Args:
        calibration: System to kind of confidence to metrics, with "reliability": a list of
            `{"confidence", "accuracy", "count"}`.
    """
    parts = []
    for kind in dict.fromkeys(kind for kinds in calibration.values() for kind in kinds):
        systems = {name: kinds[kind] for name, kinds in calibration.items() if kind in kinds}
        charts = "".join(_diagram(name, node["reliability"]) for name, node in systems.items())
        body = results_table(systems) + f'<div class="charts">{charts}</div>'
        parts.append(_titled(kind, body))
    return "".join(parts)


def dev_section(dev: Mapping[str, Any]) -> str:
    """Returns the tables of dev.json.

    Args:
        dev: `{"systems": {system: summary}, "differences": [...]}`.
    """
    return _compared("systems", dev)


def robustness_section(robustness: Mapping[str, Any]) -> str:
    """Returns the tables of robustness.json.

    Args:
        robustness: `{"n", "conditions": {condition: summary}, "differences": [...],
            "same_as_closed_book": {"value", "low", "high"}}`.
    """
    if not robustness:
        return ""
    value, low, high = (number(robustness["same_as_closed_book"][k]) for k in _CELL)
    shown = {"questions": f"{robustness['n']:,}", "same as closed book": f"{value} [{low}, {high}]"}
    items = "".join(f"<dt>{isolated(name)}</dt><dd>{text}</dd>" for name, text in shown.items())
    return f'<dl class="answers">{items}</dl>' + _compared("conditions", robustness)


def _diagram(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    bins = [ReliabilityBin(**row) for row in rows]
    total = sum(one.count for one in bins)
    return reliability_diagram(
        bins, title=name, note=f"{total:,} answers; below the diagonal: too confident"
    )


def _compared(key: str, values: Mapping[str, Any]) -> str:
    summaries = values.get(key) or {}
    found = findings(summaries, values.get("differences") or ())
    table = results_table(summaries) if summaries else ""
    return _titled(key, table) + _titled("differences", differences_tables(found, None))


def _titled(name: str, body: str) -> str:
    title = name.replace("_", " ").capitalize()
    return f"<h3>{isolated(title)}</h3>{body}" if body else ""

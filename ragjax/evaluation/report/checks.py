"""Further evaluations in a report: calibration, dev questions, teachers, robustness."""

from collections.abc import Mapping, Sequence
from typing import Any

from ragjax.evaluation.calibration import ReliabilityBin
from ragjax.evaluation.report.charts import reliability_diagram
from ragjax.evaluation.report.html import isolated, number, table
from ragjax.evaluation.report.results import differences_tables, findings, results_table
from ragjax.evaluation.systems import DOCUMENTS

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


def cells_section(cells: Mapping[str, Any]) -> str:
    """Returns the table of cells.json, a row per language model and a column per documents.

    Args:
        cells: `{"cells": [{"lm", "documents", "system", "n", metric: {"value", ...}}, ...],
            "differences": [...]}`.
    """
    found = {(cell["lm"], cell["documents"]): cell for cell in cells.get("cells", ())}
    if not found:
        return ""
    columns = [name for name in DOCUMENTS if any(docs == name for _, docs in found)]
    metrics = [name for name, value in next(iter(found.values())).items() if _is_interval(value)]
    parts = []
    for metric in metrics:
        rows = [
            [isolated(lm), *(_interval(found.get((lm, name), {}).get(metric)) for name in columns)]
            for lm in dict.fromkeys(lm for lm, _ in found)
        ]
        headers = ["language model", *(isolated(DOCUMENTS[name]) for name in columns)]
        caption = f"{metric}, by language model and by the documents that it reads"
        parts.append(table(headers, rows, caption=caption))
    summaries = {cell["system"]: {m: cell[m] for m in metrics} for cell in found.values()}
    differences = findings(summaries, cells.get("differences") or ())
    return "".join(parts) + _titled("differences", differences_tables(differences, None))


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


def teachers_section(teachers: Mapping[str, Any]) -> str:
    """Returns the tables of teachers.json.

    Args:
        teachers: `{"weights": {name: weight}, "language_model", "why", "alone": {language model:
            {name: MRR}}, "mixtures": [{"language_model", "weights", "mrr"}]}`; the last two only
            where they were chosen by training questions.
    """
    if not teachers.get("weights"):
        return ""
    shown = {
        "weights": _weights(teachers["weights"]),
        "language model": isolated(teachers.get("language_model", "")),
        "why": isolated(teachers.get("why", "")),
    }
    items = "".join(f"<dt>{isolated(name)}</dt><dd>{text}</dd>" for name, text in shown.items())
    alone = [
        [isolated(part), isolated(lm), number(value)]
        for lm, parts in (teachers.get("alone") or {}).items()
        for part, value in parts.items()
    ]
    together = [
        [_weights(one["weights"]), isolated(one.get("language_model")), number(one.get("mrr"))]
        for one in teachers.get("mixtures") or ()
    ]
    headers = ["teachers", "language model", "MRR"]
    return f'<dl class="answers">{items}</dl>' + "".join(
        table(headers, rows, caption=caption)
        for caption, rows in (("Each alone", alone), ("Together", together))
        if rows
    )


def _weights(weights: Mapping[str, Any]) -> str:
    return isolated(" ".join(f"{name}={weight}" for name, weight in weights.items()))


def _diagram(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    bins = [ReliabilityBin(**row) for row in rows]
    total = sum(one.count for one in bins)
    return reliability_diagram(
        bins, title=name, note=f"{total:,} answers; below the diagonal: too confident"
    )


def _compared(key: str, values: Mapping[str, Any]) -> str:
    summaries = values.get(key) or {}
    found = findings(summaries, values.get("differences") or ())
    results = results_table(summaries) if summaries else ""
    return _titled(key, results) + _titled("differences", differences_tables(found, None))


def _is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() >= set(_CELL)


def _interval(values: Any) -> str:
    if not _is_interval(values):
        return "–"
    value, low, high = (number(values[name]) for name in _CELL)
    return f"{value} [{low}, {high}]"


def _titled(name: str, body: str) -> str:
    title = name.replace("_", " ").capitalize()
    return f"<h3>{isolated(title)}</h3>{body}" if body else ""

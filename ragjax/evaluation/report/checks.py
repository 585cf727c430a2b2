"""Further evaluations in a report: calibration, and results in nested JSON of any form."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ragjax.evaluation.report.charts import Bin, reliability_diagram
from ragjax.evaluation.report.html import is_number, isolated, number, table
from ragjax.evaluation.report.results import differences_tables, findings, results_table

# Deeper nesting than any evaluation has; a file that is deeper is cut.
_MAX_DEPTH = 6


def calibration_section(calibration: Mapping[str, Any]) -> str:
    """Returns reliability diagrams, and the calibration metrics of the systems side by side.

    Args:
        calibration: System to kind of confidence to metrics, with "reliability": a list of
            `{"confidence", "accuracy", "count"}`. Other nesting is shown as well as it goes.
    """
    kinds: dict[str, dict[str, Mapping[str, Any]]] = {}
    for path, node in _nodes(calibration, "reliability"):
        kind = path[-1] if len(path) > 1 else ""
        kinds.setdefault(kind, {})[" ".join(path[:-1] or path) or "answers"] = node
    if not kinds:
        return nested_section(calibration)
    parts = []
    for kind, systems in kinds.items():
        charts = "".join(_diagram(name, node["reliability"]) for name, node in systems.items())
        body = results_table(systems) + f'<div class="charts">{charts}</div>'
        parts.append(_titled((kind,), body))
    return "".join(parts)


def nested_section(values: Any) -> str:
    """Returns tables of nested results, whatever their form.

    Mappings of mappings with `{"value": ..., "low": ..., "high": ...}` become a table of systems
    side by side, lists of paired differences what they are in the section on what changed, lists
    of other flat mappings a table of rows, single values a list.

    Args:
        values: What a JSON file holds.
    """
    return _nested(values, (), {}, 0) or '<p class="soft">There are no results.</p>'


def _diagram(name: str, rows: Sequence[Any]) -> str:
    bins = [
        Bin(float(one["confidence"]), float(one["accuracy"]), int(one["count"]))
        for one in rows
        if isinstance(one, Mapping)
        and all(is_number(one.get(key)) for key in ("confidence", "accuracy", "count"))
    ]
    total = sum(one.count for one in bins)
    return reliability_diagram(
        bins, title=name, note=f"{total:,} answers; below the diagonal: too confident"
    )


def _nested(
    values: Any, path: tuple[str, ...], near: Mapping[str, Mapping[str, Any]], depth: int
) -> str:
    """Returns the tables of a value; `near` are the summaries that differences may refer to."""
    if depth > _MAX_DEPTH:
        return ""
    if isinstance(values, Sequence) and not isinstance(values, str):
        rows = [row for row in values if isinstance(row, Mapping)]
        found = findings(near, rows)
        return _titled(path, differences_tables(found, None) if found else _rows(rows))
    if not isinstance(values, Mapping):
        return ""
    summaries = {k: v for k, v in values.items() if isinstance(v, Mapping) and _has_cells(v)}
    single = {k: v for k, v in values.items() if _is_cell(v) or isinstance(v, str | int | float)}
    body = results_table(summaries) if summaries else ""
    if single:
        items = "".join(
            f"<dt>{isolated(_words(key))}</dt><dd>{_shown(value)}</dd>"
            for key, value in single.items()
        )
        body += f'<dl class="answers">{items}</dl>'
    parts = [_titled(path, body)]
    for value in values.values():
        if isinstance(value, Mapping):
            inner = {k: v for k, v in value.items() if isinstance(v, Mapping) and _has_cells(v)}
            near = {**near, **inner}
    for key, value in values.items():
        if key not in summaries and key not in single:
            parts.append(_nested(value, (*path, str(key)), near, depth + 1))
    return "".join(parts)


def _titled(path: tuple[str, ...], body: str) -> str:
    title = _words(" ".join(path))
    title = title[:1].upper() + title[1:]
    return f"<h3>{isolated(title)}</h3>{body}" if title and body else body


def _words(name: Any) -> str:
    return "questions" if name == "n" else str(name).replace("_", " ")


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    if not names:
        return ""
    return table(
        [isolated(_words(name)) for name in names],
        [[_shown(row.get(name)) for name in names] for row in rows],
        caption=f"{len(rows):,} rows",
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else number(value)
    if _is_cell(value):
        return f"{number(value['value'])} [{number(value.get('low'))}, {number(value.get('high'))}]"
    return "\N{EN DASH}" if value is None else isolated(value)


def _is_cell(value: Any) -> bool:
    return isinstance(value, Mapping) and is_number(value.get("value"))


def _has_cells(values: Mapping[str, Any]) -> bool:
    return any(_is_cell(value) for value in values.values())


def _nodes(
    values: Any, key: str, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if isinstance(values, Mapping) and len(path) <= _MAX_DEPTH:
        if isinstance(values.get(key), list):
            yield path, values
        else:
            for name, value in values.items():
                yield from _nodes(value, key, (*path, str(name)))

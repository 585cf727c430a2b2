"""Plain-text reports, ASCII only: systems side by side, and the tested differences below.

Example:
    print(format_report({"before": summarize(a), "after": summarize(b)}, compare(...)))
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ragjax.evaluation.records import METRICS, Comparison
from ragjax.evaluation.systems import SYSTEMS

_ABSENT = "-"
# What a summary holds beside its metrics.
_COUNTS = ("n", "applicable")


def format_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats summaries as an aligned table, a row per metric and a column per system.

    A cell is `value [low, high]`, without the zero before the point; five systems fit into 100
    columns. A metric that does not apply to a system shows "-".

    Args:
        summaries: System name to the result of `summarize`.

    Returns:
        The table without a line end; systems in the order of `SYSTEMS`, then others as given.

    Raises:
        ValueError: If there are no summaries.
    """
    if not summaries:
        raise ValueError("there are no summaries to show")
    systems = [name for name in SYSTEMS if name in summaries]
    systems += [name for name in summaries if name not in SYSTEMS]
    found = dict.fromkeys(name for system in systems for name in summaries[system])
    metrics = [name for name in METRICS if name in found]
    metrics += [name for name in found if name not in METRICS and name not in _COUNTS]
    rows = [["", *systems]]
    rows += [
        [name, *(format_cell(summaries[system].get(name)) for system in systems)]
        for name in metrics
    ]
    rows.append(["n", *(str(summaries[system]["n"]) for system in systems)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_difference(comparison: Comparison) -> str:
    """Formats a comparison as one line.

    Args:
        comparison: One result of `compare`.

    Returns:
        A line such as "f1: after - before +0.123 [+0.051, +0.190], p = 0.002, n = 127".
    """
    metric, system, baseline, (value, low, high, p_value, n) = comparison
    p_text = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    interval = f"{_signed(value)} [{_signed(low)}, {_signed(high)}]"
    return f"{metric}: {system} - {baseline} {interval}, {p_text}, n = {n}"


def format_report(
    summaries: Mapping[str, Mapping[str, Any]], comparisons: Sequence[Comparison] = ()
) -> str:
    """Formats the table, how to read it, and a line per comparison.

    Args:
        summaries: System name to the result of `summarize`.
        comparisons: Results of `compare`.

    Returns:
        The report without a line end.

    Raises:
        ValueError: If there are no summaries.
    """
    lines = [format_table(summaries), "", "value [95% bootstrap interval over the questions]"]
    if any("answer_nll" in summary for summary in summaries.values()):
        lines[-1] += "; answer_nll: lower is better"
    fewer: dict[tuple[int, int], dict[str, list[str]]] = {}
    for system, summary in summaries.items():
        for metric, count in summary.get("applicable", {}).items():
            fewer.setdefault((count, summary["n"]), {}).setdefault(metric, []).append(system)
    lines += [
        f"{', '.join(metrics)} of {', '.join(dict.fromkeys(sum(metrics.values(), [])))}:"
        f" over {count} of {n} questions"
        for (count, n), metrics in fewer.items()
    ]
    if comparisons:
        lines += ["", "Differences on the same questions (paired; two-sided sign-flip test)"]
        lines += [format_difference(comparison) for comparison in comparisons]
    return "\n".join(lines)


def format_cell(interval: Mapping[str, float] | None) -> str:
    """Formats a mean with its interval, such as ".123 [.05, .19]"; "-" where there is none."""
    if interval is None:
        return _ABSENT
    value = _short(interval["value"], digits=3)
    return f"{value} [{_short(interval['low'], digits=2)}, {_short(interval['high'], digits=2)}]"


def _short(number: float, *, digits: int) -> str:
    """Rounds to `digits` places below 1, and to one less per digit before the point above."""
    text = ""
    for places in range(digits, -1, -1):
        text = f"{number:.{places}f}"
        whole = text.lstrip("-").split(".")[0]
        if (0 if whole == "0" else len(whole)) + places <= digits:
            break
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _signed(number: float) -> str:
    text = f"{number:+.3f}"
    return "+0.000" if text == "-0.000" else text

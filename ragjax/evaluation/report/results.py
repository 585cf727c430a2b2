"""Results in a report: the verdict in words, the systems side by side, the paired differences."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ragjax.evaluation.records import METRICS
from ragjax.evaluation.report.charts import interval_bar
from ragjax.evaluation.report.html import (
    details,
    escape,
    interval,
    isolated,
    number,
    signed,
    table,
)
from ragjax.evaluation.systems import SYSTEMS

# (system, baseline) that a run is about; the first that was compared.
_MAIN_PAIRS = (("after", "before"), ("after", "closed_book"))
_HEADLINES = ("recall@5", "mrr@10", "f1", "answer_nll")
_LOWER_IS_BETTER = frozenset(
    (
        "answer_nll",
        "marginal_nll",
        "brier",
        "ece",
        "aurc",
        "hallucination",
        "corpus_hallucination",
        "empty_answer",
    )
)
_MEANINGS = {
    "recall@1": "a relevant passage is first (share of the relevant ones)",
    "recall@5": "share of the relevant passages among the first 5",
    "recall@20": "share of the relevant passages among the first 20",
    "mrr@10": "1 / rank of the first relevant passage, 0 beyond rank 10",
    "ndcg@10": "relevance of the first 10, discounted by rank",
    "answer@5": "one of the first 5 passages contains an answer",
    "exact_match": "the answer is right, word for word",
    "f1": "words shared with a right answer",
    "answer_nll": "nats per token of the right answer; lower is better",
    "supported": "a passage that was read supports the answer",
    "hallucination": "no passage that was read supports the answer, a wrong one; lower is better",
    "corpus_supported": "a passage that any search found, or a relevant one, supports the answer",
    "corpus_hallucination": "none of these supports the answer, a wrong one; lower is better",
    "ece": "mean distance of probability from share of right answers; lower is better",
    "brier": "mean squared distance of probability from 1 or 0; lower is better",
    "auroc": "chance that a right answer is more probable than a wrong one",
    "aurc": "mean error rate when only the most probable answers are given; lower is better",
}
_SYMBOLS = {"better": "\u25b2", "worse": "\u25bc", "undecided": "\u25cb", "same": "="}


# Keys of a row of differences.json.
DIFFERENCE = ("metric", "system", "baseline", "value", "low", "high", "p_value", "n")


class Finding(NamedTuple):
    """One paired difference and its verdict."""

    metric: str
    system: str
    baseline: str
    value: float  # mean difference, with its 95 % interval
    low: float
    high: float
    p_value: float
    n: int
    before: float | None  # value of the baseline
    after: float | None  # value of the system
    state: str  # "better", "worse", "undecided" or "same"


def lower_is_better(metric: str) -> bool:
    """Returns whether a smaller value of a metric is the better one."""
    return metric in _LOWER_IS_BETTER


def findings(
    metrics: Mapping[str, Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Returns the differences with the values they lie between.

    A difference is better or worse where its interval leaves zero out, the same where nothing
    changed on any question, else undecided.

    Args:
        metrics: System to metric to `{"value": ..., "low": ..., "high": ...}`.
        differences: `{"metric", "system", "baseline", "value", "low", "high", "p_value", "n"}`.
    """
    found = []
    for row in differences:
        metric, low, high = row["metric"], row["low"], row["high"]
        state = "same" if row["value"] == low == high == 0 else "undecided"
        if low > 0 or high < 0:
            state = "better" if (low > 0) is not lower_is_better(metric) else "worse"
        before, after = (_value(metrics, row[side], metric) for side in ("baseline", "system"))
        values = [row[name] for name in DIFFERENCE]
        found.append(Finding(*values, before=before, after=after, state=state))
    return found


def main_pair(
    metrics: Mapping[str, Any], differences: Sequence[Mapping[str, Any]]
) -> tuple[str, str] | None:
    """Returns the (system, baseline) that the run is about, None where nothing was compared."""
    compared = [(row["system"], row["baseline"]) for row in differences]
    known = [pair for pair in _MAIN_PAIRS if pair in compared]
    there = [pair for pair in _MAIN_PAIRS if all(name in metrics for name in pair)]
    return next(iter([*known, *compared, *there]), None)


def verdict(found: Sequence[Finding], pair: tuple[str, str] | None) -> str:
    """Returns one sentence, in plain text, on the main pair.

    For example "Better in 1 of 2 (after against before): recall@5 rose from .564 to .708 (+.144
    [+.108, +.182]); no measurable change of f1 (+.010 [-.020, +.040])."
    """
    mine = headlines(found, pair)
    if not mine or pair is None:
        return "No two systems were compared, so there is nothing to say about a change."
    order = list(_SYMBOLS)
    said = "; ".join(_clause(one) for one in sorted(mine, key=lambda one: order.index(one.state)))
    return f"{_opening(mine)} ({pair[0]} against {pair[1]}): {said}."


def headlines(found: Sequence[Finding], pair: tuple[str, str] | None) -> list[Finding]:
    """Returns up to four findings of the main pair: those that sum a run up, else the first."""
    mine = [one for one in found if (one.system, one.baseline) == pair]
    chosen = [one for name in _HEADLINES for one in mine if one.metric == name]
    return chosen or mine[:3]


def verdict_box(found: Sequence[Finding], pair: tuple[str, str] | None) -> str:
    """Returns the verdict and a tile per headline."""
    mine = headlines(found, pair)
    decided = {one.state for one in mine} & {"better", "worse"}
    name = decided.pop() if len(decided) == 1 else ""
    tiles = "".join(_tile(one) for one in mine)
    return f'<p class="verdict {name}"><bdi>{escape(verdict(found, pair))}</bdi></p>' + (
        f'<ul class="tiles">{tiles}</ul>' if tiles else ""
    )


def results_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the systems side by side, every metric with its interval.

    Args:
        metrics: System to metric to `{"value": ..., "low": ..., "high": ...}`, with "n" and
            "applicable".
    """
    systems = [name for name in SYSTEMS if name in metrics]
    systems += [name for name in metrics if name not in SYSTEMS]
    rows = [_metric_row(metrics, systems, name) for name in _metric_names(metrics)]
    if any("n" in metrics[system] for system in systems):
        rows.append(["questions", *(_whole(metrics[system].get("n")) for system in systems)])
    return table(
        ["metric", *(isolated(system) for system in systems)],
        rows,
        caption="Mean over the questions and its 95 % bootstrap interval; a star marks the best.",
        name="results",
    )


def legend(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what the systems and the metrics are, shown on demand."""
    systems = [(name, SYSTEMS[name].note) for name in metrics if name in SYSTEMS]
    names = [(name, _MEANINGS[name]) for name in _metric_names(metrics) if name in _MEANINGS]
    items = "".join(f"<dt>{isolated(a)}</dt><dd>{isolated(b)}</dd>" for a, b in systems + names)
    title = "What the systems and the metrics are"
    return details(title, f'<dl class="answers">{items}</dl>') if items else ""


def differences_tables(found: Sequence[Finding], pair: tuple[str, str] | None) -> str:
    """Returns the paired differences, those of the main pair first and open."""
    pairs = list(dict.fromkeys((one.system, one.baseline) for one in found))
    pairs.sort(key=lambda other: other != pair)  # stable: the rest stays in its order
    parts = []
    for system, baseline in pairs:
        mine = [one for one in found if (one.system, one.baseline) == (system, baseline)]
        counts = {state: sum(one.state == state for one in mine) for state in _SYMBOLS}
        summary = f"{isolated(system)} against {isolated(baseline)}" + "".join(
            f'<span class="chip {state}">{_SYMBOLS[state]} {count} {state}</span>'
            for state, count in counts.items()
            if count
        )
        parts.append(details(summary, _difference_table(mine, system, baseline), open=not parts))
    return "".join(parts)


def _value(metrics: Mapping[str, Mapping[str, Any]], system: str, metric: str) -> float | None:
    cell = metrics.get(system, {}).get(metric)
    return cell["value"] if cell else None


def _opening(found: Sequence[Finding]) -> str:
    counts = [sum(one.state == state for one in found) for state in ("better", "worse")]
    named = [
        f"{word} in {count} of {len(found)}" if count < len(found) else word
        for word, count in zip(("better", "worse"), counts, strict=True)
        if count
    ]
    text = ", ".join(named) or "no measurable change"
    return text[0].upper() + text[1:]


def _clause(one: Finding) -> str:
    change = interval(one.value, one.low, one.high)
    if one.state == "same":
        return f"{one.metric} stayed at {number(one.after)}"
    if one.state == "undecided":
        return f"no measurable change of {one.metric} ({change})"
    verb = "rose" if one.value > 0 else "fell"
    hint = ", lower is better" if lower_is_better(one.metric) else ""
    if one.before is None or one.after is None:
        return f"{one.metric} {verb} by {change}{hint}"
    return f"{one.metric} {verb} from {number(one.before)} to {number(one.after)} ({change}{hint})"


def _tile(one: Finding) -> str:
    between = f"{number(one.before)}\u2009\u2192\u2009{number(one.after)}"
    return (
        f'<li class="{one.state}"><span>{isolated(one.metric)}</span><b>{between}</b>'
        f"<span>{_state(one)} {interval(one.value, one.low, one.high)}</span></li>"
    )


def _state(one: Finding) -> str:
    return f'<span class="state {one.state}">{_SYMBOLS[one.state]} {one.state}</span>'


def _metric_row(
    metrics: Mapping[str, Mapping[str, Any]], systems: Sequence[str], metric: str
) -> list[str]:
    there = [value for s in systems if (value := _value(metrics, s, metric)) is not None]
    best = (min if lower_is_better(metric) else max)(there, default=None)
    # Where all are equal, none is best.
    best = None if len(set(there)) < 2 else best
    cells = []
    for system in systems:
        cell = metrics[system].get(metric)
        if cell is None:
            cells.append('<span class="soft">\N{EN DASH}</span>')
            continue
        text = f"<b>{number(cell['value'])}</b>"
        text += f"<small>[{number(cell['low'])}, {number(cell['high'])}]</small>"
        applicable = metrics[system].get("applicable", {})
        if metric in applicable:
            text += f"<small>{_whole(applicable[metric])} questions</small>"
        cells.append(f'<span class="best">{text}</span>' if cell["value"] == best else text)
    return [isolated(metric), *cells]


def _metric_names(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    named = dict.fromkeys(
        name
        for summary in metrics.values()
        for name, cell in summary.items()
        if isinstance(cell, Mapping) and "value" in cell
    )
    return [name for name in METRICS if name in named] + [n for n in named if n not in METRICS]


def _whole(value: int | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:,}"


def _difference_table(found: Sequence[Finding], system: str, baseline: str) -> str:
    # One axis for all that is a share; metrics in nats and the like have their own.
    def unit(one: Finding) -> str:
        return one.metric if lower_is_better(one.metric) else ""

    limits: dict[str, float] = {}
    for one in found:
        ends = max(abs(one.low), abs(one.high), abs(one.value))
        limits[unit(one)] = max(limits.get(unit(one), 0.0), ends)
    rows = []
    for one in found:
        label = f"{one.metric}: {interval(one.value, one.low, one.high)}, {one.state}"
        bar = interval_bar(one.value, one.low, one.high, limit=limits[unit(one)], label=label)
        between = f"{number(one.before)} \u2192 {number(one.after)}"
        rows.append(
            [
                isolated(one.metric),
                _state(one),
                f"<b>{signed(one.value)}</b><small>[{signed(one.low)}, {signed(one.high)}]</small>",
                f'<span class="{one.state}">{bar}</span>',
                between,
                "&lt; .001" if one.p_value < 0.001 else number(one.p_value),
                _whole(one.n),
            ]
        )
    verdict = '<span class="soft">verdict</span>'
    return table(
        ["metric", verdict, "difference", "around zero", "from \u2192 to", "p", "questions"],
        rows,
        caption=(
            f"{system} minus {baseline} on the same questions, 95 % bootstrap interval, and p of a"
            " paired sign-flip test. Each line stands alone: nothing is corrected for their number."
        ),
        name="differences",
    )

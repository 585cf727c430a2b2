"""One self-contained HTML page on a run: what changed, curves, questions, calibration, cost.

Example:
    html = render_report(ReportData(title="COVID-QA", metrics=metrics, differences=differences))
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ragjax.evaluation.report.checks import (
    calibration_section,
    dev_section,
    robustness_section,
    support_section,
)
from ragjax.evaluation.report.curves import curves
from ragjax.evaluation.report.explained import explained_section
from ragjax.evaluation.report.html import details, escape, is_number, isolated, page, table
from ragjax.evaluation.report.questions import PassageText, questions_section
from ragjax.evaluation.report.results import (
    differences_tables,
    findings,
    legend,
    main_pair,
    results_table,
    verdict_box,
)


class _Section(NamedTuple):
    title: str  # plain text
    body: str  # HTML


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """What a report shows; every part may be missing.

    Attributes:
        title: Heading of the page.
        facts: Name to value, a line under the heading: data, models, objective.
        metrics: System to metric to `{"value": ..., "low": ..., "high": ...}`.
        other_metrics: The same for systems that are shown on demand.
        differences: Paired differences, as in differences.json.
        steps: Lines of metrics.jsonl.
        questions: Lines of predictions.jsonl.
        gold: Question id to relevant document ids.
        passages: Document id to title and text, for the documents shown.
        explained: As in explained.json.
        calibration: As in calibration.json.
        dev: As in dev.json.
        robustness: As in robustness.json.
        support: As in support.json.
        cost: `{"seconds": {stage: seconds}, "peak_memory_bytes": ..., "counts": {what: number}}`.
        config: Options, nested.
        problems: Sentences on what could not be read.
    """

    title: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    other_metrics: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    differences: Sequence[Mapping[str, Any]] = ()
    steps: Sequence[Mapping[str, Any]] = ()
    questions: Sequence[Mapping[str, Any]] = ()
    gold: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    passages: Mapping[str, PassageText] = dataclasses.field(default_factory=dict)
    explained: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dev: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    robustness: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    support: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cost: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problems: Sequence[str] = ()


def render_report(data: ReportData) -> str:
    """Returns the page: complete HTML that needs no other file, no script and no network.

    The same data gives the same bytes. What is missing is left out.

    Args:
        data: What to show.
    """
    metrics = {**data.metrics, **data.other_metrics}
    found = findings(metrics, data.differences)
    pair = main_pair(metrics, data.differences)
    sections = _sections(data)
    links = "".join(
        f'<li><a href="#part-{place}">{escape(section.title)}</a></li>'
        for place, section in enumerate(sections)
    )
    facts = "".join(
        f"<li>{escape(name)} <b>{isolated(value)}</b></li>" for name, value in data.facts.items()
    )
    body = [
        f"<header><h1>{isolated(data.title)}</h1>",
        f'<ul class="facts">{facts}</ul>' if facts else "",
        _problems(data.problems),
        verdict_box(found, pair),
        f'<nav aria-label="Contents"><ul>{links}</ul></nav></header><main>',
    ]
    body += [
        f'<section id="part-{place}"><h2>{escape(section.title)}</h2>{section.body}</section>'
        for place, section in enumerate(sections)
    ]
    body.append(
        "</main><footer><p>Written by ragjax. The numbers are in the files of this folder.</p>"
        "</footer>"
    )
    return page(data.title, "\n".join(part for part in body if part))


def _sections(data: ReportData) -> list[_Section]:
    metrics = {**data.metrics, **data.other_metrics}
    found = findings(metrics, data.differences)
    pair = main_pair(metrics, data.differences)

    def lookup(doc_id: str) -> PassageText | None:
        return data.passages.get(doc_id)

    sections = []
    if data.metrics or found:
        lead = _lead("Every system on the same test questions, and what is left of the differences"
                     " once chance is taken into account.")  # fmt: skip
        differences = differences_tables(found, pair)
        body = lead + (results_table(data.metrics) if data.metrics else "")
        if data.other_metrics:
            further = results_table(data.other_metrics)
            body += details(f"Further systems ({len(data.other_metrics)})", further)
        body += legend(metrics)
        if differences:
            body += f"<h3>Paired differences</h3>{differences}"
        sections.append(_Section("What changed", body))
    if data.questions and pair:
        sections.append(
            _Section(
                "Questions won and lost",
                _lead(
                    "Those that changed most, with what was retrieved before and after. Passages"
                    " are shortened; answers in them are marked."
                )
                + questions_section(data.questions, pair, data.gold, lookup),
            )  # fmt: skip
        )
    if data.explained.get("questions"):
        sections.append(_Section("Retriever and language model", _explained_lead(data.explained)
                                + explained_section(data.explained, lookup)))  # fmt: skip
    if data.calibration:
        lead = _lead("How far the probability that the model gives its answer can be trusted.")
        sections.append(_Section("Calibration", lead + calibration_section(data.calibration)))
    for title, values, render in (
        ("Dev questions", data.dev, dev_section),
        ("Robustness", data.robustness, robustness_section),
        ("Answers supported by a passage", data.support, support_section),
    ):
        if values:
            sections.append(_Section(title, render(values)))
    if data.steps:
        lead = _lead("As logged at each step. Where there are many, the thin line is the values"
                     " and the strong one their running mean.")  # fmt: skip
        sections.append(_Section("Training curves", lead + curves(data.steps)))
    cost = _cost(data)
    if cost:
        sections.append(_Section("Cost", cost))
    if data.config:
        sections.append(_Section("Options", _options(data.config)))
    return sections


def _lead(text: str) -> str:
    return f'<p class="lead">{escape(text)}</p>'


def _explained_lead(explained: Mapping[str, Any]) -> str:
    settings = explained.get("settings")
    known = settings if isinstance(settings, Mapping) else {}
    named = ", ".join(f"{escape(k)} {isolated(v)}" for k, v in known.items())
    return (
        '<p class="lead">For a few test questions, the candidates of both retrievers: which ones'
        " help the language model to the right answer (p<sub>LSR</sub>), which ones the retriever"
        " believes in (p<sub>R</sub>), and the posterior, which weighs both: p<sub>R</sub> times"
        " the probability of the answer given the passage."
        + (f" Settings: {named}." if named else "")
        + "</p>"
    )


def _problems(problems: Sequence[str]) -> str:
    items = "".join(f"<li>{isolated(problem)}</li>" for problem in problems)
    return f'<div class="problems"><ul>{items}</ul></div>' if items else ""


def _cost(data: ReportData) -> str:
    seconds = data.cost.get("seconds")
    stages = {
        str(stage): float(took)
        for stage, took in (seconds.items() if isinstance(seconds, Mapping) else ())
        if is_number(took)
    }
    parts = []
    if stages:
        total = sum(stages.values())
        rows = [
            [isolated(stage), _duration(took), f"{100 * took / total if total else 0:.0f} %"]
            for stage, took in stages.items()
        ]
        rows.append(["all stages", _duration(total), "100 %"])
        parts.append(
            table(
                ["stage", "time", "share"],
                rows,
                caption="Wall-clock time, all calls of the run added up; that of a call that was"
                " killed is missing.",
            )  # fmt: skip
        )
    counts = dict(_step_counts(data.steps))
    given = data.cost.get("counts")
    if isinstance(given, Mapping):
        counts |= {str(k): f"{v:,}" for k, v in given.items() if is_number(v)}
    memory = data.cost.get("peak_memory_bytes")
    if memory is not None and is_number(memory):
        counts["peak memory of the process"] = f"{memory / 2**30:.1f} GiB"
    items = "".join(f"<dt>{isolated(k)}</dt><dd>{escape(v)}</dd>" for k, v in counts.items())
    if items:
        parts.append(f'<dl class="answers">{items}</dl>')
    return "".join(parts)


def _step_counts(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for row in steps:
        by_stage.setdefault(str(row.get("stage", "training")), []).append(row)
    counts = []
    for stage, rows in by_stage.items():
        took = sum(row["seconds"] for row in rows if is_number(row.get("seconds")))
        counts.append((f"{stage}: steps", f"{len(rows):,} in {_duration(took)}"))
        versions = [row["index/version"] for row in rows if is_number(row.get("index/version"))]
        if versions:
            counts.append((f"{stage}: refreshes of the index", f"{int(max(versions)):,}"))
    return counts


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _options(config: Mapping[str, Any]) -> str:
    rows = [[isolated(name), isolated(value)] for name, value in _flat(config)]
    return details(
        f"All {len(rows)} options",
        table(["option", "value"], rows, caption="Options of the run.", name="options"),
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            found.append((f"{prefix}{name}", shown))
    return found

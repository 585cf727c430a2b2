"""One self-contained HTML page on a run: what changed, curves, questions, calibration, cost.

Example:
    html = render_report(ReportData(title="COVID-QA", metrics=metrics, differences=differences))
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ragjax.evaluation.report.checks import (
    calibration_section,
    cells_section,
    dev_section,
    robustness_section,
    teachers_section,
)
from ragjax.evaluation.report.curves import curves
from ragjax.evaluation.report.explained import explained_section
from ragjax.evaluation.report.html import details, escape, isolated, page, table
from ragjax.evaluation.report.questions import (
    Flips,
    PassageText,
    flips_section,
    questions_section,
)
from ragjax.evaluation.report.results import (
    Finding,
    differences_tables,
    findings,
    legend,
    main_pair,
    results_table,
    verdict_box,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """The contents of a report; every part may be missing.

    Attributes:
        title: Heading of the page.
        facts: Name to value, a line under the heading: data, models, objective.
        metrics: System to metric to `{"value": ..., "low": ..., "high": ...}`.
        other_metrics: The same for systems that are shown on demand.
        differences: Paired differences, as in differences.json.
        steps: Lines of metrics.jsonl.
        questions: Lines of predictions.jsonl.
        flips: Of two runs, the questions that only one got right, as in compare.json.
        gold: Question id to relevant document ids.
        passages: Document id to title and text, for the documents shown.
        explained: As in explained.json.
        calibration: As in calibration.json.
        cells: As in cells.json.
        dev: As in dev.json.
        teachers: As in teachers.json.
        robustness: As in robustness.json.
        support: As in support.json.
        cost: `{"seconds": {stage: seconds}, "peak_memory_bytes": ..., "counts": {what: number}}`.
        config: Options, nested.
        shipped: What the run ships and why, a sentence.
        notes: Sentences on the data.
        problems: Sentences on what could not be read.
    """

    title: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    other_metrics: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    differences: Sequence[Mapping[str, Any]] = ()
    steps: Sequence[Mapping[str, Any]] = ()
    questions: Sequence[Mapping[str, Any]] = ()
    flips: Flips = dataclasses.field(default_factory=dict)
    gold: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    passages: Mapping[str, PassageText] = dataclasses.field(default_factory=dict)
    explained: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cells: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dev: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teachers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    robustness: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    support: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cost: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shipped: str = ""
    notes: Sequence[str] = ()
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
    sections = {title: body for title, body in _sections(data, found, pair).items() if body}
    links = "".join(
        f'<li><a href="#part-{place}">{escape(title)}</a></li>'
        for place, title in enumerate(sections)
    )
    facts = "".join(
        f"<li>{escape(name)} <b>{isolated(value)}</b></li>" for name, value in data.facts.items()
    )
    problems = "".join(f"<li>{isolated(problem)}</li>" for problem in data.problems)
    body = [
        f"<header><h1>{isolated(data.title)}</h1>",
        f'<ul class="facts">{facts}</ul>' if facts else "",
        f'<div class="problems"><ul>{problems}</ul></div>' if problems else "",
        f'<p class="verdict"><bdi>{escape(_sentence(data.shipped))}</bdi></p>'
        if data.shipped
        else "",
        verdict_box(found, pair),
        f'<nav aria-label="Contents"><ul>{links}</ul></nav></header><main>',
    ]
    body += [
        f'<section id="part-{place}"><h2>{escape(title)}</h2>{content}</section>'
        for place, (title, content) in enumerate(sections.items())
    ]
    body.append(
        "</main><footer><p>Written by ragjax. The numbers are in the files of this folder.</p>"
        "</footer>"
    )
    return page(data.title, "\n".join(part for part in body if part))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _sections(
    data: ReportData, found: Sequence[Finding], pair: tuple[str, str] | None
) -> dict[str, str]:
    """Returns title to body; a body is empty where its data are missing."""
    lookup, explained = data.passages.get, data.explained
    changed = questions_section(data.questions, pair, data.gold, lookup) if pair else ""
    return {
        "What changed": _changed(data, found, pair) if data.metrics or found else "",
        "Which half gained": _led(
            "Every retriever read by every language model, as far as it was answered: along a row"
            " the documents differ, along a column the language model.",
            cells_section(data.cells),
        ),
        "Questions won and lost": _led(
            "Those that changed most, with what was retrieved before and after. Passages are"
            " shortened; answers in them are marked.",
            changed if data.questions else "",
        ),
        "Questions that flipped": flips_section(data.flips),
        "Retriever and language model": (
            _explained_lead(explained) + explained_section(explained, lookup)
            if explained.get("questions")
            else ""
        ),
        "Calibration": _led(
            "How far the probability that the model gives its answer can be trusted.",
            calibration_section(data.calibration),
        ),
        "Dev questions": dev_section(data.dev),
        "Teachers": _led(
            "What the retriever was trained towards, and how high each mixture ranks what counts as"
            " found among the candidates of dev questions.",
            teachers_section(data.teachers),
        ),
        "Robustness": robustness_section(data.robustness),
        "Answers supported by a passage": results_table(data.support) if data.support else "",
        "Training curves": _led(
            "As logged at each step. Where there are many, the thin line is the values and the"
            " strong one their running mean.",
            curves(data.steps),
        ),
        "Notes on the data": _notes(data.notes),
        "Cost": _cost(data),
        "Options": _options(data.config) if data.config else "",
    }


def _changed(data: ReportData, found: Sequence[Finding], pair: tuple[str, str] | None) -> str:
    body = results_table(data.metrics) if data.metrics else ""
    if data.other_metrics:
        further = results_table(data.other_metrics)
        body += details(f"Further systems ({len(data.other_metrics)})", further)
    body += legend({**data.metrics, **data.other_metrics})
    if found:
        body += f"<h3>Paired differences</h3>{differences_tables(found, pair)}"
    return _led(
        "Every system on the same test questions, and what is left of the differences once chance"
        " is taken into account.",
        body,
    )


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{isolated(note)}</li>" for note in notes)
    return f"<ul>{items}</ul>" if items else ""


def _led(lead: str, body: str) -> str:
    return f'<p class="lead">{escape(lead)}</p>{body}' if body else ""


def _explained_lead(explained: Mapping[str, Any]) -> str:
    settings = explained.get("settings", {})
    named = ", ".join(f"{escape(name)} {isolated(value)}" for name, value in settings.items())
    return (
        '<p class="lead">For a few test questions, the candidates of both retrievers: which ones'
        " help the language model to the right answer (p<sub>LSR</sub>), which ones the retriever"
        " believes in (p<sub>R</sub>), and the posterior, which weighs both: p<sub>R</sub> times"
        " the probability of the answer given the passage."
        + (f" Settings: {named}." if named else "")
        + "</p>"
    )


def _cost(data: ReportData) -> str:
    parts = []
    if stages := data.cost.get("seconds"):
        total = sum(stages.values())
        rows = [
            [isolated(stage), _duration(took), f"{100 * took / total if total else 0:.0f} %"]
            for stage, took in stages.items()
        ]
        rows.append(["all stages", _duration(total), "100 %"])
        caption = (
            "Wall-clock time, all calls of the run added up; that of a call that was killed is"
            " missing."
        )
        parts.append(table(["stage", "time", "share"], rows, caption=caption))
    counts = _step_counts(data.steps)
    counts |= {name: f"{count:,}" for name, count in data.cost.get("counts", {}).items()}
    if memory := data.cost.get("peak_memory_bytes"):
        counts["peak memory of the process"] = f"{memory / 2**30:.1f} GiB"
    items = "".join(f"<dt>{isolated(k)}</dt><dd>{escape(v)}</dd>" for k, v in counts.items())
    if items:
        parts.append(f'<dl class="answers">{items}</dl>')
    return "".join(parts)


def _step_counts(steps: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for row in steps:
        by_stage.setdefault(row["stage"], []).append(row)
    counts = {}
    for stage, rows in by_stage.items():
        took = sum(row.get("seconds") or 0 for row in rows)
        counts[f"{stage}: steps"] = f"{len(rows):,} in {_duration(took)}"
        if versions := [row["index/version"] for row in rows if "index/version" in row]:
            counts[f"{stage}: refreshes of the index"] = f"{int(max(versions)):,}"
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

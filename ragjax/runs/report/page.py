"""`report.html` of a run: reads what lies in its folder and draws one self-contained page.

What needs models, p_R and p_LSR over the same candidates, is computed once (`explain`) and kept in
`explained.json` with the texts shown, so that the page can be drawn again from the folder alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragjax.evaluation.report import ReportData, render_report
from ragjax.evaluation.report.html import is_number
from ragjax.evaluation.report.questions import Lookup, PassageText
from ragjax.evaluation.report.results import main_pair
from ragjax.runs.folder import REPORT, RunFiles, read_cost
from ragjax.runs.indexes import Retriever
from ragjax.runs.options.shared import LsrTarget
from ragjax.runs.report.explained import EXPLAINED, explain, shown_passages
from ragjax.runs.report.explained import corpus_lookup as corpus_lookup
from ragjax.runs.report.explained import gold_ids as gold_ids
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage import write_text


def write_report(
    folder: Path,
    *,
    title: str,
    lookup: Lookup | None = None,
    gold: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Draws `report.html` from the files of a folder; what is missing is left out.

    Looked for are metrics.json, differences.json, metrics.jsonl, predictions.jsonl, config.json,
    explained.json, dev.json, calibration.json, robustness.json, support.json and cost.json. The
    same files give the same bytes.

    Args:
        folder: Folder of a run.
        title: Heading.
        lookup: Document id to its text; None: what explained.json holds.
        gold: Question id to relevant document ids; None: what explained.json holds.

    Returns:
        The file written.
    """
    read = RunFiles(folder)
    metrics = read.mapping("metrics.json")
    compared = read.mapping("differences.json")
    differences = [row for row in compared.get("differences") or () if isinstance(row, dict)]
    others = compared.get("other_systems")
    metrics = _summaries(metrics)
    others = _summaries(others if isinstance(others, dict) else {})
    explained = read.mapping(EXPLAINED)
    config = read.mapping("config.json")
    options = config.get("config", config)
    options = {k: v for k, v in options.items() if k != "output"} if options else {}
    questions = read.lines("predictions.jsonl")
    relevant = gold if gold is not None else explained.get("gold") or {}
    passages = {
        str(doc): PassageText(str(text.get("title", "")), str(text.get("text", "")))
        for doc, text in (explained.get("passages") or {}).items()
        if isinstance(text, dict)
    }
    pair = main_pair({**metrics, **others}, differences)
    if lookup is not None and pair is not None:
        passages |= shown_passages(questions, pair, relevant, lookup)
    data = ReportData(
        title=title,
        facts=_facts(options, metrics),
        metrics=metrics,
        other_metrics=others,
        differences=differences,
        steps=read.lines("metrics.jsonl"),
        questions=questions,
        gold=relevant,
        passages=passages,
        explained=explained,
        calibration=read.mapping("calibration.json"),
        dev=read.mapping("dev.json"),
        robustness=read.mapping("robustness.json"),
        support=read.mapping("support.json"),
        cost=read_cost(folder) | {"counts": explained.get("counts")},
        config=options,
        problems=read.problems,
    )
    write_text(folder / REPORT, render_report(data))
    return folder / REPORT


def report_run(
    workspace: Workspace,
    before: Retriever,
    after: Retriever,
    lm: FrozenLM,
    *,
    title: str,
    target: LsrTarget,
) -> Path:
    """Explains a few test questions and draws the report of a run whose results are written.

    Args:
        workspace: Data, models and folder of the run.
        before: The un-adapted retriever.
        after: The adapted one.
        lm: The language model that teaches.
        title: Heading.
        target: Options of p_LSR.

    Returns:
        The file written.
    """
    explain(workspace, before, after, lm, target=target)
    path = write_report(workspace.folder, title=title)
    workspace.report(f"report: {path}")
    return path


def data_name(data: str) -> str:
    """Returns a short name of a folder of data: its last two parts."""
    parts = [part for part in Path(data).parts if part not in ("/", "..", ".")]
    return "/".join(parts[-2:]) if parts else "the Python documentation"


def _summaries(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: summary for name, summary in metrics.items() if isinstance(summary, dict)}


def _facts(options: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if "data" in options:
        facts["data"] = data_name(str(options["data"]))
    for name, label in (("encoder", "encoder"), ("lm", "language model")):
        if options.get(name):
            facts[label] = _model_name(str(options[name]))
    if isinstance(options.get("stages"), list):
        facts["adapted"] = ", ".join(map(str, options["stages"]))
    facts |= _objective(options)
    counts = [s["n"] for s in metrics.values() if isinstance(s.get("n"), int)]
    if counts:
        facts["test questions"] = f"{max(counts):,}"
    return facts


def _objective(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the objective: a name with dual training, a group of options end to end."""
    whole = options.get("objective")
    if isinstance(whole, dict):
        weights = {k.removesuffix("_weight"): v for k, v in whole.items() if k.endswith("_weight")}
        names = {"marginal": f"marginal likelihood ({whole.get('marginal')})", "lsr": "LSR"}
        terms = [
            f"{weight:g} \N{MULTIPLICATION SIGN} {names.get(name, name)}"
            for name, weight in weights.items()
            if is_number(weight) and weight
        ]
        return {"objective": " + ".join(terms)}
    retriever = options.get("retriever")
    if isinstance(retriever, dict) and retriever.get("objective"):
        return {"objective": retriever["objective"]}
    return {}


def _model_name(source: str) -> str:
    if source.startswith("pip:"):
        return source.removeprefix("pip:")
    return data_name(source)

"""`report.html` of a run: reads what lies in its folder and draws one self-contained page.

What needs models, p_R and p_LSR over the same candidates, is computed once (`explain`) and kept in
`explained.json` with the texts shown, so that the page can be drawn again from the folder alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragjax.evaluation.report import ReportData, render_report
from ragjax.evaluation.report.questions import Lookup, PassageText
from ragjax.evaluation.report.results import DIFFERENCE, main_pair
from ragjax.runs.compare.served import SERVED
from ragjax.runs.folder import REPORT, RunFiles, read_cost
from ragjax.runs.indexes import Retriever
from ragjax.runs.options.modes import MODES
from ragjax.runs.options.teachers import LsrTarget
from ragjax.runs.report.explained import EXPLAINED, explain, shown_passages
from ragjax.runs.report.explained import corpus_lookup as corpus_lookup
from ragjax.runs.report.explained import gold_ids as gold_ids
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage import write_json, write_text

NOTES = "notes.json"


def write_report(
    folder: Path,
    *,
    title: str,
    lookup: Lookup | None = None,
    gold: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Draws `report.html` from the files of a folder; what is missing is left out.

    Looked for are metrics.json, differences.json, metrics.jsonl, predictions.jsonl, config.json,
    explained.json, served.json, cells.json, dev.json, teachers.json, calibration.json,
    robustness.json, support.json, notes.json and cost.json. The same files give the same bytes.

    Args:
        folder: Folder of a run.
        title: Heading.
        lookup: Document id to its text; None: what explained.json holds.
        gold: Question id to relevant document ids; None: what explained.json holds.

    Returns:
        The file written.
    """
    read = RunFiles(folder)
    metrics, compared = read.mapping("metrics.json"), read.mapping("differences.json")
    others = compared.get("other_systems", {})
    differences = _whole(compared.get("differences"), *DIFFERENCE)
    explained = read.mapping(EXPLAINED)
    explained["questions"] = _whole(explained.get("questions"), "question", "answers", "candidates")
    config = read.mapping("config.json")
    options = {k: v for k, v in config.get("config", config).items() if k != "output"}
    questions = _whole(read.lines("predictions.jsonl"), "id", "question", "answers", "systems")
    noted = read.mapping(NOTES)
    relevant = gold if gold is not None else explained.get("gold", {})
    passages = {
        doc: PassageText(text["title"], text["text"], str(text.get("source") or ""))
        for doc, text in explained.get("passages", {}).items()
        if _whole([text], "title", "text")
    }
    pair = main_pair({**metrics, **others}, differences)
    if lookup is not None and pair is not None:
        passages |= shown_passages(questions, pair, relevant, lookup)
    data = ReportData(
        title=title,
        facts=_facts(options, metrics, config.get("mode")) | noted.get("facts", {}),
        metrics=metrics,
        other_metrics=others,
        differences=differences,
        steps=_whole(read.lines("metrics.jsonl"), "stage", "step"),
        questions=questions,
        gold=relevant,
        passages=passages,
        explained=explained,
        calibration=read.mapping("calibration.json"),
        cells=read.mapping("cells.json"),
        dev=read.mapping("dev.json"),
        teachers=read.mapping("teachers.json"),
        robustness=read.mapping("robustness.json"),
        support=read.mapping("support.json"),
        cost=read_cost(folder) | {"counts": explained.get("counts", {})},
        config=options,
        shipped=read.mapping(SERVED).get("reason", ""),
        notes=noted.get("notes", ()),
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
        before: The base retriever.
        after: The adapted one.
        lm: The language model that scores.
        title: Heading.
        target: Options of p_LSR.

    Returns:
        The file written.
    """
    explain(workspace, before, after, lm, target=target)
    write_notes(workspace)
    path = write_report(workspace.folder, title=title)
    workspace.log(f"report: {path}")
    return path


def write_notes(workspace: Workspace) -> None:
    """Writes what the run said of its data, and by what it measured, to `notes.json`."""
    notes = [*workspace.dataset.notes, *workspace.notes]
    measured = {"retrieval measured by": workspace.tested_by}
    write_json(workspace.folder / NOTES, {"notes": notes, "facts": measured})


def data_name(data: str) -> str:
    """Returns a short name of a folder of data: its last two parts."""
    parts = [part for part in Path(data).parts if part not in ("/", "..", ".")]
    return "/".join(parts[-2:]) if parts else "the Python documentation"


def _whole(rows: Any, *keys: str) -> list[dict[str, Any]]:
    """Returns the rows that hold every key; those of a damaged file may not."""
    return [row for row in rows or () if isinstance(row, dict) and row.keys() >= set(keys)]


def _facts(
    options: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], mode: str | None
) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if options.get("run"):
        facts["run"] = data_name(options["run"])
    # An evaluation of a run without --data reads the data of the run.
    given = options.get("data") or options.get("queries")
    if given or ("data" in options and "run" not in facts):
        facts["data"] = data_name(given or "")
    for name, label in (("encoder", "encoder"), ("lm", "language model")):
        if options.get(name):
            facts[label] = _model_name(options[name])
    if "stages" in options:
        facts["adapted"] = ", ".join(options["stages"])
    if objective := _objective(options):
        facts["objective"] = objective
    if mode in MODES:
        facts["documents read"] = f"{mode}: {MODES[mode].note}"
    if counts := [summary["n"] for summary in metrics.values() if "n" in summary]:
        facts["test questions"] = f"{max(counts):,}"
    return facts


def _objective(options: Mapping[str, Any]) -> str:
    """Returns the objective: a name with dual training, a group of options end to end."""
    whole = options.get("objective")
    if not whole:
        return options.get("retriever", {}).get("objective", "")
    names = {"marginal": f"marginal likelihood ({whole.get('marginal')})", "lsr": "LSR"}
    weights = {k.removesuffix("_weight"): v for k, v in whole.items() if k.endswith("_weight")}
    return " + ".join(
        f"{weight:g} \N{MULTIPLICATION SIGN} {names.get(name, name)}"
        for name, weight in weights.items()
        if weight
    )


def _model_name(source: str) -> str:
    if source.startswith("pip:"):
        return source.removeprefix("pip:")
    return data_name(source)

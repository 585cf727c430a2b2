"""Result files and printed tables of a run and of an evaluation."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ragjax.evaluation import (
    METRICS,
    Comparison,
    compare,
    format_report,
    retrieval_metrics,
    summarize,
)
from ragjax.evaluation.calibration import Calibration, calibrate
from ragjax.evaluation.systems import (
    DOCUMENTS,
    MAIN_SYSTEMS,
    PAIRS,
    RUN_PAIRS,
    SERVED_SYSTEMS,
    SYSTEMS,
)
from ragjax.evaluation.table import format_cell
from ragjax.index import Bm25Index
from ragjax.runs.compare.cells import CELLS, format_cells, tabulate
from ragjax.runs.compare.measures import RIGHT_F1, is_right
from ragjax.runs.compare.rerank import Reranker
from ragjax.runs.compare.robustness import (
    CONDITION_METRICS,
    Robustness,
    compare_conditions,
    condition_lines,
    summarize_robustness,
)
from ragjax.runs.compare.systems import (
    Records,
    answer_cache,
    bootstrap_options,
    evaluate_systems,
    make_columns,
    retrieve_documents,
)
from ragjax.runs.indexes import Retriever
from ragjax.runs.options.modes import MODES
from ragjax.runs.prompt_lengths import OF_EVALUATION, note_cut_answers
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage import write_json, write_text

_CONFIDENCES = ("confidence", "confidence_per_token")
_RATES = ("supported", "supported_if_right", "supported_if_wrong", "hallucination")
_SUPPORT = ("support", *_RATES, *(f"corpus_{name}" for name in _RATES), "empty_answer")
COMPARED = (
    *METRICS,
    "supported",
    "hallucination",
    "corpus_supported",
    "corpus_hallucination",
)
_TABLE = (*COMPARED, "empty_answer")
# Key of differences.json: the name of the system that metrics.json has as `served`, too.
SHIPPED = "served"
_FIRST_SYSTEMS, _FIRST_METRICS = ("bm25", "before", "hybrid_before"), ("recall@5", "mrr@10")
_SERVED_SHOWN = ("recall@5", "mrr@10", "f1", "answer_nll")
_CONDITIONS_SHOWN = ("f1", "answer_nll")


class Checks(NamedTuple):
    """Further results of an evaluation, which a run has not.

    Attributes:
        bins: Bins of equal mass in which confidence is compared with outcome.
        support_threshold: Share of content words that supports a long answer.
        robustness: Records by condition; None: not measured.
    """

    bins: int
    support_threshold: float
    robustness: Robustness | None


def evaluate_run(
    workspace: Workspace,
    bm25: Bm25Index,
    before: Retriever,
    after: Retriever,
    lm: FrozenLM,
    *,
    served: str,
    reranker: Reranker | None = None,
) -> dict[str, Any]:
    """Compares the systems of a run on its test questions and writes its results.

    Args:
        workspace: Data and base models.
        bm25: The index of words.
        before: The base retriever.
        after: The adapted one, or the base one.
        lm: The adapted language model, or the base one.
        served: What the run ships, by its name among the documents of `SYSTEMS`.
        reranker: Ranks the best of what is served again; None: nothing does.

    Returns:
        What `metrics.json` holds.
    """
    if not workspace.questions["test"]:
        return write_results(workspace, {})
    base = workspace.base_lm()
    # Where the language model was not adapted, systems that differ in it alone are the same.
    names = [
        name
        for name, kind in SYSTEMS.items()
        if kind.num_adapted != 1 or lm.fingerprint != base.fingerprint
    ]
    deepest = reranker.depth if reranker else 0
    documents = retrieve_documents(workspace, bm25, before, after, "test", deepest=deepest)
    if reranker:
        questions = workspace.questions["test"]
        documents["reranked"] = reranker.documents(questions, documents[served])
    else:
        names.remove("reranked")
    columns = make_columns(names, documents, base, lm)
    if workspace.config.evaluation.answers == "served":
        # Of the others their documents alone are compared: answers cost the most time.
        shipped = [name for name, kind in SYSTEMS.items() if kind.documents == served]
        columns = [
            column if column.name in (*SERVED_SYSTEMS, *shipped) else column._replace(lm=None)
            for column in columns
            if column.name in (*SERVED_SYSTEMS, *shipped, *MAIN_SYSTEMS)
        ]
    cache = answer_cache(workspace.folder)
    records = evaluate_systems(workspace, columns, cache, split="test")
    shipped = shipped_system(records, "reranked" if reranker else served)
    return write_results(workspace, records, shipped=shipped)


def shipped_system(records: Records, documents: str) -> str:
    """Returns the system with these documents, read by the adapted language model if there is.

    Args:
        records: Of systems by name.
        documents: By their name in `SYSTEMS`.

    Returns:
        Its name; "" where there is none.
    """
    names = [name for name in records if SYSTEMS[name].documents == documents]
    by_lm = {SYSTEMS[name].lm: name for name in names}
    return by_lm.get("adapted", by_lm.get("base", ""))


def show_first_numbers(workspace: Workspace, bm25: Bm25Index, retriever: Retriever) -> None:
    """Shows how well the base retriever finds, long before anything is adapted.

    Args:
        workspace: Data.
        bm25: The index of words.
        retriever: The base retriever.
    """
    rows, counts = {name: [DOCUMENTS[name]] for name in _FIRST_SYSTEMS}, []
    header = ["before adapting"]
    for split in ("dev", "test"):
        if not (questions := workspace.questions.get(split)):
            continue
        counts.append(f"{len(questions):,} {split}")
        header += [f"{split} {name}" for name in _FIRST_METRICS]
        grades = workspace.gold_rows(split)
        found = retrieve_documents(workspace, bm25, retriever, retriever, split)
        for name, row in rows.items():
            values = retrieval_metrics(found[name].found.doc_ids, grades)
            row += [_known_mean(values[metric]) for metric in _FIRST_METRICS]
    if not counts:
        return
    lines = [header, *rows.values()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    workspace.log(
        "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        + f"\n{' and '.join(counts)} questions"
    )


def _known_mean(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return f"{known.mean():.3f}" if len(known) else "-"


def write_results(
    workspace: Workspace,
    records: Records,
    checks: Checks | None = None,
    *,
    shipped: str = "",
) -> dict[str, Any]:
    """Writes every result file and prints the tables.

    Files: metrics.json, differences.json, predictions.jsonl, and cells.json where a retriever was
    read by both language models, or two of them by one; with checks also calibration.json,
    support.json and, if it was measured, robustness.json.

    Args:
        workspace: Folder, options, log.
        records: By system.
        checks: Further results of an evaluation; None: a run, which has fewer pairs and keeps
            systems beside the main ones in differences.json.
        shipped: The system that the run ships, which metrics.json has as `served` also.

    Returns:
        What metrics.json holds.
    """
    options = bootstrap_options(workspace.config)
    records = {name: rows for name, rows in records.items() if any(r.metrics for r in rows)}
    note_cut_answers(workspace, records, None if checks is None else OF_EVALUATION)
    summaries = {name: summarize(rows, **options) for name, rows in records.items()}
    comparisons = compare(
        records, pairs=RUN_PAIRS if checks is None else tuple(PAIRS), metrics=COMPARED, **options
    )
    calibrations = {} if checks is None else _calibrations(records, checks.bins, options)
    kept = (*MAIN_SYSTEMS, "reranked") if checks is None else records
    names = [name for name in kept if name in records]
    table = {name: shown_summary(summaries[name], calibrations.get(name, {})) for name in names}
    shown = [c for c in comparisons if c.metric in PAIRS[c.system, c.baseline]]
    if table:
        legend = _legend(list(records), checks, workspace.config.mode)
        measured = f"retrieval is measured by {workspace.tested_by}"
        workspace.log(f"\n{format_report(table, shown)}\n{legend}\n{measured}")
    else:
        workspace.note(
            "nothing is measured: there are no test questions with an answer, a judgement or the"
            " passage that they were written from"
        )
    folder = workspace.folder
    if cells := tabulate(records, **options):
        workspace.log(f"\n{format_cells(cells)}")
        write_json(folder / CELLS, cells)
    lines = {}
    if checks is not None:
        write_json(folder / "calibration.json", _calibration_json(calibrations))
        write_json(folder / "support.json", _support(summaries))
        if checks.robustness is not None:
            summary = summarize_robustness(checks.robustness, **options)
            compared = compare_conditions(checks.robustness, **options)
            workspace.log("\n" + _robustness_report(summary, compared))
            write_json(folder / "robustness.json", summary)
            lines = condition_lines(checks.robustness)
    write_text(folder / "predictions.jsonl", _prediction_lines(records, lines))
    differences: dict[str, Any] = {"differences": [c.as_json() for c in comparisons]}
    if checks is None:
        others = {name: value for name, value in summaries.items() if name not in names}
        differences["other_systems"] = others
    metrics = {name: summaries[name] for name in names}
    if shipped in summaries:
        metrics["served"], differences[SHIPPED] = summaries[shipped], shipped
        cells = [
            f"{name} {format_cell(summaries[shipped][name])}"
            for name in _SERVED_SHOWN
            if name in summaries[shipped]
        ]
        workspace.log(f"\nserved ({shipped}): {', '.join(cells)}")
    write_json(folder / "differences.json", differences)
    write_json(folder / "metrics.json", metrics)
    for follower in workspace.metrics.followers:
        follower.summarize(_values(metrics))
    return metrics


def _values(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns the means of the systems, as `system/metric`."""
    return {
        f"{system}/{name}": cell["value"]
        for system, summary in metrics.items()
        for name, cell in summary.items()
        if name not in ("n", "applicable")
    }


def _prediction_lines(records: Records, conditions: Mapping[int, Any]) -> str:
    """Returns one JSON line per question, with what each system did, and under each condition."""
    lines = []
    for row, rows in enumerate(zip(*records.values(), strict=True)):
        systems = {
            r.system: {
                "prediction": r.prediction,
                "doc_ids": list(r.doc_ids),
                "doc_scores": list(r.doc_scores),
                "metrics": dict(r.metrics),
            }
            for r in rows
        }
        first = rows[0]
        line = {"id": first.id, "question": first.question, "answers": list(first.answers)}
        line |= {"systems": systems}
        if row in conditions:
            line["robustness"] = conditions[row]
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False))
    return "".join(line + "\n" for line in lines)


def _calibrations(
    records: Records, bins: int, options: Mapping[str, int]
) -> dict[str, dict[str, Calibration]]:
    """Returns by system how well each confidence fits F1 >= `RIGHT_F1`."""
    found: dict[str, dict[str, Calibration]] = {}
    for system, lines in records.items():
        for name in _CONFIDENCES:
            rows = [r.metrics for r in lines if name in r.metrics and "f1" in r.metrics]
            if rows:
                confidence = np.array([row[name] for row in rows])
                right = np.array([is_right(row["f1"]) for row in rows])
                calibration = calibrate(confidence, right, num_bins=bins, **options)
                found.setdefault(system, {})[name] = calibration
    return found


def _calibration_json(calibrations: Mapping[str, Mapping[str, Calibration]]) -> dict[str, Any]:
    def plain(found: Calibration) -> dict[str, Any]:
        values = {k: v for k, v in found._asdict().items() if k not in ("n", "reliability")}
        return {
            "n": found.n,
            **{name: value._asdict() for name, value in values.items() if value is not None},
            "reliability": [row._asdict() for row in found.reliability],
        }

    return {
        system: {name: plain(found) for name, found in by_name.items()}
        for system, by_name in calibrations.items()
    }


def _support(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, summary in summaries.items():
        rates = {key: summary[key] for key in _SUPPORT if key in summary}
        if "corpus_supported" in rates:
            counts = {k: v for k, v in summary.get("applicable", {}).items() if k in rates}
            found[name] = {**rates, "n": summary["n"], "applicable": counts}
    return found


def shown_summary(
    summary: Mapping[str, Any], calibrations: Mapping[str, Calibration]
) -> dict[str, Any]:
    """Returns the printed rows of one system: its calibration is that per token."""
    rows = {name: summary[name] for name in _TABLE if name in summary}
    found = calibrations.get("confidence_per_token")
    if found is not None:
        measured = {"calibration_error": found.ece, "auroc": found.auroc}
        rows |= {name: value._asdict() for name, value in measured.items() if value is not None}
    counts = {k: v for k, v in summary.get("applicable", {}).items() if k in rows}
    return rows | {"n": summary["n"]} | ({"applicable": counts} if counts else {})


def _legend(systems: Sequence[str], checks: Checks | None, mode: str) -> str:
    lines = ["; ".join(f"{name}: {SYSTEMS[name].note}" for name in systems)]
    if "after" in systems:
        lines[0] += ". after and hybrid are read by the language model as the run left it"
    lines.append(f"documents are read in mode {mode}: {MODES[mode].note}")
    if checks is not None:
        lines += [
            "supported: a passage that was read contains the answer, or"
            f" {checks.support_threshold:.0%} of the content words of a longer one;"
            f" hallucination: not supported, and F1 below {RIGHT_F1:g}; empty answers are in"
            " neither",
            "corpus_supported, corpus_hallucination: the same by the passages that any search found"
            " and the relevant ones, whatever was read, so that all systems compare",
            "calibration_error, auroc: of the answer's probability per token against"
            f" F1 >= {RIGHT_F1:g} (lower, higher is better)",
        ]
    return "\n".join(lines)


def _robustness_report(summary: Mapping[str, Any], compared: Sequence[Comparison]) -> str:
    names = (*CONDITION_METRICS, "hallucination", "n")
    conditions = {
        condition: {name: values[name] for name in names if name in values}
        for condition, values in summary["conditions"].items()
    }
    same = summary["same_as_closed_book"]
    # All of them are in robustness.json.
    shown = [comparison for comparison in compared if comparison.metric in _CONDITIONS_SHOWN]
    return (
        "Robustness: relevant passages alone, before and behind distractors; distractors alone\n"
        f"{format_report(conditions, shown)}\n"
        "distractors alone give the answer of no documents in"
        f" {same['value']:.0%} [{same['low']:.0%}, {same['high']:.0%}] of the questions"
    )

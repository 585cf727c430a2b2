"""What an evaluation writes and shows: metrics, differences, calibration, support, robustness."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ragjax.evaluation import METRICS, QuestionRecord, compare, format_report, summarize
from ragjax.evaluation.calibration import Calibration, calibrate
from ragjax.runs.compare.measures import RIGHT_F1, is_right
from ragjax.runs.compare.robustness import METRICS as CONDITION_METRICS
from ragjax.runs.compare.robustness import (
    Robustness,
    compare_conditions,
    condition_lines,
    summarize_robustness,
)
from ragjax.runs.compare.systems import Records, as_json, prediction_lines
from ragjax.runs.options.evaluate import EvaluateConfig
from ragjax.runs.saved import SYSTEM_NOTES
from ragjax.runs.workspace import Workspace
from ragjax.storage import write_json, write_text

CONFIDENCES = ("confidence", "confidence_per_token")
SUPPORT = (
    "support",
    "supported",
    "supported_if_right",
    "supported_if_wrong",
    "hallucination",
    "empty_answer",
)
_PAIRS = (
    ("after", "before"),
    ("hybrid", "hybrid_before"),
    ("hybrid", "bm25"),
    ("hybrid_before", "bm25"),
    ("before", "closed_book"),
    ("hybrid_before", "closed_book"),
    ("after", "closed_book_lm_half"),
    ("hybrid", "closed_book_lm_half"),
    ("after", "closed_book"),
    ("hybrid", "closed_book"),
    ("closed_book_lm_half", "closed_book"),
    ("lm_half", "before"),
    ("hybrid", "hybrid_base_lm"),
)
# Differences shown on the screen; all of them are in differences.json.
_SHOWN = {
    ("after", "before"): ("recall@5", "mrr@10", "f1", "answer_nll", "hallucination"),
    ("hybrid", "hybrid_before"): ("recall@5", "f1", "answer_nll", "hallucination"),
    ("hybrid", "bm25"): ("recall@5", "f1"),
    ("hybrid_before", "bm25"): ("recall@5",),
    ("before", "closed_book"): ("f1", "answer_nll"),
    ("after", "closed_book_lm_half"): ("f1", "answer_nll"),
}
_CONDITIONS_SHOWN = ("f1", "answer_nll")
_TABLE = (*METRICS, "supported", "hallucination", "empty_answer")


def write_evaluation(
    workspace: Workspace, config: EvaluateConfig, records: Records, robustness: Robustness | None
) -> dict[str, Any]:
    """Writes every result file and shows the tables.

    Files: metrics.json, differences.json, calibration.json, support.json, robustness.json (if
    there is any), predictions.jsonl.

    Args:
        workspace: Where, and whom to show.
        config: Options.
        records: By system.
        robustness: Records by condition; None: not measured.

    Returns:
        What metrics.json holds.
    """
    options = {"num_resamples": config.resamples, "seed": workspace.config.seed}
    records = {name: rows for name, rows in records.items() if any(r.metrics for r in rows)}
    summaries = {name: summarize(rows, **options) for name, rows in records.items()}
    pairs = [pair for pair in _PAIRS if set(pair) <= set(records)]
    metrics = (*METRICS, "supported", "hallucination")
    comparisons = compare(records, pairs=pairs, metrics=metrics, **options)
    calibrations = {
        name: found
        for name, rows in records.items()
        if (found := _calibrations(rows, config.bins, options))
    }
    shown = [c for c in comparisons if c.metric in _SHOWN.get((c.system, c.baseline), ())]
    table = {name: _shown_summary(summaries[name], calibrations.get(name, {})) for name in records}
    workspace.report("\n" + format_report(table, shown) + "\n" + _legend(config, list(records)))
    folder = workspace.folder
    conditions: Mapping[int, Any] = {}
    if robustness is not None:
        workspace.report("\n" + _robustness_report(robustness, options))
        write_json(folder / "robustness.json", summarize_robustness(robustness, **options))
        conditions = condition_lines(robustness)
    asked = len(next(iter(records.values())))
    more = [{"robustness": conditions[row]} if row in conditions else {} for row in range(asked)]
    write_text(folder / "predictions.jsonl", prediction_lines(records, more))
    write_json(
        folder / "calibration.json",
        {
            name: {confidence: _calibration_json(found) for confidence, found in by_name.items()}
            for name, by_name in calibrations.items()
        },
    )
    write_json(folder / "support.json", _support(summaries))
    write_json(folder / "differences.json", {"differences": [as_json(c) for c in comparisons]})
    write_json(folder / "metrics.json", summaries)
    return summaries


def _calibrations(
    records: Sequence[QuestionRecord], bins: int, options: Mapping[str, int]
) -> dict[str, Calibration]:
    """Returns how well each confidence of one system fits F1 >= `RIGHT_F1`."""
    found = {}
    for name in CONFIDENCES:
        rows = [r.metrics for r in records if name in r.metrics and "f1" in r.metrics]
        if rows:
            confidence = np.array([row[name] for row in rows])
            right = np.array([is_right(row["f1"]) for row in rows])
            found[name] = calibrate(confidence, right, num_bins=bins, **options)
    return found


def _calibration_json(found: Calibration) -> dict[str, Any]:
    intervals = ("accuracy", "confidence", "ece", "brier", "auroc", "aurc")
    values = {name: getattr(found, name) for name in intervals}
    return {
        "n": found.n,
        **{name: value._asdict() for name, value in values.items() if value is not None},
        "reliability": [row._asdict() for row in found.reliability],
    }


def _support(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, summary in summaries.items():
        rates = {key: summary[key] for key in SUPPORT if key in summary}
        if "supported" in rates:
            counts = {k: v for k, v in summary.get("applicable", {}).items() if k in rates}
            found[name] = {**rates, "n": summary["n"], "applicable": counts}
    return found


def _shown_summary(
    summary: Mapping[str, Any], calibrations: Mapping[str, Calibration]
) -> dict[str, Any]:
    """Returns the rows of one system on the screen: its calibration is that per token."""
    rows = {name: summary[name] for name in _TABLE if name in summary}
    found = calibrations.get("confidence_per_token")
    if found is not None:
        measured = {"calibration_error": found.ece, "auroc": found.auroc}
        rows |= {name: value._asdict() for name, value in measured.items() if value is not None}
    counts = {k: v for k, v in summary.get("applicable", {}).items() if k in rows}
    return rows | {"n": summary["n"]} | ({"applicable": counts} if counts else {})


def _legend(config: EvaluateConfig, systems: Sequence[str]) -> str:
    lines = ["; ".join(f"{name}: {SYSTEM_NOTES[name]}" for name in systems if name in SYSTEM_NOTES)]
    if "after" in systems:
        lines[0] += ". after and hybrid are read by the language model as the run left it"
    lines += [
        "supported: a passage that was read contains the answer, or"
        f" {config.support_threshold:.0%} of the content words of a longer one;"
        f" hallucination: not supported, and F1 below {RIGHT_F1:g}; empty answers are in neither",
        "calibration_error, auroc: of the answer's probability per token against"
        f" F1 >= {RIGHT_F1:g} (lower, higher is better)",
    ]
    return "\n".join(lines)


def _robustness_report(robustness: Robustness, options: Mapping[str, int]) -> str:
    summaries = {
        name: _only(summarize(rows, **options), (*CONDITION_METRICS, "hallucination"))
        for name, rows in robustness.records.items()
    }
    same = summarize_robustness(robustness, **options)["same_as_closed_book"]
    told = (
        "distractors alone give the answer of no documents in"
        f" {same['value']:.0%} [{same['low']:.0%}, {same['high']:.0%}] of the questions"
    )
    # All of them are in robustness.json.
    shown = [c for c in compare_conditions(robustness, **options) if c.metric in _CONDITIONS_SHOWN]
    return "\n".join(
        [
            "Robustness: relevant passages alone, before and behind distractors; distractors alone",
            format_report(summaries, shown),
            told,
        ]
    )


def _only(summary: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: summary[name] for name in names if name in summary} | {"n": summary["n"]}

"""Which half gained: every retriever read by every language model, as far as it was answered."""

from collections.abc import Mapping, Sequence
from typing import Any

from ragjax.evaluation import QuestionRecord, compare, summarize
from ragjax.evaluation.systems import DOCUMENTS, SYSTEMS

CELLS = "cells.json"
_METRICS = ("f1", "exact_match", "answer_nll")
_SHOWN = ("f1", "answer_nll")
# Documents against documents, read by the same language model.
_STEPS = (
    ("after", "before"),
    ("hybrid", "hybrid_before"),
    ("hybrid", "bm25"),
    ("hybrid_before", "bm25"),
    ("hybrid_before", "none"),
    ("hybrid", "none"),
    ("reranked", "hybrid"),
)


def tabulate(
    records: Mapping[str, Sequence[QuestionRecord]], *, num_resamples: int, seed: int
) -> dict[str, Any]:
    """Returns what `cells.json` holds.

    Args:
        records: Records by system, as in `SYSTEMS`.
        num_resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        `cells`, one for each language model and documents that were answered: `lm`, `documents`,
        `system`, `n`, and each metric with its interval; and `differences`, paired by question,
        between language models that read the same documents (`side` "lm") and between documents
        that the same one reads (`side` "documents"). Empty where nothing can be compared.
    """
    options = {"num_resamples": num_resamples, "seed": seed}
    halves = any(SYSTEMS[name].num_adapted == 1 for name in records if name in SYSTEMS)
    names = {
        # Without a half, both rows would be one language model: the one that the run left.
        (kind.lm if halves else "base", kind.documents or "none"): name
        for name, kind in SYSTEMS.items()
        if any("f1" in record.metrics for record in records.get(name, ()))
    }
    lms = [lm for lm in ("base", "adapted") if any(key[0] == lm for key in names)]
    pairs = {
        "lm": [(names.get(("adapted", docs)), names.get(("base", docs))) for docs in DOCUMENTS],
        "documents": [
            (names.get((lm, new)), names.get((lm, old))) for lm in lms for new, old in _STEPS
        ],
    }
    differences = [
        {"side": side, **comparison.as_json()}
        for side, wanted in pairs.items()
        for comparison in compare(
            records,
            pairs=[(new, old) for new, old in wanted if new and old],
            metrics=_METRICS,
            **options,
        )
    ]
    if not differences:
        return {}
    cells = []
    for lm in lms:
        for documents in DOCUMENTS:
            if (name := names.get((lm, documents))) is None:
                continue
            answered = [record for record in records[name] if "f1" in record.metrics]
            summary = summarize(answered, **options)
            values = {metric: summary[metric] for metric in _METRICS if metric in summary}
            place = {"lm": lm, "documents": documents, "system": name, "n": summary["n"]}
            cells.append({**place, **values})
    return {"cells": cells, "differences": differences}


def format_cells(table: Mapping[str, Any]) -> str:
    """Returns the table as text: a row per language model, a column per documents.

    Args:
        table: From `tabulate`.
    """
    cells = {(cell["lm"], cell["documents"]): cell for cell in table["cells"]}
    lms = list(dict.fromkeys(lm for lm, _ in cells))
    columns = [name for name in DOCUMENTS if any(docs == name for _, docs in cells)]
    count = max(cell["n"] for cell in cells.values())
    lines = [f"Retriever x language model, {count} questions, F1 / answer_nll"]
    rows = [["language model", *(DOCUMENTS[name] for name in columns)]]
    for lm in lms:
        found = [cells.get((lm, name)) for name in columns]
        rows.append([lm, *(_text(cell) for cell in found)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _text(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    values = (cell[name]["value"] for name in _SHOWN if name in cell)
    return " / ".join(f"{value:.3f}".removeprefix("0") for value in values)

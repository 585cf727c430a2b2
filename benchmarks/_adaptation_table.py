"""The table of `benchmarks/adaptation.py`: means over seeds, paired differences, rows for docs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragjax.evaluation import paired_difference

_HYBRID, _SERVED = "hybrid recall@5", "served recall@5"
_SHOWN = (
    "dense recall@5",
    "dense ndcg@10",
    _HYBRID,
    "hybrid ndcg@10",
    _SERVED,
    "reranked recall@5",
)
_BASE = "un-adapted"
POOLED = "pooled"


class Cell(NamedTuple):
    """One line of `cells.jsonl`."""

    data: str
    size: int
    seed: int
    system: str
    seconds: float
    questions: dict[str, list[float]]  # metric to the value of each test question
    dev: dict[str, float]
    weight: float  # of the dense side in the hybrid
    note: str = ""

    @property
    def key(self) -> tuple[str, int, int, str]:
        """What no two lines share."""
        return self.data, self.size, self.seed, self.system


class Row(NamedTuple):
    """A system on a set, or on all of them."""

    data: str
    system: str
    runs: int
    values: dict[str, np.ndarray]  # metric to [Q], averaged over seeds
    differences: dict[str, tuple[float, float, float]]  # by what it is compared with


def read_cells(path: Path) -> list[Cell]:
    """Returns the finished cells."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [Cell(**json.loads(line)) for line in lines]


def format_table(cells: Sequence[Cell], title: str) -> str:
    """Returns the table as text."""
    lines = ["", title, "| set | system | runs | " + " | ".join(_SHOWN) + " | " + " | ".join(
        _heads(rows := make_rows(cells))
    ) + " |"]  # fmt: skip
    lines.append("|" + "---|" * (lines[-1].count("|") - 1))
    lines += ["| " + " | ".join(_texts(row, rows)) + " |" for row in rows]
    return "\n".join(lines)


def format_rows(cells: Sequence[Cell]) -> str:
    """Returns the table as rows of a `list-table`."""
    rows = make_rows(cells)
    table = [["set", "system", "runs", *_SHOWN, *_heads(rows)], *(_texts(r, rows) for r in rows)]
    lines = []
    for texts in table:
        lines += [f"   {'*' if not i else ' '} - {text}" for i, text in enumerate(texts)]
    return "\n".join(lines) + "\n"


def make_rows(cells: Sequence[Cell]) -> list[Row]:
    """Returns the systems of each set, and those that every set has, on all questions."""
    names = list(dict.fromkeys(cell.data for cell in cells))
    rows = [row for name in names for row in _rows_of_set(name, cells)]
    shared = [
        system
        for system in dict.fromkeys(row.system for row in rows)
        if sum(row.system == system for row in rows) == len(names)
    ]
    if len(names) > 1:
        pooled = []
        for system in shared:
            mine = [row for row in rows if row.system == system]
            common = set.intersection(*(set(row.values) for row in mine))
            values = {m: np.concatenate([row.values[m] for row in mine]) for m in common}
            pooled.append(Row(POOLED, system, min(row.runs for row in mine), values, {}))
        rows += pooled
    return [row._replace(differences=_differences(row, rows)) for row in rows]


def _rows_of_set(name: str, cells: Iterable[Cell]) -> list[Row]:
    by_system: dict[str, dict[int, Cell]] = {}
    for cell in (cell for cell in cells if cell.data == name):
        system, *rate = cell.system.split(" ")
        label = cell.system if system in ("ragjax", "stress") or not rate else system
        best = by_system.setdefault(label, {})
        earlier = best.get(cell.seed)
        # Of learning rates the one that dev likes best, for each seed.
        if earlier is None or cell.dev["dense mrr@10"] > earlier.dev["dense mrr@10"]:
            best[cell.seed] = cell
    return [
        Row(name, label, len(found), _mean(list(found.values())), {})
        for label, found in by_system.items()
    ]


def _mean(cells: Sequence[Cell]) -> dict[str, np.ndarray]:
    values = {
        metric: np.mean([cell.questions[metric] for cell in cells], axis=0)
        for metric in cells[0].questions
    }
    # What a run ships; the hybrid of those that choose nothing.
    return {_SERVED: values.get("shipped recall@5", values[_HYBRID]), **values}


def _heads(rows: Sequence[Row]) -> list[str]:
    return [f"{_SERVED} - {other}" for other in _compared(rows)]


def _compared(rows: Sequence[Row]) -> list[str]:
    """Returns what everything is compared with: un-adapted, BM25, the peers that there are."""
    known = dict.fromkeys(row.system for row in rows)
    return [_BASE, "BM25", *(name for name in ("mnrl", "mnrl_hard") if name in known)]


def _differences(row: Row, rows: Sequence[Row]) -> dict[str, tuple[float, float, float]]:
    found = {}
    for other in _compared(rows):
        base = next(
            (
                r
                for r in rows
                if (r.data, r.system) == (row.data, _BASE if other == "BM25" else other)
            ),
            None,
        )
        if base is None or base.system == row.system and other != "BM25":
            continue
        before = base.values["bm25 recall@5"] if other == "BM25" else base.values[_SERVED]
        result = paired_difference(row.values[_SERVED], before)
        found[other] = (result.value, result.low, result.high)
    return found


def _texts(row: Row, rows: Sequence[Row]) -> list[str]:
    shown: list[Any] = [row.data, row.system, str(row.runs)]
    shown += [
        f"{np.nanmean(row.values[metric]):.3f}" if metric in row.values else "–"
        for metric in _SHOWN
    ]
    for other in _compared(rows):
        value = row.differences.get(other)
        shown.append("–" if value is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*value))
    return shown

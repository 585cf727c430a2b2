"""Two finished runs, or evaluations, read from their folders and checked to be comparable."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.evaluation.report.html import is_number
from ragjax.runs.compare.results import SHIPPED
from ragjax.runs.data import Log
from ragjax.runs.folder import CONFIG, REPORT, RunFiles
from ragjax.runs.options.compare import CompareConfig
from ragjax.runs.report.page import NOTES

COMPARISON = "compare.json"
_DEFAULT = "hybrid_before"  # of base models, which ship nothing


class Side(NamedTuple):
    """One of the two."""

    folder: Path
    system: str
    lines: Mapping[str, Mapping[str, Any]]  # of predictions.jsonl, by question
    config: Mapping[str, Any]  # what config.json holds
    measured: str  # by what retrieval is measured; "" where it does not say


class Pair(NamedTuple):
    """Both of them, with the questions that they share, in the order of A."""

    a: Side
    b: Side
    shared: tuple[str, ...]

    @property
    def named(self) -> dict[str, Side]:
        """The two by their names in tables and files."""
        return {"A": self.a, "B": self.b}


def open_pair(config: CompareConfig, log: Log) -> Pair:
    """Reads both sides and checks that a difference between them is one of the systems.

    Args:
        config: Options.
        log: Shows one line to the user.

    Raises:
        FileNotFoundError, ValueError: See `compare_runs`.
    """
    systems = config.system * (2 if len(config.system) == 1 else 1) or ("", "")
    a, b = (
        _open_side(Path(folder), system)
        for folder, system in zip(config.compare, systems, strict=True)
    )
    _check_output(Path(config.output), (a.folder, b.folder))
    pair = Pair(a, b, tuple(id for id in a.lines if id in b.lines))
    _check_same_data(pair, log)
    left = [
        f"{len(side.lines) - len(pair.shared):,} of {name}" for name, side in pair.named.items()
    ]
    log(f"{len(pair.shared):,} questions of both; asked in one only: {', '.join(left)}")
    return pair


def _open_side(folder: Path, system: str) -> Side:
    read = RunFiles(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"--compare {folder}: no run there (no {CONFIG}); give the --output folder of"
            " experiments/adapt.py, experiments/train_rag.py or experiments/evaluate.py"
        )
    config, differences = read.mapping(CONFIG), read.mapping("differences.json")
    metrics, facts = read.mapping("metrics.json"), read.mapping(NOTES).get("facts", {})
    rows = read.lines("predictions.jsonl")
    if read.problems:
        raise ValueError(
            f"--compare {folder}: {read.problems[0]}; evaluate again, with another --output folder"
        )
    if not rows:
        raise ValueError(
            f"--compare {folder}: it has measured nothing, or has not ended; the same command goes"
            " on with it"
        )
    lines = {}
    for number, row in enumerate(rows, 1):
        if not _is_whole(row) or row["id"] in lines:
            problem = "this question for the second time" if _is_whole(row) else "no prediction"
            raise ValueError(
                f"--compare {folder}: predictions.jsonl: line {number} holds {problem}"
            )
        lines[row["id"]] = row
    there = [name for name in rows[0]["systems"] if all(name in row["systems"] for row in rows)]
    if system and system not in there:
        raise ValueError(
            f"--system {system}: {folder} has not measured it; it has {' '.join(there)}"
        )
    # Where something is shipped, but an earlier version did not write down what, one must say.
    default = "" if "served" in metrics else _DEFAULT
    chosen = system or differences.get(SHIPPED, default)
    if chosen not in there:
        raise ValueError(
            f"--compare {folder}: it does not say what it ships; add --system, one of"
            f" {' '.join(there)}"
        )
    measured = facts.get("retrieval measured by", "").partition(" (known")[0]
    return Side(folder, chosen, lines, config, measured)


def _is_whole(row: Mapping[str, Any]) -> bool:
    systems = row.get("systems")
    return (
        all(isinstance(row.get(name), str) for name in ("id", "question"))
        and isinstance(row.get("answers"), list)
        and isinstance(systems, dict)
        and all(
            isinstance(one, dict)
            and one.keys() >= {"prediction", "doc_ids", "doc_scores", "metrics"}
            and isinstance(one["metrics"], dict)
            and all(map(is_number, one["metrics"].values()))
            for one in systems.values()
        )
    )


def _check_output(folder: Path, sides: Sequence[Path]) -> None:
    """Raises ValueError for a folder in which something else would be written over."""
    there = {path.name for path in folder.glob("*")} if folder.is_dir() else set()
    if folder.resolve() in [side.resolve() for side in sides] or there - {COMPARISON, REPORT}:
        raise ValueError(
            f"--output {folder} holds something else than a comparison; choose another folder"
        )


def _check_same_data(pair: Pair, log: Log) -> None:
    """Raises ValueError where the two were asked, or searched, or were measured by, other data."""
    a, b = pair.a, pair.b
    again = "evaluate both on the same data: experiments/evaluate.py --run RUN --data FOLDER"
    inputs = [side.config.get("inputs") or {} for side in (a, b)]
    for side, read in zip((a, b), inputs, strict=True):
        if "corpus" not in read:
            log(f"note: {side.folder} does not say what it read: the passages are not compared")
    corpora = [read["corpus"] for read in inputs if "corpus" in read]
    if len(corpora) == 2 and corpora[0] != corpora[1]:
        raise ValueError(f"{a.folder} and {b.folder} searched different passages; {again}")
    if not pair.shared:
        raise ValueError(
            f"{a.folder} ({len(a.lines):,} questions) and {b.folder} ({len(b.lines):,}) share no"
            f" question; {again} --split SPLIT"
        )
    for id in pair.shared:
        if any(a.lines[id][name] != b.lines[id][name] for name in ("question", "answers")):
            raise ValueError(
                f"question {id} has other words or other answers in {b.folder} than in {a.folder};"
                f" {again}"
            )
    judged = [_judgements(side, read) for side, read in zip((a, b), inputs, strict=True)]
    same = judged[0]["questions"] == judged[1]["questions"]
    if a.measured != b.measured or (same and judged[0] != judged[1]):
        measured = (
            f" ({a.measured or '?'}; {b.measured or '?'})" if a.measured != b.measured else ""
        )
        raise ValueError(
            f"what counts as found is not the same in {a.folder} and {b.folder}{measured}; {again}"
        )


def _judgements(side: Side, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns digests of the questions that a side was measured by, and of their judgements."""
    split = side.config.get("config", {}).get("split", "test")
    read = inputs.get(f"{split} split") or {}
    return {name: read.get(name) for name in ("questions", "relevance judgements")}

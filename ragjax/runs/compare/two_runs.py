"""Two finished runs, or evaluations, compared on the questions that both were asked."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ragjax.evaluation import (
    Comparison,
    QuestionRecord,
    compare,
    format_report,
    summarize,
)
from ragjax.evaluation.report import ReportData, render_report
from ragjax.evaluation.report.questions import Flips, PassageText
from ragjax.evaluation.report.results import lower_is_better
from ragjax.runs.compare.measures import is_right
from ragjax.runs.compare.pair import COMPARISON, Pair, open_pair
from ragjax.runs.compare.results import COMPARED, shown_summary
from ragjax.runs.data import Log
from ragjax.runs.folder import REPORT, RunFiles
from ragjax.runs.options.compare import CompareConfig
from ragjax.runs.report.explained import EXPLAINED
from ragjax.runs.saved import Results
from ragjax.storage import write_json, write_text
from ragjax.training.loop import StopFlag

# Flips of each kind that are printed; all of them are in the file.
_SHOWN = 3
_DOCUMENTS = 5  # among which a relevant passage counts as found
_WORSE = 1  # exit code


class Limit(NamedTuple):
    """A metric that may not get worse by more than so much."""

    metric: str
    loss: float  # of B against A, positive: worse
    max_loss: float

    @property
    def holds(self) -> bool:
        """Whether B is good enough; sums of rounded decimals are not taken for a loss."""
        return self.loss <= self.max_loss + 1e-9


@dataclass(frozen=True, repr=False)
class Compared(Results):
    """What `compare_runs` found.

    Attributes:
        differences: Of each metric that both have, B - A.
        flips: By what flipped (`found`, `right`) and how (`lost`, `won`), as in compare.json.
        limits: The metrics that `max_loss` limits.
    """

    differences: Sequence[Comparison] = ()
    flips: Flips = dataclasses.field(default_factory=dict)
    limits: Sequence[Limit] = ()

    main_file: ClassVar[str] = COMPARISON

    @property
    def exit_code(self) -> int:
        """1 where B is worse than A by more than `max_loss`, else 0."""
        return 0 if all(limit.holds for limit in self.limits) else _WORSE


def compare_runs(
    config: CompareConfig, *, stop: StopFlag | None = None, log: Log = print
) -> Compared:
    """Compares two finished runs or evaluations question by question and writes what differs.

    Args:
        config: Options.
        stop: Takes no part: this is done in seconds.
        log: Shows one line to the user.

    Raises:
        FileNotFoundError: A folder holds no run.
        ValueError: The two cannot be compared; the message says why.
    """
    pair = open_pair(config, log)
    options = {"num_resamples": config.resamples, "seed": config.seed}
    records = {name: _records(pair, name) for name in pair.named}
    summaries = {name: summarize(rows, **options) for name, rows in records.items()}
    found = compare(records, pairs=[("B", "A")], metrics=COMPARED, **options)
    limits = _limits(config, found)
    flips = _flips(pair)
    shown = {name: shown_summary(summary, {}) for name, summary in summaries.items()}
    log(f"\n{format_report(shown, found)}\n{_sides(pair)}\n")
    for line in [*_describe_flips(flips), *map(_describe, limits)]:
        log(line)
    folder = Path(config.output)
    write_json(
        folder / COMPARISON,
        {
            **{
                name: {"folder": str(s.folder), "system": s.system}
                for name, s in pair.named.items()
            },
            "questions": len(pair.shared),
            "metrics": summaries,
            "differences": [one.as_json() for one in found],
            "flipped": flips,
            "limits": [one._asdict() | {"holds": one.holds} for one in limits],
        },
    )
    write_text(folder / REPORT, render_report(_report(pair, shown, found, flips)))
    return Compared(folder, summaries, differences=found, flips=flips, limits=limits)


def _records(pair: Pair, name: str) -> list[QuestionRecord]:
    side = pair.named[name]
    records = []
    for id in pair.shared:
        line, found = side.lines[id], side.lines[id]["systems"][side.system]
        records.append(
            QuestionRecord(
                id=id,
                system=name,
                question=line["question"],
                answers=line["answers"],
                prediction=found["prediction"],
                doc_ids=found["doc_ids"],
                doc_scores=found["doc_scores"],
                metrics=found["metrics"],
            )  # fmt: skip
        )
    return records


def _limits(config: CompareConfig, found: Sequence[Comparison]) -> list[Limit]:
    differences = {one.metric: one.difference.value for one in found}
    if missing := [name for name in config.metric if name not in differences]:
        raise ValueError(
            f"--metric {' '.join(missing)}: not measured in both; there are {' '.join(differences)}"
        )
    most = config.max_loss or 0.0
    return [
        Limit(name, differences[name] * (1 if lower_is_better(name) else -1), most)
        for name in config.metric
    ]


def _flips(pair: Pair) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns the questions whose passage, or answer, only one of the two has found."""
    flips: dict[str, dict[str, list[dict[str, Any]]]] = {
        kind: {"lost": [], "won": []} for kind in ("found", "right")
    }
    for id in pair.shared:
        sides = {name: side.lines[id]["systems"][side.system] for name, side in pair.named.items()}
        for kind, outcome in (("found", _is_found), ("right", _is_answered)):
            before, after = outcome(sides["A"]["metrics"]), outcome(sides["B"]["metrics"])
            if None in (before, after) or before == after:
                continue
            flip = {"id": id, "question": pair.a.lines[id]["question"]}
            for name, one in sides.items():
                flip[name] = (
                    one["prediction"] if kind == "right" else list(one["doc_ids"][:_DOCUMENTS])
                )
            flips[kind]["won" if after else "lost"].append(flip)
    return flips


def _is_found(metrics: Mapping[str, float]) -> bool | None:
    value = metrics.get(f"recall@{_DOCUMENTS}", metrics.get(f"answer@{_DOCUMENTS}"))
    return None if value is None else value > 0


def _is_answered(metrics: Mapping[str, float]) -> bool | None:
    return bool(is_right(metrics["f1"])) if "f1" in metrics else None


def _sides(pair: Pair) -> str:
    return "; ".join(f"{name}: {side.folder}, {side.system}" for name, side in pair.named.items())


def _describe_flips(flips: Flips) -> list[str]:
    titles = {
        "found": f"a relevant passage among the first {_DOCUMENTS}",
        "right": "a right answer",
    }
    lines = []
    for kind, title in titles.items():
        lost, won = flips[kind]["lost"], flips[kind]["won"]
        lines.append(f"{title}: {len(lost):,} questions lost from A to B, {len(won):,} won")
        for word, group in (("lost", lost), ("won", won)):
            lines += [f"  {word} {one['id']}: {one['question']}" for one in group[:_SHOWN]]
    return lines


def _describe(limit: Limit) -> str:
    verdict = "within" if limit.holds else "beyond"
    return (
        f"{limit.metric}: B is worse by {limit.loss:.4f}, {verdict} --max_loss {limit.max_loss:g}"
        if limit.loss > 0
        else f"{limit.metric}: B is not worse"
    )


def _report(
    pair: Pair,
    metrics: Mapping[str, Mapping[str, Any]],
    found: Sequence[Comparison],
    flips: Flips,
) -> ReportData:
    """Returns the page of a run, about A and B in place of before and after."""
    explained = [RunFiles(side.folder).mapping(EXPLAINED) for side in (pair.a, pair.b)]
    passages = {
        doc: PassageText(text["title"], text["text"])
        for one in explained
        for doc, text in one.get("passages", {}).items()
    }
    questions = [
        {
            **pair.a.lines[id],
            "systems": {
                name: side.lines[id]["systems"][side.system] for name, side in pair.named.items()
            },
        }
        for id in pair.shared
    ]
    return ReportData(
        title=f"{pair.b.folder.name} against {pair.a.folder.name}",
        facts={name: f"{side.folder} ({side.system})" for name, side in pair.named.items()}
        | {"questions of both": f"{len(pair.shared):,}"},
        metrics=metrics,
        differences=[one.as_json() for one in found],
        questions=questions,
        gold=explained[0].get("gold") or explained[1].get("gold") or {},
        passages=passages,
        flips=flips,
    )

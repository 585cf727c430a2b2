"""End-to-end training from documents and questions to a before/after table, resumable."""

import time
from pathlib import Path
from typing import Any

from ragjax.runs.compare.dev import Side, evaluate_dev
from ragjax.runs.compare.systems import evaluate_run
from ragjax.runs.forecast import duration, estimate_rag_cost
from ragjax.runs.indexes import build_bm25, build_towers, source_rows
from ragjax.runs.options.end_to_end import PROGRAM, RagConfig
from ragjax.runs.options.files import to_dict
from ragjax.runs.options.shared import fingerprint
from ragjax.runs.report.page import data_name, report_run
from ragjax.runs.train.end_to_end import choose_devices, make_reader, train_end_to_end
from ragjax.runs.workspace import Report, Workspace, open_workspace, tower_params
from ragjax.storage import write_json
from ragjax.training.loop import StopFlag


def train_rag(config: RagConfig, *, stop: StopFlag, report: Report = print) -> dict[str, Any]:
    """Runs every stage that is not done yet and returns what `metrics.json` holds.

    Args:
        config: Options; the caller has checked `config.output` (`check_output`).
        stop: Looked at between batches.
        report: Shows one line to the user.
    """
    started = time.perf_counter()
    folder = Path(config.output)
    workspace = _open(config, folder, stop, report)
    # Only now: a run whose input was refused leaves nothing that would refuse the next one.
    write_json(
        folder / "config.json",
        {"program": PROGRAM, "fingerprint": fingerprint(config), "config": to_dict(config)},
    )
    report(estimate_rag_cost(workspace, config).describe())
    base = workspace.base_lm()
    with workspace.timed("index before"):
        bm25 = build_bm25(workspace)
        towers = tower_params(workspace)
        before = build_towers(workspace, bm25, towers, 0)
    with workspace.timed("end to end"):
        trained = train_end_to_end(workspace, config, bm25, before, towers)
    lm = base
    if config.trains_lm:
        lm = workspace.adapted_lm(trained.lm_params)
    after = before
    if config.trains_retriever:
        with workspace.timed("index after"):
            after = build_towers(workspace, bm25, trained.towers, 1)
    with workspace.timed("dev"):
        evaluate_dev(workspace, Side("before", before, base), Side("after", after, lm))
    with workspace.timed("evaluation"):
        metrics = evaluate_run(workspace, bm25, before, after, lm)
    with workspace.timed("report"):
        title = f"End-to-end training on {data_name(config.data)}"
        report_run(workspace, before, after, lm, title=title, target=config.objective.target)
    took = ", ".join(f"{stage} {duration(s)}" for stage, s in workspace.seconds.items())
    report(f"\ntook {duration(time.perf_counter() - started)} in this call ({took})")
    return metrics


def dry_run(config: RagConfig, *, folder: Path, stop: StopFlag, report: Report = print) -> None:
    """Reads the data, loads the models, measures their speed and prints what a run would cost."""
    workspace = _open(config, folder, stop, report)
    report(estimate_rag_cost(workspace, config).describe())


def _open(config: RagConfig, folder: Path, stop: StopFlag, report: Report) -> Workspace:
    """Opens the workspace and checks what only the loaded data and models can tell."""
    choose_devices(config)
    workspace = open_workspace(config, folder, stop=stop, report=report)
    make_reader(workspace, config)
    if config.training.same_source == "drop":
        source_rows(workspace.dataset.corpus, workspace.questions["train"])
    return workspace

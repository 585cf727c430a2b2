"""End-to-end training from documents and questions to a before/after table, resumable."""

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path

from ragjax.runs.compare.dev import Side, evaluate_dev
from ragjax.runs.compare.results import evaluate_run
from ragjax.runs.compare.served import choose_served
from ragjax.runs.data import Log, require_answers
from ragjax.runs.folder import claim, config_record
from ragjax.runs.forecast import describe_time, estimate_rag_cost
from ragjax.runs.found import source_rows
from ragjax.runs.indexes import build_bm25, build_towers
from ragjax.runs.inputs import begin, run_inputs
from ragjax.runs.models import rows_note
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.prompt_lengths import check_prompts, run_prompts
from ragjax.runs.prompts.choice import choose_prompt
from ragjax.runs.report.page import data_name, report_run
from ragjax.runs.saved import FinishedRun, open_run
from ragjax.runs.tracking.trackers import check_trackers, track
from ragjax.runs.train.end_to_end import make_reader, train_end_to_end
from ragjax.runs.train.guard import Guard
from ragjax.runs.train.live import check_machine
from ragjax.runs.train.statements import read_statements
from ragjax.runs.workspace import (
    Workspace,
    note_batch,
    note_limits,
    open_workspace,
    tower_params,
)
from ragjax.training.loop import StopFlag


def train_rag(config: RagConfig, *, stop: StopFlag | None = None, log: Log = print) -> FinishedRun:
    """Trains both models end to end through the marginal likelihood of the answers.

    The results are in `config.output`. The same call continues a run that was interrupted, and
    repeats nothing of one that has ended.

    Args:
        config: Options.
        stop: Set by the caller to stop between batches; None: set by SIGTERM and SIGINT.
        log: Shows one line to the user.

    Returns:
        Metrics, models and report.

    Raises:
        FileNotFoundError, ValueError: For data, models or an output folder that cannot be used,
            before any expensive work.
        Interrupted: After saving, where the run was stopped.
    """
    started = time.perf_counter()
    record = config_record(config, config.fingerprint(), mode=config.mode)
    with claim(config, record, stop) as (flag, folder), ExitStack() as tracked:
        workspace = open_rag(config, folder, stop=flag, log=log)
        # After validation, so that a rejected run leaves no config.json behind.
        begin(folder, record, run_inputs(workspace), kind=config.kind, log=log)
        tracked.enter_context(track(config, record, workspace))
        log(estimate_rag_cost(workspace, config).describe())
        workspace = choose_prompt(workspace, run_prompts(workspace, dev=True))
        base = workspace.base_lm()
        with workspace.timed("index before"):
            bm25 = build_bm25(workspace)
            towers = tower_params(workspace)
            before = build_towers(workspace, bm25, towers, 0)
        with workspace.timed("end to end"):
            trained = train_end_to_end(workspace, config, bm25, before, towers)
        lm = workspace.adapted_lm(trained.lm_params) if config.trains_lm else base
        after, kept = before, None
        if config.trains_retriever:
            guard = Guard(workspace, bm25, before, towers)
            kept = guard.finish(trained.towers)
            with workspace.timed("index after"):
                after = build_towers(workspace, bm25, kept.params, 1)
        served = choose_served(workspace, bm25, before, after, lm, kept)
        with workspace.timed("dev"):
            evaluate_dev(workspace, Side("before", before, base), Side("after", after, lm))
        with workspace.timed("evaluation"):
            evaluate_run(workspace, bm25, before, after, lm, served=served.documents)
        with workspace.timed("report"):
            title = f"End-to-end training on {data_name(config.data or config.queries)}"
            report_run(workspace, before, after, lm, title=title, target=config.objective.target)
        log(describe_time(workspace.seconds, started))
    return open_run(Path(config.output))


def open_rag(config: RagConfig, folder: Path, *, stop: StopFlag, log: Log = print) -> Workspace:
    """Reads data and models of a run and checks what only they can tell; see `open_workspace`."""
    check_machine(config)
    check_trackers(config.log_to)
    workspace = open_workspace(config, folder, stop=stop, log=log)
    workspace = _with_answers(workspace, config)
    check_prompts(workspace, run_prompts(workspace, dev=True))
    documents = {
        "evaluation.documents": config.evaluation.documents,
        "training.documents": config.training.documents,
    }
    note_limits(workspace, documents)
    note_batch(workspace, "training.batch_size", config.training.batch_size)
    part = config.training.batch_size // config.training.accumulate
    if note := rows_note(workspace.layout, "training.batch_size", part):
        log(note)
    make_reader(workspace, config)
    if config.training.same_source == "drop":
        source_rows(workspace.dataset.corpus, workspace.questions["train"])
    return workspace


def _with_answers(workspace: Workspace, config: RagConfig) -> Workspace:
    """Returns the workspace with training questions that have answers, and with statements."""
    asked, corpus = workspace.questions["train"], workspace.dataset.corpus
    train = tuple(question for question in asked if question.answers)
    if source := config.training.statements:
        statements = read_statements(source, corpus, seed=config.seed)
        workspace.note(f"{len(statements):,} statements are reconstructed from passages")
        train += statements
    require_answers(workspace.dataset, train or asked, "training end to end")
    if left := sum(not question.answers for question in asked):
        workspace.note(f"{left:,} training questions have no answer, and are left out")
    return dataclasses.replace(workspace, questions=workspace.questions | {"train": train})

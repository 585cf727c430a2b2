"""Dual training from documents and questions to a before/after table, resumable at any point."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.index import Bm25Index, SearchResult
from ragjax.losses import target_entropy
from ragjax.runs.compare.results import evaluate_run
from ragjax.runs.folder import CONFIG, claim, config_record
from ragjax.runs.forecast import describe_time, estimate_cost
from ragjax.runs.indexes import Retriever, build_bm25, build_towers, search
from ragjax.runs.options.dual import AdaptConfig, RetrieverConfig
from ragjax.runs.report.page import data_name, report_run
from ragjax.runs.saved import FinishedRun, open_run
from ragjax.runs.teacher import score_candidates, target_log_probs
from ragjax.runs.train.language_model import train_lm
from ragjax.runs.train.live import train_live
from ragjax.runs.train.retriever import (
    BatchOf,
    Lessons,
    fixed_lessons,
    labelled_lessons,
    train_retriever,
)
from ragjax.runs.workspace import (
    FrozenLM,
    Report,
    Workspace,
    gold_sets,
    open_workspace,
    question_rows,
    tower_params,
)
from ragjax.storage import write_json
from ragjax.training.loop import StopFlag
from ragjax.training.score_cache import ResultCache, Score


def adapt(
    config: AdaptConfig, *, stop: StopFlag | None = None, report: Report = print
) -> FinishedRun:
    """Trains the language model on retrieved documents, and the retriever by its scores.

    The results are in `config.output`. The same call continues a run that was interrupted, and
    repeats nothing of one that has ended.

    Args:
        config: Options.
        stop: Set by the caller to stop between batches; None: set by SIGTERM and SIGINT.
        report: Shows one line to the user.

    Returns:
        Metrics, models and report.

    Raises:
        FileNotFoundError, ValueError: For data, models or an output folder that cannot be used,
            before any expensive work.
        Interrupted: After saving, where the run was stopped.
    """
    started, folder = time.perf_counter(), Path(config.output)
    record = config_record(config, config.fingerprint())
    with claim(config, record, stop) as flag:
        workspace = open_adapt(config, folder, stop=flag, report=report)
        # Written after validation, so that a rejected run leaves no config.json behind.
        write_json(folder / CONFIG, record)
        report(estimate_cost(workspace, config).describe())
        with workspace.timed("index before"):
            bm25 = build_bm25(workspace)
            params = tower_params(workspace)
            before = build_towers(workspace, bm25, params, 0)
        lm, candidates = workspace.base_lm(), None
        if config.trains_lm:
            with workspace.timed("language model"):
                count = max(config.language_model.documents, config.retriever.candidates)
                candidates = _candidates(workspace, before, count)
                questions = workspace.questions["train"]
                adapted = train_lm(workspace, config.language_model, questions, candidates)
                lm = workspace.adapted_lm(adapted)
        after = before
        if config.trains_retriever:
            after = _adapt_retriever(workspace, config, bm25, params, before, lm, candidates)
        with workspace.timed("evaluation"):
            evaluate_run(workspace, bm25, before, after, lm)
        with workspace.timed("report"):
            title = f"Adaptation to {data_name(config.data)}"
            report_run(workspace, before, after, lm, title=title, target=config.retriever.target)
        report(describe_time(workspace.seconds, started))
    return open_run(folder)


def open_adapt(
    config: AdaptConfig, folder: Path, *, stop: StopFlag, report: Report = print
) -> Workspace:
    """Reads data and models of a run and checks what only they can tell; see `open_workspace`."""
    if config.score_cache and not Path(config.score_cache).is_file():
        raise ValueError(f"--score_cache {config.score_cache}: no such file")
    return open_workspace(config, folder, stop=stop, report=report)


def _candidates(workspace: Workspace, retriever: Retriever, count: int) -> SearchResult:
    """Returns the best documents of the training questions by the hybrid, the best there is."""
    return search(workspace, retriever, workspace.questions["train"], count).hybrid


def _first(found: SearchResult, k: int) -> SearchResult:
    return SearchResult(found.doc_ids[:, :k], found.scores[:, :k], found.mask[:, :k])


def _adapt_retriever(
    workspace: Workspace,
    config: AdaptConfig,
    bm25: Bm25Index,
    params: dict[str, Any],
    before: Retriever,
    lm: FrozenLM,
    candidates: SearchResult | None,
) -> Retriever:
    options = config.retriever
    known = [config.score_cache] if config.score_cache else []
    if config.refresh.mode != "off":
        cache = ResultCache(workspace.folder / "scores" / "live.jsonl", Score, earlier=known)
        with workspace.timed("retriever"):
            params = train_live(workspace, options, bm25, before, params, lm, cache)
        return _build_after(workspace, bm25, params, 1)
    retriever = before
    for number in range(options.rounds):
        lessons = (
            _labelled_round(workspace, options, retriever, number)
            if options.objective == "dpr"
            else _taught_round(workspace, options, retriever, number, lm, known, candidates)
        )
        candidates = None  # the retriever will be another one
        with workspace.timed("retriever"):
            questions = workspace.questions["train"]
            params = train_retriever(workspace, options, number, params, questions, lessons)
        retriever = _build_after(workspace, bm25, params, number + 1)
    return retriever


def _build_after(
    workspace: Workspace, bm25: Bm25Index, params: Mapping[str, Any], version: int
) -> Retriever:
    with workspace.timed("index after"):
        return build_towers(workspace, bm25, params, version)


def _taught_round(
    workspace: Workspace,
    config: RetrieverConfig,
    retriever: Retriever,
    number: int,
    lm: FrozenLM,
    known: list[str],
    candidates: SearchResult | None,
) -> BatchOf:
    """Lets the language model score the candidates of all questions, where known those given."""
    with workspace.timed("teacher"):
        path = workspace.folder / "scores" / f"{number}.jsonl"
        cache = ResultCache(path, Score, earlier=known)
        known.append(str(path))
        if candidates is None:
            candidates = _candidates(workspace, retriever, config.candidates)
        candidates = _first(candidates, config.candidates)
        questions = workspace.questions["train"]
        scores = score_candidates(workspace, lm, questions, candidates, cache)
        targets = target_log_probs(config.target, scores, candidates)
        _report_target(workspace, targets, candidates)
    return fixed_lessons(workspace, number, candidates, targets, batch_size=config.batch_size)


def _labelled_round(
    workspace: Workspace, config: RetrieverConfig, retriever: Retriever, number: int
) -> BatchOf:
    """Takes the relevance judgements, and what the dense index finds as hard negatives."""
    questions = workspace.questions["train"]
    found = search(workspace, retriever, questions, config.negative_depth).dense
    gold = gold_sets(workspace, "train")

    def batch_of(step: int) -> Lessons:
        rows = question_rows(workspace, number, len(questions), step, batch_size=config.batch_size)
        part = SearchResult(found.doc_ids[rows], found.scores[rows], found.mask[rows])
        chosen = [gold[row] for row in rows]
        seed = (workspace.config.seed + number, step)
        return labelled_lessons(part, chosen, config.candidates, seed=seed)

    return batch_of


def _report_target(workspace: Workspace, targets: np.ndarray, candidates: SearchResult) -> None:
    """Says how sharp the target is, and what to change where it teaches nothing."""
    entropy = target_entropy(targets, doc_mask=candidates.mask)
    mean = float(np.asarray(entropy.normalized).mean())
    workspace.report(f"teacher: entropy of p_LSR is {mean:.2f} of its maximum")
    if mean >= 0.98:
        workspace.report(
            "warning: the target is uniform and teaches nothing; lower --retriever.temperature or"
            " use --retriever.score log_prob_per_token"
        )
    elif mean <= 0.02:
        workspace.report("warning: the target is a single document; raise --retriever.temperature")

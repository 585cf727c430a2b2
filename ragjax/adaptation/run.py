"""Dual training from documents and questions to a before/after table, resumable at any point."""

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.adaptation.config import AdaptConfig, RunConfig, fingerprint
from ragjax.adaptation.config_files import to_dict
from ragjax.adaptation.estimate import duration, estimate_cost
from ragjax.adaptation.evaluate import System, evaluate_systems, write_results
from ragjax.adaptation.live import gold_sets, train_live
from ragjax.adaptation.report import data_name, report_run
from ragjax.adaptation.retrieval import (
    Retriever,
    build_bm25,
    build_retriever,
    doc_logits,
    search,
)
from ragjax.adaptation.stages import (
    BatchOf,
    Lessons,
    fixed_lessons,
    labelled_lessons,
    question_rows,
    tower_params,
    train_lm,
    train_retriever,
)
from ragjax.adaptation.teacher import Teacher, score_candidates, target_log_probs
from ragjax.adaptation.workspace import (
    Report,
    Workspace,
    open_workspace,
    tree_fingerprint,
)
from ragjax.index import Bm25Index, SearchResult
from ragjax.losses import target_entropy
from ragjax.training.files import write_json
from ragjax.training.loop import StopFlag
from ragjax.training.lsr import towers
from ragjax.training.score_cache import ResultCache, Score

# Documents listed for each test question; recall@20 is the deepest metric.
_SEARCH_DEPTH = 20
_CONFIG = "config.json"


def check_output(config: RunConfig, folder: Path) -> None:
    """Checks that an output folder is free, or holds an earlier life of this same run.

    Args:
        config: Options of the run.
        folder: Output folder; may be missing.

    Raises:
        ValueError: If the folder holds something else, or a run with other options (the first that
            differ are named).
    """
    path = folder / _CONFIG
    if not path.is_file():
        ours = {"run.lock", "data", _CONFIG + ".tmp"}  # what is there before the config is
        strangers = sorted(p.name for p in folder.glob("*") if p.name not in ours)
        if strangers:
            raise ValueError(
                f"{folder} is not empty ({', '.join(strangers[:3])}) and holds no run;"
                " choose another --output folder"
            )
        return
    try:
        earlier = json.loads(path.read_text("utf-8"))
        same = earlier["fingerprint"] == fingerprint(config)
        differences = _differences(earlier["config"], to_dict(config))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not the config of a run ({error}); choose another --output"
        ) from error
    if not same:
        raise ValueError(
            f"{folder} holds a run with other options ({'; '.join(differences[:5])}); choose"
            " another --output folder, or give the same options to continue it"
        )


def adapt(config: AdaptConfig, *, stop: StopFlag, report: Report = print) -> dict[str, Any]:
    """Runs every stage that is not done yet and returns what `metrics.json` holds.

    Args:
        config: Options; the caller has checked `config.output` (`check_output`).
        stop: Looked at between batches.
        report: Shows one line to the user.
    """
    started = time.perf_counter()
    folder = Path(config.output)
    workspace = open_workspace(config, folder, stop=stop, report=report)
    # Only now: a run whose input was refused leaves nothing that would refuse the next one.
    write_json(folder / _CONFIG, {"fingerprint": fingerprint(config), "config": to_dict(config)})
    report(estimate_cost(workspace).describe())
    with workspace.timed("index before"):
        bm25 = build_bm25(workspace)
        params = tower_params(workspace)
        before = build_towers(workspace, bm25, params, 0)
    lm = teacher_of(workspace, workspace.lm.params, workspace.lm.fingerprint)
    if "lm" in config.stages:
        with workspace.timed("language model"):
            candidates = _candidates(workspace, before, config.language_model.documents)
            adapted = train_lm(workspace, workspace.questions["train"], candidates)
            lm = teacher_of(workspace, adapted, tree_fingerprint(adapted))
    after = before
    if "retriever" in config.stages:
        after = _adapt_retriever(workspace, bm25, params, before, lm)
    with workspace.timed("evaluation"):
        metrics = evaluate_run(workspace, bm25, before, after, lm)
    with workspace.timed("report"):
        title = f"Adaptation to {data_name(config.data)}"
        report_run(workspace, before, after, lm, title=title, target=config.retriever)
    took = ", ".join(f"{stage} {duration(s)}" for stage, s in workspace.seconds.items())
    report(f"\ntook {duration(time.perf_counter() - started)} in this call ({took})")
    return metrics


def dry_run(config: AdaptConfig, *, folder: Path, stop: StopFlag, report: Report = print) -> None:
    """Reads the data, loads the models, measures their speed and prints what a run would cost."""
    workspace = open_workspace(config, folder, stop=stop, report=report)
    report(estimate_cost(workspace).describe())


def teacher_of(workspace: Workspace, params: Any, fingerprint: str) -> Teacher:
    """Returns a language model that scores and answers in the dtype of the run."""
    dtype = workspace.config.compute_dtype
    name = fingerprint if dtype == "float32" else f"{fingerprint} {dtype}"
    return Teacher(workspace.in_compute_dtype(params), name)


def build_towers(
    workspace: Workspace, bm25: Bm25Index, params: Mapping[str, Any], version: int
) -> Retriever:
    """Indexes the corpus with these towers; see `build_retriever`."""
    query_params, doc_params = towers(params, None)
    return build_retriever(
        workspace, bm25, version=version, query_params=query_params, doc_params=doc_params
    )


def _candidates(workspace: Workspace, retriever: Retriever, count: int) -> SearchResult:
    """Returns the best documents of the training questions by the hybrid, the best there is."""
    return search(workspace, retriever, workspace.questions["train"], count).hybrid


def _adapt_retriever(
    workspace: Workspace,
    bm25: Bm25Index,
    params: dict[str, Any],
    before: Retriever,
    lm: Teacher,
) -> Retriever:
    config = workspace.config.retriever
    if workspace.config.refresh.mode != "off":
        known = [workspace.config.score_cache] if workspace.config.score_cache else []
        cache = ResultCache(workspace.folder / "scores" / "live.jsonl", Score, earlier=known)
        with workspace.timed("retriever"):
            params = train_live(workspace, bm25, before, params, lm, cache)
        return _build_after(workspace, bm25, params, 1)
    retriever = before
    known = [workspace.config.score_cache] if workspace.config.score_cache else []
    for number in range(config.rounds):
        lessons = (
            _labelled_round(workspace, retriever, number)
            if config.objective == "dpr"
            else _taught_round(workspace, retriever, number, lm, known)
        )
        with workspace.timed("retriever"):
            questions = workspace.questions["train"]
            params = train_retriever(workspace, number, params, questions, lessons)
        retriever = _build_after(workspace, bm25, params, number + 1)
    return retriever


def _build_after(
    workspace: Workspace, bm25: Bm25Index, params: Mapping[str, Any], version: int
) -> Retriever:
    with workspace.timed("index after"):
        return build_towers(workspace, bm25, params, version)


def _taught_round(
    workspace: Workspace, retriever: Retriever, number: int, lm: Teacher, known: list[str]
) -> BatchOf:
    """Lets the language model score the candidates of all questions."""
    config = workspace.config.retriever
    with workspace.timed("teacher"):
        path = workspace.folder / "scores" / f"{number}.jsonl"
        cache = ResultCache(path, Score, earlier=known)
        known.append(str(path))
        candidates = _candidates(workspace, retriever, config.candidates)
        questions = workspace.questions["train"]
        scores = score_candidates(workspace, lm, questions, candidates, cache)
        targets = target_log_probs(config, scores, candidates)
        _report_target(workspace, targets, candidates)
    return fixed_lessons(workspace, number, candidates, targets)


def _labelled_round(workspace: Workspace, retriever: Retriever, number: int) -> BatchOf:
    """Takes the relevance judgements, and what the dense index finds as hard negatives."""
    questions = workspace.questions["train"]
    config = workspace.config.retriever
    found = search(workspace, retriever, questions, config.negative_depth).dense
    gold = gold_sets(workspace)

    def batch_of(step: int) -> Lessons:
        rows = question_rows(workspace, number, len(questions), step)
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


def evaluate_run(
    workspace: Workspace,
    bm25: Bm25Index,
    before: Retriever,
    after: Retriever,
    lm: Teacher,
) -> dict[str, Any]:
    """Compares the systems of a run on its test questions and writes its results.

    Args:
        workspace: Data and un-adapted models.
        bm25: The lexical baseline.
        before: The un-adapted retriever.
        after: The adapted one.
        lm: The adapted language model, or the un-adapted one.

    Returns:
        What `metrics.json` holds.
    """
    questions = workspace.questions["test"]
    base = teacher_of(workspace, workspace.lm.params, workspace.lm.fingerprint)
    found_before = search(workspace, before, questions, _SEARCH_DEPTH)
    found_after = search(workspace, after, questions, _SEARCH_DEPTH)
    lexical = bm25.search([question.text for question in questions], _SEARCH_DEPTH)
    scale = workspace.config.retriever.scale
    logits_before = functools.partial(doc_logits, before, found_before.queries, scale=scale)
    logits_after = functools.partial(doc_logits, after, found_after.queries, scale=scale)
    systems = [
        System("closed_book", base, None),
        System("bm25", base, lexical, logits_before(lexical)),
        System("before", base, found_before.dense, logits_before(found_before.dense)),
        System("after", lm, found_after.dense, logits_after(found_after.dense)),
        System("hybrid", lm, found_after.hybrid, logits_after(found_after.hybrid)),
        System("hybrid_before", None, found_before.hybrid),
    ]
    if lm.fingerprint != base.fingerprint:  # what the LM half did alone, with and without documents
        systems += [
            System("lm_half", lm, found_before.dense, logits_before(found_before.dense)),
            System("closed_book_lm_half", lm, None),
            System("hybrid_base_lm", base, found_after.hybrid, logits_after(found_after.hybrid)),
        ]
    records = evaluate_systems(workspace, systems)
    return write_results(workspace, records)


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*earlier, *now} - {"output"}):
        old, new = earlier.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} there, {new!r} here")
    return found

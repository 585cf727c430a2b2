"""Evaluation of a finished run, or of models as they were published, on one split.

Q questions, K documents each, D embedding size.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.adaptation.answers import Answer
from ragjax.adaptation.config_files import to_dict
from ragjax.adaptation.evaluate import System, answer_cache, answered_rows, evaluate_systems
from ragjax.adaptation.evaluate_config import (
    EvaluateConfig,
    evaluation_fingerprint,
    system_names,
)
from ragjax.adaptation.evaluate_cost import describe_cost
from ragjax.adaptation.evaluate_measures import measure_answer
from ragjax.adaptation.evaluate_open import CONFIG, PROGRAM, Opened, open_evaluation
from ragjax.adaptation.evaluate_results import write_evaluation
from ragjax.adaptation.evaluate_robustness import Robustness, answer_conditions
from ragjax.adaptation.finished import FinishedRun
from ragjax.adaptation.report import corpus_lookup, write_report
from ragjax.adaptation.retrieval import (
    Rankings,
    Retriever,
    build_bm25,
    build_retriever,
    doc_logits,
    search,
)
from ragjax.adaptation.run import teacher_of
from ragjax.adaptation.teacher import Teacher
from ragjax.adaptation.workspace import Report, Workspace, tree_fingerprint
from ragjax.index import SearchResult
from ragjax.training.files import write_json
from ragjax.training.loop import StopFlag
from ragjax.training.score_cache import ResultCache

# Documents listed for each question; recall@20 is the deepest metric.
_SEARCH_DEPTH = 20


def evaluate(config: EvaluateConfig, *, stop: StopFlag, report: Report = print) -> dict[str, Any]:
    """Evaluates whatever is not evaluated yet and returns what `metrics.json` holds.

    Args:
        config: Options; the caller has checked `config.output`
            (`ragjax.adaptation.evaluate_open.check_output`).
        stop: Looked at between batches.
        report: Shows one line to the user.

    Raises:
        FileNotFoundError, ValueError: For a run, data or models that cannot be used, before any
            expensive work.
    """
    folder = Path(config.output)
    opened = open_evaluation(config, folder, stop=stop, report=report)
    workspace, split = opened.workspace, config.split
    # Only now: input that was refused leaves nothing that would refuse the next one.
    fingerprint = evaluation_fingerprint(config, opened.run)
    identity = {"program": PROGRAM, "fingerprint": fingerprint}
    write_json(folder / CONFIG, identity | {"config": to_dict(config)})
    report(describe_cost(opened, config))
    found = _retrieve(opened, split)
    base, lm = _readers(opened)
    cache = answer_cache(workspace, _earlier_answers(opened.run))
    with workspace.timed("answers"):
        records = evaluate_systems(
            workspace,
            _systems(opened, config, found, base, lm),
            split=split,
            measure=measure_answer(config.support_threshold),
            cache=cache,
        )
    robustness = _measure_robustness(opened, config, found, lm, cache)
    metrics = write_evaluation(workspace, config, records, robustness)
    path = write_report(
        folder,
        title=f"Evaluation on {workspace.dataset.name}, {split} questions",
        lookup=corpus_lookup(workspace.dataset.corpus),
        gold=_gold(workspace, split),
    )
    report(f"report: {path}")
    return metrics


class _Found(NamedTuple):
    before: Retriever
    after: Retriever  # the same where the run did not adapt it
    bm25: SearchResult
    found_before: Rankings
    found_after: Rankings


def _retrieve(opened: Opened, split: str) -> _Found:
    """Builds the indexes and searches each once."""
    workspace, encoder = opened.workspace, opened.workspace.encoder
    earlier = sorted((opened.run.folder / "index").glob("*")) if opened.run else []
    with workspace.timed("index before"):
        bm25 = build_bm25(workspace)
        before = build_retriever(
            opened.weighing, bm25, version=0, query_params=encoder.params,
            doc_params=encoder.params, earlier=earlier,
        )  # fmt: skip
    after = before
    if opened.adapts_retriever:
        with workspace.timed("index after"):
            after = build_retriever(
                opened.weighing, bm25, version=1, query_params=opened.query_params,
                doc_params=opened.doc_params, earlier=earlier,
            )  # fmt: skip
    questions = workspace.questions[split]
    found_before = search(workspace, before, questions, _SEARCH_DEPTH)
    return _Found(
        before,
        after,
        bm25.search([question.text for question in questions], _SEARCH_DEPTH),
        found_before,
        search(workspace, after, questions, _SEARCH_DEPTH) if after is not before else found_before,
    )


def _systems(
    opened: Opened, config: EvaluateConfig, found: _Found, base: Teacher, lm: Teacher
) -> list[System]:
    """Returns the systems that are compared; p_R is the dense retriever's in all of them."""
    scale = opened.workspace.config.retriever.scale
    dense_before, hybrid_before, queries_before = found.found_before
    dense, hybrid, queries = found.found_after
    before = functools.partial(doc_logits, found.before, queries_before, scale=scale)
    after = functools.partial(doc_logits, found.after, queries, scale=scale)
    there = {
        "closed_book": System("closed_book", base, None),
        "bm25": System("bm25", base, found.bm25, before(found.bm25)),
        "before": System("before", base, dense_before, before(dense_before)),
        "hybrid_before": System("hybrid_before", base, hybrid_before, before(hybrid_before)),
        "after": System("after", lm, dense, after(dense)),
        "hybrid": System("hybrid", lm, hybrid, after(hybrid)),
        "lm_half": System("lm_half", lm, dense_before, before(dense_before)),
        "closed_book_lm_half": System("closed_book_lm_half", lm, None),
        "hybrid_base_lm": System("hybrid_base_lm", base, hybrid, after(hybrid)),
    }
    return [there[name] for name in system_names(config, adapts_lm=opened.adapts_lm)]


def _readers(opened: Opened) -> tuple[Teacher, Teacher]:
    """Returns the un-adapted language model and the adapted one, which may be the same."""
    workspace = opened.workspace
    base = teacher_of(workspace, workspace.lm.params, workspace.lm.fingerprint)
    if not opened.adapts_lm:
        return base, base
    return base, teacher_of(workspace, opened.lm_params, tree_fingerprint(opened.lm_params))


def _measure_robustness(
    opened: Opened, config: EvaluateConfig, found: _Found, lm: Teacher, cache: ResultCache[Answer]
) -> Robustness | None:
    workspace, rows = opened.workspace, answered_rows(opened.workspace, config.split)
    if not (config.robustness and rows):
        return None
    with workspace.timed("robustness"):
        robustness = answer_conditions(
            workspace,
            lm,
            found.after,
            found.found_after.hybrid,
            cache,
            split=config.split,
            rows=rows,
            num_distractors=config.distractors,
            measure=measure_answer(config.support_threshold),
        )
    if robustness is None:
        workspace.report("note: no question has a relevant passage and a distractor: no robustness")
    return robustness


def _earlier_answers(run: FinishedRun | None) -> list[Path]:
    """Returns the answers that the run kept: the same prompts were read for its own table."""
    path = run.folder / "evaluation" / "answers.jsonl" if run else None
    return [path] if path and path.is_file() else []


def _gold(workspace: Workspace, split: str) -> dict[str, list[str]]:
    judged = workspace.dataset.qrels[split]
    return {
        question.id: sorted(doc for doc, grade in judged[question.id].items() if grade > 0)
        for question in workspace.questions[split]
    }

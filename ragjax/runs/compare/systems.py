"""Systems side by side: retrieval and answers, intervals, paired tests, one line per question."""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ragjax.data import Question
from ragjax.evaluation import (
    Comparison,
    QuestionRecord,
    answer_at_k,
    compare,
    exact_match,
    f1_score,
    format_report,
    retrieval_metrics,
    summarize,
)
from ragjax.index import Bm25Index, SearchResult
from ragjax.runs.compare.answers import Answer, Request, answer_requests
from ragjax.runs.indexes import (
    Retriever,
    doc_logits,
    search,
)
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage import write_json, write_text
from ragjax.training.score_cache import ResultCache

MAIN_SYSTEMS = ("closed_book", "bm25", "before", "after", "hybrid")
_PAIRS = (
    ("after", "before"),
    ("lm_half", "before"),
    ("hybrid", "hybrid_base_lm"),
    ("before", "closed_book"),
    ("after", "closed_book_lm_half"),
    ("hybrid", "bm25"),
    ("hybrid", "hybrid_before"),
)
# Differences shown on the screen; all of them are in differences.json.
_SHOWN = {
    ("after", "before"): ("recall@5", "mrr@10", "f1", "answer_nll"),
    ("lm_half", "before"): ("f1", "answer_nll"),
    ("hybrid", "hybrid_base_lm"): ("f1", "answer_nll"),
    ("before", "closed_book"): ("f1", "answer_nll"),
    ("after", "closed_book_lm_half"): ("f1",),
    ("hybrid", "bm25"): ("recall@5", "f1"),
    ("hybrid", "hybrid_before"): ("recall@5",),
}
_LEGEND = (
    "closed_book, bm25, before: un-adapted language model; after (dense), hybrid: adapted;"
    " lm_half: adapted language model over the documents of before; hybrid_base_lm: un-adapted one"
    " over those of hybrid; closed_book_lm_half: adapted one without documents"
)

Records = dict[str, list[QuestionRecord]]
# Metric name to value of one answer; NaN where it does not apply.
Measure = Callable[[Workspace, Request, Answer], dict[str, float]]


class System(NamedTuple):
    """A language model reading what a retriever found."""

    name: str
    lm: FrozenLM | None  # None: retrieval metrics only
    found: SearchResult | None  # None: closed book
    logits: np.ndarray | None = None  # [Q, K] of p_R, where the language model reads what was found


def answer_metrics(workspace: Workspace, request: Request, answer: Answer) -> dict[str, float]:
    """Returns how right an answer is, and how surprising the right one was."""
    answers = request.question.answers
    metrics = {
        "exact_match": exact_match(answer.prediction, answers),
        "f1": f1_score(answer.prediction, answers),
    }
    return metrics if answer.nll is None else metrics | {"answer_nll": answer.nll}


def evaluate_systems(
    workspace: Workspace,
    systems: Sequence[System],
    *,
    split: str = "test",
    measure: Measure = answer_metrics,
    cache: ResultCache[Answer] | None = None,
) -> Records:
    """Returns one record per system and question of a split.

    Retrieval is measured on every question, answers on the first `answer_questions` that have one
    (the order is a seeded shuffle).

    Args:
        workspace: Data, models, options.
        systems: What is compared.
        split: Of the workspace's questions.
        measure: What is measured of an answer.
        cache: Answers known already; None: those of this folder.
    """
    questions = workspace.questions[split]
    answered = answered_rows(workspace, split)
    known = answer_cache(workspace) if cache is None else cache
    answers = _answers(workspace, systems, questions, answered, known)
    records: Records = {}
    for system in systems:
        metrics: list[dict[str, float]] = [{} for _ in questions]
        predictions: list[str | None] = [None] * len(questions)
        if system.found is not None:
            _add_retrieval(workspace, system.found, split, metrics)
        for row, answer in zip(answered, answers.get(system.name, ()), strict=False):
            predictions[row] = answer.prediction
            request = _request(workspace, system, questions[row], row)
            metrics[row] |= measure(workspace, request, answer)
        records[system.name] = [
            _record(workspace, system, question, row, predictions[row], metrics[row])
            for row, question in enumerate(questions)
        ]
    return records


def answered_rows(workspace: Workspace, split: str) -> list[int]:
    """Returns the questions of a split that the language model answers."""
    rows = [row for row, question in enumerate(workspace.questions[split]) if question.answers]
    return rows[: workspace.config.data_options.answer_questions]


def answer_cache(
    workspace: Workspace, earlier: Sequence[str | os.PathLike[str]] = ()
) -> ResultCache[Answer]:
    """Opens the answers of this folder, which nothing computes twice.

    Args:
        workspace: The folder.
        earlier: Files of answers that other runs kept.
    """
    path = workspace.folder / "evaluation" / "answers.jsonl"
    return ResultCache(path, Answer, earlier=earlier)


def _answers(
    workspace: Workspace,
    systems: Sequence[System],
    questions: Sequence[Question],
    rows: Sequence[int],
    cache: ResultCache[Answer],
) -> dict[str, list[Answer]]:
    """Returns the answers of each system to the questions in `rows`.

    Systems with the same language model are answered together: where they retrieve the same
    documents, the same prompt is read once.
    """
    together: dict[tuple[str, bool], list[System]] = {}
    for system in systems:
        if system.lm is not None and rows:
            kind = (system.lm.fingerprint, system.found is None)
            together.setdefault(kind, []).append(system)
    answers: dict[str, list[Answer]] = {}
    for group in together.values():
        workspace.report(f"answers of {', '.join(system.name for system in group)}")
        requests = [
            _request(workspace, system, questions[row], row) for system in group for row in rows
        ]
        lm = group[0].lm
        assert lm is not None, "only systems that answer are grouped"
        found = iter(answer_requests(workspace, lm, requests, cache))
        answers |= {system.name: [next(found) for _ in rows] for system in group}
    return answers


def write_results(workspace: Workspace, records: Records) -> dict[str, Any]:
    """Writes metrics.json, differences.json and predictions.jsonl, and shows the table.

    Returns:
        What metrics.json holds.
    """
    config = workspace.config
    resamples = config.evaluation.resamples
    records = {name: rows for name, rows in records.items() if any(r.metrics for r in rows)}
    summaries = {
        name: summarize(rows, num_resamples=resamples, seed=config.seed)
        for name, rows in records.items()
    }
    comparisons = compare(records, pairs=_PAIRS, num_resamples=resamples, seed=config.seed)
    main = {name: summaries[name] for name in MAIN_SYSTEMS if name in summaries}
    shown = [c for c in comparisons if c.metric in _SHOWN[(c.system, c.baseline)]]
    workspace.report("\n" + format_report(main, shown) + f"\n{_LEGEND}")
    write_text(workspace.folder / "predictions.jsonl", prediction_lines(records))
    others = {name: summary for name, summary in summaries.items() if name not in main}
    write_json(
        workspace.folder / "differences.json",
        {"differences": [as_json(c) for c in comparisons], "other_systems": others},
    )
    write_json(workspace.folder / "metrics.json", main)
    return main


def prediction_lines(records: Records, more: Sequence[Mapping[str, Any]] = ()) -> str:
    """Returns one JSON line per question, with what each system did.

    Args:
        records: By system, all of the same questions.
        more: What else is in the line of each question; none: nothing.
    """
    lines = []
    for row, rows in enumerate(zip(*records.values(), strict=True)):
        systems = {
            r.system: {
                "prediction": r.prediction,
                "doc_ids": list(r.doc_ids),
                "doc_scores": list(r.doc_scores),
                "metrics": dict(r.metrics),
            }
            for r in rows
        }
        first = rows[0]
        line = {"id": first.id, "question": first.question, "answers": list(first.answers)}
        line |= {"systems": systems, **(more[row] if more else {})}
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False))
    return "".join(line + "\n" for line in lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Returns a comparison as a flat JSON object."""
    return {
        "metric": comparison.metric,
        "system": comparison.system,
        "baseline": comparison.baseline,
        **comparison.difference._asdict(),
    }


def _add_retrieval(
    workspace: Workspace,
    found: SearchResult,
    split: str,
    metrics: list[dict[str, float]],
) -> None:
    questions = workspace.questions[split]
    columns = retrieval_metrics(found.doc_ids, workspace.gold_rows(split))
    corpus = workspace.dataset.corpus
    passages = [
        [corpus[int(doc)].text for doc in docs[mask][:5]]
        for docs, mask in zip(found.doc_ids, found.mask, strict=True)
    ]
    columns["answer@5"] = answer_at_k(passages, [q.answers for q in questions], k=5)
    for name, column in columns.items():
        for row, value in enumerate(column):
            metrics[row][name] = float(value)


def _request(workspace: Workspace, system: System, question: Question, row: int) -> Request:
    if system.found is None:
        return Request(question, (), ())
    count = workspace.config.evaluation.documents
    kept = np.flatnonzero(system.found.mask[row])[:count]
    assert system.logits is not None, "documents that are read are weighed"
    scores = system.logits[row, kept]
    return Request(
        question, tuple(system.found.doc_ids[row, kept].tolist()), tuple(scores.tolist())
    )


def _record(
    workspace: Workspace,
    system: System,
    question: Question,
    row: int,
    prediction: str | None,
    metrics: Mapping[str, float],
) -> QuestionRecord:
    docs: list[str] = []
    scores: list[float] = []
    if system.found is not None:
        kept = system.found.mask[row]
        docs = [workspace.dataset.corpus.id_of(int(d)) for d in system.found.doc_ids[row][kept]]
        scores = [round(float(score), 6) for score in system.found.scores[row][kept]]
    return QuestionRecord(
        id=question.id,
        system=system.name,
        question=question.text,
        answers=question.answers,
        prediction=prediction,
        doc_ids=docs,
        doc_scores=scores,
        metrics=metrics,
    )


# Documents listed for each test question; recall@20 is the deepest metric.
SEARCH_DEPTH = 20


def evaluate_run(
    workspace: Workspace,
    bm25: Bm25Index,
    before: Retriever,
    after: Retriever,
    lm: FrozenLM,
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
    base = workspace.base_lm()
    found_before = search(workspace, before, questions, SEARCH_DEPTH)
    found_after = search(workspace, after, questions, SEARCH_DEPTH)
    lexical = bm25.search([question.text for question in questions], SEARCH_DEPTH)
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

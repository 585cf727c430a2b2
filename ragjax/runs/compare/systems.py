"""Systems side by side: their documents, their answers, one record per question."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragjax.data import Question
from ragjax.evaluation import (
    QuestionRecord,
    answer_at_k,
    exact_match,
    f1_score,
    retrieval_metrics,
)
from ragjax.evaluation.systems import SYSTEMS
from ragjax.index import Bm25Index, SearchResult
from ragjax.runs.compare.answers import Request, ScoredAnswer, answer_requests
from ragjax.runs.found import FindableIndex, findable_in
from ragjax.runs.indexes import Rankings, Retriever, doc_logits, search
from ragjax.runs.options.shared import RunConfig
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.training.score_cache import ResultCache

# Documents listed for each question, at least: recall@20 is the deepest metric.
_SEARCH_DEPTH = 20

Records = dict[str, list[QuestionRecord]]
# Metric name to value of one answer; NaN where it does not apply.
AnswerMeasure = Callable[[Request, ScoredAnswer], dict[str, float]]


class Documents(NamedTuple):
    """The documents that were retrieved for Q questions."""

    found: SearchResult
    logits: np.ndarray  # [Q, K] of p_R


class Column(NamedTuple):
    """One column of the table: a language model and the documents that it reads."""

    name: str
    lm: FrozenLM | None  # None: retrieval metrics only
    documents: Documents | None  # None: closed book


def retrieve_documents(
    workspace: Workspace,
    bm25: Bm25Index,
    before: Retriever,
    after: Retriever,
    split: str,
    *,
    distractors: int = 0,
    deepest: int = 0,
) -> dict[str, Documents]:
    """Searches each index once.

    Args:
        workspace: Data and options.
        bm25: The index of words.
        before: The base retriever.
        after: The adapted one, or the base one again.
        split: Of the workspace's questions.
        distractors: Irrelevant documents that are wanted of each question.
        deepest: Documents that are wanted of each question, whatever they are.

    Returns:
        The documents by their name in `SYSTEMS`. p_R is a dense retriever's in all of them; that of
        the documents of BM25 is the base retriever's.
    """
    questions = workspace.questions[split]
    wanted = max(workspace.config.evaluation.documents, deepest)
    if distractors:
        most = max(map(len, workspace.relevant_rows(split)), default=0)
        wanted = max(wanted, distractors + most)
    # Beyond the corpus there is nothing to find.
    depth = max(_SEARCH_DEPTH, min(wanted, len(workspace.dataset.corpus)))
    texts = [question.text for question in questions]
    lexical = FindableIndex(bm25, findable_in(workspace, split)).search(texts, depth)
    if nothing := int((~lexical.mask.any(axis=1)).sum()):
        workspace.note(
            f"BM25 finds nothing for {nothing} of the {len(questions)} {split} questions:"
            " they share no word with any passage"
        )
    old = search(workspace, before, split, depth)
    new = old if after is before else search(workspace, after, split, depth)
    scale = workspace.scale

    def weighed(retriever: Retriever, ranked: Rankings, found: SearchResult) -> Documents:
        return Documents(found, doc_logits(retriever, ranked.queries, found, scale=scale))

    return {
        "bm25": weighed(before, old, lexical),
        "before": weighed(before, old, old.dense),
        "hybrid_before": weighed(before, old, old.hybrid),
        "after": weighed(after, new, new.dense),
        "hybrid": weighed(after, new, new.hybrid),
    }


def make_columns(
    names: Iterable[str], documents: Mapping[str, Documents], base: FrozenLM, adapted: FrozenLM
) -> list[Column]:
    """Returns the systems of these names as `SYSTEMS` describes them."""
    lms = {"base": base, "adapted": adapted}
    kinds = {name: SYSTEMS[name] for name in names}
    return [
        Column(name, lms[kind.lm], documents[kind.documents] if kind.documents else None)
        for name, kind in kinds.items()
    ]


def answer_metrics(request: Request, answer: ScoredAnswer) -> dict[str, float]:
    """Returns exact match and F1 of an answer, and the NLL of the right one."""
    answers = request.question.answers
    metrics = {
        "exact_match": exact_match(answer.prediction, answers),
        "f1": f1_score(answer.prediction, answers),
    }
    return metrics if answer.nll is None else metrics | {"answer_nll": answer.nll}


def evaluate_systems(
    workspace: Workspace,
    columns: Sequence[Column],
    cache: ResultCache[ScoredAnswer],
    *,
    split: str,
    measure: AnswerMeasure = answer_metrics,
) -> Records:
    """Returns one record per system and question of a split.

    Retrieval is measured on every question, answers on the first `answer_questions` that have one
    (the order is a seeded shuffle).

    Args:
        workspace: Data, models, options.
        columns: The systems.
        cache: Answers known already.
        split: Of the workspace's questions.
        measure: Computes the metrics of an answer.
    """
    questions = workspace.questions[split]
    answered = answered_rows(workspace, split)
    count = workspace.config.evaluation.documents
    requests = {
        column.name: [_request(column.documents, questions[row], row, count) for row in answered]
        for column in columns
    }
    answers = _answers(workspace, columns, requests, cache)
    records: Records = {}
    for column in columns:
        metrics: list[dict[str, float]] = [{} for _ in questions]
        predictions: list[str | None] = [None] * len(questions)
        if column.documents is not None:
            _add_retrieval(workspace, column.documents.found, split, metrics)
        known = zip(requests[column.name], answers.get(column.name, ()), strict=False)
        for row, (request, answer) in zip(answered, known, strict=False):
            predictions[row] = answer.prediction
            metrics[row] |= measure(request, answer)
        records[column.name] = [
            make_record(
                question,
                column.name,
                prediction=predictions[row],
                metrics=metrics[row],
                **_listed(workspace, column.documents, row),
            )
            for row, question in enumerate(questions)
        ]
    return records


def make_record(question: Question, system: str, **values: Any) -> QuestionRecord:
    """Returns what a system did with a question; `values` are further fields of the record."""
    return QuestionRecord(
        id=question.id, system=system, question=question.text, answers=question.answers, **values
    )


def bootstrap_options(config: RunConfig) -> dict[str, int]:
    """Returns the arguments of `summarize`, `compare` and `calibrate` that a run decides."""
    return {"num_resamples": config.evaluation.resamples, "seed": config.seed}


def answered_rows(workspace: Workspace, split: str) -> list[int]:
    """Returns the questions of a split that the language model answers."""
    rows = [row for row, question in enumerate(workspace.questions[split]) if question.answers]
    return rows[: workspace.config.data_options.answer_questions]


def answer_cache(
    folder: Path, earlier: Sequence[str | os.PathLike[str]] = ()
) -> ResultCache[ScoredAnswer]:
    """Opens the answers of a folder, which nothing computes twice.

    Args:
        folder: Output folder.
        earlier: Files of answers that other runs kept.
    """
    return ResultCache(folder / "evaluation" / "answers.jsonl", ScoredAnswer, earlier=earlier)


def _answers(
    workspace: Workspace,
    columns: Sequence[Column],
    requests: Mapping[str, Sequence[Request]],
    cache: ResultCache[ScoredAnswer],
) -> dict[str, list[ScoredAnswer]]:
    """Returns the answers by system.

    Systems with the same language model are answered together: where they retrieve the same
    documents, the same prompt is read once.
    """
    groups: dict[tuple[str, bool], list[Column]] = {}
    for column in columns:
        if column.lm is not None and requests[column.name]:
            kind = (column.lm.fingerprint, column.documents is None)
            groups.setdefault(kind, []).append(column)
    answers: dict[str, list[ScoredAnswer]] = {}
    for group in groups.values():
        workspace.log(f"answers of {', '.join(column.name for column in group)}")
        lm = group[0].lm
        assert lm is not None, "only systems that answer are grouped"
        together = [request for column in group for request in requests[column.name]]
        found = iter(answer_requests(workspace, lm, together, cache))
        answers |= {column.name: [next(found) for _ in requests[column.name]] for column in group}
    return answers


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


def _request(documents: Documents | None, question: Question, row: int, count: int) -> Request:
    if documents is None:
        return Request(question, (), ())
    kept = np.flatnonzero(documents.found.mask[row])[:count]
    docs = documents.found.doc_ids[row, kept].tolist()
    return Request(question, tuple(docs), tuple(documents.logits[row, kept].tolist()))


def _listed(workspace: Workspace, documents: Documents | None, row: int) -> dict[str, Any]:
    if documents is None:
        return {}
    found = documents.found
    kept = found.mask[row]
    return {
        "doc_ids": [workspace.dataset.corpus.id_of(int(doc)) for doc in found.doc_ids[row][kept]],
        "doc_scores": [round(float(score), 6) for score in found.scores[row][kept]],
    }

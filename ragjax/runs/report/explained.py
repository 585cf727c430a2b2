"""p_R beside p_LSR on a few test questions, computed once and kept in `explained.json`.

K candidates of a question.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ragjax.data import Corpus, Dataset, Question
from ragjax.evaluation.report.questions import (
    Change,
    Lookup,
    PassageText,
    by_answer,
    by_passage,
    changes,
    select,
    shown_documents,
)
from ragjax.evaluation.report.results import main_pair
from ragjax.index.base import empty_result
from ragjax.runs.folder import RunFiles
from ragjax.runs.found import FindableIndex, findable_in
from ragjax.runs.indexes import Retriever
from ragjax.runs.options.modes import MODES
from ragjax.runs.options.teachers import LsrTarget
from ragjax.runs.teachers.reading import score_candidates
from ragjax.runs.teachers.target import target_log_probs, teacher_parts
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage import write_json
from ragjax.training.score_cache import ResultCache, Score

EXPLAINED = "explained.json"
_EXPLAINED_QUESTIONS = 6
_CANDIDATES = 6
# Questions looked at in each direction before others fill the list up.
_CHANGED_MOST = 2
# Longest text kept of a passage: a report shows a few lines of it.
_KEPT_CHARACTERS = 20_000


def explain(
    workspace: Workspace,
    before: Retriever,
    after: Retriever,
    lm: FrozenLM,
    *,
    target: LsrTarget,
) -> None:
    """Compares p_R before and after with p_LSR on a few test questions, in `explained.json`.

    p_R(c|x) = softmax(scale · q·d), p_LSR(c) = softmax(g/τ) with g the score of the answer alone,
    in the form of the options, and the posterior is p_R(c|x) p_LM(y|c∘x) over its sum, with p_R
    after; all over the same candidates, the best of both retrievers. The scores of the language
    model are kept, so a run that is interrupted and resumed writes the same bytes.

    Args:
        workspace: Data, models and folder of the run; its predictions.jsonl is written.
        before: The base retriever.
        after: The adapted one.
        lm: The language model that scores.
        target: Form and temperature of p_LSR.
    """
    read = RunFiles(workspace.folder)
    lines = read.lines("predictions.jsonl")
    gold = gold_ids(workspace.dataset, "test", workspace.questions["test"])
    compared = read.mapping("differences.json").get("differences") or ()
    pair = main_pair(read.mapping("metrics.json"), compared) or ("after", "before")
    questions = _chosen(workspace, changes(lines, pair, gold))
    described = _explained(workspace, before, after, lm, questions, gold, target)
    lookup = corpus_lookup(workspace.dataset.corpus)
    passages = shown_passages(lines, pair, gold, lookup)
    for one in described:
        for candidate in one["candidates"]:
            passage = lookup(candidate["doc_id"])
            passages |= {candidate["doc_id"]: passage} if passage else {}
    settings = {
        "score": target.score,
        "temperature": target.temperature,
        "scale": workspace.scale,
    }
    if MODES[workspace.config.mode].fused:
        settings["read"] = "each passage alone, unlike for the answers"
    explained = {
        "settings": settings,
        "counts": _encoded(workspace),
        "questions": described,
        "gold": gold,
        "passages": {doc: passages[doc]._asdict() for doc in sorted(passages)},
    }
    write_json(workspace.folder / EXPLAINED, explained)


def corpus_lookup(corpus: Corpus) -> Lookup:
    """Returns a function from document id to its text; None for an id the corpus has not."""

    def lookup(doc_id: str) -> PassageText | None:
        if doc_id not in corpus:
            return None
        passage = corpus[corpus.row_of(doc_id)]
        return PassageText(passage.title, passage.text[:_KEPT_CHARACTERS], passage.source)

    return lookup


def gold_ids(dataset: Dataset, split: str, questions: Sequence[Question]) -> dict[str, list[str]]:
    """Returns question id to the sorted ids of its relevant documents."""
    graded, id_of = dataset.graded_rows(split, questions), dataset.corpus.id_of
    return {
        question.id: sorted(id_of(row) for row, grade in rows.items() if grade > 0)
        for question, rows in zip(questions, graded, strict=True)
    }


def shown_passages(
    lines: Sequence[Mapping[str, Any]],
    pair: tuple[str, str],
    gold: Mapping[str, Sequence[str]],
    lookup: Lookup,
) -> dict[str, PassageText]:
    """Returns the texts of the documents in the section on questions won and lost.

    Args:
        lines: Lines of predictions.jsonl.
        pair: (system, baseline).
        gold: Question id to relevant document ids.
        lookup: Document id to its text.
    """
    found = {doc: lookup(doc) for doc in shown_documents(lines, pair, gold)}
    return {doc: passage for doc, passage in found.items() if passage is not None}


def _encoded(workspace: Workspace) -> dict[str, int]:
    """Returns how many documents there are and were encoded for the indexes that are compared."""
    documents = len(workspace.doc_tokens)
    versions = sum(path.is_dir() for path in (workspace.folder / "index").glob("*"))
    return {
        "documents in the corpus": documents,
        "documents encoded for the indexes before and after": documents * versions,
    }


def _chosen(workspace: Workspace, found: Sequence[Change]) -> list[Question]:
    """Returns questions with an answer: those that changed most, then the first ones."""
    known = {question.id: question for question in workspace.questions["test"] if question.answers}
    able = [change for change in found if change.line["id"] in known]
    first = [select(able, by, _CHANGED_MOST) for by in (by_passage, by_answer)]
    changed = [one.line["id"] for chosen in first for one in (*chosen.won, *chosen.lost)]
    return [known[id] for id in list(dict.fromkeys([*changed, *known]))[:_EXPLAINED_QUESTIONS]]


class _Scores(NamedTuple):
    rows: list[int]  # candidates of one question, corpus rows
    before: np.ndarray  # [K] q·d of each
    after: np.ndarray  # [K]


def _candidate_scores(
    workspace: Workspace, before: Retriever, after: Retriever, questions: Sequence[Question]
) -> list[_Scores]:
    """Returns the best documents of both retrievers, taken in turn, and what both think of them."""
    sides = []
    for retriever in (before, after):
        queries = workspace.encode_queries(retriever.query_params, questions)
        index = FindableIndex(retriever.dense, findable_in(workspace, "test", questions))
        found = index.search(queries, min(_CANDIDATES, len(retriever.embeddings)))
        sides.append((retriever, queries, found))
    scores = []
    for place in range(len(questions)):
        listed = [found.doc_ids[place][found.mask[place]].tolist() for _, _, found in sides]
        turns = (row for pair in zip(*listed, strict=False) for row in pair)
        rows = list(dict.fromkeys(map(int, turns)))[:_CANDIDATES]
        values = [
            np.asarray(retriever.embeddings[rows], np.float64) @ queries[place].astype(np.float64)
            for retriever, queries, _ in sides
        ]
        scores.append(_Scores(rows, *values))
    return scores


def _explained(
    workspace: Workspace,
    before: Retriever,
    after: Retriever,
    lm: FrozenLM,
    questions: Sequence[Question],
    gold: Mapping[str, Sequence[str]],
    target: LsrTarget,
) -> list[dict[str, Any]]:
    if not questions:
        return []
    scores = _candidate_scores(workspace, before, after, questions)
    candidates = empty_result(len(questions), max(len(one.rows) for one in scores))
    for place, one in enumerate(scores):
        candidates.doc_ids[place, : len(one.rows)] = one.rows
        candidates.mask[place, : len(one.rows)] = True
    cache = ResultCache(workspace.folder / "scores" / "explained.jsonl", Score)
    taught = score_candidates(workspace, lm, questions, candidates, cache)
    parts = teacher_parts(target.score, taught, candidates)
    targets = np.exp(target_log_probs(target, parts, candidates).astype(np.float64))
    scale = workspace.scale
    described = []
    for place, (question, one) in enumerate(zip(questions, scores, strict=True)):
        count = len(one.rows)
        log_probs = taught.log_probs[place, :count].astype(np.float64)
        views = {
            "target": targets[place, :count],
            "before": _softmax(scale * one.before),
            "after": _softmax(scale * one.after),
            "posterior": _softmax(scale * one.after + log_probs),
        }
        described.append(
            {
                "id": question.id,
                "question": question.text,
                "answers": list(question.answers),
                "candidates": [
                    {
                        "doc_id": doc_id,
                        "relevant": doc_id in gold[question.id],
                        "log_prob": round(float(log_probs[slot]), 4),
                    }
                    | {name: round(float(values[slot]), 5) for name, values in views.items()}
                    for slot, doc_id in enumerate(map(workspace.dataset.corpus.id_of, one.rows))
                ],
            }
        )
    return described


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()

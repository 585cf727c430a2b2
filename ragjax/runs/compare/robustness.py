"""Answers from relevant passages, from these with distractors, and from distractors alone.

Q questions, R passages.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ragjax.evaluation import Comparison, QuestionRecord, bootstrap_interval, compare, summarize
from ragjax.evaluation.robustness import PassageSets, passage_sets, same_answers
from ragjax.index import SearchResult
from ragjax.runs.compare.answers import Request, ScoredAnswer, answer_requests
from ragjax.runs.compare.systems import AnswerMeasure, answered_rows, make_record
from ragjax.runs.indexes import Retriever
from ragjax.runs.options.modes import MODES
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.training.score_cache import ResultCache

CONDITION_METRICS = ("exact_match", "f1", "answer_nll", "corpus_hallucination")
_CONDITIONS: dict[str, Callable[[PassageSets], tuple[int, ...]]] = {
    "closed_book": lambda sets: (),
    "gold": lambda sets: sets.gold,
    "gold_first": lambda sets: sets.gold_first,
    "gold_last": lambda sets: sets.gold_last,
    "distractors": lambda sets: sets.distractors,
}
_PAIRS = (
    ("gold", "closed_book"),
    ("gold_first", "gold"),
    ("gold_last", "gold"),
    ("gold_last", "gold_first"),
    ("distractors", "closed_book"),
    ("distractors", "closed_book_base"),
)


class Robustness(NamedTuple):
    """Records by condition, over the questions that have all of them."""

    records: dict[str, list[QuestionRecord]]
    rows: list[int]  # of the split's questions


def answer_conditions(
    workspace: Workspace,
    lm: FrozenLM,
    retriever: Retriever,
    found: SearchResult,
    cache: ResultCache[ScoredAnswer],
    *,
    split: str,
    num_distractors: int,
    measure: AnswerMeasure,
) -> Robustness | None:
    """Answers each question under every condition.

    Relevant passages are read up to as many as the systems read documents (the most relevant
    first); p_R of all passages is the retriever's, also of those that it did not find. Where the
    language model is adapted, the base one answers closed book, too: distractors should not make
    the adapted one worse than that.

    Args:
        workspace: Data, prompts, options.
        lm: The language model that answers.
        retriever: Computes the logits of p_R.
        found: `[Q, K]` documents of the split's questions; the distractors are chosen among them.
        cache: Answers known already.
        split: Of the workspace's questions.
        num_distractors: Distractors read.
        measure: Computes the metrics of an answer.

    Returns:
        The records; None where no question has a relevant passage and a distractor.
    """
    sets = _passage_sets(workspace, found, split, num_distractors)
    if not sets:
        return None
    workspace.log(f"answers of {len(sets)} questions with and without distractors")
    asked = [workspace.questions[split][row] for row in sets]
    # One product for all passages that are read: each has one logit, whatever is read beside it.
    passages = sorted({doc for chosen in sets.values() for doc in chosen.gold_first})
    place = {doc: column for column, doc in enumerate(passages)}
    queries = workspace.encode_queries(retriever.query_params, asked)
    scale = workspace.scale
    logits = scale * queries @ retriever.embeddings[np.array(passages)].T  # [Q, R]
    base, conditions = workspace.base_lm(), dict(_CONDITIONS)
    if base.fingerprint != lm.fingerprint:
        conditions["closed_book_base"] = conditions["closed_book"]
    records = {}
    for name, condition in conditions.items():
        if name == "gold_last" and MODES[workspace.config.mode].apart:
            continue  # read apart, passages have no order
        requests = [
            Request(question, docs, tuple(scores[[place[doc] for doc in docs]].tolist()))
            for question, docs, scores in zip(asked, map(condition, sets.values()), logits,
                                              strict=True)
        ]  # fmt: skip
        reader = base if name == "closed_book_base" else lm
        answers = answer_requests(workspace, reader, requests, cache)
        records[name] = [
            make_record(
                request.question,
                name,
                prediction=answer.prediction,
                doc_ids=[workspace.dataset.corpus.id_of(row) for row in request.docs],
                doc_scores=[round(score, 6) for score in request.doc_scores],
                metrics=measure(request, answer),
            )
            for request, answer in zip(requests, answers, strict=True)
        ]
    return Robustness(records, list(sets))


def summarize_robustness(
    robustness: Robustness, *, num_resamples: int, seed: int
) -> dict[str, Any]:
    """Returns what robustness.json holds.

    Args:
        robustness: Records by condition.
        num_resamples: Bootstrap samples.
        seed: Of the bootstrap.

    Returns:
        `conditions` as `summarize` gives them, paired `differences`, and how often the answer from
        distractors alone is the one given closed book (`same_as_closed_book`).
    """
    records = robustness.records
    options = {"num_resamples": num_resamples, "seed": seed}
    same = same_answers(
        *([r.prediction or "" for r in records[name]] for name in ("distractors", "closed_book"))
    )
    return {
        "n": len(robustness.rows),
        "conditions": {name: summarize(rows, **options) for name, rows in records.items()},
        "differences": [c.as_json() for c in compare_conditions(robustness, **options)],
        "same_as_closed_book": bootstrap_interval(same, **options)._asdict(),
    }


def compare_conditions(
    robustness: Robustness, *, num_resamples: int, seed: int
) -> list[Comparison]:
    """Returns the differences that passages and distractors make, paired by question."""
    return compare(
        robustness.records,
        pairs=_PAIRS,
        metrics=CONDITION_METRICS,
        num_resamples=num_resamples,
        seed=seed,
    )


def condition_lines(robustness: Robustness) -> dict[int, dict[str, Any]]:
    """Returns by question what was answered under each condition, for predictions.jsonl."""
    return {
        row: {
            name: {
                "prediction": rows[place].prediction,
                "doc_ids": list(rows[place].doc_ids),
                "metrics": dict(rows[place].metrics),
            }
            for name, rows in robustness.records.items()
        }
        for place, row in enumerate(robustness.rows)
    }


def _passage_sets(
    workspace: Workspace, found: SearchResult, split: str, num_distractors: int
) -> dict[int, PassageSets]:
    """Returns the passages of each answered question that has a relevant one and a distractor."""
    grades, num_gold = workspace.gold_rows(split), workspace.config.evaluation.documents
    sets = {}
    for row in answered_rows(workspace, split):
        ranked = sorted((-grade, doc) for doc, grade in grades[row].items() if grade > 0)
        chosen = passage_sets(
            [doc for _, doc in ranked],
            found.doc_ids[row].tolist(),
            num_gold=num_gold,
            num_distractors=num_distractors,
        )
        if chosen is not None:
            sets[row] = chosen
    return sets

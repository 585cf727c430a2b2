"""How a language model answers from relevant passages, with distractors, and from these alone.

Q questions, N documents.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ragjax.data import Question
from ragjax.evaluation import Comparison, QuestionRecord, bootstrap_interval, compare, summarize
from ragjax.evaluation.robustness import PassageSets, passage_sets, same_answers
from ragjax.index import SearchResult
from ragjax.runs.compare.answers import Answer, Request, answer_requests
from ragjax.runs.compare.systems import Measure, as_json
from ragjax.runs.indexes import Retriever
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.training.score_cache import ResultCache

METRICS = ("exact_match", "f1", "answer_nll")
_CONDITIONS = ("closed_book", "gold", "gold_first", "gold_last", "distractors")
_PAIRS = (
    ("gold", "closed_book"),
    ("gold_first", "gold"),
    ("gold_last", "gold"),
    ("gold_last", "gold_first"),
    ("distractors", "closed_book"),
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
    cache: ResultCache[Answer],
    *,
    split: str,
    rows: Sequence[int],
    num_distractors: int,
    measure: Measure,
) -> Robustness | None:
    """Answers each question under every condition.

    Relevant passages are read up to as many as the systems read documents (the most relevant
    first); p_R of all passages is the retriever's, also of those that it did not find.

    Args:
        workspace: Data, prompts, options.
        lm: The language model that answers.
        retriever: Gives the logits of p_R.
        found: `[Q, K]` documents of the split's questions; the distractors come from them.
        cache: Answers known already.
        split: Of the workspace's questions.
        rows: Questions that are answered.
        num_distractors: Distractors read.
        measure: What is measured of an answer.

    Returns:
        The records; None where no question has a relevant passage and a distractor.
    """
    questions, grades = workspace.questions[split], workspace.gold_rows(split)
    sets: dict[int, PassageSets] = {}
    for row in rows:
        ranked = sorted((-grade, doc) for doc, grade in grades[row].items() if grade > 0)
        chosen = passage_sets(
            [doc for _, doc in ranked],
            found.doc_ids[row].tolist(),
            num_gold=workspace.config.evaluation.documents,
            num_distractors=num_distractors,
        )
        if chosen is not None:
            sets[row] = chosen
    if not sets:
        return None
    workspace.report(f"answers of {len(sets)} questions with and without distractors")
    asked = [questions[row] for row in sets]
    queries = workspace.encode_queries(retriever.query_params, asked)
    logits = workspace.config.retriever.scale * queries @ retriever.embeddings.T  # [Q, N]
    records = {}
    for name in _CONDITIONS:
        docs = [getattr(chosen, name, ()) for chosen in sets.values()]
        if name == "gold_last" and workspace.config.evaluation.mode != "concat":
            continue  # read apart, passages have no order
        requests = [
            Request(question, passages, tuple(scores[list(passages)].tolist()))
            for question, passages, scores in zip(asked, docs, logits, strict=True)
        ]
        answers = answer_requests(workspace, lm, requests, cache)
        records[name] = [
            _record(workspace, name, request, answer, measure)
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
        "differences": [as_json(c) for c in compare_conditions(robustness, **options)],
        "same_as_closed_book": bootstrap_interval(same, **options)._asdict(),
    }


def compare_conditions(
    robustness: Robustness, *, num_resamples: int, seed: int
) -> list[Comparison]:
    """Returns what passages and distractors change, in pairs of the same questions."""
    pairs = [pair for pair in _PAIRS if set(pair) <= set(robustness.records)]
    return compare(
        robustness.records, pairs=pairs, metrics=METRICS, num_resamples=num_resamples, seed=seed
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


def _record(
    workspace: Workspace, name: str, request: Request, answer: Answer, measure: Measure
) -> QuestionRecord:
    question: Question = request.question
    return QuestionRecord(
        id=question.id,
        system=name,
        question=question.text,
        answers=question.answers,
        prediction=answer.prediction,
        doc_ids=[workspace.dataset.corpus.id_of(row) for row in request.docs],
        doc_scores=[round(score, 6) for score in request.doc_scores],
        metrics=measure(workspace, request, answer),
    )

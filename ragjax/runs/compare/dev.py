"""Dev-set retrieval metrics and the NLL of the right answers.

Q questions, K documents each.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ragjax.data import Question
from ragjax.evaluation import (
    QuestionRecord,
    compare,
    format_difference,
    retrieval_metrics,
    summarize,
)
from ragjax.index import SearchResult
from ragjax.losses import rag_sequence_loss
from ragjax.runs.compare.answers import Request, answer_requests
from ragjax.runs.compare.systems import answer_cache, bootstrap_options, make_record
from ragjax.runs.indexes import Retriever, search
from ragjax.runs.options.modes import MODES
from ragjax.runs.teachers.reading import score_candidates
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage import write_json
from ragjax.training.score_cache import ResultCache, Score

# Over documents that are read alone, and given documents that are read at once.
MARGINAL_NLL, ANSWER_NLL = "marginal_nll", "answer_nll"
_RETRIEVAL = ("recall@1", "recall@5", "recall@20", "mrr@10", "ndcg@10")
_DEPTH = 20
_SHOWN = ("recall@5", "mrr@10", MARGINAL_NLL, ANSWER_NLL)


class Side(NamedTuple):
    """A retriever and the language model that reads what it finds."""

    name: str
    retriever: Retriever
    lm: FrozenLM


def evaluate_dev(workspace: Workspace, before: Side, after: Side) -> Mapping[str, Any] | None:
    """Measures both sides on the dev questions and writes `dev.json`.

    Where the mode of the run is `fusion`, the NLL is that of a reader of all documents at once,
    `answer_nll`; else `marginal_nll`.

    Args:
        workspace: Data, prompts, options; `evaluation.documents` is K.
        before: The base side.
        after: The adapted one.

    Returns:
        What `dev.json` holds: by side each metric with its 95 % interval, and the paired
        differences; None where the data has no dev questions.
    """
    questions = workspace.questions["dev"]
    if not questions:
        workspace.log("no dev questions: nothing to compare there")
        return None
    records = {side.name: _records(workspace, side, questions) for side in (before, after)}
    options = bootstrap_options(workspace.config)
    differences = compare(
        records,
        pairs=((after.name, before.name),),
        metrics=(*_RETRIEVAL, MARGINAL_NLL, ANSWER_NLL),
        **options,
    )
    result = {
        "measured_by": workspace.measured_by("dev"),
        "systems": {name: summarize(rows, **options) for name, rows in records.items()},
        "differences": [difference.as_json() for difference in differences],
    }
    write_json(workspace.folder / "dev.json", result)
    name = ANSWER_NLL if MODES[workspace.config.mode].fused else MARGINAL_NLL
    workspace.log(
        f"\n{len(questions)} dev questions ({name} in nats per token; retrieval by"
        f" {result['measured_by']})"
    )
    for difference in differences:
        if difference.metric in _SHOWN:
            workspace.log(format_difference(difference))
    return result


def marginal_nll(
    workspace: Workspace,
    lm: FrozenLM,
    questions: Sequence[Question],
    found: SearchResult,
    cache: ResultCache[Score],
) -> np.ndarray:
    r"""Computes the marginal negative log-likelihood of the right answers.

    .. math::
        -\frac{1}{T} \log \sum_c p_R(c|x) \, p_{LM}(y|c \circ x)

    Args:
        workspace: Prompts, and the scale of p_R.
        lm: The language model.
        questions: Q questions with answers; the first answer counts.
        found: `[Q, K]` documents with their cosines.
        cache: Scores known already; new ones are added batch by batch.

    Returns:
        `[Q]` float32, nats per token of the answer.
    """
    scores = score_candidates(workspace, lm, questions, found, cache)
    scaled = np.where(found.mask, found.scores, 0.0) * workspace.scale
    nats = rag_sequence_loss(
        scaled.astype(np.float32), scores.log_probs, doc_mask=np.asarray(found.mask)
    )
    return np.asarray(nats) / np.maximum(1, scores.lengths)


def _records(
    workspace: Workspace, side: Side, questions: Sequence[Question]
) -> list[QuestionRecord]:
    read = workspace.config.evaluation.documents
    depth = max(_DEPTH, min(read, len(workspace.dataset.corpus)))
    found = search(workspace, side.retriever, "dev", depth).dense
    columns = retrieval_metrics(found.doc_ids, workspace.gold_rows("dev"))
    top = found.top(read)
    answered = [row for row, question in enumerate(questions) if question.answers]
    nll, fused = np.full(len(questions), np.nan), MODES[workspace.config.mode].fused
    if answered:
        part = top.take(np.asarray(answered, np.int64))
        chosen = [questions[row] for row in answered]
        if fused:
            nll[answered] = _fused_nll(workspace, side.lm, chosen, part)
        else:
            cache = ResultCache(workspace.folder / "scores" / "dev.jsonl", Score)
            nll[answered] = marginal_nll(workspace, side.lm, chosen, part, cache)
    columns[ANSWER_NLL if fused else MARGINAL_NLL] = nll
    return [
        make_record(
            question,
            side.name,
            metrics={name: float(column[row]) for name, column in columns.items()},
        )
        for row, question in enumerate(questions)
    ]


def _fused_nll(
    workspace: Workspace, lm: FrozenLM, questions: Sequence[Question], found: SearchResult
) -> list[float | None]:
    """Returns nats per token of the right answers, given all documents `[Q, K]` of a question."""
    requests = [
        Request(question, tuple(docs[mask].tolist()), tuple(scores[mask].tolist()))
        for question, docs, scores, mask in zip(questions, *found, strict=True)
    ]
    cache = answer_cache(workspace.folder)
    return [answer.nll for answer in answer_requests(workspace, lm, requests, cache)]

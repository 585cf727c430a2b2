"""Metrics of an answer beside exact match and F1: its probability and its support.

K documents.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ragjax.data import passage_text
from ragjax.evaluation.calibration import answer_confidence
from ragjax.evaluation.support import Support, answer_support, is_empty, support_rates
from ragjax.runs.compare.answers import Request, ScoredAnswer
from ragjax.runs.compare.systems import AnswerMeasure, Documents, answer_metrics
from ragjax.runs.options.modes import MODES
from ragjax.runs.workspace import Workspace

# An answer that shares half of its words with a right one counts as right where it has to be one
# or the other.
RIGHT_F1 = 0.5


# Before the names of rates: by the evidence of the corpus, not by what was read.
_BY_CORPUS = "corpus_"


def measure_answer(
    workspace: Workspace, threshold: float, evidence: Mapping[str, Sequence[int]]
) -> AnswerMeasure:
    """Returns the function that computes the metrics of an answer in an evaluation.

    Beside the metrics of `answer_metrics` it has `confidence` p(y) and `confidence_per_token`, the
    geometric mean of its tokens' probabilities; the rates of
    `ragjax.evaluation.support.SupportRates` by the evidence of the corpus, whatever was read
    (`corpus_supported`, `corpus_hallucination` and so on), where right means an F1 of at least
    `RIGHT_F1`; and, where documents were read, the same rates by these, and `support` (share of
    content tokens in the best of them).

    Args:
        workspace: Prompts and documents.
        threshold: Share of content tokens that supports a long answer.
        evidence: Question id to corpus rows, as of `corpus_evidence`.
    """

    @functools.cache  # systems often give the same answer
    def is_supported(question_id: str, prediction: str) -> bool:
        passages = (passage_text(workspace.dataset.corpus[row]) for row in evidence[question_id])
        return any(
            answer_support(prediction, [passage], threshold=threshold).supported
            for passage in passages
        )

    def measure(request: Request, answer: ScoredAnswer) -> dict[str, float]:
        metrics = answer_metrics(request, answer)
        if answer.log_prob is not None and answer.num_tokens is not None:
            log_prob, length = np.array([answer.log_prob]), np.array([answer.num_tokens])
            metrics["confidence"] = float(answer_confidence(log_prob)[0])
            metrics["confidence_per_token"] = float(answer_confidence(log_prob, length)[0])
        empty, right = is_empty(answer.prediction), is_right(metrics["f1"])
        metrics["empty_answer"] = float(empty)
        by_corpus = Support(is_supported(request.question.id, answer.prediction), math.nan)
        rates = support_rates(by_corpus, right=right, empty=empty)
        metrics |= {f"{_BY_CORPUS}{name}": value for name, value in rates._asdict().items()}
        if request.docs:
            passages = passages_read(workspace, request)
            support = answer_support(answer.prediction, passages, threshold=threshold)
            rates = support_rates(support, right=right, empty=empty)
            metrics["support"] = math.nan if empty else support.containment
            metrics |= rates._asdict()
        return metrics

    return measure


def corpus_evidence(
    workspace: Workspace, documents: Mapping[str, Documents], split: str
) -> dict[str, tuple[int, ...]]:
    """Returns what the corpus has to say on each question, the same for every system.

    The relevant passages, and all that any search found: so also whatever a system read.

    Args:
        workspace: Data.
        documents: Of each search, as of `retrieve_documents`.
        split: Of the workspace's questions.

    Returns:
        Question id to corpus rows, relevant ones first, each once.
    """
    found = [one.found for one in documents.values()]
    return {
        question.id: tuple(
            dict.fromkeys(
                [*sorted(relevant)]
                + [doc for one in found for doc in one.doc_ids[row][one.mask[row]].tolist()]
            )
        )
        for row, (question, relevant) in enumerate(
            zip(workspace.questions[split], workspace.relevant_rows(split), strict=True)
        )
    }


def is_right(f1: float) -> float:
    """Returns 1.0 for a right answer, 0.0 for a wrong one, NaN without a known answer."""
    return math.nan if math.isnan(f1) else float(f1 >= RIGHT_F1)


def passages_read(workspace: Workspace, request: Request) -> list[str]:
    """Returns of each document the part that stood in the prompt.

    Args:
        workspace: Prompts and documents.
        request: The question and its K documents.
    """
    prompts, documents = workspace.prompts, workspace.documents.get(request.docs)
    if MODES[workspace.config.mode].apart:
        return [
            text
            for document in documents
            for text in prompts.document_texts(request.question.text, [document])
        ]
    return prompts.document_texts(request.question.text, documents)

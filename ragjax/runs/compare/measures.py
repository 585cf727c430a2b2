"""Metrics of an answer beside exact match and F1: its probability and its support.

K documents.
"""

import math
from collections.abc import Sequence

import numpy as np

from ragjax.data import PromptBuilder
from ragjax.evaluation.calibration import answer_confidence
from ragjax.evaluation.support import answer_support, is_empty, support_rates
from ragjax.runs.compare.answers import Request, ScoredAnswer
from ragjax.runs.compare.systems import AnswerMeasure, answer_metrics
from ragjax.runs.options.modes import MODES
from ragjax.runs.workspace import Workspace

# An answer that shares half of its words with a right one counts as right where it has to be one
# or the other.
RIGHT_F1 = 0.5


def measure_answer(workspace: Workspace, threshold: float) -> AnswerMeasure:
    """Returns the function that computes the metrics of an answer in an evaluation.

    Beside the metrics of `answer_metrics` it has `confidence` p(y) and `confidence_per_token`, the
    geometric mean of its tokens' probabilities; and, where documents were read, `support` (share of
    content tokens in the best passage) and the rates of
    `ragjax.evaluation.support.SupportRates`, where right means an F1 of at least `RIGHT_F1`.

    Args:
        workspace: Prompts and documents.
        threshold: Share of content tokens that supports a long answer.
    """

    def measure(request: Request, answer: ScoredAnswer) -> dict[str, float]:
        metrics = answer_metrics(request, answer)
        if answer.log_prob is not None and answer.num_tokens is not None:
            log_prob, length = np.array([answer.log_prob]), np.array([answer.num_tokens])
            metrics["confidence"] = float(answer_confidence(log_prob)[0])
            metrics["confidence_per_token"] = float(answer_confidence(log_prob, length)[0])
        empty = is_empty(answer.prediction)
        metrics["empty_answer"] = float(empty)
        if request.docs:
            passages = passages_read(workspace, request)
            support = answer_support(answer.prediction, passages, threshold=threshold)
            rates = support_rates(support, right=is_right(metrics["f1"]), empty=empty)
            metrics["support"] = math.nan if empty else support.containment
            metrics |= rates._asdict()
        return metrics

    return measure


def is_right(f1: float) -> float:
    """Returns 1.0 for a right answer, 0.0 for a wrong one, NaN without a known answer."""
    return math.nan if math.isnan(f1) else float(f1 >= RIGHT_F1)


def passages_read(workspace: Workspace, request: Request) -> list[str]:
    """Returns of each document the part that stood in the prompt.

    Args:
        workspace: Prompts and documents.
        request: The question and its K documents.
    """
    documents = workspace.documents.get(request.docs)
    if not MODES[workspace.config.mode].apart:
        budget = _tokens_read(workspace.prompts, request.question.text, len(request.docs))
        documents = [document[:budget] for document in documents]
    return workspace.lm.tokenizer.decode_batch([document.tolist() for document in documents])


def _tokens_read(prompts: PromptBuilder, question: str, num_documents: int) -> int:
    """Returns how many tokens of each document a prompt has room for."""
    nothing: Sequence[Sequence[int]] = [[]] * num_documents
    room = prompts.max_context_length - len(prompts.context(question, nothing))
    return min(prompts.template.max_document_tokens, room // num_documents)

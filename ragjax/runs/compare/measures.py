"""What is measured of an answer beside whether it is right: its probability and its support.

K documents.
"""

import math
from collections.abc import Sequence

import numpy as np

from ragjax.evaluation.calibration import answer_confidence
from ragjax.evaluation.support import answer_support, is_empty, support_rates
from ragjax.runs.compare.answers import Answer, Request
from ragjax.runs.compare.systems import Measure, answer_metrics
from ragjax.runs.workspace import Workspace

# An answer that shares half of its words with a right one counts as right where it has to be one
# or the other.
RIGHT_F1 = 0.5


def measure_answer(threshold: float) -> Measure:
    """Returns a measure of an answer: right, likely, supported.

    Beside the metrics of `answer_metrics` it has `confidence` p(y) and `confidence_per_token`, the
    geometric mean of its tokens' probabilities; and, where documents were read, `support` (share of
    content tokens in the best passage) and the rates of
    `ragjax.evaluation.support.SupportRates`, where right means an F1 of at least `RIGHT_F1`.

    Args:
        threshold: Share of content tokens that supports a long answer.
    """

    def measure(workspace: Workspace, request: Request, answer: Answer) -> dict[str, float]:
        metrics = answer_metrics(workspace, request, answer)
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
            metrics["supported"] = rates.supported
            metrics["supported_if_right"] = rates.supported_if_right
            metrics["supported_if_wrong"] = rates.supported_if_wrong
            metrics["hallucination"] = rates.hallucination
        return metrics

    return measure


def is_right(f1: float) -> float:
    """Returns 1.0 for a right answer, 0.0 for a wrong one, NaN where nobody knows."""
    return math.nan if math.isnan(f1) else float(f1 >= RIGHT_F1)


def passages_read(workspace: Workspace, request: Request) -> list[str]:
    """Returns of each document the part that stood in the prompt.

    Args:
        workspace: Prompts and documents.
        request: The question and its K documents.
    """
    documents = workspace.documents.get(request.docs)
    if workspace.config.evaluation.mode == "concat":
        budget = tokens_read(workspace, request.question.text, len(request.docs))
        documents = [document[:budget] for document in documents]
    return workspace.lm.tokenizer.decode_batch([document.tolist() for document in documents])


def tokens_read(workspace: Workspace, question: str, num_documents: int) -> int:
    """Returns how many tokens of each document a prompt has room for."""
    prompts = workspace.prompts
    nothing: Sequence[Sequence[int]] = [[]] * num_documents
    room = prompts.max_context_length - len(prompts.context(question, nothing))
    return min(prompts.template.max_document_tokens, room // num_documents)

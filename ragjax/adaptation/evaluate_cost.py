"""What an evaluation will take at most, from the measured speed of its models."""

import numpy as np

from ragjax.adaptation.estimate import duration, encoder_rate, lm_rate, padded_tokens
from ragjax.adaptation.evaluate import answered_rows
from ragjax.adaptation.evaluate_config import EvaluateConfig, system_names
from ragjax.adaptation.evaluate_open import Opened

# Generated tokens are read one at a time, which keeps the processor less busy than a prompt does.
_DECODE_TOKEN = 3.0
# Template and question; and a language model's tokens for one of the encoder's.
_QUESTION_TOKENS = 28
_LM_TOKENS = 1.15


def describe_cost(opened: Opened, config: EvaluateConfig) -> str:
    """Measures both models and says how long the evaluation will take at most."""
    workspace, options = opened.workspace, opened.workspace.config
    evaluation = options.evaluation
    names = system_names(config, adapts_lm=opened.adapts_lm)
    answered = len(answered_rows(workspace, config.split))
    closed = sum(name.startswith("closed_book") for name in names)
    read = (len(names) - closed) * answered
    documents = read * evaluation.documents
    if config.robustness:
        # Under the four conditions relevant passages are read three times, and so are distractors.
        read += 4 * answered
        documents += 3 * answered * (evaluation.documents + config.distractors)
        closed += 1
    apart = evaluation.mode != "concat"
    prompts = (documents if apart else read) + closed * answered
    beams = evaluation.beams if apart else 1
    mean_doc = float(np.mean([len(ids) for ids in workspace.doc_ids]))
    tokens = documents * min(options.prompt.document_tokens, mean_doc * _LM_TOKENS)
    tokens += prompts * (
        _QUESTION_TOKENS
        + options.prompt.answer_tokens
        + _DECODE_TOKEN * evaluation.max_new_tokens * beams
    )
    encodes = 1 + opened.adapts_retriever
    seconds = {
        "encoding": padded_tokens(workspace) * encodes / encoder_rate(workspace),
        "answers": tokens / lm_rate(workspace) if prompts else 0.0,
    }
    stages = ", ".join(f"{name} {duration(s)}" for name, s in seconds.items())
    return (
        f"\n== forecast\n{len(workspace.questions[config.split]):,} questions of {config.split},"
        f" {answered:,} of them answered; at most {prompts:,} prompts for the language model\n"
        f"at most about {duration(sum(seconds.values()))} on this machine ({stages}), less what is"
        " known already and what systems share"
    )

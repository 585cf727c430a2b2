"""What an end-to-end run will cost, from the lengths of its texts and its models' speed."""

import os

import jax
import numpy as np

from ragjax.adaptation.estimate import (
    BACKWARD,
    COMPILE_SECONDS,
    COMPILED_SHAPES,
    DECODE_TOKEN,
    ENCODER_BACKWARD,
    ENCODER_FORWARDS,
    LM_TOKENS,
    PROMPTS,
    QUESTION_TOKENS,
    Cost,
    backward_forwards,
    encoder_rate,
    forecast_refreshes,
    lm_rate,
    padded_tokens,
    refreshes,
    tree_bytes,
)
from ragjax.adaptation.rag_batches import RagBatches
from ragjax.adaptation.rag_config import RagConfig
from ragjax.adaptation.rag_stage import take_apart, total_steps
from ragjax.adaptation.stages import tower_params
from ragjax.adaptation.workspace import Workspace


def estimate_rag_cost(workspace: Workspace, config: RagConfig) -> Cost:
    """Measures both models on a few real texts and forecasts the run; see `estimate_cost`."""
    encode_rate, score_rate = encoder_rate(workspace), lm_rate(workspace)
    training, evaluation = config.training, config.evaluation
    batches = RagBatches(workspace, config, lambda batch: batch)
    steps = total_steps(workspace, config)
    questions = steps * training.batch_size
    read = batches.num_retrieved + training.null_document
    encoded = read + bool(config.objective.contrastive_weight)
    learns, teaches = config.language_model.train, config.retriever.train != "none"
    lm_work = 1 + learns * backward_forwards(config.language_model, workspace.lm.config, BACKWARD)
    encoder_work = ENCODER_FORWARDS + teaches * backward_forwards(
        config.retriever, workspace.encoder.config, ENCODER_BACKWARD
    )
    corpus = padded_tokens(workspace)
    dev = len(workspace.questions["dev"]) * evaluation.documents * 2
    answered = sum(bool(q.answers) for q in workspace.questions["test"])
    answered = min(answered, config.data_options.answer_questions)
    mean_doc = float(np.mean([len(ids) for ids in workspace.doc_ids])) * LM_TOKENS
    question = QUESTION_TOKENS + config.prompt.answer_tokens
    prompt = min(config.prompt.document_tokens, mean_doc) + question
    decoded = DECODE_TOKEN * evaluation.max_new_tokens
    alone = evaluation.mode != "concat"  # each document in a prompt of its own
    per_answer = evaluation.documents * (prompt + (decoded if alone else 0)) + (
        0 if alone else decoded
    )
    answers = answered * PROMPTS * (1 + learns)
    seconds = {
        "encoding": corpus * (1 + teaches) / encode_rate,
        "reading": questions * read * batches.context_tokens * lm_work / score_rate,
        "retriever": questions * encoded * batches.doc_tokens * encoder_work / encode_rate,
        "dev": dev * prompt / score_rate,
        "evaluation": (answers * per_answer + answered * (1 + learns) * (question + decoded))
        / score_rate,
        "compiling": COMPILE_SECONDS * COMPILED_SHAPES,
    }
    disk = os.statvfs(workspace.folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    refresh = None
    if config.refresh.mode in ("sync", "async"):
        step_seconds = (seconds["reading"] + seconds["retriever"]) / steps
        rate = encode_rate * len(workspace.doc_ids) / corpus
        refresh = forecast_refreshes(workspace, steps, step_seconds, rate, free_bytes)
        seconds["refreshes"] = refreshes(refresh, steps) * refresh.refresh_seconds
    index_bytes = len(workspace.doc_ids) * workspace.encoder.embedding_size * 4 * (1 + teaches)
    towers = tower_params(workspace)
    trained = jax.eval_shape(
        lambda lm, towers: take_apart(config, workspace.lm.family, lm, towers).trainable,
        workspace.lm.params,
        towers,
    )
    # What learns and the optimiser's two moments of it, in each of two checkpoints.
    checkpoints = tree_bytes(trained) * 3 * 2
    return Cost(
        documents=len(workspace.doc_ids) * (1 + teaches),
        lm_forwards=int(questions * read + dev + answers * evaluation.documents),
        seconds=seconds,
        bytes_on_disk=int(index_bytes + checkpoints + (refresh.bytes_on_disk if refresh else 0)),
        free_bytes=free_bytes,
        refresh=refresh,
    )

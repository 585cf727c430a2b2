"""The language-model stage of dual training: fine-tuning on retrieved documents."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from ragjax.data import Question, batch_rows, num_steps
from ragjax.index import SearchResult
from ragjax.models.inputs import LMBatch
from ragjax.runs.options.dual import LMConfig
from ragjax.runs.train.stages import optimizer_config, run_stage
from ragjax.runs.trainable import lm_parts
from ragjax.runs.workspace import (
    Workspace,
    answer_end_id,
    make_prompts,
)
from ragjax.training.lm import answer_tokens, make_lm_loss
from ragjax.training.optimizer import make_optimizer
from ragjax.training.steps import init_state, make_train_step


def train_lm(
    workspace: Workspace,
    config: LMConfig,
    questions: Sequence[Question],
    candidates: SearchResult,
) -> dict[str, Any]:
    """Fine-tunes the language model on each question with each of its documents.

    Args:
        workspace: Data and models.
        config: Options of the stage.
        questions: Q training questions, with answers.
        candidates: `[Q, K]` documents, of which the best `documents` are used.

    Returns:
        The adapted parameters, sharing the frozen ones with `workspace.lm`; with LoRA the adapters
        lie beside the weights (`ragjax.models.lora.merge` folds them in).
    """
    rows = lm_rows(config, candidates)
    steps = num_steps(num_examples=len(rows), batch_size=config.batch_size, epochs=config.epochs)
    lm = workspace.lm
    parts = lm_parts(config, lm.family, lm.params, seed=workspace.config.seed)
    log_probs = functools.partial(lm.family.token_log_probs, lm.config, remat=config.remat)
    optimizer = make_optimizer(optimizer_config(config, steps), total_steps=steps)
    step = make_train_step(
        make_lm_loss(
            lambda params, batch: log_probs(workspace.in_compute_dtype(params), batch), parts.merge
        ),
        optimizer,
        accumulate=config.accumulate,
        weight=answer_tokens,
    )
    state = run_stage(
        workspace,
        "lm",
        steps,
        step,
        init_state(parts.trainable, optimizer, workspace.config.seed),
        _lm_batches(workspace, config, questions, rows),
        frozen=parts.frozen,
        index_version=0,
    )
    return parts.merge(state.params, parts.frozen)


def lm_rows(config: LMConfig, candidates: SearchResult) -> list[tuple[int, int]]:
    """Returns the training rows (question, corpus row) of the LM half."""
    return [
        (q, int(candidates.doc_ids[q, k]))
        for q in range(min(config.questions, len(candidates.mask)))
        for k in range(min(config.documents, candidates.mask.shape[1]))
        if candidates.mask[q, k]
    ]


def _lm_batches(
    workspace: Workspace,
    config: LMConfig,
    questions: Sequence[Question],
    rows: Sequence[tuple[int, int]],
) -> Callable[[int], LMBatch]:
    # Something ends the answer: the model learns to stop where generation stops.
    prompts = make_prompts(workspace.config, workspace.lm, end_id=answer_end_id(workspace))
    contexts = [
        prompts.context(questions[q].text, workspace.documents.get([doc])) for q, doc in rows
    ]
    targets = [prompts.target(questions[q].answers[0]) for q, _ in rows]
    length = max(map(len, contexts))

    def batch_at(step: int) -> LMBatch:
        chosen = batch_rows(
            workspace.config.seed, step, num_examples=len(rows), batch_size=config.batch_size
        )
        packed = prompts.pack(
            [contexts[row] for row in chosen],
            [targets[row] for row in chosen],
            context_length=-(-length // 32) * 32,
        )
        return LMBatch(*map(jnp.asarray, packed))

    return batch_at

"""The language-model stage of dual training: fine-tuning on retrieved documents."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from ragjax.data import batch_rows
from ragjax.index import SearchResult
from ragjax.models.inputs import LMBatch
from ragjax.runs.options.dual import LMConfig
from ragjax.runs.tokens import training_prompts
from ragjax.runs.train.stages import Stage, run_stage, stage_steps
from ragjax.runs.trainable import split_lm
from ragjax.runs.workspace import Workspace
from ragjax.training.lm import answer_tokens, make_lm_loss


def train_lm(workspace: Workspace, config: LMConfig, candidates: SearchResult) -> dict[str, Any]:
    """Fine-tunes the language model on each training question with each of its documents.

    Args:
        workspace: Data and models.
        config: Options of the stage.
        candidates: `[Q, K]` documents of the training questions; the best `documents` are used.

    Returns:
        The adapted parameters, sharing the frozen ones with `workspace.lm`; with LoRA the adapters
        lie beside the weights (`ragjax.models.lora.merge` folds them in).
    """
    lm, seed = workspace.lm, workspace.config.seed
    rows = lm_rows(config, candidates)
    split = split_lm(config, lm.family, lm.params, seed=seed)
    log_probs = functools.partial(lm.family.token_log_probs, lm.config, remat=config.remat)
    stage = Stage(
        name="lm",
        num_steps=stage_steps(config, len(rows)),
        seed=seed,
        config=config,
        learning_rate=config.learning_rate,
        index_version=0,
        accumulate=config.accumulate,
        weight=answer_tokens,
    )
    loss = make_lm_loss(workspace.cast_lm(log_probs), split.merge)
    trained = run_stage(workspace, stage, split, loss, _lm_batches(workspace, config, rows))
    return split.merged(trained)


def lm_rows(config: LMConfig, candidates: SearchResult) -> list[tuple[int, int]]:
    """Returns the training rows (question, corpus row) of the stage."""
    return [
        (q, int(candidates.doc_ids[q, k]))
        for q in range(min(config.questions, len(candidates.mask)))
        for k in range(min(config.documents, candidates.mask.shape[1]))
        if candidates.mask[q, k]
    ]


def _lm_batches(
    workspace: Workspace, config: LMConfig, rows: Sequence[tuple[int, int]]
) -> Callable[[int], LMBatch]:
    questions = workspace.questions["train"]
    prompts = training_prompts(workspace.config.prompt, workspace.lm)
    contexts = [
        prompts.context(questions[q].text, workspace.documents.get([doc])) for q, doc in rows
    ]
    targets = [prompts.target(questions[q].answers[0]) for q, _ in rows]
    length = -(-max(map(len, contexts)) // 32) * 32

    def batch_at(step: int) -> LMBatch:
        chosen = batch_rows(
            workspace.config.seed, step, num_examples=len(rows), batch_size=config.batch_size
        )
        packed = prompts.pack(
            [contexts[row] for row in chosen],
            [targets[row] for row in chosen],
            context_length=length,
        )
        return LMBatch(*map(jnp.asarray, packed))

    return batch_at

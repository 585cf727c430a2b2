"""The two halves of dual training as resumable stages.

Q questions, K candidates, B questions a step, M documents a step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ragjax.adaptation.config import LMConfig, RetrieverConfig
from ragjax.adaptation.workspace import Workspace, make_prompts
from ragjax.data import Question, batch_rows, num_steps, pad_right
from ragjax.index import SearchResult
from ragjax.losses import lsr_loss, pdist_loss
from ragjax.models.inputs import LMBatch, Tokens
from ragjax.models.llama_training import merge_trainable, split_trainable
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.lm import make_lm_loss
from ragjax.training.loop import LoopConfig, run_steps
from ragjax.training.lsr import LsrBatch, make_lsr_loss
from ragjax.training.optimizer import OptimizerConfig, make_optimizer
from ragjax.training.steps import TrainState, init_state, make_train_step

_OBJECTIVES = {"pdist": pdist_loss, "lsr": lsr_loss}


def train_lm(
    workspace: Workspace, questions: Sequence[Question], candidates: SearchResult
) -> dict[str, Any]:
    """Fine-tunes the language model on each question with each of its documents.

    Args:
        workspace: Data, models, options.
        questions: Q training questions, with answers.
        candidates: `[Q, K]` documents, of which the best `documents` are used.

    Returns:
        The adapted parameters, sharing the frozen ones with `workspace.lm`.
    """
    config = workspace.config.language_model
    rows = lm_rows(config, candidates)
    steps = num_steps(num_examples=len(rows), batch_size=config.batch_size, epochs=config.epochs)
    trainable, frozen = split_trainable(
        workspace.lm.params,
        config.train_layers or None,
        embeddings=config.train_layers == 0,
    )
    optimizer = make_optimizer(_optimizer_config(config, steps), total_steps=steps)
    step = make_train_step(make_lm_loss(workspace.lm.token_log_probs, merge_trainable), optimizer)
    state = _run(
        workspace,
        "lm",
        steps,
        step,
        init_state(trainable, optimizer, workspace.config.seed),
        _lm_batches(workspace, questions, rows),
        frozen=frozen,
        index_version=0,
    )
    return merge_trainable(state.params, frozen)


def lm_rows(config: LMConfig, candidates: SearchResult) -> list[tuple[int, int]]:
    """Returns the training rows (question, corpus row) of the LM half."""
    return [
        (q, int(candidates.doc_ids[q, k]))
        for q in range(min(config.questions, len(candidates.mask)))
        for k in range(min(config.documents, candidates.mask.shape[1]))
        if candidates.mask[q, k]
    ]


def _lm_batches(
    workspace: Workspace, questions: Sequence[Question], rows: Sequence[tuple[int, int]]
) -> Callable[[int], LMBatch]:
    # A newline ends the answer: the model learns to stop where generation stops.
    prompts = make_prompts(workspace.config, workspace.lm, end_id=newline_id(workspace))
    contexts = [
        prompts.context(questions[q].text, workspace.documents.get([doc])) for q, doc in rows
    ]
    targets = [prompts.target(questions[q].answers[0]) for q, _ in rows]
    length = max(map(len, contexts))
    config = workspace.config.language_model

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


def newline_id(workspace: Workspace) -> int | None:
    """Returns the token that is one newline, if the language model has it."""
    ids = workspace.lm.tokenizer.encode("\n", add_special_tokens=False).ids
    return ids[0] if len(ids) == 1 else None


def tower_params(workspace: Workspace) -> dict[str, Any]:
    """Returns un-adapted towers by name: one `shared` tower, or `query` and `doc` apart."""
    params = workspace.encoder.params
    if workspace.config.retriever.train == "shared":
        return {"shared": params}
    return {"query": params, "doc": params}


def train_retriever(
    workspace: Workspace,
    round_number: int,
    params: dict[str, Any],
    questions: Sequence[Question],
    candidates: SearchResult,
    targets: np.ndarray,
) -> dict[str, Any]:
    """Teaches the retriever one round of LSR.

    Args:
        workspace: Data, models, options.
        round_number: From 0; each round has its own checkpoints and batches.
        params: Towers before the round.
        questions: Q training questions.
        candidates: `[Q, K]` documents retrieved with those towers.
        targets: `[Q, K]` float32, log p_LSR of the candidates.

    Returns:
        The towers after the round.
    """
    config = workspace.config.retriever
    steps = num_steps(
        num_examples=len(questions), batch_size=config.batch_size, epochs=config.epochs
    )
    trainable = {k: v for k, v in params.items() if config.train != "query" or k == "query"}
    frozen = {k: v for k, v in params.items() if k not in trainable}
    rates = {k: config.learning_rate for k in trainable}
    if "doc" in rates and config.doc_learning_rate >= 0:
        rates["doc"] = config.doc_learning_rate
    optimizer = make_optimizer(
        _optimizer_config(config, steps), total_steps=steps, learning_rates=rates
    )
    loss = make_lsr_loss(
        workspace.encoder.encode,
        _OBJECTIVES[config.objective],
        scale=config.scale,
        in_batch=config.negatives == "batch",
    )
    state = _run(
        workspace,
        f"retriever-{round_number}",
        steps,
        make_train_step(loss, optimizer),
        init_state(trainable, optimizer, workspace.config.seed + round_number),
        _lsr_batches(workspace, round_number, questions, candidates, targets),
        frozen=frozen,
        index_version=round_number,
    )
    return {**frozen, **state.params}


def _lsr_batches(
    workspace: Workspace,
    round_number: int,
    questions: Sequence[Question],
    candidates: SearchResult,
    targets: np.ndarray,
) -> Callable[[int], LsrBatch]:
    config = workspace.config.retriever
    query_ids = workspace.query_ids(questions)
    query_length = _bucket(workspace, max(map(len, query_ids)))
    seed = workspace.config.seed + round_number
    num_docs = config.batch_size * candidates.mask.shape[1]

    def batch_at(step: int) -> LsrBatch:
        rows = batch_rows(seed, step, num_examples=len(questions), batch_size=config.batch_size)
        docs = _batch_docs(candidates, rows, num_docs, len(workspace.doc_ids), (seed, step))
        found = {doc: column for column, doc in enumerate(docs)}
        target = np.full((len(rows), num_docs), -np.inf, np.float32)
        mask = np.zeros((len(rows), num_docs), bool)
        for b, row in enumerate(rows):
            for k in np.flatnonzero(candidates.mask[row]):
                column = found[int(candidates.doc_ids[row, k])]
                target[b, column], mask[b, column] = targets[row, k], True
        doc_ids = [_cut(workspace.doc_ids[doc], config.doc_tokens) for doc in docs]
        filler: list[list[int]] = [[]] * (num_docs - len(docs))
        return LsrBatch(
            queries=_tokens(workspace, [query_ids[row] for row in rows], query_length),
            docs=_tokens(workspace, doc_ids + filler, _bucket(workspace, max(map(len, doc_ids)))),
            target_log_probs=jnp.asarray(target),
            candidate_mask=jnp.asarray(mask),
            doc_mask=jnp.arange(num_docs) < len(docs),
        )

    return batch_at


def _cut(ids: list[int], length: int) -> list[int]:
    """Cuts token ids, keeping the last one: an encoder expects its closing [SEP]."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _batch_docs(
    candidates: SearchResult,
    rows: np.ndarray,
    num_docs: int,
    corpus_size: int,
    seed: tuple[int, int],
) -> list[int]:
    """Returns the batch's distinct candidates, then random documents in the slots left over.

    Questions share candidates, so slots are left over; a random document there costs nothing and
    is one more negative.
    """
    chosen = np.unique(candidates.doc_ids[rows][candidates.mask[rows]]).tolist()
    extra = np.random.default_rng(seed).permutation(corpus_size)[: 2 * num_docs]
    known = set(chosen)
    return (chosen + [int(doc) for doc in extra if int(doc) not in known])[:num_docs]


def _tokens(workspace: Workspace, ids: Sequence[Sequence[int]], length: int) -> Tokens:
    padded = pad_right(ids, length=length, pad_id=workspace.encoder.pad_id)
    return Tokens(jnp.asarray(padded.ids), jnp.asarray(padded.mask))


def _bucket(workspace: Workspace, length: int) -> int:
    return next(bucket for bucket in workspace.buckets() if bucket >= length)


def _optimizer_config(config: LMConfig | RetrieverConfig, steps: int) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=config.learning_rate,
        warmup_steps=int(config.warmup_fraction * steps),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )


def _run(
    workspace: Workspace,
    stage: str,
    steps: int,
    step_fn: Callable[..., tuple[TrainState, dict]],
    state: TrainState,
    batch_at: Callable[[int], Any],
    *,
    frozen: Any,
    index_version: int,
) -> TrainState:
    info = {"index_version": index_version, "num_steps": steps}
    return run_steps(
        LoopConfig(
            stage=stage, num_steps=steps, checkpoint_every=workspace.config.checkpoint_every
        ),
        step_fn,
        state,
        batch_at,
        frozen=frozen,
        checkpointer=Checkpointer(workspace.folder / "checkpoints" / stage),
        log=workspace.metrics,
        stop=workspace.stop,
        info=info,
    )

"""The two halves of dual training as resumable stages.

Q questions, K candidates, B questions a step, M documents a step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ragjax.adaptation.config import LMConfig, RetrieverConfig
from ragjax.adaptation.parts import lm_parts, retriever_parts, whole_towers
from ragjax.adaptation.workspace import Workspace, make_prompts
from ragjax.data import Question, batch_rows, num_steps, pad_right
from ragjax.index import SearchResult
from ragjax.losses import lsr_loss, pdist_loss
from ragjax.models.inputs import LMBatch, Tokens
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.lm import answer_tokens, make_lm_loss
from ragjax.training.loop import HostWork, LoopConfig, run_steps
from ragjax.training.lsr import LsrBatch, make_lsr_loss
from ragjax.training.optimizer import OptimizerConfig, make_optimizer
from ragjax.training.steps import TrainState, init_state, make_train_step

Rows: TypeAlias = NDArray[np.int64]
BatchOf: TypeAlias = Callable[[int], "Lessons"]
# With a target that is 1 on the relevant document, KL(target‖p_R) is DPR's loss.
_OBJECTIVES = {"pdist": pdist_loss, "lsr": lsr_loss, "dpr": pdist_loss}


def train_lm(
    workspace: Workspace, questions: Sequence[Question], candidates: SearchResult
) -> dict[str, Any]:
    """Fine-tunes the language model on each question with each of its documents.

    Args:
        workspace: Data, models, options.
        questions: Q training questions, with answers.
        candidates: `[Q, K]` documents, of which the best `documents` are used.

    Returns:
        The adapted parameters, sharing the frozen ones with `workspace.lm`; with LoRA the adapters
        lie beside the weights (`ragjax.models.lora.merge` folds them in).
    """
    config = workspace.config.language_model
    rows = lm_rows(config, candidates)
    steps = num_steps(num_examples=len(rows), batch_size=config.batch_size, epochs=config.epochs)
    lm = workspace.lm
    parts = lm_parts(config, lm.family, lm.params, seed=workspace.config.seed)
    log_probs = functools.partial(lm.family.token_log_probs, lm.config, remat=config.remat)
    optimizer = make_optimizer(_optimizer_config(config, steps), total_steps=steps)
    step = make_train_step(
        make_lm_loss(
            lambda params, batch: log_probs(workspace.in_compute_dtype(params), batch), parts.merge
        ),
        optimizer,
        accumulate=config.accumulate,
        weight=answer_tokens,
    )
    state = _run(
        workspace,
        "lm",
        steps,
        step,
        init_state(parts.trainable, optimizer, workspace.config.seed),
        _lm_batches(workspace, questions, rows),
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
    workspace: Workspace, questions: Sequence[Question], rows: Sequence[tuple[int, int]]
) -> Callable[[int], LMBatch]:
    # Something ends the answer: the model learns to stop where generation stops.
    prompts = make_prompts(workspace.config, workspace.lm, end_id=answer_end_id(workspace))
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


def answer_end_id(workspace: Workspace) -> int | None:
    """Returns what the model is trained to end targets with, else a newline, if it is one token."""
    if (end_id := workspace.lm.text_format.target_end_id) is not None:
        return end_id
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
    batch_of: BatchOf,
    host: HostWork | None = None,
) -> dict[str, Any]:
    """Teaches the retriever one round.

    Args:
        workspace: Data, models, options.
        round_number: From 0; each round has its own checkpoints and batches.
        params: Towers before the round.
        questions: Q training questions.
        batch_of: Step to the lessons of its questions.
        host: Called before each step, where the lessons depend on the towers of that moment.

    Returns:
        The towers after the round.
    """
    config = workspace.config.retriever
    steps = retriever_steps(config, len(questions))
    parts = retriever_parts(config, params, seed=workspace.config.seed + round_number)
    rates = {k: config.learning_rate for k in parts.trainable}
    if "doc" in rates and config.doc_learning_rate >= 0:
        rates["doc"] = config.doc_learning_rate
    optimizer = make_optimizer(
        _optimizer_config(config, steps), total_steps=steps, learning_rates=rates
    )
    loss = make_lsr_loss(
        workspace.training_encode(),
        _OBJECTIVES[config.objective],
        scale=config.scale,
        in_batch=config.negatives == "batch",
        merge=parts.merge,
    )
    state = _run(
        workspace,
        f"retriever-{round_number}",
        steps,
        make_train_step(loss, optimizer),
        init_state(parts.trainable, optimizer, workspace.config.seed + round_number),
        _lsr_batches(workspace, round_number, questions, batch_of),
        frozen=parts.frozen,
        index_version=round_number,
        host=host,
    )
    return whole_towers(parts, state.params)


def retriever_steps(config: RetrieverConfig, num_questions: int) -> int:
    """Returns the training steps of a round."""
    return num_steps(num_examples=num_questions, batch_size=config.batch_size, epochs=config.epochs)


def question_rows(workspace: Workspace, round_number: int, num_questions: int, step: int) -> Rows:
    """Returns the questions `[B]` of a step, a pure function of the seed and the step."""
    return batch_rows(
        workspace.config.seed + round_number,
        step,
        num_examples=num_questions,
        batch_size=workspace.config.retriever.batch_size,
    )


class Lessons(NamedTuple):
    """What a step teaches about B questions, K documents each."""

    doc_ids: NDArray[np.int32]  # [B, K] corpus rows
    mask: NDArray[np.bool_]  # [B, K]
    target_log_probs: NDArray[np.float32]  # [B, K] of those documents, log q
    # Judged documents of each question: they share the target wherever they stand in the batch,
    # also where another question brought them. Empty where a teacher set the target.
    positives: Sequence[frozenset[int]]


def fixed_lessons(
    workspace: Workspace,
    round_number: int,
    candidates: SearchResult,
    targets: NDArray[np.float32],
) -> BatchOf:
    """Returns lessons from candidates `[Q, K]` and targets `[Q, K]` known before the round."""

    def batch_of(step: int) -> Lessons:
        rows = question_rows(workspace, round_number, len(targets), step)
        empty = [frozenset[int]()] * len(rows)
        return Lessons(candidates.doc_ids[rows], candidates.mask[rows], targets[rows], empty)

    return batch_of


def labelled_lessons(
    found: SearchResult,
    gold: Sequence[frozenset[int]],
    num_documents: int,
    *,
    seed: tuple[int, int],
) -> Lessons:
    """Returns the lessons of relevance judgements: DPR with hard negatives that were retrieved.

    Args:
        found: `[B, D]` documents that the index returned, from which negatives are drawn.
        gold: Relevant documents of each question, at least one.
        num_documents: K, judged documents and negatives together.
        seed: Of the draw: the run's and the step.

    References:
        Karpukhin et al., Dense Passage Retrieval, 2020, section 3.2; Xiong et al., Approximate
        Nearest Neighbor Negative Contrastive Learning, 2021, section 4 (negatives from the top 200
        of a refreshed index).
    """
    shape = (len(gold), num_documents)
    doc_ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    draw = np.random.default_rng(seed)
    for row, relevant in enumerate(gold):
        positives = sorted(relevant)[: max(1, num_documents - 1)]
        negatives = [int(d) for d in found.doc_ids[row][found.mask[row]] if int(d) not in relevant]
        chosen = (positives + draw.permutation(negatives).tolist())[:num_documents]
        doc_ids[row, : len(chosen)], mask[row, : len(chosen)] = chosen, True
    return Lessons(doc_ids, mask, np.full(shape, -np.inf, np.float32), gold)


def _lsr_batches(
    workspace: Workspace, round_number: int, questions: Sequence[Question], batch_of: BatchOf
) -> Callable[[int], LsrBatch]:
    config = workspace.config.retriever
    query_ids = workspace.query_ids(questions)
    query_length = bucket_of(workspace, max(map(len, query_ids)))
    seed = workspace.config.seed + round_number

    def batch_at(step: int) -> LsrBatch:
        rows = question_rows(workspace, round_number, len(questions), step)
        lessons = batch_of(step)
        num_docs = lessons.mask.size
        docs = _batch_docs(lessons, num_docs, len(workspace.doc_ids), (seed, step))
        found = {doc: column for column, doc in enumerate(docs)}
        target = np.full((len(rows), num_docs), -np.inf, np.float32)
        mask = np.zeros((len(rows), num_docs), bool)
        for b, positives in enumerate(lessons.positives):
            for k in np.flatnonzero(lessons.mask[b]):
                column = found[int(lessons.doc_ids[b, k])]
                target[b, column], mask[b, column] = lessons.target_log_probs[b, k], True
            judged = [found[doc] for doc in positives if doc in found]
            if judged:
                target[b, judged], mask[b, judged] = -np.log(len(judged)), True
        doc_ids = [cut_ids(workspace.doc_ids[doc], config.doc_tokens) for doc in docs]
        filler: list[list[int]] = [[]] * (num_docs - len(docs))
        return LsrBatch(
            queries=_tokens(workspace, [query_ids[row] for row in rows], query_length),
            docs=_tokens(workspace, doc_ids + filler, bucket_of(workspace, max(map(len, doc_ids)))),
            target_log_probs=jnp.asarray(target),
            candidate_mask=jnp.asarray(mask),
            doc_mask=jnp.arange(num_docs) < len(docs),
        )

    return batch_at


def cut_ids(ids: list[int], length: int) -> list[int]:
    """Cuts token ids, keeping the last one: an encoder expects its closing [SEP]."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _batch_docs(
    lessons: Lessons, num_docs: int, corpus_size: int, seed: tuple[int, int]
) -> list[int]:
    """Returns the batch's distinct candidates, then random documents in the slots left over.

    Questions share candidates, so slots are left over; a random document there costs nothing and
    is one more negative.
    """
    chosen = np.unique(lessons.doc_ids[lessons.mask]).tolist()
    extra = np.random.default_rng(seed).permutation(corpus_size)[: 2 * num_docs]
    known = set(chosen)
    return (chosen + [int(doc) for doc in extra if int(doc) not in known])[:num_docs]


def _tokens(workspace: Workspace, ids: Sequence[Sequence[int]], length: int) -> Tokens:
    padded = pad_right(ids, length=length, pad_id=workspace.encoder.pad_id)
    return Tokens(jnp.asarray(padded.ids), jnp.asarray(padded.mask))


def bucket_of(workspace: Workspace, length: int) -> int:
    """Returns the length that an encoder's batch is padded to."""
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
    host: HostWork | None = None,
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
        host=host,
    )

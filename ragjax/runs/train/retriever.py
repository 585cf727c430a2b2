"""The two halves of dual training as resumable stages.

Q questions, K candidates, B questions a step, M documents a step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ragjax.data import Question, num_steps, pad_right
from ragjax.index import SearchResult
from ragjax.losses import lsr_loss, pdist_loss
from ragjax.models.inputs import Tokens
from ragjax.runs.options.dual import RetrieverConfig
from ragjax.runs.train.stages import optimizer_config, run_stage
from ragjax.runs.trainable import retriever_parts, whole_towers
from ragjax.runs.workspace import Workspace, bucket_of, cut_ids, question_rows
from ragjax.training.loop import HostWork
from ragjax.training.lsr import LsrBatch, make_lsr_loss
from ragjax.training.optimizer import make_optimizer
from ragjax.training.steps import init_state, make_train_step

BatchOf: TypeAlias = Callable[[int], "Lessons"]
# With a target that is 1 on the relevant document, KL(target‖p_R) is DPR's loss.
_OBJECTIVES = {"pdist": pdist_loss, "lsr": lsr_loss, "dpr": pdist_loss}


def train_retriever(
    workspace: Workspace,
    config: RetrieverConfig,
    round_number: int,
    params: dict[str, Any],
    questions: Sequence[Question],
    batch_of: BatchOf,
    host: HostWork | None = None,
) -> dict[str, Any]:
    """Teaches the retriever one round.

    Args:
        workspace: Data and models.
        config: Options of the stage.
        round_number: From 0; each round has its own checkpoints and batches.
        params: Towers before the round.
        questions: Q training questions.
        batch_of: Step to the lessons of its questions.
        host: Called before each step, where the lessons depend on the towers of that moment.

    Returns:
        The towers after the round.
    """
    steps = retriever_steps(config, len(questions))
    parts = retriever_parts(config, params, seed=workspace.config.seed + round_number)
    rates = {k: config.learning_rate for k in parts.trainable}
    if "doc" in rates and config.doc_learning_rate >= 0:
        rates["doc"] = config.doc_learning_rate
    optimizer = make_optimizer(
        optimizer_config(config, steps), total_steps=steps, learning_rates=rates
    )
    loss = make_lsr_loss(
        workspace.training_encode(),
        _OBJECTIVES[config.objective],
        scale=config.scale,
        in_batch=config.negatives == "batch",
        merge=parts.merge,
    )
    state = run_stage(
        workspace,
        f"retriever-{round_number}",
        steps,
        make_train_step(loss, optimizer),
        init_state(parts.trainable, optimizer, workspace.config.seed + round_number),
        _lsr_batches(workspace, config, round_number, questions, batch_of),
        frozen=parts.frozen,
        index_version=round_number,
        host=host,
    )
    return whole_towers(parts, state.params)


def retriever_steps(config: RetrieverConfig, num_questions: int) -> int:
    """Returns the training steps of a round."""
    return num_steps(num_examples=num_questions, batch_size=config.batch_size, epochs=config.epochs)


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
    *,
    batch_size: int,
) -> BatchOf:
    """Returns lessons from candidates `[Q, K]` and targets `[Q, K]` known before the round."""

    def batch_of(step: int) -> Lessons:
        rows = question_rows(workspace, round_number, len(targets), step, batch_size=batch_size)
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
    workspace: Workspace,
    config: RetrieverConfig,
    round_number: int,
    questions: Sequence[Question],
    batch_of: BatchOf,
) -> Callable[[int], LsrBatch]:
    query_ids = workspace.query_ids(questions)
    query_length = bucket_of(workspace, max(map(len, query_ids)))
    seed = workspace.config.seed + round_number

    def batch_at(step: int) -> LsrBatch:
        rows = question_rows(
            workspace, round_number, len(questions), step, batch_size=config.batch_size
        )
        lessons = batch_of(step)
        num_docs = lessons.mask.size
        docs = _batch_docs(lessons, num_docs, len(workspace.doc_tokens), (seed, step))
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
        doc_ids = [cut_ids(workspace.doc_tokens[doc], config.doc_tokens) for doc in docs]
        filler: list[list[int]] = [[]] * (num_docs - len(docs))
        return LsrBatch(
            queries=_tokens(workspace, [query_ids[row] for row in rows], query_length),
            docs=_tokens(workspace, doc_ids + filler, bucket_of(workspace, max(map(len, doc_ids)))),
            target_log_probs=jnp.asarray(target),
            candidate_mask=jnp.asarray(mask),
            doc_mask=jnp.arange(num_docs) < len(docs),
        )

    return batch_at


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

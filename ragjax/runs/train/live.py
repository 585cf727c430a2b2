"""The retriever half with live retrieval: candidates of each step from an index kept fresh.

Q questions, B of them a step, K candidates, N documents, D embedding size.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from ragjax.index import Bm25Index
from ragjax.refresh import (
    BuildOptions,
    EmbeddingDrift,
    EncodeTask,
    Executor,
    PartialPolicy,
    ProcessExecutor,
    Refresher,
    RefreshOptions,
    ThreadExecutor,
    parse_trigger,
)
from ragjax.runs.indexes import Retriever, corpus_task, live_search
from ragjax.runs.options.dual import RetrieverConfig
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.teacher import score_step, target_log_probs
from ragjax.runs.train.retriever import BatchOf, Lessons, labelled_lessons, train_retriever
from ragjax.runs.trainable import retriever_parts, whole_towers
from ragjax.runs.workspace import FrozenLM, Workspace, gold_sets, question_rows
from ragjax.training.live import LiveRetrieval, refresh_trigger
from ragjax.training.lsr import towers
from ragjax.training.score_cache import ResultCache, Score

# Questions whose results measure the recall of an index and how much a refresh changed them.
_PROBES = 64
_DRIFT_PROBES = 64
_ROWS_PER_SHARD = 512


class LiveHalf(NamedTuple):
    """What the retriever half needs to train with live retrieval."""

    retrieval: LiveRetrieval  # the host's side of a step
    batch_of: BatchOf


def train_live(
    workspace: Workspace,
    config: RetrieverConfig,
    bm25: Bm25Index,
    before: Retriever,
    params: dict[str, Any],
    lm: FrozenLM,
    cache: ResultCache[Score],
) -> dict[str, Any]:
    """Teaches the retriever from documents retrieved at each step with the towers of that moment.

    Args:
        workspace: Data, models, options; `refresh.mode` says how fresh the index is.
        config: Options of the stage.
        bm25: Lexical side of the candidates.
        before: The un-adapted retriever, whose embeddings are the first generation.
        params: Towers before training.
        lm: Scores the candidates of the LSR objectives.
        cache: Its scores, added to step by step.

    Returns:
        The towers after training.
    """
    questions = workspace.questions["train"]
    if config.objective == "dpr":
        # Labels need the dense index's own mistakes; a teacher the best candidates there are.
        half = open_labelled(workspace, config, params, before.embeddings)
    else:
        half = open_taught(workspace, config, bm25, before, params, lm, cache)
    with closing(half.retrieval.refresher):
        return train_retriever(
            workspace, config, 0, params, questions, half.batch_of, host=half.retrieval
        )


def open_labelled(
    workspace: Workspace,
    config: RetrieverConfig,
    params: dict[str, Any],
    embeddings: NDArray[np.float32],
) -> LiveHalf:
    """Opens live retrieval of hard negatives for the relevance judgements (`dpr`).

    Args:
        workspace: Data, models, options.
        config: Options of the stage.
        params: Towers before training.
        embeddings: `[N, D]` of the documents with them.

    Returns:
        The host's side, whose refresher the caller closes, and the lessons.
    """
    retrieval = _open(workspace, config, params, embeddings, None, 1.0, k=config.negative_depth)
    gold = gold_sets(workspace, "train")

    def batch_of(step: int) -> Lessons:
        _, rows, found = retrieval.retrieved(step)
        chosen = [gold[row] for row in rows]
        seed = (workspace.config.seed, step)
        return labelled_lessons(found, chosen, config.candidates, seed=seed)

    return LiveHalf(retrieval, batch_of)


def open_taught(
    workspace: Workspace,
    config: RetrieverConfig,
    bm25: Bm25Index,
    before: Retriever,
    params: dict[str, Any],
    lm: FrozenLM,
    cache: ResultCache[Score],
) -> LiveHalf:
    """Opens live retrieval of candidates that the language model scores; see `train_live`."""
    questions = workspace.questions["train"]
    retrieval = _open(
        workspace,
        config,
        params,
        before.embeddings,
        bm25,
        before.hybrid.dense_weight,
        k=config.candidates,
    )

    def batch_of(step: int) -> Lessons:
        _, rows, found = retrieval.retrieved(step)
        chosen = [questions[row] for row in rows]
        scores = score_step(workspace, lm, chosen, found, cache)
        targets = target_log_probs(config.target, scores, found)
        return Lessons(found.doc_ids, found.mask, targets, [frozenset()] * len(rows))

    return LiveHalf(retrieval, batch_of)


def _open(
    workspace: Workspace,
    config: RetrieverConfig,
    params: dict[str, Any],
    embeddings: NDArray[np.float32],
    bm25: Bm25Index | None,
    dense_weight: float,
    *,
    k: int,
) -> LiveRetrieval:
    questions = workspace.questions["train"]
    task = workspace_task(workspace)
    parts = retriever_parts(config, params, seed=workspace.config.seed)
    live: list[LiveRetrieval] = []  # filled below: its parts look at its parameters
    refresher = open_refresher(workspace, task, lambda: live[0].query_params)
    retrieval = LiveRetrieval(
        refresher,
        towers=lambda trainable: towers(whole_towers(parts, trainable), None),
        encode_queries=lambda params, rows: workspace.encode_queries(
            params, [questions[row] for row in rows]
        ),
        rows_at=lambda step: question_rows(
            workspace, 0, len(questions), step, batch_size=config.batch_size
        ),
        k=min(k, len(workspace.doc_ids)),
        search=live_search(
            workspace,
            task,
            questions,
            bm25,
            dense_weight=dense_weight,
            doc_params=lambda: live[0].doc_params,
        ),
        embeddings=embeddings,
    )
    live.append(retrieval)
    return retrieval


def workspace_task(workspace: Workspace) -> EncodeTask:
    """Returns the corpus of a run as the refresher encodes it."""
    return corpus_task(
        workspace.encoder,
        workspace.doc_ids,
        encode_tokens=workspace.config.encode_tokens,
        rows_per_shard=_ROWS_PER_SHARD,
        corpus_fingerprint=workspace.dataset.corpus.fingerprint,
    )


def open_refresher(
    workspace: Workspace, task: EncodeTask, query_params: Callable[[], Any]
) -> Refresher:
    """Opens the refresher of a run in its folder `refresh`, as the options say.

    Args:
        workspace: Options, questions, folder.
        task: The corpus.
        query_params: Returns the live parameters of the query encoder.

    Raises:
        ValueError: For a trigger that cannot be read, or more devices than there are.
    """
    config = workspace.config.refresh
    mode = config.mode
    if mode == "off":
        raise ValueError("refresh.mode is off: there is nothing to refresh")
    drift = EmbeddingDrift(task, num_probes=_DRIFT_PROBES, seed=workspace.config.seed)
    train = workspace.questions["train"]
    probes = (workspace.questions["dev"] or train)[:_PROBES]
    folder = workspace.folder / "refresh"
    return Refresher(
        folder,
        task,
        executor=_executor(config, folder),
        trigger=refresh_trigger(mode, parse_trigger(config.every, measure=drift)),
        options=refresh_options(config),
        probe_queries=lambda: workspace.encode_queries(query_params(), probes),
        report=workspace.report,
        check=workspace.stop.check,
    )


def refresh_options(config: RefreshConfig) -> RefreshOptions:
    """Returns the refresher's options for those of a run."""
    partial = PartialPolicy(config.partial, config.full_every) if config.partial < 1 else None
    return RefreshOptions(
        index=config.index,
        build=BuildOptions(deadline_seconds=config.deadline_seconds),
        keep=config.keep,
        on_failure=config.on_failure,
        max_index_lag_steps=config.max_lag,
        on_lag=config.on_lag,
        adopt_after=0 if config.mode == "sync" else config.adopt_after,
        partial=partial,
    )


def _executor(config: RefreshConfig, folder: Path) -> Executor:
    if config.workers:
        return ProcessExecutor(folder)
    if not config.devices:
        return ThreadExecutor()
    local = jax.local_devices()
    if config.devices >= len(local):
        raise ValueError(
            f"--refresh.devices {config.devices}: there are {len(local)} local devices and training"
            " needs one; use 0 to encode beside training"
        )
    return ThreadExecutor(local[-config.devices :])

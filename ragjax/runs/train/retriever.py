"""The retriever stage of dual training: rounds over fixed or live candidates.

Q questions, K candidates, B questions and W keyword queries a step, M documents a step, N
documents, D embedding size.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ragjax.data import batch_rows, encode_texts
from ragjax.index import Bm25Index, EmbeddingStore, SearchResult
from ragjax.losses import lsr_loss, pdist_loss
from ragjax.runs.found import findable_in_training, first_copies
from ragjax.runs.indexes import Retriever
from ragjax.runs.models import chunk_tokens
from ragjax.runs.options.dual import RetrieverConfig
from ragjax.runs.teachers.reading import score_step
from ragjax.runs.tokens import bucket_of, pad_tokens, truncated
from ragjax.runs.train.guard import Guard
from ragjax.runs.train.live import open_retrieval
from ragjax.runs.train.stages import Stage, run_stage, stage_steps, tower_rates
from ragjax.runs.train.targets import (
    Targets,
    Teaching,
    taught_targets,
    written_passages,
)
from ragjax.runs.trainable import split_towers
from ragjax.runs.workspace import Workspace
from ragjax.runs.written.pretext import Keywords
from ragjax.training.live import LiveRetrieval
from ragjax.training.loop import HostWork
from ragjax.training.lsr import LsrBatch, make_lsr_loss, real_questions
from ragjax.training.score_cache import ResultCache, Score

# Passages up to which all are permuted for a step, as for the results that were published; drawing
# a few of many is as random, but differs.
_PERMUTED = 100_000

# With a target that is 1 on the relevant document, KL(target‖p_R) is DPR's loss.
OBJECTIVES = {"pdist": pdist_loss, "lsr": lsr_loss, "dpr": pdist_loss}


# (step, its questions [B]) -> their targets
TargetsAt: TypeAlias = Callable[[int, NDArray[np.int64]], Targets]


class LiveTargets(NamedTuple):
    """Targets of candidates that are retrieved before each step."""

    retrieval: LiveRetrieval  # the host's side of a step
    at: TargetsAt


def train_retriever(
    workspace: Workspace,
    config: RetrieverConfig,
    round_number: int,
    params: dict[str, Any],
    targets_at: TargetsAt,
    host: HostWork | None = None,
    guard: Guard | None = None,
) -> dict[str, Any]:
    """Trains the retriever for one round.

    Args:
        workspace: Data and models.
        config: Options of the stage.
        round_number: From 0; each round has its own checkpoints and batches.
        params: Towers before the round.
        targets_at: Targets of the training questions of a step.
        host: Called before each step, where the targets depend on the towers of that moment.
        guard: Measures the towers every few steps; None: nobody does.

    Returns:
        The towers after the round.
    """
    seed = workspace.config.seed + round_number
    split = split_towers(config, params, seed=seed)
    stage = Stage(
        name=f"retriever-{round_number}",
        num_steps=stage_steps(config, len(workspace.questions["train"])),
        seed=seed,
        config=config,
        learning_rate=tower_rates(config, split.trainable),
        index_version=round_number,
        weight=real_questions,
    )
    encode_queries, encode = workspace.training_encodes()
    loss = make_lsr_loss(
        encode,
        OBJECTIVES[config.objective],
        scale=workspace.scale,
        in_batch=config.negatives == "batch",
        chunk_tokens=chunk_tokens(workspace.config),
        merge=split.merge,
        encode_queries=encode_queries,
        axis_name=workspace.layout.rows_axis,
    )
    batches = _lsr_batches(workspace, config, seed, targets_at)
    watch = guard.watch(stage.name, stage.num_steps, split.merged) if guard else None
    trained = run_stage(workspace, stage, split, loss, batches, host=host, watch=watch)
    return split.merged(trained)


def train_live(
    workspace: Workspace,
    config: RetrieverConfig,
    bm25: Bm25Index,
    before: Retriever,
    params: dict[str, Any],
    teaching: Teaching,
    cache: ResultCache[Score],
    guard: Guard | None = None,
) -> dict[str, Any]:
    """Trains the retriever on documents retrieved before each step with the current towers.

    Args:
        workspace: Data, models, options; `refresh.mode` decides how fresh the index is.
        config: Options of the stage.
        bm25: Joins the dense index for candidates that the language model scores.
        before: The base retriever, whose embeddings are the first generation.
        params: Towers before training.
        teaching: Sets the target of the LSR objectives; of no use with `dpr`.
        cache: Scores of its language model, added to step by step.
        guard: As in `train_retriever`.

    Returns:
        The towers after training.
    """
    if config.objective == "dpr":
        # Hard negatives are the dense index's own mistakes; scored are the best candidates.
        live = open_labelled(workspace, config, params, before.store)
    else:
        retrieval = open_retrieval(
            workspace,
            split_towers(config, params, seed=workspace.config.seed),
            before.store,
            k=config.candidates,
            batch_size=config.batch_size,
            bm25=bm25 if config.search == "hybrid" else None,
            dense_weight=before.hybrid.dense_weight,
        )

        def scored_at(step: int, rows: NDArray[np.int64]) -> Targets:
            found = retrieval.retrieved(step).found
            return taught_targets(workspace, teaching, rows, found, cache, score=score_step)

        live = LiveTargets(retrieval, scored_at)
    with closing(live.retrieval.refresher):
        return train_retriever(workspace, config, 0, params, live.at, live.retrieval, guard)


def open_labelled(
    workspace: Workspace,
    config: RetrieverConfig,
    params: dict[str, Any],
    store: EmbeddingStore | None = None,
) -> LiveTargets:
    """Opens live retrieval of hard negatives for the relevance judgements (`dpr`).

    Args:
        workspace: Data, models, options.
        config: Options of the stage.
        params: Towers before training.
        store: Embeddings of the documents with them; None encodes the documents.

    Returns:
        The retrieval, whose refresher the caller closes, and the targets.
    """
    seed = workspace.config.seed
    towers = split_towers(config, params, seed=seed)
    retrieval = open_retrieval(
        workspace, towers, store, k=config.negative_depth, batch_size=config.batch_size
    )
    relevant = [first_copies(workspace, rows) for rows in workspace.relevant_rows("train")]

    def targets_at(step: int, rows: NDArray[np.int64]) -> Targets:
        results, chosen = retrieval.retrieved(step).found, [relevant[row] for row in rows]
        return labelled_targets(results, chosen, config.candidates, seed=(seed, step))

    return LiveTargets(retrieval, targets_at)


def labelled_targets(
    results: SearchResult,
    relevant: Sequence[frozenset[int]],
    num_documents: int,
    *,
    seed: tuple[int, int],
) -> Targets:
    """Returns the targets of relevance judgements: DPR with hard negatives that were retrieved.

    Args:
        results: `[B, D]` documents that the index returned, from which negatives are drawn.
        relevant: Relevant documents of each question, at least one.
        num_documents: K, relevant documents and negatives together.
        seed: Of the draw: the run's and the step.

    References:
        Karpukhin et al., Dense Passage Retrieval, 2020, section 3.2; Xiong et al., Approximate
        Nearest Neighbor Negative Contrastive Learning, 2021, section 4 (negatives from the top 200
        of a refreshed index).
    """
    shape = (len(relevant), num_documents)
    doc_ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    draw = np.random.default_rng(seed)
    for row, positives in enumerate(relevant):
        returned = results.doc_ids[row][results.mask[row]].tolist()
        negatives = draw.permutation([doc for doc in returned if doc not in positives]).tolist()
        chosen = (sorted(positives)[: max(1, num_documents - 1)] + negatives)[:num_documents]
        doc_ids[row, : len(chosen)], mask[row, : len(chosen)] = chosen, True
    ones = np.ones(len(relevant), np.float32)
    return Targets(doc_ids, mask, np.full(shape, -np.inf, np.float32), relevant, ones)


def _lsr_batches(
    workspace: Workspace, config: RetrieverConfig, seed: int, targets_at: TargetsAt
) -> Callable[[int], LsrBatch]:
    encoder, query_ids = workspace.encoder, workspace.train_query_ids
    query_encoder = workspace.query_encoder
    query_length = bucket_of(query_encoder, max(map(len, query_ids)))
    keywords = Keywords(workspace.dataset.corpus, seed) if config.keywords else None
    own = findable_in_training(workspace).dropped
    firsts = {row: min(group) for row, group in workspace.dataset.twins.copies.items()}
    shortened = _rests(workspace)

    def batch_at(step: int) -> LsrBatch:
        rows = batch_rows(seed, step, num_examples=len(query_ids), batch_size=config.batch_size)
        targets = targets_at(step, rows)
        learnt, num_docs = targets.best(config.learnt), len(rows) * config.learnt + config.keywords
        chosen = np.unique(targets.doc_ids[learnt]).tolist()
        docs = _batch_docs(chosen, num_docs, len(workspace.doc_tokens), (seed, step), firsts)
        columns = {doc: column for column, doc in enumerate(docs)}
        log_probs = np.full((len(rows) + config.keywords, num_docs), -np.inf, np.float32)
        mask = np.zeros(log_probs.shape, bool)
        b, k = np.nonzero(targets.mask & np.isin(targets.doc_ids, docs))
        places = b, [columns[doc] for doc in targets.doc_ids[b, k].tolist()]
        log_probs[places], mask[places] = targets.log_probs[b, k], True
        for row, relevant in enumerate(targets.relevant):
            if there := [columns[doc] for doc in relevant if doc in columns]:
                each = np.log(targets.share[row] / len(there))
                log_probs[row, there] = np.logaddexp(log_probs[row, there], each)
                mask[row, there] = True
        queries = [query_ids[row] for row in rows]
        if keywords is not None:
            # The documents that no question brought, of which there are as many at least.
            asked = _keyword_ids(workspace, keywords, docs[len(chosen) :], (seed, step))
            for doc, ids in list(asked.items())[: config.keywords]:
                log_probs[len(queries), columns[doc]], mask[len(queries), columns[doc]] = 0, True
                queries.append(truncated(ids, query_length))
        # Of candidates that no question brought into the batch, the target goes to the others.
        with np.errstate(invalid="ignore"):
            total = np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
        log_probs -= np.where(np.isfinite(total), total, 0)
        excluded = np.zeros(mask.shape, bool)
        for place, row in enumerate(rows):
            excluded[place, [columns[doc] for doc in own[row] if doc in columns]] = True
        rests = {doc: ids for row in rows for doc, ids in shortened.get(int(row), ())}
        doc_ids = [
            truncated(rests.get(doc) or workspace.doc_tokens[doc], config.doc_tokens)
            for doc in docs
        ]
        padding: list[list[int]] = [[]] * (num_docs - len(docs))
        queries += [[]] * (len(log_probs) - len(queries))
        doc_length = bucket_of(encoder, max(map(len, doc_ids)))
        return LsrBatch(
            queries=pad_tokens(query_encoder, queries, query_length),
            docs=pad_tokens(encoder, doc_ids + padding, doc_length),
            target_log_probs=jnp.asarray(log_probs),
            candidate_mask=jnp.asarray(mask),
            doc_mask=jnp.arange(num_docs) < len(docs),
            excluded=jnp.asarray(excluded) if any(own) else None,
        )

    return batch_at


def _keyword_ids(
    workspace: Workspace, keywords: Keywords, docs: Sequence[int], seed: tuple[int, int]
) -> dict[int, list[int]]:
    """Returns by document the token ids of a keyword query, of those that have one."""
    draw = np.random.default_rng(seed)
    texts = {doc: text for doc in docs if (text := keywords.query(doc, draw))}
    encoder = workspace.query_encoder
    written = [encoder.query_prefix + text for text in texts.values()]
    encoded = encode_texts(encoder.tokenizer, written, max_length=encoder.max_length).ids
    return dict(zip(texts, encoded, strict=True))


def _rests(workspace: Workspace) -> dict[int, list[tuple[int, list[int]]]]:
    """Returns by training question the passages that are read without it, and their token ids."""
    encoder, questions = workspace.encoder, workspace.questions["train"]
    rows = [row for row, question in enumerate(questions) if question.rest]
    texts = [encoder.doc_prefix + questions[row].rest for row in rows]
    encoded = encode_texts(encoder.tokenizer, texts, max_length=encoder.max_length).ids
    passages = written_passages(workspace)
    return {
        row: [(doc, ids) for doc in passages[row]] for row, ids in zip(rows, encoded, strict=True)
    }


def _batch_docs(
    chosen: Sequence[int],
    num_docs: int,
    corpus_size: int,
    seed: tuple[int, int],
    firsts: Mapping[int, int],
) -> list[int]:
    """Returns the documents that were chosen, then random ones in the slots left over.

    Questions share candidates, so slots are left over; a random document there costs nothing and
    is one more negative.
    """
    rng, count = np.random.default_rng(seed), min(2 * num_docs, corpus_size)
    if corpus_size <= _PERMUTED:
        extra = rng.permutation(corpus_size)[:count]
    else:
        extra = rng.choice(corpus_size, count, replace=False)
    # Of copies the first, as in the candidates.
    others = dict.fromkeys(firsts.get(int(doc), int(doc)) for doc in extra)
    known = set(chosen)
    return [*chosen, *(doc for doc in others if doc not in known)][:num_docs]

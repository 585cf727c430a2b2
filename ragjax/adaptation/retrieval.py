"""The indexes of a run: BM25, dense before and after, and the hybrid of both.

Q questions, N documents, D embedding size.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragjax.adaptation.workspace import Workspace, tree_fingerprint
from ragjax.data import Question, passage_text
from ragjax.index import (
    Bm25Index,
    EmbeddingStore,
    EmbeddingWriter,
    HybridIndex,
    HybridQueries,
    Index,
    IndexSnapshot,
    SearchResult,
    StoreSpec,
    choose_dense_weight,
    choose_index,
)
from ragjax.models.inputs import Tokens
from ragjax.refresh import EncodeTask, encode_to_store, tqdm_progress
from ragjax.training.live import Search, search_dense, search_reranked

# A killed run encodes at most this many documents again.
_ROWS_PER_SHARD = 512
# Half each is what un-adapted models want where there is nothing to choose the weight on.
_DEFAULT_WEIGHT = 0.5


class Retriever(NamedTuple):
    """A dense index, the query encoder that goes with it, and its hybrid with BM25."""

    version: int  # 0 before training, then one more each time the corpus is encoded again
    query_params: Any
    dense: Index
    hybrid: HybridIndex
    embeddings: np.ndarray  # [N, D] of the documents, float32


class Rankings(NamedTuple):
    """What a retriever finds for the same questions in two ways."""

    dense: SearchResult
    hybrid: SearchResult
    queries: np.ndarray  # [Q, D] float32, their embeddings


def build_bm25(workspace: Workspace) -> Bm25Index:
    """Indexes the words of titles and texts."""
    return Bm25Index.build(passage_text(passage) for passage in workspace.dataset.corpus)


def build_retriever(
    workspace: Workspace,
    bm25: Bm25Index,
    *,
    version: int,
    query_params: Any,
    doc_params: Any,
    earlier: Sequence[Path] = (),
) -> Retriever:
    """Encodes the corpus (or opens what an earlier life of this run encoded) and indexes it.

    The weight of the hybrid is the one of highest MRR@10 on the dev questions.

    Args:
        workspace: Data and models.
        bm25: The lexical side.
        version: Number of this index.
        query_params: Parameters of the query encoder.
        doc_params: Parameters of the document encoder.
        earlier: Folders of embeddings of other runs, which are read where this encoder made them
            of this corpus.

    Returns:
        The retriever; its embeddings lie in `index/VERSION` of the output folder, or where they
        were found.
    """
    folder = workspace.folder / "index" / str(version)
    embeddings = _encode_corpus(workspace, doc_params, folder, earlier)
    choice = choose_index(*embeddings.shape)
    if version == 0:
        workspace.report(choice.reason)
    dense = choice.build(embeddings)
    weight = _DEFAULT_WEIGHT
    dev = workspace.questions["dev"]
    if dev:
        queries = _hybrid_queries(workspace, query_params, dev)
        gold = [[row for row, g in rows.items() if g > 0] for rows in workspace.gold_rows("dev")]
        weight = choose_dense_weight(dense, bm25, queries, gold).weight
    chosen = f"chosen on {len(dev)} dev questions" if dev else "no dev questions to choose it on"
    workspace.report(
        f"index {version}: weight of the dense side in the hybrid {weight:g} ({chosen})"
    )
    hybrid = HybridIndex(dense, bm25, dense_weight=weight)
    return Retriever(version, query_params, dense, hybrid, embeddings)


def search(
    workspace: Workspace, retriever: Retriever, questions: Sequence[Question], k: int
) -> Rankings:
    """Returns the k best documents of each question, dense and hybrid."""
    queries = _hybrid_queries(workspace, retriever.query_params, questions)
    return Rankings(
        retriever.dense.search(queries.embeddings, k),
        retriever.hybrid.search(queries, k),
        np.asarray(queries.embeddings),
    )


def doc_logits(
    retriever: Retriever, queries: np.ndarray, found: SearchResult, *, scale: float
) -> np.ndarray:
    """Returns the logits of p_R: scale · cosine, whatever found the documents.

    Only that score is trained (or scaled) to be a log-probability, and training weighs hybrid
    candidates the same way; sums of z-scores and BM25 scores have no such unit.

    Args:
        retriever: Whose p_R it is.
        queries: `[Q, D]` float32, embeddings by its query encoder.
        found: `[Q, K]` documents.
        scale: Factor from cosine to logit.

    Returns:
        `[Q, K]` float32, 0 where masked.
    """
    docs = retriever.embeddings[np.maximum(found.doc_ids, 0)]  # [Q, K, D]
    cosines = np.einsum("qd,qkd->qk", queries, docs)
    return np.where(found.mask, scale * cosines, 0).astype(np.float32)


def live_search(
    workspace: Workspace,
    task: EncodeTask,
    questions: Sequence[Question],
    bm25: Bm25Index | None,
    *,
    dense_weight: float,
    doc_params: Callable[[], Any],
) -> Search:
    """Returns how the documents of a training step are found in the index that serves.

    Args:
        workspace: Options: `refresh.mode` and `overfetch`.
        task: The documents, for `rerank`.
        questions: Q training questions.
        bm25: Joins the dense side; None: dense alone.
        dense_weight: Weight of the dense side.
        doc_params: Returns the live parameters of the document encoder.
    """
    config = workspace.config.refresh
    # With BM25 the hybrid looks that deep already.
    factor = config.overfetch if bm25 is None else 1
    dense = (
        search_reranked(task, doc_params, factor=factor)
        if config.mode == "rerank"
        else search_dense
    )
    if bm25 is None:
        return dense

    def search_both(
        snapshot: IndexSnapshot, rows: np.ndarray, embeddings: np.ndarray, k: int
    ) -> SearchResult:
        found = _Found(dense, snapshot, rows)
        # Equally deep in every mode, so that they differ in freshness only.
        hybrid = HybridIndex(found, bm25, dense_weight=dense_weight, depth=config.overfetch * k)
        return hybrid.search(HybridQueries(embeddings, [questions[row].text for row in rows]), k)

    return search_both


class _Found:
    """One step's dense search as an index, for the hybrid."""

    def __init__(self, search: Search, snapshot: IndexSnapshot, rows: np.ndarray) -> None:
        self._search, self._snapshot, self._rows = search, snapshot, rows

    @property
    def size(self) -> int:
        """Number of documents."""
        return self._snapshot.index.size

    def search(self, queries: Any, k: int) -> SearchResult:
        """Returns the k best documents of each query."""
        return self._search(self._snapshot, self._rows, queries, k)


def _hybrid_queries(
    workspace: Workspace, params: Any, questions: Sequence[Question]
) -> HybridQueries:
    return HybridQueries(
        workspace.encode_queries(params, questions), [question.text for question in questions]
    )


def _encode_corpus(
    workspace: Workspace, params: Any, folder: Path, earlier: Sequence[Path]
) -> np.ndarray:
    spec = StoreSpec(
        size=len(workspace.doc_ids),
        dim=workspace.encoder.embedding_size,
        model_fingerprint=tree_fingerprint(params),
        corpus_fingerprint=workspace.dataset.corpus.fingerprint,
        settings={"max_length": workspace.encoder.max_length, "source": workspace.encoder.source},
        rows_per_shard=_ROWS_PER_SHARD,
    )
    if folder.exists():
        store = EmbeddingStore.open(
            folder,
            model_fingerprint=spec.model_fingerprint,
            corpus_fingerprint=spec.corpus_fingerprint,
        )
        return store.read()
    for other in earlier:
        try:
            store = EmbeddingStore.open(
                other,
                model_fingerprint=spec.model_fingerprint,
                corpus_fingerprint=spec.corpus_fingerprint,
                settings=spec.settings,
            )
        except (FileNotFoundError, ValueError):
            continue  # of another encoder or corpus, or damaged: it is encoded again
        workspace.report(f"embeddings of the documents: {other}")
        return store.read()
    draw = tqdm_progress(f"encoding for index {folder.name}")

    def progress(state: Any) -> None:
        draw(state)
        workspace.stop.check()

    folder.parent.mkdir(parents=True, exist_ok=True)
    store = encode_to_store(
        workspace.encoder.encode,
        params,
        workspace.doc_ids,
        list,
        EmbeddingWriter.open(folder, spec),
        pad_id=workspace.encoder.pad_id,
        options=workspace.encode_options(),
        make_tokens=Tokens,
        progress=progress,
    )
    return store.read()

"""The indexes of a run: BM25, dense before and after, and the hybrid of both.

Q questions, N documents, D embedding size.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragjax.data import Question, passage_text
from ragjax.data.truth import TRUTHS
from ragjax.index import (
    USUAL_WEIGHT,
    Bm25Index,
    EmbeddingStore,
    EmbeddingWriter,
    HybridIndex,
    HybridQueries,
    Index,
    MilvusIndex,
    ScannIndex,
    SearchResult,
    StoredEmbeddings,
    choose_dense_weight,
    choose_index,
    fetch_store,
)
from ragjax.index.objects import is_url, published
from ragjax.index.store import MANIFEST
from ragjax.refresh import (
    BuildOptions,
    EncodeTask,
    encode_to_store,
    estimate_build_seconds,
    live_embeddings,
    rerank,
    tqdm_progress,
)
from ragjax.refresh.build import ScannBuild
from ragjax.refresh.task import Cancelled, params_digest
from ragjax.runs.compare.choice import FIGURE_DEPTH, judge_problem, ranking_figure
from ragjax.runs.found import FindableIndex, findable_in
from ragjax.runs.workspace import Workspace
from ragjax.storage import kept_folder, sha256
from ragjax.training.live import StepQueries, StepSearch, search_dense, search_reranked
from ragjax.training.lsr import towers


class Retriever(NamedTuple):
    """A dense index, the query encoder that goes with it, and its hybrid with BM25."""

    version: int  # 0 before training, then one more each time the corpus is encoded again
    query_params: Any
    dense: Index
    hybrid: HybridIndex
    embeddings: StoredEmbeddings  # [N, D] of the documents, float32
    store: EmbeddingStore  # of the same, on disk


class Rankings(NamedTuple):
    """What a retriever finds for the same questions in two ways."""

    dense: SearchResult
    hybrid: SearchResult
    queries: np.ndarray  # [Q, D] float32, their embeddings


def build_bm25(workspace: Workspace) -> Bm25Index:
    """Indexes the words of titles and texts once, and says how they are made."""
    corpus = workspace.dataset.corpus
    bm25 = Bm25Index.kept(
        corpus.cache,
        lambda: map(passage_text, corpus),
        identity=corpus.fingerprint,
        language=workspace.config.data_options.language,
    )
    workspace.log(f"BM25: {bm25.describe()}")
    return bm25


def build_retriever(
    workspace: Workspace,
    bm25: Bm25Index,
    *,
    version: int,
    query_params: Any,
    doc_params: Any,
    earlier: Sequence[Path] = (),
    dense_weight: float | None = None,
) -> Retriever:
    """Encodes the corpus (or opens what an earlier life encoded, if undamaged) and indexes it.

    The weight of the hybrid is chosen by MRR@10 on the dev questions, see `choose_dense_weight`; it
    is the usual one where a language model wrote them.

    Args:
        workspace: Data and models.
        bm25: The lexical side.
        version: Number of this index.
        query_params: Parameters of the query encoder.
        doc_params: Parameters of the document encoder.
        earlier: Folders of embeddings of other runs, which are read where this encoder made them
            of this corpus.
        dense_weight: Weight of the hybrid where it is chosen by then.

    Returns:
        The retriever; its embeddings lie in `index/VERSION` of the output folder, or where they
        were found.
    """
    folder = workspace.folder / "index" / str(version)
    store = _encode_corpus(workspace, doc_params, folder, earlier)
    embeddings = store.rows()
    dense = _index_dense(workspace, store, quiet=version > 0)
    weight, chosen = dense_weight, "as the run chose it"
    if weight is None:
        weight, chosen = _dense_weight(workspace, bm25, dense, query_params)
    workspace.log(f"index {version}: weight of the dense side in the hybrid {weight:g} ({chosen})")
    hybrid = HybridIndex(dense, bm25, dense_weight=weight)
    return Retriever(version, query_params, dense, hybrid, embeddings, store)


def _index_dense(workspace: Workspace, store: EmbeddingStore, *, quiet: bool) -> Index:
    """Indexes the embeddings of a store: in this process exactly, in one of its own with ScaNN."""
    config, spec = workspace.config, store.spec
    devices = workspace.layout.devices
    choice = choose_index(spec.size, spec.dim, kind=config.index, devices=devices)
    if not quiet:
        workspace.log(choice.reason)
    if choice.name == "exact":
        return choice.build(store.rows())

    def asked_to_stop(seconds: float) -> bool:
        time.sleep(seconds)
        return workspace.stop.signum is not None

    def build(folder: Path) -> None:
        seconds = estimate_build_seconds(spec.size, spec.dim, "scann")
        workspace.log(f"building the ScaNN index: about {seconds:,.0f} s")
        store.linked(folder / "embeddings")
        try:
            ScannBuild(folder, BuildOptions(threads=os.cpu_count() or 1)).wait(asked_to_stop)
        except Cancelled:
            workspace.stop.check()
            raise
        shutil.rmtree(folder / "embeddings")

    # Named after the embeddings, which may be another run's.
    digest = sha256(store.folder / MANIFEST)[:16]
    folder = workspace.folder / "scann" / digest
    kept = kept_folder(folder, build, what="ScaNN index", version=1)
    return ScannIndex.load(kept / "index", threads=0, verified=True)


def _dense_weight(
    workspace: Workspace, bm25: Bm25Index, dense: Index, query_params: Any
) -> tuple[float, str]:
    """Returns the weight of the dense side in the hybrid, and how it was chosen."""
    truth, relevant = workspace.truth("dev"), workspace.relevant_rows("dev")
    known = [row for row, rows in enumerate(relevant) if rows]
    if not known:
        return USUAL_WEIGHT, "the usual one: no dev questions to choose it on"
    if truth == "written":
        # They repeat words of their passage, or none of them, as no user does.
        why = "questions that a language model wrote do not choose it"
        return USUAL_WEIGHT, f"the usual one: {why}"
    dev = [workspace.questions["dev"][row] for row in known]
    queries = _hybrid_queries(workspace, query_params, dev)
    findable = findable_in(workspace, "dev").take(known)
    sides = FindableIndex(dense, findable), FindableIndex(bm25, findable)
    usual = HybridIndex(*sides, dense_weight=USUAL_WEIGHT).search(queries, FIGURE_DEPTH)
    figure = np.full(len(relevant), np.nan)
    figure[known] = ranking_figure(usual, [relevant[row] for row in known])
    if why := judge_problem(figure, relevant, len(workspace.doc_tokens)):
        return USUAL_WEIGHT, f"the usual one: {why}"
    weight = choose_dense_weight(*sides, queries, [relevant[row] for row in known]).weight
    return weight, f"chosen on {len(dev)} dev questions by {TRUTHS[truth]}"


def in_milvus(retriever: Retriever, address: str) -> Retriever:
    """Returns a retriever whose dense side is searched by a server.

    Args:
        retriever: A retriever; its embeddings stay, for p_R.
        address: `milvus:URI/ALIAS`, where these embeddings were published.

    Raises:
        OSError: There is no such server or index.
        ValueError: It holds embeddings of another encoder, corpus or settings.
    """
    spec = retriever.store.spec
    dense = MilvusIndex.open(
        address,
        model_fingerprint=spec.model_fingerprint,
        corpus_fingerprint=spec.corpus_fingerprint,
        settings=spec.settings,
    )
    return retriever._replace(dense=dense, hybrid=retriever.hybrid.with_dense(dense))


def search(workspace: Workspace, retriever: Retriever, split: str, k: int) -> Rankings:
    """Returns the k best documents of each question of a split, dense and hybrid.

    No question finds itself, and a copy of a relevant passage counts as that; see `findable_in`.
    """
    queries = _hybrid_queries(workspace, retriever.query_params, workspace.questions[split])
    findable = findable_in(workspace, split)
    return Rankings(
        FindableIndex(retriever.dense, findable).search(queries.embeddings, k),
        FindableIndex(retriever.hybrid, findable).search(queries, k),
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


def live_search(workspace: Workspace, bm25: Bm25Index | None, *, dense_weight: float) -> StepSearch:
    """Returns how the documents of a training step are found in the active index.

    Args:
        workspace: Documents, training questions and options: `refresh.mode` and `overfetch`.
        bm25: Joins the dense side, as in `build_retriever`; None: dense alone.
        dense_weight: Weight of the dense side.
    """
    questions = workspace.questions["train"]
    overfetch = workspace.config.refresh.overfetch
    reranks = workspace.config.refresh.mode == "rerank"
    if bm25 is None:
        return search_reranked(workspace.task, factor=overfetch) if reranks else search_dense

    def search_both(queries: StepQueries, k: int) -> SearchResult:
        dense = _LiveDense(queries, workspace.task, overfetch * k if reranks else 0)
        # As deep as the retriever that is evaluated and serves: the scores depend on the depth.
        hybrid = HybridIndex(dense, bm25, dense_weight=dense_weight)
        texts = [questions[row].text for row in queries.rows]
        return hybrid.search(HybridQueries(queries.embeddings, texts), k)

    return search_both


class _LiveDense:
    """One step's dense side of the hybrid, its best documents scored by the live encoder."""

    def __init__(self, queries: StepQueries, task: EncodeTask, live: int) -> None:
        """Takes the step's queries and how many of the best documents are encoded again."""
        self._queries, self._task, self._live = queries, task, live

    @property
    def size(self) -> int:
        """Number of documents."""
        return self._queries.snapshot.index.size

    def search(self, queries: Any, k: int) -> SearchResult:
        """Returns the k best documents of each query; those beyond keep the index's scores."""
        found = self._queries.snapshot.index.search(queries, k)
        best = min(self._live, k)
        if not best:
            return found
        encode = live_embeddings(self._task, self._queries.doc_params)
        first = rerank(found.top(best), queries, encode, best)
        columns = zip(first, found, strict=True)
        return SearchResult(*(np.concatenate([a, b[:, best:]], axis=1) for a, b in columns))


def _hybrid_queries(
    workspace: Workspace, params: Any, questions: Sequence[Question]
) -> HybridQueries:
    return HybridQueries(
        workspace.encode_queries(params, questions), [question.text for question in questions]
    )


def _encode_corpus(
    workspace: Workspace, params: Any, folder: Path, earlier: Sequence[Path]
) -> EmbeddingStore:
    """Opens the embeddings of the documents with these parameters, or makes them."""
    spec = workspace.task.spec(params, params_digest=params_digest(params))
    wanted = {
        "model_fingerprint": spec.model_fingerprint,
        "corpus_fingerprint": spec.corpus_fingerprint,
    }
    if folder.exists():
        store = _open_whole(folder, workspace)
        if store is not None:
            return EmbeddingStore.open(folder, verified=True, **wanted, settings=spec.settings)
        shutil.rmtree(folder)
    if workspace.config.embeddings and folder.name == "0":
        return _given(workspace.config.embeddings, {**wanted, **spec.settings}, folder)
    for other in earlier:
        store = _open_whole(other, workspace)
        if store is None or store.spec.differences({**wanted, **spec.settings}):
            continue  # of another encoder or corpus, or damaged: it is encoded again
        workspace.log(f"embeddings of the documents: {other}")
        return store
    draw = tqdm_progress(f"encoding for index {folder.name}")

    def progress(state: Any) -> None:
        draw(state)
        workspace.stop.check()

    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = EmbeddingWriter.open(folder, spec)
    except ValueError as error:
        workspace.log(f"note: what an earlier life had begun to encode is given up ({error})")
        shutil.rmtree(folder.with_name(f"{folder.name}.building"))
        writer = EmbeddingWriter.open(folder, spec)
    return encode_to_store(workspace.task, params, writer, progress=progress)


def _given(place: str, wanted: Mapping[str, Any], folder: Path) -> EmbeddingStore:
    """Opens the embeddings that the user has made elsewhere, of an object store as a copy.

    Raises:
        ValueError: They are of another encoder or corpus.
        FileNotFoundError: There are none.
    """
    store = None if is_url(place) else EmbeddingStore.open(place)
    spec = published(place) if store is None else store.spec
    if spec is not None and (problem := spec.differences(wanted)):
        raise ValueError(
            f"embeddings {place}: not those of this encoder and corpus ({problem}); make them"
            " with the same options by experiments/encode.py, or leave the flag out"
        )
    return fetch_store(place, folder) if store is None else store


def _open_whole(folder: Path, workspace: Workspace) -> EmbeddingStore | None:
    """Opens embeddings whose every byte is as it was written; None, with a note, if one is not."""
    try:
        return EmbeddingStore.open(folder)
    except (FileNotFoundError, ValueError) as error:
        workspace.log(f"note: {folder} is damaged and its documents are encoded again ({error})")
        return None


def build_towers(
    workspace: Workspace, bm25: Bm25Index, params: Mapping[str, Any], version: int
) -> Retriever:
    """Indexes the corpus with these towers; see `build_retriever`."""
    query_params, doc_params = towers(params, None)
    return build_retriever(
        workspace, bm25, version=version, query_params=query_params, doc_params=doc_params
    )

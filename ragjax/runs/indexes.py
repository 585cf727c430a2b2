"""The indexes of a run: BM25, dense before and after, and the hybrid of both.

Q questions, N documents, D embedding size.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ragjax.data import Corpus, Question, buckets_up_to, encode_texts, passage_text
from ragjax.data.corpus_cache import Passage
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
from ragjax.index.base import NO_DOC
from ragjax.models.encoder import TextEncoder
from ragjax.models.inputs import Tokens
from ragjax.refresh import EncodeTask, encode_to_store, tqdm_progress
from ragjax.refresh.batches import DEFAULT_BUCKETS, EncodeOptions
from ragjax.runs.workspace import (
    Workspace,
    gold_sets,
    tree_fingerprint,
)
from ragjax.training.live import Search, search_dense, search_reranked
from ragjax.training.lsr import towers

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
        gold = gold_sets(workspace, "dev")
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


def corpus_task(
    encoder: TextEncoder,
    corpus: Corpus | Sequence[list[int]],
    *,
    encode_tokens: int,
    rows_per_shard: int,
    corpus_fingerprint: str = "",
) -> EncodeTask:
    """Returns the task of encoding a corpus with an encoder, whatever its weights become.

    Args:
        encoder: the un-adapted encoder; its fingerprint says where the weights started.
        corpus: passages, tokenised when they are encoded, or the encoder's token ids of each.
        encode_tokens: tokens in a batch, padding included.
        rows_per_shard: documents in a shard.
        corpus_fingerprint: of the corpus that token ids come from; "" takes that of `corpus`.
    """
    longest = encoder.max_length
    buckets = buckets_up_to(longest, DEFAULT_BUCKETS)
    settings: dict[str, Any] = {
        "encode": encoder.encode,
        "documents": cast(Sequence[Any], corpus),  # read by index only
        "pad_id": encoder.pad_id,
        "make_tokens": Tokens,
        "options": EncodeOptions(batch_tokens=encode_tokens, buckets=buckets),
        "corpus_fingerprint": corpus_fingerprint,
        "model_fingerprint": encoder.fingerprint,
        "rows_per_shard": rows_per_shard,
    }
    if not isinstance(corpus, Corpus):
        return EncodeTask(**settings)

    def tokenize(passages: Sequence[Passage]) -> list[list[int]]:
        texts = [encoder.doc_prefix + passage_text(passage) for passage in passages]
        return encode_texts(encoder.tokenizer, texts, max_length=longest).ids

    settings["corpus_fingerprint"] = corpus_fingerprint or corpus.fingerprint
    return EncodeTask(**settings, tokenize=tokenize)


_SHOWN = 3


def source_rows(corpus: Corpus, questions: Sequence[Question]) -> list[frozenset[int]]:
    """Returns the corpus rows that each question was made from.

    A question's source is its `metadata.doc`; the rows of it are those whose id or title it is.

    Args:
        corpus: The passages.
        questions: Q questions.

    Returns:
        Q sets of rows; empty for a question that names no source.

    Raises:
        ValueError: No question names a source, or no passage is of one.
    """
    wanted = {question.source for question in questions if question.source is not None}
    if not wanted:
        raise ValueError(
            "--training.same_source drop: no question names the document it was made from"
            ' ("doc" in the metadata of queries.jsonl); add it, or use --training.same_source keep'
        )
    rows: dict[str, set[int]] = {}
    for row, passage in enumerate(corpus):
        for name in {passage.id, passage.title} & wanted:
            rows.setdefault(name, set()).add(row)
    if not rows:
        shown = ", ".join(repr(name) for name in sorted(wanted)[:_SHOWN])
        raise ValueError(
            f"--training.same_source drop: no passage has the id or title of a source ({shown},"
            " ...); make the metadata of queries.jsonl and corpus.jsonl agree, or use"
            " --training.same_source keep"
        )
    return [frozenset(rows.get(question.source or "", ())) for question in questions]


def search_without_sources(
    search: Search, sources: Sequence[frozenset[int]], questions: Sequence[Question]
) -> Search:
    """Returns a search that looks deeper by as many documents as it leaves out.

    Args:
        search: Finds documents.
        sources: Rows left out for each question.
        questions: The same questions, to name in an error.

    Returns:
        The search; it raises ValueError where nothing is left for a question, rather than hand it
        the document that it was made from.
    """

    def without(
        snapshot: IndexSnapshot, rows: NDArray[np.int64], embeddings: NDArray[np.float32], k: int
    ) -> SearchResult:
        deepest = k + max(len(sources[row]) for row in rows)
        found = search(snapshot, rows, embeddings, min(deepest, snapshot.index.size))
        kept = drop_rows(found, [sources[row] for row in rows], k)
        for row, mask in zip(rows, kept.mask, strict=True):
            if not mask.any():
                raise ValueError(
                    f"question {questions[row].id!r}: all {found.mask.shape[1]} documents that were"
                    f" found are its own source {questions[row].source!r}, so nothing is left to"
                    " read; use --training.same_source keep, or a corpus with other documents"
                )
        return kept

    return without


def drop_rows(found: SearchResult, dropped: Sequence[frozenset[int]], k: int) -> SearchResult:
    """Returns the k best documents of each query that are not among its dropped ones.

    Args:
        found: `[B, D]` documents, best first.
        dropped: B sets of rows.
        k: Columns returned.
    """
    shape = (len(dropped), k)
    doc_ids = np.full(shape, NO_DOC, np.int32)
    scores = np.full(shape, -np.inf, np.float32)
    for row, unwanted in enumerate(dropped):
        kept = [
            column
            for column in np.flatnonzero(found.mask[row])
            if int(found.doc_ids[row, column]) not in unwanted
        ][:k]
        doc_ids[row, : len(kept)] = found.doc_ids[row, kept]
        scores[row, : len(kept)] = found.scores[row, kept]
    return SearchResult(doc_ids, scores, doc_ids != NO_DOC)


def build_towers(
    workspace: Workspace, bm25: Bm25Index, params: Mapping[str, Any], version: int
) -> Retriever:
    """Indexes the corpus with these towers; see `build_retriever`."""
    query_params, doc_params = towers(params, None)
    return build_retriever(
        workspace, bm25, version=version, query_params=query_params, doc_params=doc_params
    )

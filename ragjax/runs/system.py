"""A question-answering system: data, retriever and language model.

    system = open_system("runs/adapt")
    retrieved = retrieve(system, ["what is a pytree?"], 4, by=by_hybrid)

B questions, K documents each, N documents in all.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragjax.data import Dataset, Question, encode_texts
from ragjax.data.matching import refuse_string
from ragjax.index import Bm25Index, HybridQueries, SearchResult
from ragjax.index.base import empty_result, pad_result
from ragjax.models.encoder import TextEncoder
from ragjax.refresh import encode_corpus
from ragjax.runs.compare.lexical import adapted_bm25
from ragjax.runs.compare.rerank import (
    DEFAULT_DEPTH,
    DEFAULT_WEIGHT,
    NONE,
    Chosen,
    Reranker,
    chosen_name,
    make_scorer,
)
from ragjax.runs.data import Log, choose_questions, read_data
from ragjax.runs.indexes import Retriever, build_bm25, build_retriever, doc_logits
from ragjax.runs.options.shared import RunConfig
from ragjax.runs.saved import ModelChoice, Models, newest_index, open_run
from ragjax.runs.tokens import buckets, query_ids
from ragjax.runs.trainable import folded
from ragjax.runs.workspace import FrozenLM, Workspace, make_workspace
from ragjax.runs.written.file import with_written
from ragjax.storage import keep_compiled
from ragjax.training.loop import StopFlag

# Lengths of questions that are compiled for, beside those from 256 tokens on.
_QUERY_TOKENS = (32, 128)


@dataclass(frozen=True, kw_only=True)
class System:
    """Documents, a retriever and a language model that answer questions.

    Attributes:
        workspace: Data, tokenizers and options.
        bm25: The BM25 index.
        retriever: The dense index, its query encoder, and the hybrid of both indexes.
        lm_params: Parameters of `workspace.lm`, trained or base, in its compute dtype.
        doc_params: Parameters of the encoder of documents that made the dense index.
        name: Run or data folder, for messages.
        search: How documents are found where nothing else is asked for.
    """

    workspace: Workspace
    bm25: Bm25Index
    retriever: Retriever
    lm_params: Any
    doc_params: Any
    name: str
    search: "Search"

    @property
    def scale(self) -> float:
        """p_R = softmax(scale · q·d)."""
        return self.workspace.scale

    @property
    def size(self) -> int:
        """Number of documents N."""
        return len(self.workspace.dataset.corpus)


class Retrieved(NamedTuple):
    """The documents of each question and their scores."""

    found: SearchResult
    doc_scores: np.ndarray  # [B, K] float32, logits of p_R; 0 where masked


class Queries(NamedTuple):
    """B questions as text and as the query encoder sees them."""

    texts: Sequence[str]
    embeddings: np.ndarray  # [B, D] float32


# (system, queries, k) -> the k best documents of each question.
Search = Callable[[System, Queries, int], SearchResult]


def open_system(
    folder: str | Path,
    *,
    models: ModelChoice = "shipped",
    devices: int = 1,
    stop: StopFlag | None = None,
    log: Log = print,
) -> System:
    """Opens what a run ships, as its dev questions chose.

    Its stored embeddings are reused, and the weight of the hybrid that it ships. For other models
    the dev questions are encoded, which choose one.

    Args:
        folder: Output folder of a finished run.
        models: `adapted` or `base` models in place of what is shipped, with the hybrid of both
            indexes.
        devices: That have an equal part of each parameter, where the models do not fit one.
        stop: Looked at while a corpus is encoded.
        log: Shows one line to the user.

    Raises:
        FileNotFoundError: There is no run, or its data or models are not there any more.
        ValueError: The run has not ended, or its files do not belong together.
    """
    keep_compiled()
    folder = Path(folder)
    run = open_run(folder)
    config = dataclasses.replace(run.config, devices=devices, fsdp=devices)
    opened = run.open_models(models, devices=devices, fsdp=devices).read()
    dataset = read_data(config, folder, log)
    workspace = make_workspace(
        config,
        folder,
        dataset,
        with_written(choose_questions(config, dataset), folder, dataset.corpus),
        opened.base_encoders,
        opened.base_language_model,
        stop=stop or StopFlag(),
        log=log,
    )
    version = newest_index(folder) if opened.trained_retriever else 0
    search, weight = by_hybrid, None
    if models == "shipped" and run.served is not None:
        log(run.served.reason)
        search, weight = SEARCHES[run.served.search], run.served.dense_weight
    return _assemble(workspace, opened, version, str(folder), search, weight)


def open_base_system(
    config: RunConfig, *, cache: Path, stop: StopFlag | None = None, log: Log = print
) -> System:
    """Opens documents and base models.

    Args:
        config: `data` (a folder in the BEIR layout; `corpus.jsonl` alone is enough), `encoder`,
            `lm`, `prompt` and the scale of the retriever.
        cache: Folder for the prepared corpus and its embeddings, which later calls reuse; other
            data or another encoder get a folder of their own in it.
        stop: Looked at while the corpus is encoded.
        log: Shows one line to the user.

    Raises:
        FileNotFoundError, ValueError: Data or models cannot be used.
    """
    keep_compiled()
    dataset = _documents(config, cache, log)
    models = Models(config, None)
    encoder = models.base_encoder
    dev = dataset.questions.get("dev", ())[: config.data_options.dev_questions]
    identity = (
        f"{encoder.fingerprint} {encoder.max_length} {config.compute_dtype}"
        f" {dataset.corpus.fingerprint}"
    )
    workspace = make_workspace(
        config,
        cache / hashlib.sha256(identity.encode()).hexdigest()[:16],
        dataset,
        {"train": (), "dev": dev, "test": dataset.questions.get("test", ())},
        models.base_encoders,
        models.base_language_model,
        stop=stop or StopFlag(),
        log=log,
    )
    return _assemble(workspace, models, 0, config.data or config.queries or "Python packages")


def retrieve(system: System, questions: Sequence[str], k: int, *, by: Search) -> Retrieved:
    """Returns the k best documents of each question, and the logits of p_R.

    Whichever index returns the documents, p_R is the dense retriever's; see `doc_logits`.

    Args:
        system: Documents and models.
        questions: B texts.
        k: Documents per question; beyond N the rest is masked.
        by: `by_dense`, `by_bm25` or `by_hybrid`.

    Returns:
        `[B, k]` documents and logits. A question may have fewer, or none: BM25 returns only
        documents that share a word with it. With k = 0 nothing is retrieved.

    Raises:
        ValueError: k is negative.
    """
    refuse_string(questions, "questions")
    if k < 0:
        raise ValueError(f"k must be at least 0 documents, got {k}")
    if k == 0:
        return Retrieved(empty_result(len(questions), 0), np.zeros((len(questions), 0), np.float32))
    embeddings = encode_queries(system, questions)
    count = min(k, system.size)
    found = by(system, Queries(questions, embeddings), count)
    scores = doc_logits(system.retriever, embeddings, found, scale=system.scale)
    padded = pad_result(found.doc_ids, found.scores, k)
    return Retrieved(padded, np.pad(scores, ((0, 0), (0, k - count))))


def encode_queries(system: System, texts: Sequence[str]) -> np.ndarray:
    """Returns the embeddings `[B, D]` float32 of B questions, as the dense index is searched."""
    asked = [Question(id=str(row), text=text) for row, text in enumerate(texts)]
    return _encode(system, query_ids(system.workspace.query_encoder, asked))


def encode_documents(system: System, texts: Sequence[str]) -> np.ndarray:
    """Returns the embeddings `[B, D]` float32 of B texts, as those of the documents were made."""
    encoder = system.workspace.encoder
    given = [encoder.doc_prefix + text for text in texts]
    ids = encode_texts(encoder.tokenizer, given, max_length=encoder.max_length).ids
    return _encode(system, ids, documents=True)


def encode_query_of(
    system: System, num_tokens: int, count: int = 1, *, documents: bool = False
) -> None:
    """Encodes dummy queries, or documents, of this many tokens, which compiles that shape."""
    pad_id = system.workspace.query_encoder.pad_id
    _encode(system, [[pad_id] * num_tokens] * count, documents=documents)


def query_lengths(encoder: TextEncoder) -> tuple[int, ...]:
    """Returns the lengths, in tokens, that questions are padded to where few are asked."""
    lengths = buckets(encoder)
    return tuple(n for n in lengths if n in _QUERY_TOKENS or n >= min(lengths[-1], 256))


def _encode(system: System, ids: Sequence[Sequence[int]], *, documents: bool = False) -> np.ndarray:
    """Returns the embeddings `[B, D]` float32 of queries, or documents, that are token ids."""
    workspace = system.workspace
    encoder, task, params = (
        (workspace.encoder, workspace.task, system.doc_params)
        if documents
        else (workspace.query_encoder, workspace.query_task, system.retriever.query_params)
    )
    options = dataclasses.replace(task.options, buckets=query_lengths(encoder))
    return encode_corpus(dataclasses.replace(task.of_token_ids(ids), options=options), params)


def by_dense(system: System, queries: Queries, k: int) -> SearchResult:
    """Returns documents by the similarity of embeddings."""
    return system.retriever.dense.search(queries.embeddings, k)


def by_bm25(system: System, queries: Queries, k: int) -> SearchResult:
    """Returns documents by the words they share with the question; there may be none."""
    return system.bm25.search(queries.texts, k)


def by_hybrid(system: System, queries: Queries, k: int) -> SearchResult:
    """Returns documents by both, weighted as on the dev questions."""
    both = HybridQueries(queries.embeddings, queries.texts)
    return system.retriever.hybrid.search(both, k)


def reranked_search(
    system: System, search: Search, name: str | None, *, depth: int = 0, log: Log = print
) -> Search:
    """Returns a search whose best documents are ranked again.

    Args:
        system: Documents and models; in the folder of a run, with what that chose on dev.
        search: Finds the documents.
        name: `none`, `question`, the source of a cross-encoder, or `auto`: `question`, but `none`
            on a CPU. None: as the run ships, else `none`.
        depth: Documents that are ranked again; 0: as the run, else 10.
        log: Told what ranks again, and with which weight.

    Raises:
        OSError, ValueError: There is no such cross-encoder.
    """
    workspace, chosen = system.workspace, Chosen.read(system.workspace.folder)
    name = chosen_name(name or (chosen.name if chosen and chosen.weight else NONE))
    if name == NONE:
        return search
    depth = depth or (chosen.depth if chosen else DEFAULT_DEPTH)
    weight, why = DEFAULT_WEIGHT, "not chosen on dev"
    if chosen and chosen.name == name and chosen.weight:
        weight, why = chosen.weight, f"chosen on {chosen.questions} dev questions"
    log(f"the best {depth} documents are ranked again: {name}, weight {weight:g} ({why})")
    reranker = Reranker(
        scorer=make_scorer(workspace, name, FrozenLM(system.lm_params, system.name), folder=None),
        depth=depth,
        weight=weight,
        prior_scale=system.scale if search is by_dense else 1.0,
    )

    def search_again(system: System, queries: Queries, k: int) -> SearchResult:
        found = search(system, queries, min(max(k, depth), system.size))
        asked = [Question(id=str(row), text=text) for row, text in enumerate(queries.texts)]
        return reranker(asked, found, keep=False).top(k)

    return search_again


SEARCHES: dict[str, Search] = {"dense": by_dense, "bm25": by_bm25, "hybrid": by_hybrid}


def _documents(config: RunConfig, cache: Path, log: Log) -> Dataset:
    """Reads a corpus with the questions and judgements that lie beside it, if any."""
    # Judgements only choose the weight of the hybrid, so unknown ids are no reason to stop.
    options = dataclasses.replace(config.data_options, on_unknown="skip")
    return read_data(dataclasses.replace(config, data_options=options), cache, log)


def _assemble(
    workspace: Workspace,
    models: Models,
    version: int,
    name: str,
    search: Search = by_hybrid,
    dense_weight: float | None = None,
) -> System:
    bm25 = build_bm25(workspace)
    if models.trained_retriever:
        bm25 = adapted_bm25(workspace, bm25, workspace.folder)
    retriever = build_retriever(
        workspace,
        bm25,
        version=version,
        query_params=models.query_encoder.params,
        doc_params=models.doc_encoder.params,
        dense_weight=dense_weight,
    )
    return System(
        workspace=workspace,
        bm25=bm25,
        retriever=retriever,
        lm_params=workspace.in_compute_dtype(folded(models.language_model.params)),
        doc_params=models.doc_encoder.params,
        name=name,
        search=search,
    )

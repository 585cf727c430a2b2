"""BM25 over words: the lexical baseline every dense retriever has to beat.

index = Bm25Index.build(texts, titles=titles)
result = index.search(["what is a coronavirus?"], 20)
"""

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragjax import storage
from ragjax.index import base
from ragjax.index.words import Analyzer

_WORDS = "words.json"


class Bm25Index:
    """Documents ranked by BM25 (Lucene's variant) over stemmed words, in any script.

    Documents that share no word with the query are no results: their slots are masked. Equal
    scores are ordered by the lower document id.

    References:
        Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
        Lù, "BM25S: Orders of magnitude faster lexical search via eager sparse scoring", 2024.
    """

    def __init__(self, scorer: Any, analyzer: Analyzer, size: int) -> None:
        """Wraps a built scorer; use `Bm25Index.build`."""
        self._scorer = scorer
        self._analyzer = analyzer
        self._size = size

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        *,
        titles: Iterable[str] | None = None,
        expansions: Mapping[int, Sequence[str]] | None = None,
        language: str = "auto",
        k1: float = 0.9,
        b: float = 0.4,
    ) -> "Bm25Index":
        """Counts the words of every document.

        Args:
            texts: The documents in the order of their ids; read once.
            titles: A title for each text, counted as part of it.
            expansions: Document id to texts that are counted as part of it, such as the questions
                that it answers (doc2query).
            language: Whose stems and stop words are used: a name that Snowball has, "none", or
                "auto", chosen by the commonest words of the documents.
            k1: How soon repeating a word stops paying, >= 0.
            b: How much long documents are discounted, 0 to 1.

        Raises:
            ValueError: No documents, no words in any of them, titles and texts of different
                number, expansions of a document that there is not, an unknown language, or k1 or b
                out of range.

        References:
            Nogueira and Lin, "From doc2query to docTTTTTquery", 2019; Gospodinov et al.,
            "Doc2Query--: When Less is More", 2023 (only questions that pass a filter).
        """
        return next(
            cls.variants(texts, [(k1, b)], titles=titles, expansions=expansions, language=language)
        )

    @classmethod
    def kept(
        cls,
        folder: str | os.PathLike[str],
        texts: Callable[[], Iterable[str]],
        *,
        identity: str,
        expansions: Mapping[int, Sequence[str]] | None = None,
        language: str = "auto",
        k1: float = 0.9,
        b: float = 0.4,
    ) -> "Bm25Index":
        """Maps the index that an earlier call built of the same texts, or builds and saves it.

        Args:
            folder: That has one folder for each index.
            texts: Returns the documents; called where there is no whole index of them.
            identity: Of the documents, such as the digest of a corpus.
            expansions: As in `build`, like the following.
            language: As in `build`.
            k1: As in `build`.
            b: As in `build`.

        Raises:
            ValueError: As `build`.
        """
        options: Any = {"expansions": expansions, "language": language, "k1": k1, "b": b}
        versions = [importlib.metadata.version(name) for name in ("bm25s", "PyStemmer", "regex")]
        parts = json.dumps(
            [identity, versions, sorted((expansions or {}).items()), language, k1, b]
        )
        name = f"bm25-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
        return cls.open(
            storage.kept_folder(
                Path(folder) / name,
                lambda building: cls.build(texts(), **options).save(building),
                what="BM25 index",
                version=1,
            )
        )

    @classmethod
    def variants(
        cls,
        texts: Iterable[str],
        constants: Sequence[tuple[float, float]],
        *,
        titles: Iterable[str] | None = None,
        expansions: Mapping[int, Sequence[str]] | None = None,
        language: str = "auto",
    ) -> Iterator["Bm25Index"]:
        """Yields an index for each pair of k1 and b; the words are counted once.

        Args:
            texts: As in `build`, like all but the following.
            constants: Pairs of k1 and b.
            titles: As in `build`.
            expansions: As in `build`.
            language: As in `build`.

        Raises:
            ValueError: As `build`.
        """
        for k1, b in constants:
            if k1 < 0 or not 0 <= b <= 1:
                raise ValueError(f"BM25 needs k1 >= 0 and 0 <= b <= 1, got k1={k1} and b={b}")
        bm25s = _import_bm25s()
        if isinstance(texts, str) or isinstance(titles, str):
            raise ValueError("texts and titles must be lists of strings, got one string")
        analyzer = Analyzer(language)
        token_ids = analyzer.learn(_expand(_join(texts, titles), expansions or {}))
        if not analyzer.vocabulary:
            raise ValueError(f"BM25 found no words in {len(token_ids)} documents")
        for k1, b in constants:
            scorer = bm25s.BM25(k1=k1, b=b, method="lucene")
            counted = bm25s.tokenization.Tokenized(token_ids, analyzer.vocabulary)
            scorer.index(counted, create_empty_token=False, show_progress=False)
            scorer.vocab_dict = {}  # the analyzer's, of which one copy is enough
            yield cls(scorer, analyzer, len(token_ids))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index into a folder that is there; see `ragjax.storage.kept_folder`."""
        with storage.named_if_full(Path(folder), 0):
            self._scorer.save(folder, show_progress=False)
        storage.write_json(Path(folder) / _WORDS, self._analyzer.as_json())

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Bm25Index":
        """Maps what `save` wrote; scores stay on disk until a query needs them."""
        scorer = _import_bm25s().BM25.load(folder, mmap=True, load_vocab=False)
        learnt = json.loads((Path(folder) / _WORDS).read_text("utf-8"))
        return cls(scorer, Analyzer.from_json(learnt), scorer.scores["num_docs"])

    @property
    def size(self) -> int:
        """Number of documents."""
        return self._size

    @property
    def language(self) -> str:
        """Language of the stems and stop words, or "none"."""
        return self._analyzer.language

    def describe(self) -> str:
        """Returns how texts become words, and why the language was chosen, in one sentence."""
        return self._analyzer.describe()

    def content_words(self, query: str) -> list[int]:
        """Returns the words of a query that it is searched by, as numbers, repeated ones too."""
        return self._analyzer.look_up(query)

    def search(self, queries: Sequence[str], k: int) -> base.SearchResult:
        """Returns the k documents of highest BM25 score for each query.

        Args:
            queries: B questions.
            k: Results per query.

        Returns:
            `[B, k]` ids, BM25 scores (> 0) and mask, best first.

        Raises:
            ValueError: `k` is not positive, or `queries` is one string.
        """
        base.check_k(k, size=self._size)
        if isinstance(queries, str):
            raise ValueError("queries must be a sequence of strings, got one string")
        result = base.empty_result(len(queries), k)
        for row, query in enumerate(queries):
            token_ids = self._analyzer.look_up(query)
            if not token_ids:
                continue
            doc_ids, scores = _best(self._scorer.get_scores(token_ids), k)
            result.doc_ids[row, : len(doc_ids)] = doc_ids
            result.scores[row, : len(doc_ids)] = scores
            result.mask[row, : len(doc_ids)] = True
        return result


def _import_bm25s() -> Any:
    # Imported late: bm25s initialises a jax backend at import.
    import bm25s

    # At import it asks for the messages of its debugging.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def _join(texts: Iterable[str], titles: Iterable[str] | None) -> Iterator[str]:
    """Yields each text behind its title."""
    if titles is None:
        yield from texts
        return
    try:
        for title, text in zip(titles, texts, strict=True):
            yield f"{title} {text}"
    except ValueError as error:
        raise ValueError("BM25 needs one title for each text; their numbers differ") from error


def _expand(texts: Iterable[str], expansions: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """Yields each text with what expands it."""
    count = 0
    for row, text in enumerate(texts):
        yield " ".join([text, *expansions[row]]) if row in expansions else text
        count += 1
    if strangers := [row for row in expansions if not 0 <= row < count]:
        raise ValueError(f"expansions of document {strangers[0]}: there are {count} documents")


def _best(scores: NDArray[np.float32], k: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Returns ids and scores of the at most k best positive scores, ties by the lower id."""
    matching = np.flatnonzero(scores > 0)
    if len(matching) > k:
        bound = np.partition(scores[matching], -k)[-k]
        matching = matching[scores[matching] >= bound]
    # A stable sort of ascending ids leaves equal scores in the order of their ids.
    order = np.argsort(-scores[matching], kind="stable")[:k]
    return matching[order], scores[matching[order]]

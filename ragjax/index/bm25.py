"""BM25 over words: the lexical baseline every dense retriever has to beat.

index = Bm25Index.build(texts, titles=titles)
result = index.search(["what is a coronavirus?"], 20)
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragjax.index import base

_WORD = re.compile(r"\w+")
# Rare in passages, so BM25 would weigh them like names; they only say that a question is asked.
_QUESTION_WORDS = frozenset(
    "what which who whom whose when where why how "
    "am been being do does did done has have had having "
    "were can could would shall should may might must".split()
)


class Bm25Index:
    """Documents ranked by BM25 (Lucene's variant) over stemmed English words.

    Documents that share no word with the query are no results: their slots are masked. Equal
    scores are ordered by the lower document id.

    References:
        Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
        Lù, "BM25S: Orders of magnitude faster lexical search via eager sparse scoring", 2024.
    """

    def __init__(self, scorer: Any, analyzer: "_Analyzer", size: int) -> None:
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
        k1: float = 0.9,
        b: float = 0.4,
    ) -> "Bm25Index":
        """Counts the words of every document.

        Args:
            texts: The documents in the order of their ids; read once.
            titles: A title for each text, counted as part of it.
            k1: How soon repeating a word stops paying, >= 0.
            b: How much long documents are discounted, 0 to 1.

        Raises:
            ValueError: No documents, no words in any of them, titles and texts of different
                number, or k1 or b out of range.
        """
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"BM25 needs k1 >= 0 and 0 <= b <= 1, got k1={k1} and b={b}")
        # Imported here: bm25s initialises a jax backend at import.
        import bm25s

        analyzer = _Analyzer()
        token_ids = [analyzer.learn(text) for text in _join(texts, titles)]
        if not analyzer.vocabulary:
            raise ValueError(f"BM25 found no words in {len(token_ids)} documents")
        scorer = bm25s.BM25(k1=k1, b=b, method="lucene")
        scorer.index(
            (token_ids, analyzer.vocabulary), create_empty_token=False, show_progress=False
        )
        return cls(scorer, analyzer, len(token_ids))

    @property
    def size(self) -> int:
        """Number of documents."""
        return self._size

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


class _Analyzer:
    """Text to word ids: lower case, words, English stop words out, Snowball English stems.

    Question words are left out of queries too, if anything else is in them. Documents keep them.
    """

    def __init__(self) -> None:
        """Starts with an empty vocabulary."""
        import Stemmer  # pyrefly: ignore[missing-import]  (a compiled module without stubs)
        from bm25s.stopwords import STOPWORDS_EN

        self.vocabulary: dict[str, int] = {}
        self._stop_words = frozenset(STOPWORDS_EN)
        self._stem = Stemmer.Stemmer("english").stemWords

    def learn(self, text: str) -> list[int]:
        """Returns the ids of the words of `text`, adding unseen ones to the vocabulary."""
        vocabulary = self.vocabulary
        stems = self._stem(self._words(text))
        return [vocabulary.setdefault(stem, len(vocabulary)) for stem in stems]

    def look_up(self, text: str) -> list[int]:
        """Returns the ids of the words of `text` that some document has."""
        words = self._words(text)
        stems = self._stem([word for word in words if word not in _QUESTION_WORDS] or words)
        return [self.vocabulary[stem] for stem in stems if stem in self.vocabulary]

    def _words(self, text: str) -> list[str]:
        return [word for word in _WORD.findall(text.lower()) if word not in self._stop_words]


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


def _best(scores: NDArray[np.float32], k: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Returns ids and scores of the at most k best positive scores, ties by the lower id."""
    matching = np.flatnonzero(scores > 0)
    if len(matching) > k:
        bound = np.partition(scores[matching], -k)[-k]
        matching = matching[scores[matching] >= bound]
    # A stable sort of ascending ids leaves equal scores in the order of their ids.
    order = np.argsort(-scores[matching], kind="stable")[:k]
    return matching[order], scores[matching[order]]

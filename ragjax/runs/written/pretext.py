"""Queries that a passage makes of itself: a sentence of it, words of one, or its title."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ragjax.data import passage_text
from ragjax.data.corpus import Corpus
from ragjax.data.matching import fold, words
from ragjax.index.words import split_words

# A sentence ends at its mark and what closes it; behind a mark of a script with spaces comes one.
_END = re.compile(r"[.!?…؟։।]+[\"'”’»)\]]*\s+|[。！？]+[」』”]*\s*|\n{2,}")
_FEWEST_WORDS = 5  # of a sentence that is searched for
_REMOVED = 0.9  # share of the passages that lose it
_KEYWORDS = 4, 8  # fewest and most of a query
_COUNTED = 10_000  # passages that tell how rare a word is


class Cloze(NamedTuple):
    """A sentence of a passage, and the text that it is searched in."""

    sentence: str
    rest: str  # of the passage; in one of ten it still holds the sentence


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text, by their marks and by empty lines."""
    ends = [match.end() for match in _END.finditer(text)]
    parts = (text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True))
    return [part.strip() for part in parts if part.strip()]


def inverse_cloze(text: str, *, seed: tuple[int, int]) -> Cloze | None:
    """Takes a sentence out of a passage, which is then to be found by it.

    One passage of ten keeps its sentence, so that the words which both have count too.

    Args:
        text: Of the passage.
        seed: Of the draw: that of the run, and the passage.

    Returns:
        The sentence and the rest; None where there are not two sentences, or all are short.

    References:
        Lee, Chang and Toutanova, "Latent Retrieval for Weakly Supervised Open Domain Question
        Answering", 2019, section 4.
    """
    parts = sentences(text)
    long = [place for place, part in enumerate(parts) if len(words(part)) >= _FEWEST_WORDS]
    if len(parts) < 2 or not long:
        return None
    # By a hash: the streams of NumPy may change with its version, a resumed run must not.
    digest = hashlib.sha256(repr(seed).encode()).digest()
    place = long[int.from_bytes(digest[:8]) % len(long)]
    kept = int.from_bytes(digest[8:16]) >= _REMOVED * 2**64
    others = [part for number, part in enumerate(parts) if kept or number != place]
    return Cloze(parts[place], " ".join(others))


def own_titles(corpus: Corpus, rows: Iterable[int]) -> dict[int, str]:
    """Returns the titles of those rows whose title no other passage has."""
    counts = Counter(fold(passage.title) for passage in corpus)
    titles = {row: corpus[row].title for row in rows}
    return {row: title for row, title in titles.items() if title and counts[fold(title)] == 1}


class Keywords:
    """Draws queries of a few of the rarer words of a passage.

    By them an encoder learns what BM25 knows from the start: that rare words and names tell the
    passages of this corpus apart.

    References:
        Ma et al., "PROP: Pre-training with Representative Words Prediction for Ad-hoc Retrieval",
        2021 (sets of words drawn from a document); Chen et al., "Salient Phrase Aware Dense
        Retrieval: Can a Dense Retriever Imitate a Sparse One?", 2022.
    """

    def __init__(self, corpus: Corpus, seed: int) -> None:
        """Counts in how many passages each word is.

        Args:
            corpus: Passages; of a large one a part is counted.
            seed: Of the choice of that part.
        """
        rows = np.random.default_rng(seed).permutation(len(corpus))[:_COUNTED]
        self._corpus, self._size = corpus, len(rows)
        self._counts = Counter(
            word
            for row in rows
            for word in set(split_words(passage_text(corpus[int(row)]), singles=False))
        )

    def query(self, row: int, draw: np.random.Generator) -> str:
        """Returns words of one sentence of a passage, rarer ones more often; "" if it has none."""
        text = passage_text(self._corpus[row])
        parts = [split_words(part, singles=False) for part in sentences(text)]
        parts = [part for part in parts if len(part) >= _FEWEST_WORDS]
        part = parts[draw.integers(len(parts))] if parts else split_words(text, singles=False)
        rarity = {word: np.log(self._size / max(1, self._counts[word])) for word in part}
        # The first of exponential waiting times: a draw without replacement by weight.
        waits = {word: draw.exponential() / rare for word, rare in rarity.items() if rare > 0}
        count = draw.integers(*_KEYWORDS, endpoint=True)
        chosen = sorted(waits, key=waits.__getitem__)[:count]
        return " ".join(word for word in waits if word in chosen)

"""Queries that a passage makes of itself: one of its sentences, or its title."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ragjax.data.corpus import Corpus
from ragjax.data.matching import fold, words

# A sentence ends at its mark and what closes it; behind a mark of a script with spaces comes one.
_END = re.compile(r"[.!?…؟։।]+[\"'”’»)\]]*\s+|[。！？]+[」』”]*\s*|\n{2,}")
_FEWEST_WORDS = 5  # of a sentence that is searched for
_REMOVED = 0.9  # share of the passages that lose it


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

"""Spans of a passage: exact and fuzzy matches of an answer, and windows to leave out in turn.

Offsets are of characters of the passage as it is written, end excluded, in any script.

Example:
    find_answer("Paris is on the Seine.", "the seine")  # [Match(start=16, end=21, score=1.0)]
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ragjax.data import matching
from ragjax.data.matching import ARTICLES, Token

_SENTENCE_END = re.compile(
    r"(?<=[.!?\u2026\u061f\u06d4\u0964])[\"')\]\u00bb\u201d]*\s+|(?<=[\u3002\uff01\uff1f])|\n+"
)
# A sentence longer than this is cut into windows between words.
_LONG_WINDOW = 240


class Match(NamedTuple):
    """A run of characters of a passage."""

    start: int  # first character
    end: int  # behind the last character
    score: float  # F1 of its words and the answer's; 1.0: the answer word by word


class TextWindow(NamedTuple):
    """A sentence, several short ones, or a part of a long one."""

    start: int  # first character
    end: int  # behind the last character


def find_answer(text: str, answer: str) -> list[Match]:
    """Finds the places where the words of an answer follow each other in a text.

    Case, Unicode form, punctuation between words and an article in front do not matter. "1" is not
    found in "-1" or "1.5", nor "axes" in "out_axes".

    Args:
        text: A passage.
        answer: A generated or a given answer.

    Returns:
        All places that do not overlap, in order, score 1; none for a blank answer. An answer
        of punctuation only ("+=") is searched for as it is.
    """
    return [Match(start, end, 1.0) for start, end in matching.find_answer(text, answer)]


def find_similar(text: str, answer: str, *, least: float = 0.6) -> Match | None:
    """Finds the run of words that is most like an answer, by the F1 of their words.

    Runs from half to one and a half times as long as the answer are compared.

    Args:
        text: A passage.
        answer: A generated or a given answer.
        least: Lowest F1 that counts, a fraction.

    Returns:
        The best run, of equally good ones the first and shortest; None where none is good enough,
        or where the answer has one word only (a single word is alike or not).

    References:
        Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016,
        section 6.1, for F1 of words.
    """
    wanted = Counter(word.text for word in _without_article(_words(answer)))
    size = wanted.total()
    if size < 2:
        return None
    words = _words(text)
    best: Match | None = None
    for length in range(max(1, size // 2), min(size + (size + 1) // 2, len(words)) + 1):
        counts = Counter(word.text for word in words[:length])
        for start in range(len(words) - length + 1):
            if start:
                counts[words[start - 1].text] -= 1
                counts[words[start + length - 1].text] += 1
            common = sum(min(counts[word], count) for word, count in wanted.items())
            score = 2 * common / (size + length)
            if score >= least and (best is None or score > best.score):
                best = Match(words[start].start, words[start + length - 1].end, score)
    return best


def split_windows(text: str, *, most: int) -> list[TextWindow]:
    """Cuts a text into sentences, and joins neighbours until there are few enough.

    Args:
        text: A passage.
        most: Windows at most, at least 1.

    Returns:
        Windows in order that together hold every character but white space around them; the
        shortest neighbours are joined first. None for a blank text.

    Raises:
        ValueError: `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1 window, got {most}")
    edges = [0, *(found.end() for found in _SENTENCE_END.finditer(text)), len(text)]
    windows: list[TextWindow] = []
    for start, end in zip(edges, edges[1:], strict=False):
        windows += _pieces(text, start, end)
    while len(windows) > most:
        sizes = [right.end - left.start for left, right in zip(windows, windows[1:], strict=False)]
        place = sizes.index(min(sizes))
        joined = TextWindow(windows[place].start, windows[place + 1].end)
        windows[place : place + 2] = [joined]
    return windows


def _pieces(text: str, start: int, end: int) -> list[TextWindow]:
    """Returns one sentence without the white space around it, cut where it is very long."""
    pieces = []
    while start < end:
        cut = end
        if end - start > _LONG_WINDOW * 3 // 2:
            space = max(text.rfind(" ", start, start + _LONG_WINDOW), start)
            cut = space + 1 if space > start else start + _LONG_WINDOW
        piece = text[start:cut]
        if piece.strip():
            first = start + len(piece) - len(piece.lstrip())
            pieces.append(TextWindow(first, start + len(piece.rstrip())))
        start = cut
    return pieces


def _words(text: str) -> list[Token]:
    return [token for token in matching.tokenize(text) if not token.is_symbol]


def _without_article(words: Sequence[Token]) -> list[Token]:
    kept = list(words)
    while len(kept) > 1 and kept[0].text in ARTICLES:
        kept = kept[1:]
    return kept

"""The words of a passage that carry an answer.

K documents, T answer tokens, W windows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ragjax.data import Corpus
from ragjax.evaluation.spans import Match, TextWindow, find_answer, find_similar, split_windows
from ragjax.runs.ask.decoding import Generated
from ragjax.runs.ask.prompts import Prompt
from ragjax.runs.ask.reader import Reader


class Span(NamedTuple):
    """The part of a passage that carries the answer."""

    field: str  # "text" or "title": what the offsets are of
    start: int  # first character
    end: int  # behind the last character
    method: str  # "match", "similar" or "left_out"
    score: float | None  # F1 of the words, for "match" and "similar"
    change: (
        float | None
    )  # nats that the answer's log-prob loses without its window; None: not tried


class ReadPassage(NamedTuple):
    """The part of a passage that the language model reads."""

    title: str
    text: str
    # Characters of the passage's text that each token stands for; those of the title, which stands
    # in front, are negative.
    places: list[tuple[int, int]]


class SpanFinder:
    """Finds the words of a passage that carry an answer."""

    def __init__(self, reader: Reader, corpus: Corpus) -> None:
        """Takes the reader of the answers and the passages."""
        self._reader, self._corpus = reader, corpus

    def find(self, prompt: Prompt, generated: Generated, answer: str, row: int) -> Span | None:
        """Returns the words of the answer in the passage, or else the window that carries it.

        Args:
            prompt: The question beside its documents.
            generated: The answer's tokens.
            answer: Its text.
            row: Place of the passage among the documents.
        """
        # What the language model did not read carries nothing.
        title, text, _ = self.read(prompt, row)
        matches = find_answer(text, answer)
        if len(matches) == 1:
            return _matched("text", matches[0], "match")
        if not matches:
            if found := find_answer(title, answer):
                return _matched("title", found[0], "match")
            if similar := find_similar(text, answer):
                return _matched("text", similar, "similar")
        windows = self.windows(prompt, row)
        if not windows:
            return None
        changes = self.changes(prompt, generated, row, windows)
        if matches:  # several: the one whose window the answer needs most
            best = max(matches, key=lambda match: _change_at(match, windows, changes))
            span = _matched("text", best, "match")
            return span._replace(change=_change_at(best, windows, changes))
        place = int(np.argmax(changes))
        window = windows[place]
        return Span("text", window.start, window.end, "left_out", None, float(changes[place]))

    def read(self, prompt: Prompt, row: int) -> ReadPassage:
        """Returns the part of a passage that the language model reads."""
        passage, shown = self._corpus[prompt.docs[row]], prompt.read[row]
        whole = self._reader.prompts.builder.passage_text(passage)
        before = len(whole) - len(passage.text)
        places = [(start - before, end - before) for start, end in shown.characters]
        title, text, end = passage.title or "", passage.text, len(shown.text) - before
        if end < len(text):
            # Cut within the title, before which the template has nothing.
            title, text = (title, text[:end]) if end > 0 else (whole[: before + end], "")
        return ReadPassage(title, text, places)

    def windows(self, prompt: Prompt, row: int) -> list[TextWindow]:
        """Returns the windows of that part's text."""
        return split_windows(self.read(prompt, row).text, most=self._reader.prompts.options.windows)

    def changes(
        self, prompt: Prompt, generated: Generated, row: int, windows: Sequence[TextWindow]
    ) -> np.ndarray:
        """Returns what the answer's log-prob loses without each window `[W]`, in nats."""
        places = self.read(prompt, row).places
        left_out = [
            [
                token
                for token, (start, end) in enumerate(places)
                if start < window.end and end > window.start
            ]
            for window in windows
        ]
        log_probs = self._reader.leave_out(prompt, generated.reading, row, left_out, generated.ids)
        return log_probs[0] - log_probs[1:]


def _matched(field: str, match: Match, method: str) -> Span:
    return Span(field, match.start, match.end, method, match.score, None)


def _change_at(match: Match, windows: Sequence[TextWindow], changes: np.ndarray) -> float:
    """Returns what the answer loses without the match's window, 0 where no window holds it."""
    inside = [
        float(change)
        for window, change in zip(windows, changes, strict=True)
        if window.start < match.end and match.start < window.end
    ]
    return max(inside, default=0.0)

"""Statements that the models reconstruct from retrieved passages: a task that needs no labels.

The statement is the query; the reader is shown the passages and not the statement, so it can only
take from them what it is to write, and passages that say the same become the likelier.

References:
    Siriwardhana et al., Improving the Domain Adaptation of Retrieval Augmented Generation (RAG)
    Models for Open Domain Question Answering, 2023, section 3 (statement reconstruction).
"""

from pathlib import Path

import numpy as np

from ragjax.data import Corpus, Question
from ragjax.data.matching import tokenize
from ragjax.runs.written.pretext import sentences

# What a reader is shown in place of a statement, as the paper marks them.
_MARK = "<p>"
_FEWEST_WORDS, _MOST_WORDS = 5, 60


def read_statements(source: str, corpus: Corpus, *, seed: int) -> tuple[Question, ...]:
    """Returns statements as questions whose answer is the question.

    Args:
        source: A file with one statement a line, or how many sentences to draw from the corpus, one
            of each passage at most.
        corpus: The passages; a sentence has the one that it stands in as its source.
        seed: Of the draw.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no text, or the corpus no sentence.
    """
    if source.isdecimal():
        return _drawn(corpus, int(source), seed)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"--training.statements {source}: no such file; give a file with one statement a line,"
            " or a number of sentences of the corpus"
        )
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--training.statements {source}: not UTF-8 ({error})") from error
    made = [
        _statement(f"statement-{number}", " ".join(line.split()))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not made:
        raise ValueError(f"--training.statements {source}: the file holds no statement")
    return tuple(made)


def shown(question: Question) -> str:
    """Returns what a reader is shown as the question: of a statement only that it is one."""
    return _MARK if question.answers == (question.text,) else question.text


def _drawn(corpus: Corpus, count: int, seed: int) -> tuple[Question, ...]:
    random, made = np.random.default_rng(seed), []
    for row in random.permutation(len(corpus)).tolist():
        if len(made) == count:
            break
        passage = corpus[row]
        if parts := _sentences(passage.text):
            chosen = parts[int(random.integers(len(parts)))]
            made.append(_statement(f"statement-{passage.id}", chosen, passage.id))
    if not made:
        raise ValueError(
            f"--training.statements {count}: no passage has a sentence of {_FEWEST_WORDS} to"
            f" {_MOST_WORDS} words; give a file with one statement a line"
        )
    return tuple(made)


def _sentences(text: str) -> list[str]:
    parts = (" ".join(part.split()) for part in sentences(text))
    return [part for part in parts if _FEWEST_WORDS <= len(tokenize(part)) <= _MOST_WORDS]


def _statement(id: str, text: str, passage: str | None = None) -> Question:
    return Question(id=id, text=text, answers=(text,), source=passage, passage=passage)

"""Lengths of the texts of a run in the tokens of its models, and how many are cut."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ragjax.data import encode_texts, passage_text
from ragjax.runs.workspace import Workspace

# Passages that are measured, spread over the corpus.
MEASURED = 10_000
_CALL = 512  # texts tokenised at a time


class Lengths(NamedTuple):
    """Lengths of one kind of text for one model, in tokens."""

    what: str
    reader: str  # of the two models
    measured: int  # texts
    of: int  # that there are
    median: int
    most_of: int  # that 95 % do not exceed
    longest: int
    limit: int
    cut: int  # of the measured ones
    flag: str  # that says the limit
    longest_id: str

    @property
    def share(self) -> float:
        """Share of the measured texts that are cut."""
        return self.cut / self.measured


def sampled_rows(size: int, most: int = MEASURED) -> list[int]:
    """Returns rows of a corpus that stand for all, ascending."""
    return np.unique(np.linspace(0, size - 1, most).astype(int)).tolist()


def measure_lengths(workspace: Workspace) -> list[Lengths]:
    """Tokenises passages, questions and answers with the tokenizers of both models.

    Args:
        workspace: Data, tokenizers and options; weights are not looked at.
    """
    config, corpus, prompts = workspace.config, workspace.dataset.corpus, workspace.prompts
    encoder, asker = workspace.encoder, workspace.query_encoder
    rows = sampled_rows(len(corpus))
    asked = [q for split in workspace.questions.values() for q in split]
    answers = [(q.id, q.answers[0]) for q in asked if q.answers]

    def passages(show: Callable[..., str]) -> Iterable[tuple[str, str]]:
        bar = tqdm(rows, desc="measuring passages", unit=" passages", delay=5)
        return ((passage.id, show(passage)) for passage in map(corpus.__getitem__, bar))

    def encoded(texts: Sequence[str]) -> list[int]:
        return _lengths(encoder.tokenizer, texts, special=True)

    def asked_of(texts: Sequence[str]) -> list[int]:
        return _lengths(asker.tokenizer, texts, special=True)

    def read(texts: Sequence[str]) -> list[int]:
        return _lengths(workspace.lm.tokenizer, texts, special=False)

    def answered(texts: Sequence[str]) -> list[int]:
        return [len(prompts.answer_ids(text)) for text in texts]

    found = [
        _measure(
            "passages", "encoder", len(corpus), encoder.max_length, "encoder_max_length",
            passages(lambda passage: encoder.doc_prefix + passage_text(passage)), encoded,
        ),
        _measure(
            "passages", "language model", len(corpus), config.prompt.document_tokens,
            "prompt.document_tokens", passages(prompts.passage_text), read,
        ),
        _measure(
            "questions", "encoder", len(asked), asker.max_length, "encoder_max_length",
            ((q.id, asker.query_prefix + q.text) for q in asked), asked_of,
        ),
        _measure(
            "answers", "language model", len(answers), config.prompt.answer_tokens,
            "prompt.answer_tokens", answers, answered,
        ),
    ]  # fmt: skip
    return [each for each in found if each.measured]


def _measure(
    what: str,
    reader: str,
    of: int,
    limit: int,
    flag: str,
    texts: Iterable[tuple[str, str]],
    count: Callable[[Sequence[str]], list[int]],
) -> Lengths:
    ids: list[str] = []
    lengths: list[int] = []
    batch: list[str] = []
    for id, text in texts:
        ids.append(id)
        batch.append(text)
        if len(batch) == _CALL:
            lengths += count(batch)
            batch = []
    lengths += count(batch)
    values = np.array(lengths or [0])
    return Lengths(
        what=what,
        reader=reader,
        measured=len(lengths),
        of=of,
        median=int(np.median(values)),
        most_of=int(np.quantile(values, 0.95, method="higher")),
        longest=int(values.max()),
        limit=limit,
        cut=int((values > limit).sum()),
        flag=flag,
        longest_id=ids[int(values.argmax())] if ids else "",
    )


def _lengths(tokenizer, texts: Sequence[str], *, special: bool) -> list[int]:
    encoded = encode_texts(tokenizer, texts, max_length=None, add_special_tokens=special)
    return list(map(len, encoded.ids))

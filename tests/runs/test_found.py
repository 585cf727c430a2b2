"""What a run says about the documents that are found, without any model."""

from types import SimpleNamespace

import numpy as np
import pytest

from ragjax.data import Question
from ragjax.index import Bm25Index
from ragjax.runs.compare import systems
from ragjax.runs.found import Findable
from ragjax.runs.indexes import Rankings, build_bm25
from ragjax.runs.options.evaluate import EvaluateConfig, run_options
from ragjax.runs.options.shared import DataConfig, RunConfig

PASSAGES = ("the red cat", "der blaue Hund ist auf dem Dach und in der Sonne")


def workspace(*texts, **options):
    """A workspace of two passages and these test questions, and the lines that it logs."""
    lines = []
    return SimpleNamespace(
        config=RunConfig(data_options=DataConfig(**options)),
        dataset=SimpleNamespace(
            corpus=[SimpleNamespace(title="", text=text, id=text) for text in PASSAGES]
        ),
        questions={"test": tuple(Question(id=text, text=text) for text in texts)},
        log=lines.append,
        note=lines.append,
    ), lines


def test_the_words_of_bm25_are_said_once():
    opened, lines = workspace()
    assert build_bm25(opened).language == "german"
    assert lines == ["BM25: german stems (50% of the words are its commonest ones)"]
    opened, lines = workspace(language="none")
    assert build_bm25(opened).language == "none"
    assert lines == ["BM25: words as written (as given)"]


def test_questions_for_which_bm25_finds_nothing_are_counted(monkeypatch):
    opened, lines = workspace("red cat", "奥斯陆", "unicorn")
    bm25 = Bm25Index.build(PASSAGES)
    found = bm25.search(["cat"] * 3, 2)
    monkeypatch.setattr(systems, "search", lambda *_: Rankings(found, found, np.zeros((3, 1))))
    monkeypatch.setattr(systems, "doc_logits", lambda *_, **__: np.zeros((3, 2)))
    monkeypatch.setattr(systems, "findable_in", lambda *_: Findable([frozenset()] * 3, [{}] * 3))
    before = SimpleNamespace()
    systems.retrieve_documents(opened, bm25, before, before, "test")
    assert lines == [
        "BM25 finds nothing for 2 of the 3 test questions: they share no word with any passage"
    ]


def test_the_language_is_checked_with_the_options():
    with pytest.raises(ValueError, match="did you mean 'english'"):
        DataConfig(language="engish")
    assert run_options(EvaluateConfig(language="none"), None).data_options.language == "none"
    assert run_options(EvaluateConfig(), None).data_options.language == "auto"

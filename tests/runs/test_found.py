"""What a run says about the documents that are found, without any model."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ragjax.data import Question
from ragjax.index import Bm25Index
from ragjax.models.testing import tiny_encoder
from ragjax.refresh.batches import plan_batches
from ragjax.runs.compare import systems
from ragjax.runs.found import Findable
from ragjax.runs.indexes import Rankings, build_bm25
from ragjax.runs.options.evaluate import EvaluateConfig, run_options
from ragjax.runs.options.shared import DataConfig, EvaluationConfig, RunConfig, TowersConfig
from ragjax.runs.tokens import corpus_task
from ragjax.runs.workspace import note_batch, note_limits
from ragjax.training.mesh import make_layout

PASSAGES = ("the red cat", "der blaue Hund ist auf dem Dach und in der Sonne")


class Passages(list):
    """A corpus of two passages, its cache in a folder."""

    fingerprint = "two"

    def __init__(self, cache):
        super().__init__(SimpleNamespace(title="", text=text, id=text) for text in PASSAGES)
        self.cache = cache


@pytest.fixture
def workspace(tmp_path):
    return functools.partial(make_workspace, tmp_path)


def make_workspace(folder, *texts, **options):
    """A workspace of two passages and these test questions, and the lines that it logs."""
    lines = []
    return SimpleNamespace(
        config=RunConfig(data_options=DataConfig(**options)),
        dataset=SimpleNamespace(corpus=Passages(folder)),
        questions={"test": tuple(Question(id=text, text=text) for text in texts)},
        scale=20.0,
        log=lines.append,
        note=lines.append,
    ), lines


def test_the_words_of_bm25_are_said_once(workspace):
    opened, lines = workspace()
    assert build_bm25(opened).language == "german"
    assert lines == ["BM25: german stems (50% of the words are its commonest ones)"]
    opened, lines = workspace(language="none")
    assert build_bm25(opened).language == "none"
    assert lines == ["BM25: words as written (as given)"]


def test_questions_for_which_bm25_finds_nothing_are_counted(workspace, monkeypatch):
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


@pytest.mark.parametrize(
    "documents,distractors,depth",
    [(1, 0, 20), (50, 0, 50), (4, 40, 42), (60, 2, 60), (10**9, 0, 60)],
)
def test_as_many_documents_are_searched_as_are_read(
    workspace, monkeypatch, documents, distractors, depth
):
    opened, _ = workspace("red cat")
    opened.config = RunConfig(evaluation=EvaluationConfig(documents=documents))
    opened.dataset.corpus = [SimpleNamespace(title="", text="", id="")] * 60
    opened.relevant_rows = lambda split: [frozenset({0, 1})]
    asked = []

    def search(workspace, retriever, questions, k):
        asked.append(k)
        found = Bm25Index.build(PASSAGES).search(["cat"], k)
        return Rankings(found, found, np.zeros((1, 1)))

    monkeypatch.setattr(systems, "search", search)
    monkeypatch.setattr(systems, "doc_logits", lambda *_, **__: np.zeros((1, depth)))
    monkeypatch.setattr(systems, "findable_in", lambda *_: Findable([frozenset()], [{}]))
    found = systems.retrieve_documents(
        opened, Bm25Index.build(PASSAGES), SimpleNamespace(), SimpleNamespace(), "test",
        distractors=distractors,
    )  # fmt: skip
    assert asked == [depth, depth]
    assert {documents.found.doc_ids.shape for documents in found.values()} == {(1, depth)}


def test_more_than_there_is_is_said(workspace):
    opened, lines = workspace("red cat")
    opened.encoder = SimpleNamespace(max_length=64)
    opened.layout = make_layout(jax.devices())
    note_limits(opened, {"evaluation.documents": 3, "distractors": 2})
    assert lines == ["note: --evaluation.documents 3: there are 2 passages, all are taken"]
    lines.clear()
    opened.layout = make_layout(jax.devices()[:3])
    opened.config = RunConfig(retriever=TowersConfig(doc_tokens=200))
    note_limits(opened, {})
    assert lines == [
        "note: --retriever.doc_tokens 200: the encoder reads 64 tokens",
    ]
    lines.clear()
    opened.questions["train"] = opened.questions["test"]
    note_batch(opened, "retriever.batch_size", 1)
    assert not lines
    note_batch(opened, "retriever.batch_size", 2)
    assert lines[0].startswith("note: --retriever.batch_size 2: with 1 training questions a batch")


@pytest.mark.parametrize("encode_tokens,rows", [(1024, 64), (4096, 256), (1 << 16, 4096)])
def test_tokens_alone_limit_the_rows_of_a_batch(encode_tokens, rows):
    encoder = tiny_encoder()
    corpus = type("Passages", (list,), {"fingerprint": ""})(PASSAGES)
    task = corpus_task(encoder, corpus, encode_tokens=encode_tokens)
    assert plan_batches([16] * 5000, task.options)[0].rows == rows


def test_the_language_is_checked_with_the_options():
    with pytest.raises(ValueError, match="did you mean 'english'"):
        DataConfig(language="engish")
    assert run_options(EvaluateConfig(language="none"), None).data_options.language == "none"
    assert run_options(EvaluateConfig(), None).data_options.language == "auto"

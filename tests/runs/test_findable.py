"""A question does not find itself, and copies of a passage are one."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.data import read_beir
from ragjax.evaluation import recall_at_k
from ragjax.index import Bm25Index, SearchResult
from ragjax.losses import pdist_loss
from ragjax.models.inputs import Tokens
from ragjax.runs.found import (
    Findable,
    FindableIndex,
    findable_in,
    findable_in_training,
    first_copies,
    search_findable,
    search_in_training,
)
from ragjax.runs.workspace import Workspace
from ragjax.training.lsr import LsrBatch, make_lsr_loss

PASSAGES = {
    "q1": "how heavy is the lamp",  # the question under its own id
    "lamp": "the lamp weighs one",
    "other": "How heavy  is the PUMP",  # a question's text under another id
    "pump": "the pump weighs two",
    "pump-2": "the pump weighs TWO",  # a copy
    "q3": "the fan weighs three",  # relevant, with the id of the question by chance
}
QUESTIONS = {"q1": "how heavy is the lamp", "q2": "how heavy is the pump", "q3": "a fan?"}


@pytest.fixture
def workspace(tmp_path):
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", PASSAGES), ("queries", QUESTIONS)):
        rows = [{"_id": id, "title": "", "text": text} for id, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("train", "test"):
        text = "q1\tlamp\t1\nq2\tpump\t1\nq3\tq3\t1\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    dataset, notes = read_beir(folder, cache=tmp_path / "cache", dev_fraction=0), []
    return SimpleNamespace(
        dataset=dataset, questions=dict(dataset.questions), notes=notes, note=notes.append
    )


def rows(*ids):
    return frozenset(list(PASSAGES).index(id) for id in ids)


def test_a_question_does_not_find_itself_by_id_or_text(workspace):
    findable = findable_in(workspace, "test")
    assert findable.dropped == [rows("q1"), rows("other"), frozenset()]
    assert "2 of the 3 test questions stand in the corpus themselves" in workspace.notes[0]
    texts = [question.text for question in workspace.questions["test"]]
    bm25 = Bm25Index.build(PASSAGES.values())
    grades = workspace.dataset.graded_rows("test")
    alone = recall_at_k(bm25.search(texts, 1).doc_ids, grades, k=1)
    np.testing.assert_array_equal(alone, [0, 0, 1])
    found = FindableIndex(bm25, findable).search(texts, 2)
    np.testing.assert_array_equal(recall_at_k(found.doc_ids, grades, k=2), [1, 1, 1])
    assert found.mask[:2].all()  # what is left out makes room
    assert not any(
        set(docs) & own for docs, own in zip(found.doc_ids, findable.dropped, strict=True)
    )


def test_a_copy_of_a_relevant_passage_counts_as_that(workspace):
    findable = findable_in(workspace, "test")
    (copy,), (pump,) = rows("pump-2"), rows("pump")
    assert findable.stands_for == [{}, {copy: pump}, {}]
    assert "1 of the 3 test questions have a relevant passage with copies" in workspace.notes[1]


def test_copies_of_relevant_passages_are_relevant(workspace):
    workspace.gold_rows = lambda split: workspace.dataset.graded_rows(split)
    relevant = Workspace.relevant_rows(workspace, "train")
    assert relevant == [rows("lamp"), rows("pump", "pump-2"), rows("q3")]


def test_in_training_copies_are_one_passage_and_none_finds_itself(workspace):
    (copy,), (pump,) = rows("pump-2"), rows("pump")
    findable = findable_in_training(workspace, [rows("pump"), frozenset(), frozenset()])
    assert findable.dropped == [rows("q1", "pump", "pump-2"), rows("other"), frozenset()]
    assert findable.stands_for == [{copy: pump, pump: pump}] * 3
    assert first_copies(workspace, rows("lamp", "pump-2")) == rows("lamp", "pump")
    assert "1 passages have the title and text of another" in workspace.notes[-1]


def ranking(*docs):
    ids = np.array(docs, np.int32)
    return SearchResult(ids, -np.arange(ids.size, dtype=np.float32).reshape(ids.shape), ids >= 0)


def test_what_is_left_out_makes_room_for_the_next_best_however_deep():
    asked = []

    def search(depth):
        asked.append(depth)
        return ranking(list(range(depth)))

    findable = Findable([frozenset({0})], [dict.fromkeys(range(1, 40), 1)])
    kept = search_findable(search, findable, 3, size=50)
    assert kept.doc_ids.tolist() == [[1, 40, 41]]
    assert kept.scores.tolist() == [[-1, -40, -41]]
    assert asked == [4, 16, 50]
    plain = search_findable(search, Findable([frozenset()], [{}]), 3, size=50)
    assert plain.doc_ids.tolist() == [[0, 1, 2]] and asked[3:] == [3]


def test_a_question_that_finds_only_itself_stops_training():
    step = SimpleNamespace(
        rows=np.array([1]), snapshot=SimpleNamespace(index=SimpleNamespace(size=1))
    )
    findable = Findable([frozenset(), frozenset({0})], [{}, {}])
    questions = [SimpleNamespace(id="a", source=None), SimpleNamespace(id="b", source=None)]
    search = search_in_training(lambda queries, k: ranking([0]), findable, questions)
    with pytest.raises(ValueError, match="question 'b': all documents that were found are"):
        search(step, 1)


def test_an_excluded_document_is_no_negative():
    def loss(excluded, docs):
        tokens = [
            Tokens(jnp.asarray(rows)[:, None], jnp.ones((len(rows), 1), bool))
            for rows in ([1.0], docs)
        ]
        target = jnp.array([[0.0, -jnp.inf, -jnp.inf]])
        batch = LsrBatch(*tokens, target, jnp.array([[True, False, False]]), jnp.ones(3, bool))
        encode = lambda params, tokens: params["w"] * tokens.ids  # noqa: E731  (of this case alone)
        make = make_lsr_loss(encode, pdist_loss, scale=1.0, in_batch=True)
        params = {"shared": {"w": jnp.ones(())}}
        return float(make(params, None, batch._replace(excluded=excluded), None)[0])

    excluded = jnp.array([[False, False, True]])
    assert loss(excluded, [0.5, 0.2, 9.0]) == pytest.approx(loss(excluded, [0.5, 0.2, -9.0]))
    assert loss(None, [0.5, 0.2, 9.0]) > loss(excluded, [0.5, 0.2, 9.0])

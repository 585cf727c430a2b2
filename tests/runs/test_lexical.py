"""The lexical half chosen on dev questions."""

import dataclasses
import json

import numpy as np
import pytest

from ragjax.data import Question
from ragjax.index import USUAL_WEIGHT, ExactIndex, HybridIndex
from ragjax.runs.compare.lexical import LEXICAL, Lexical, adapt_bm25, adapted_bm25
from ragjax.runs.indexes import Retriever, build_bm25, build_retriever
from ragjax.runs.options.dual import AdaptConfig, LMConfig
from ragjax.runs.workspace import open_workspace
from ragjax.training.loop import StopFlag


@pytest.fixture
def opened(tiny_inputs, tmp_path):
    """A workspace, its BM25, a retriever whose dense half knows nothing, and the lines logged."""
    lines = []
    layers = LMConfig(train_layers=1)
    config = AdaptConfig(**tiny_inputs, output=str(tmp_path), language_model=layers)
    workspace = open_workspace(config, tmp_path, stop=StopFlag(), log=lines.append)
    bm25 = build_bm25(workspace)
    embeddings = np.random.default_rng(0).normal(size=(bm25.size, workspace.encoder.embedding_size))
    dense = ExactIndex(embeddings.astype(np.float32))
    hybrid = HybridIndex(dense, bm25, dense_weight=0.3)
    params = workspace.encoder.params
    return workspace, bm25, Retriever(0, params, dense, hybrid, embeddings, None), lines


def _asked_in_other_words(workspace, *, written):
    """Returns the workspace with dev questions whose words only written questions have."""
    corpus = workspace.dataset.corpus
    dev = [q for q in workspace.questions["dev"]]
    truth = {q.id: min(rows) for q, rows in zip(dev, workspace.relevant_rows("dev"), strict=True)}
    asked = tuple(dataclasses.replace(q, text=f"zorp{truth[q.id]}") for q in dev)
    train = tuple(
        Question(id=f"w{row}", text=f"who would zorp{row}?", passage=corpus.id_of(row))
        for row in truth.values()
    )
    questions = {**workspace.questions, "dev": asked, "train": train if written else ()}
    return dataclasses.replace(workspace, questions=questions)


def test_passages_are_expanded_where_dev_gains_and_the_same_index_is_built_again(opened):
    workspace, bm25, retriever, lines = opened
    workspace = _asked_in_other_words(workspace, written=True)
    chosen = adapt_bm25(workspace, bm25, retriever)
    lexical = Lexical.read(workspace.folder)
    assert len(lexical.expansions) == len(workspace.questions["dev"])
    assert "chosen: stems auto, k1 0.9, b 0.4, passages expanded with" in lines[-1]
    texts = [question.text for question in workspace.questions["dev"]]
    assert not bm25.search(texts, 5).mask.any()
    again = adapted_bm25(workspace, bm25, workspace.folder)
    for mine, theirs in zip(chosen.search(texts, 5), again.search(texts, 5), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert chosen.search(texts, 5).mask[:, 0].all()


def test_the_default_is_kept_where_dev_gains_nothing(opened):
    workspace, bm25, retriever, lines = opened
    workspace = _asked_in_other_words(workspace, written=False)
    assert adapt_bm25(workspace, bm25, retriever) is bm25
    assert Lexical.read(workspace.folder) == Lexical("auto", 0.9, 0.4, {})
    assert adapted_bm25(workspace, bm25, workspace.folder) is bm25
    assert "7 ways to count words on dev, the default is kept" in lines[-1]


def test_a_damaged_choice_is_named(tmp_path):
    assert Lexical.read(tmp_path) is None
    (tmp_path / LEXICAL).write_text(json.dumps({"k1": 1.0}))
    with pytest.raises(ValueError, match=r"lexical\.json: not what a run writes there"):
        Lexical.read(tmp_path)


def test_dev_questions_that_cannot_judge_leave_the_usual_weight(opened):
    workspace, bm25, retriever, lines = opened

    def weight(workspace):
        lines.clear()
        built = build_retriever(
            workspace, bm25, version=0, query_params=workspace.query_encoder.params,
            doc_params=workspace.encoder.params,
        )  # fmt: skip
        return built.hybrid.dense_weight, next(line for line in lines if "weight" in line)

    chosen, said = weight(workspace)
    assert 0 < chosen < 1 and "(chosen on 27 dev questions" in said
    asked = workspace.questions["dev"]
    few = dataclasses.replace(workspace, questions={**workspace.questions, "dev": asked[:6]})
    assert weight(few)[0] == USUAL_WEIGHT and "known for 6 of 6 dev questions" in lines[-1]
    # As where answers were shuffled: what counts as found has nothing to do with the question.
    dealt = tuple(
        dataclasses.replace(question, text=other.text)
        for question, other in zip(asked, asked[1:] + asked[:1], strict=True)
    )
    shuffled = dataclasses.replace(workspace, questions={**workspace.questions, "dev": dealt})
    assert weight(shuffled)[0] == USUAL_WEIGHT and "hardly better than chance" in lines[-1]

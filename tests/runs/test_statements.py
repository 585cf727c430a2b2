"""Statements that are reconstructed: where they come from, and what a reader sees of them."""

import dataclasses
import json
import shutil

import pytest

from ragjax.data import Question
from ragjax.runs.options.end_to_end import RagConfig, ReaderConfig, TrainingConfig
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.options.shared import DataConfig
from ragjax.runs.train.batches import RagBatches
from ragjax.runs.train.statements import read_statements, shown
from ragjax.runs.train_rag import open_rag
from ragjax.training.loop import StopFlag


@pytest.fixture(scope="module")
def opened(tiny_inputs, tmp_path_factory):
    """A workspace with four questions and six sentences of the corpus."""
    folder = tmp_path_factory.mktemp("statements")
    config = RagConfig(
        **tiny_inputs,
        output=str(folder),
        data_options=DataConfig(train_questions=4),
        training=TrainingConfig(batch_size=2, statements="6", same_source="drop"),
        language_model=ReaderConfig(train_layers=1),
        refresh=RefreshConfig(mode="frozen"),
    )
    return config, open_rag(config, folder, stop=StopFlag(), log=lambda _: None)


def test_sentences_of_the_corpus_join_the_questions_each_with_its_own_passage(opened):
    config, workspace = opened
    train = workspace.questions["train"]
    statements, corpus = train[4:], workspace.dataset.corpus
    assert len(statements) == 6 and len({made.source for made in statements}) == 6
    for made in statements:
        assert made.answers == (made.text,)
        assert made.text in corpus[corpus.row_of(made.source)].text
    assert read_statements("6", corpus, seed=config.seed) == statements
    assert read_statements("6", corpus, seed=config.seed + 1) != statements
    assert len(read_statements("5000", corpus, seed=0)) <= len(corpus)
    gold = workspace.relevant_rows("train")[4:]
    assert all(corpus.row_of(s.source) in rows for s, rows in zip(statements, gold, strict=True))
    assert any("6 statements" in note for note in workspace.notes)


def test_questions_without_answers_are_left_out_and_statements_alone_can_train(
    tiny_inputs, tmp_path
):
    data = tmp_path / "data"
    shutil.copytree(tiny_inputs["data"], data)
    lines = (data / "queries.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    bare = "\n".join(json.dumps({k: row[k] for k in ("_id", "text")}) for row in rows)
    (data / "queries.jsonl").write_text(bare)

    def train(statements):
        config = RagConfig(
            **tiny_inputs | {"data": str(data)},
            output=str(tmp_path),
            training=TrainingConfig(batch_size=2, statements=statements),
            language_model=ReaderConfig(train_layers=1),
            refresh=RefreshConfig(mode="frozen"),
        )
        workspace = open_rag(config, tmp_path, stop=StopFlag(), log=lambda _: None)
        return workspace.questions["train"], workspace.notes

    questions, notes = train("3")
    assert len(questions) == 3 and all(shown(question) == "<p>" for question in questions)
    assert any("have no answer, and are left out" in note for note in notes)
    with pytest.raises(ValueError, match="no training question has an answer.* a column `answer`"):
        train("")


def test_a_reader_is_not_shown_what_it_is_to_reconstruct(opened):
    config, workspace = opened
    batches = RagBatches(workspace, config)
    statement = workspace.questions["train"][4]
    read = workspace.lm.tokenizer.decode(batches._context(4, 0))
    passage = workspace.dataset.corpus[0]
    assert passage.text in read and "<p>" in read and statement.text not in read
    assert workspace.questions["train"][0].text in workspace.lm.tokenizer.decode(
        batches._context(0, 0)
    )
    assert shown(Question(id="q", text="a b", answers=("b", "a b"))) == "a b"


def test_a_file_holds_one_statement_a_line(opened, tmp_path):
    corpus, path = opened[1].dataset.corpus, tmp_path / "statements.txt"
    path.write_text("Owls  hunt at night.\n\nCats do not.\n", "utf-8")
    made = read_statements(str(path), corpus, seed=0)
    assert [s.text for s in made] == ["Owls hunt at night.", "Cats do not."]
    assert [s.id for s in made] == ["statement-1", "statement-3"] and made[0].source is None


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), (b"\n", "no statement"), (b"\xff", "not UTF-8")]
)
def test_statements_that_cannot_be_read_are_refused(opened, tmp_path, content, words):
    path = tmp_path / "statements.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        read_statements(str(path), opened[1].dataset.corpus, seed=0)
    assert f"--training.statements {path}" in str(error.value)


def test_what_a_statement_may_not_find_is_not_missed(opened):
    config, workspace = opened
    rows = workspace.relevant_rows("train")
    sources = [frozenset()] * 4 + list(rows[4:])
    batches = RagBatches(workspace, config, sources=sources)
    nothing = dataclasses.make_dataclass("Found", ["doc_ids", "mask"])
    found = nothing([[] for _ in range(6)], [[] for _ in range(6)])
    assert batches._recall(range(4, 10), found) == {}

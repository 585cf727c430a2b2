"""Questions made from passages: what is written, kept, split, and trained on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ragjax.data import DataError, Question
from ragjax.index import USUAL_WEIGHT, SearchResult
from ragjax.runs import adapt
from ragjax.runs.indexes import build_bm25, build_towers
from ragjax.runs.options.dual import AdaptConfig, LMConfig, RetrieverConfig
from ragjax.runs.options.questions import QuestionsConfig
from ragjax.runs.options.shared import DataConfig
from ragjax.runs.system import by_hybrid, open_system, retrieve
from ragjax.runs.train.retriever import _lsr_batches
from ragjax.runs.train.targets import (
    Known,
    known_passages,
    scored_targets,
    with_passages,
    written_passages,
)
from ragjax.runs.workspace import open_workspace, tower_params
from ragjax.runs.written import stage, writing
from ragjax.runs.written.file import NAME, Written, read_file, with_written, write_file
from ragjax.runs.written.pretext import Cloze
from ragjax.runs.written.rules import Rules, ends_asking, first_question
from ragjax.runs.written.writing import (
    NEUTRAL,
    Draft,
    Example,
    Form,
    read_template,
    write_drafts,
)
from ragjax.training.loop import StopFlag


@pytest.fixture(scope="module")
def workspace(tiny_inputs, tmp_path_factory):
    config = AdaptConfig(
        **tiny_inputs,
        data_options=DataConfig(train_questions=9),
        language_model=LMConfig(train_layers=1),
    )
    folder = tmp_path_factory.mktemp("workspace")
    return open_workspace(config, folder, stop=StopFlag(), log=lambda _: None)


@pytest.fixture(scope="module")
def bm25(workspace):
    return build_bm25(workspace)


@pytest.fixture(scope="module")
def retriever(workspace, bm25):
    return build_towers(workspace, bm25, tower_params(workspace), 0)


@pytest.fixture
def fresh(workspace, tmp_path, monkeypatch):
    """A workspace in a folder of its own, whose passages are long enough to ask about."""
    monkeypatch.setattr(stage, "_FEWEST_WORDS", 4)
    return dataclasses.replace(workspace, folder=tmp_path, notes=[], seconds={})


def documents_only(workspace, *, test=()):
    return dataclasses.replace(workspace, questions={"train": (), "dev": (), "test": tuple(test)})


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("  Who is\nit?  Answer: me", "Who is it?"),
        ("谁来了？他。", "谁来了？"),
        ("no mark at all", "no mark at all"),
        ("A? B？", "A?"),
    ],
)
def test_a_generated_text_ends_with_its_first_question(text, first):
    assert first_question(text) == first


def test_rules_name_what_is_wrong():
    content = {"cat", "dog", "red"}
    rules = Rules(
        lambda text: [word for word in text.lower().strip("?").split() if word in content],
        ["Does the red dog see a cat?"],
        marked=True,
    )
    said = {
        "Where does the red cat sleep?": "",
        "where does the  red cat sleep": "written twice",
        "does the RED dog see a cat": "asked by others",
        "red cat?": "too short",
        "red cat " * 30 + "?": "too long",
        "The red cat sleeps here.": "not a question",
        "What is the name of it?": "names nothing",
        "Is the cat a cat or a cat?": "names nothing",
    }
    assert {text: rules.against(text) for text in said} == said
    free = Rules(lambda text: [1, 2], [], marked=False)
    assert free.against("red cats of the north") == ""


@pytest.mark.parametrize(
    ("texts", "expected"), [(["a?", "b？", "c"], True), (["a?", "b", "c"], False), ([], True)]
)
def test_questions_need_a_mark_where_most_have_one(texts, expected):
    assert ends_asking(texts) is expected


def test_a_template_is_filled_with_examples_and_read_from_a_file(tmp_path):
    examples = [Example("P1 {passage}", "Q1?"), Example("P2", "Q2?")]
    form = Form.of(read_template(QuestionsConfig()), examples)
    assert form.head == "P1 {passage}\n\nQuestion: Q1?\n\n\nP2\n\nQuestion: Q2?\n\n\n"
    assert form.tail == "\n\nQuestion:"
    own = "Stelle eine Frage.\n{passage}\nFrage:"
    (tmp_path / "t.txt").write_text(own + "\n")
    for given in (own, str(tmp_path / "t.txt")):
        assert Form.of(read_template(QuestionsConfig(template=given)), examples) == Form(
            "Stelle eine Frage.\n", "\nFrage:"
        )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nowhere.txt", "nowhere.txt: neither a text with {passage} nor a file"),
        ("{passage} {passage}", "expected {passage} once"),
        ("{passage} {examples}", "{examples} must stand before {passage}"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        read_template(QuestionsConfig(template=template))


def test_drafts_are_kept_and_do_not_depend_on_the_batch(fresh, monkeypatch):
    config, lm = QuestionsConfig(per_passage=2), fresh.base_lm()
    rows = [3, 11, 4]
    drafts = write_drafts(fresh, lm, rows, NEUTRAL[:1], config)
    assert [len(group) for group in drafts] == [2, 2, 2]
    assert len({draft.text for group in drafts for draft in group}) > 3
    other = dataclasses.replace(fresh, folder=fresh.folder / "other")
    alone = write_drafts(other, lm, [11], NEUTRAL[:1], config)
    assert [draft.text for draft in alone[0]] == [draft.text for draft in drafts[1]]

    def forbidden(*_, **__):
        raise AssertionError("written again")

    monkeypatch.setattr(writing, "generate_sampled", forbidden)
    assert write_drafts(fresh, lm, rows, NEUTRAL[:1], config) == drafts
    for changed in ({"temperature": 0.9}, {"template": "{passage}?"}, {"per_passage": 1}):
        with pytest.raises(AssertionError, match="written again"):
            write_drafts(fresh, lm, rows, NEUTRAL[:1], dataclasses.replace(config, **changed))


def test_examples_are_left_out_where_there_is_no_room(workspace):
    many = [Example("word " * 60, "which word?")] * 5
    ids = writing._context(workspace, read_template(QuestionsConfig()), many, 3)
    most = workspace.prompts.max_length - writing._MOST_TOKENS
    assert len(ids) <= most
    (document,) = workspace.documents.get([3])
    text = workspace.lm.tokenizer.decode(ids)
    assert document.text in text and text.endswith("Question:")


def test_passages_without_a_question_come_first(fresh):
    config = QuestionsConfig(passages=75)
    asked = frozenset().union(*fresh.relevant_rows("train"))
    rows, splits = stage.choose_passages(fresh, config)
    assert len(asked) == 9 and len(rows) == len(set(rows)) == 75
    assert not asked & set(rows[:71]) and asked >= set(rows[71:])
    assert set(splits) == {"train"}
    seeded = dataclasses.replace(fresh, config=dataclasses.replace(fresh.config, seed=1))
    assert stage.choose_passages(seeded, config).rows != rows


def test_short_passages_are_counted_and_not_asked_about(workspace):
    alone = dataclasses.replace(workspace, notes=[])
    assert stage.choose_passages(alone, QuestionsConfig(passages=5)).rows == []
    assert alone.notes == ["80 passages of under 12 words are not asked about"]


def test_where_nobody_asks_some_passages_are_held_out(fresh):
    nobody = documents_only(fresh)
    rows, splits = stage.choose_passages(nobody, QuestionsConfig(passages=20))
    assert len(set(rows)) == 20
    assert splits == ["train"] * 12 + ["dev"] * 4 + ["test"] * 4
    tested = documents_only(fresh, test=fresh.questions["test"])
    assert stage.choose_passages(tested, QuestionsConfig(passages=20)).splits.count("dev") == 4
    assert "test" not in stage.choose_passages(tested, QuestionsConfig(passages=20)).splits


def test_where_nothing_tells_the_passages_of_dev_some_are_written_to_measure_by(fresh):
    # Given questions without judgements or answers.
    bare = dataclasses.replace(fresh.dataset, qrels={"test": fresh.dataset.qrels["test"]})
    questions = {
        split: tuple(dataclasses.replace(q, answers=()) for q in asked)
        for split, asked in fresh.questions.items()
    }
    unknown = dataclasses.replace(fresh, dataset=bare, questions=questions)
    assert stage.count_passages(fresh, QuestionsConfig()) == 0
    assert stage.count_passages(unknown, QuestionsConfig()) > 0
    rows, splits = stage.choose_passages(unknown, QuestionsConfig())
    assert rows and set(splits) == {"dev"}
    id = unknown.dataset.corpus.id_of(rows[0])
    joined = stage._joined(unknown, [Written("w", "what?", id, "dev")], ["dev"])
    assert joined.truth("dev") == "written" and joined.truth("test") == "judgements"
    assert len(joined.questions["dev"]) == 1 + len(questions["dev"])
    assert joined.questions["train"] == questions["train"]


def asking(questions):
    return AdaptConfig(questions=questions)


def drafted(monkeypatch, write):
    """Lets a function of the passage write, in place of the language model."""

    def write_them(workspace, lm, rows, examples, config):
        passages = [workspace.dataset.corpus[row] for row in rows]
        return [[Draft(text, -1.0, 1) for text in write(passage)] for passage in passages]

    monkeypatch.setattr(stage, "write_drafts", write_them)


def test_questions_that_find_their_passage_are_added(fresh, bm25, retriever, monkeypatch):
    def write(passage):
        colour, animal = passage.id.split("-")
        return [f"what is it that the {colour} {animal} likes?", "what do brown and pink bees do?"]

    drafted(monkeypatch, write)
    config = QuestionsConfig(passages=10, found=1)
    after, same = stage.add_written(fresh, asking(config), bm25, retriever, fresh.base_lm())
    added = after.questions["train"][9:]
    assert after.questions["train"][:9] == fresh.questions["train"] and same is retriever
    assert len(added) <= 10
    truths = [row for rows in after.relevant_rows("train")[9:] for row in rows]
    assert [after.dataset.corpus[row].id for row in truths] == [q.passage for q in added]
    assert all(q.text.startswith("what is it that the") and not q.answers for q in added)
    rows = [json.loads(line) for line in (fresh.folder / NAME).read_text().splitlines()]
    assert len(rows) == 20 and sum(row["kept"] for row in rows) == len(added) > 0
    lost = {row["reason"] for row in rows if not row["kept"]}
    assert lost <= {"written twice", "its passage is not among the first 1"} and lost
    assert "questions written by the language model: 20 of 10 passages" in after.notes[-1]


def test_what_dev_or_test_asks_is_never_written(fresh, bm25, retriever, monkeypatch):
    # Also one that the cap of this run leaves out.
    hidden = fresh.dataset.questions["test"][-1].text
    drafted(monkeypatch, lambda passage: [hidden.upper()])
    config = QuestionsConfig(passages=3)
    after, _ = stage.add_written(fresh, asking(config), bm25, retriever, fresh.base_lm())
    assert after.questions == fresh.questions
    rows = [json.loads(line) for line in (fresh.folder / NAME).read_text().splitlines()]
    assert {row["reason"] for row in rows} == {"asked by others"}


def test_nothing_is_written_where_people_have_asked(fresh, bm25, retriever):
    after, same = stage.add_written(
        fresh, asking(QuestionsConfig()), bm25, retriever, fresh.base_lm()
    )
    assert after is fresh and same is retriever


def test_documents_alone_get_dev_and_test_of_passages_of_their_own(
    fresh, bm25, retriever, monkeypatch
):
    monkeypatch.setattr(stage, "_FEWEST_QUESTIONS", 3)
    drafted(monkeypatch, lambda passage: [f"what is {passage.id.replace('-', ' ')} fond of?"])
    nobody = documents_only(fresh)
    after, chosen = stage.add_written(
        nobody, asking(QuestionsConfig(passages=20)), bm25, retriever, fresh.base_lm()
    )
    passages = {split: {q.passage for q in asked} for split, asked in after.questions.items()}
    assert all(passages.values())
    assert len(set.union(*passages.values())) == sum(map(len, passages.values()))
    assert len(passages["dev"]) == len(passages["test"]) == 4
    assert chosen is not retriever  # its weight is chosen on dev
    again = with_written({"train": (), "dev": (), "test": ()}, fresh.folder, after.dataset.corpus)
    assert again == after.questions


def test_few_written_questions_are_joined_by_sentences(fresh, bm25, retriever, monkeypatch):
    drafted(monkeypatch, lambda passage: ["who knows?"])
    asked = fresh, asking(QuestionsConfig(passages=20)), bm25, retriever, fresh.base_lm()
    nobody = (documents_only(fresh), *asked[1:])
    with pytest.raises(ValueError, match="made from 20 passages is left to train on"):
        stage.add_written(*nobody)  # no passage has two sentences

    def cut(passage_text, *, seed):
        return Cloze("the sentence of it", "the rest")

    monkeypatch.setattr(stage, "inverse_cloze", cut)
    after, _ = stage.add_written(*nobody)
    assert any("too few to train on" in note for note in after.notes)
    train = after.questions["train"]
    assert len(train) == 12 and {q.text for q in train} == {"the sentence of it"}
    assert all(q.rest.endswith("\nthe rest") and q.passage for q in train)
    assert not after.questions["dev"] and not after.questions["test"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a?"}, "no field passage"),
        ({"text": "a?", "passage": "nowhere"}, "'nowhere' is no id of the corpus"),
        ({"text": " ", "passage": "red-cat"}, "text is empty"),
        ({"text": "a?", "passage": "red-cat", "split": "valid"}, "split is 'valid'"),
        ({"id": "1", "text": "b?", "passage": "red-cat"}, "the id '1' stands there twice"),
    ],
)
def test_a_damaged_line_of_a_file_is_named(workspace, tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    rows = [{"id": "1", "text": "a?", "passage": "red-dog"}, line]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=f"mine.jsonl:2: .*{message}"):
        read_file(path, workspace.dataset.corpus)
    assert path.is_file()


def test_a_file_is_taken_as_it_was_edited(fresh, bm25, retriever, tmp_path):
    written = [
        Written("1", "what does the red cat like?", "red-cat", "train"),
        Written("2", "and this?", "red-dog", "train", reason="too short"),
        Written("3", "a sentence", "red-owl", "train", rest="the rest"),
    ]
    write_file(tmp_path / "mine.jsonl", written)
    assert read_file(tmp_path / "mine.jsonl", fresh.dataset.corpus) == [written[0], written[2]]
    config = QuestionsConfig(file=str(tmp_path / "mine.jsonl"))
    after, _ = stage.add_written(fresh, asking(config), bm25, retriever, fresh.base_lm())
    assert [q.id for q in after.questions["train"][9:]] == ["1", "3"]
    write_file(tmp_path / "none.jsonl", written[1:2])
    with pytest.raises(DataError, match="no question that is to be used"):
        read_file(tmp_path / "none.jsonl", fresh.dataset.corpus)
    # Of a run that uses none of them.
    write_file(fresh.folder / NAME, written[1:2])
    assert with_written(fresh.questions, fresh.folder, fresh.dataset.corpus) == fresh.questions


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_target_of_a_written_question_is_its_passage(share):
    ids = np.array([[4, 5, 6], [4, 5, 6], [7, 8, 9]], np.int32)
    log_probs = np.log(np.array([[0.5, 0.3, 0.2]] * 3, np.float32))
    mask = np.ones(ids.shape, bool)
    found = SearchResult(ids, np.zeros(ids.shape, np.float32), mask)
    given = scored_targets(found, log_probs)
    passages = [frozenset[int](), frozenset({5}), frozenset({1})]
    targets = with_passages(given, Known(passages, np.float32([0, share, share])))
    np.testing.assert_array_equal(targets.log_probs[0], log_probs[0])  # asked by a person
    assert mask.all() and (given.mask == mask).all()
    if share == 1:  # what was found beside it may answer the question as well
        assert targets.doc_ids[1:][targets.mask[1:]].tolist() == [5, 1]
        assert np.isneginf(targets.log_probs[1:][targets.mask[1:]]).all()
    else:
        np.testing.assert_allclose(np.exp(targets.log_probs[1]), [0.375, 0.225, 0.15], rtol=1e-5)
        assert targets.doc_ids[2].tolist() == [7, 8, 1] and np.isneginf(targets.log_probs[2, 2])
    assert with_passages(given, Known([frozenset()] * 3, np.zeros(3, np.float32))) is given


def test_of_several_known_passages_one_among_the_candidates_is_enough():
    ids = np.array([[4, 5, 6]] * 2, np.int32)
    log_probs = np.log(np.array([[0.5, 0.3, 0.2]] * 2, np.float32))
    found = SearchResult(ids, np.zeros(ids.shape, np.float32), np.ones(ids.shape, bool))
    known = Known([frozenset({2, 6}), frozenset({2, 3})], np.float32([0.5, 0.5]))
    targets = with_passages(scored_targets(found, log_probs), known)
    assert targets.doc_ids.tolist() == [[4, 5, 6], [4, 5, 2]]
    assert targets.best(1).tolist() == [[False, False, True]] * 2


def test_what_is_known_of_questions_given_and_written(workspace):
    row = workspace.dataset.corpus.row_of
    given = workspace.questions["train"][0]
    asked = [
        given,
        Question(id="b", text="which dog?", passage="red-dog"),
        Question(id="c", text="?"),
    ]
    own = with_train(workspace, *asked)
    relevant = own.relevant_rows("train")[0]
    known = known_passages(own, given=0.5, written=1.0)
    assert known.passages == [relevant, {row("red-dog")}, frozenset()] and relevant
    assert known.shares.tolist() == [0.5, 1.0, 0.0] and known.asked.tolist() == [0, 2]
    assert known.take(np.array([1])).passages == [{row("red-dog")}]
    alone = known_passages(own, given=0.0, written=0.0)
    assert not any(alone.passages) and alone.asked.tolist() == [0, 1, 2]


def with_train(workspace, *questions):
    return dataclasses.replace(
        workspace, questions={**workspace.questions, "train": tuple(questions)}
    )


def test_batches_hold_the_passages_of_written_questions(workspace):
    row = workspace.dataset.corpus.row_of
    asked = [
        Question(id="a", text="what does it like?", passage="red-cat", rest="only this"),
        Question(id="b", text="what does the dog like?", passage="red-dog"),
        Question(id="c", text="who?", answers=("1",)),
        Question(id="d", text="what else does the dog like?", passage="red-dog"),
    ]
    own = with_train(workspace, *asked)
    ids = np.array([[row("blue-cow"), row("blue-pig")]] * 4, np.int32)
    found = SearchResult(ids, np.zeros(ids.shape, np.float32), np.ones(ids.shape, bool))
    log_probs = np.full(ids.shape, np.log(0.5), np.float32)
    passages = written_passages(own)
    assert passages == [{row("red-cat")}, {row("red-dog")}, frozenset(), {row("red-dog")}]
    for share in (0.75, 1.0):
        known = known_passages(own, given=0.0, written=share)
        assert known.passages == passages
        targets = with_passages(scored_targets(found, log_probs), known)
        config = RetrieverConfig(batch_size=4, candidates=2, keyword_queries=0)
        batch = _lsr_batches(own, config, 0, lambda step, rows, t=targets: t.take(rows))(0)
        probs = np.exp(np.asarray(batch.target_log_probs))
        np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.sort(probs, axis=1)[:, -1].max(), max(share, 0.5), rtol=1e-5)
        lengths = np.asarray(batch.docs.mask).sum(axis=1)
        short = workspace.encoder.tokenizer.encode("only this").ids
        shown = np.asarray(batch.docs.ids)
        assert any(shown[doc, : lengths[doc]].tolist() == short for doc in range(len(lengths)))


@pytest.mark.slow
def test_documents_are_enough_for_a_whole_run(tiny_inputs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for line in Path(tiny_inputs["data"], "corpus.jsonl").read_text().splitlines():
        row = json.loads(line)
        row["text"] += f". It has been seen near the {row['_id']} house in the old town. So be it."
        rows.append(json.dumps(row) + "\n")
    (folder / "corpus.jsonl").write_text("".join(rows))
    config = AdaptConfig.from_dict(
        {
            **tiny_inputs,
            "data": str(folder),
            "output": str(tmp_path / "run"),
            "questions": {"passages": 20, "per_passage": 1},
            "language_model": {"train_layers": 1},
            "retriever": {"batch_size": 4, "candidates": 3},
            "evaluation": {"max_new_tokens": 3, "resamples": 50},
        }
    )
    monkeypatch.setattr(stage, "_FEWEST_QUESTIONS", 3)
    drafted(monkeypatch, lambda passage: [f"where has the {passage.id} house been seen?"])
    run = adapt(config)
    assert run.metrics["before"]["n"] == 4  # the passages that were held out for test
    notes = json.loads((run.folder / "notes.json").read_text())["notes"]
    assert any("questions written by the language model: 20 of 20 passages" in n for n in notes)
    system = open_system(run.folder)
    assert system.retriever.hybrid.dense_weight == USUAL_WEIGHT
    assert len(system.workspace.questions["dev"]) == 4
    assert retrieve(system, ["where is the red-cat house?"], 2, by=by_hybrid).found.mask.all()
    printed = capsys.readouterr().out
    assert "questions that a language model wrote do not choose it" in printed
    assert printed.index("== forecast") < printed.index("== questions")
    assert adapt(config).metrics == run.metrics

"""What a run is told of its data before anything expensive."""

import dataclasses
import json

import pytest

from ragjax.data import Question, read_beir
from ragjax.models.testing import tiny_encoder, tiny_language_model
from ragjax.runs.data import choose_questions, note_shared_passages, read_data, require_answers
from ragjax.runs.models import Encoders, load_encoders
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.evaluate import EvaluateConfig, run_options
from ragjax.runs.tokens import query_ids
from ragjax.runs.workspace import make_workspace
from ragjax.training.loop import StopFlag


@pytest.mark.parametrize("leaks", [0, 1, 5])
def test_questions_asked_in_train_and_test_are_told(tmp_path, write_domain, leaks):
    folder = write_domain(tmp_path / "data")
    path = folder / "queries.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number in range(leaks):  # every third question is of train, the second after it of test
        rows[3 * number + 2]["text"] = rows[3 * number]["text"].upper()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = []
    read_data(AdaptConfig(data=str(folder)), tmp_path / "run", told.append)
    some = {
        0: [],
        1: ["note: 1 of the 26 test questions are also asked in train: q2"],
        5: ["note: 5 of the 26 test questions are also asked in train: q2, q5, q8, ..."],
    }
    assert told == some[leaks]


@pytest.mark.parametrize("leaks", ["drop", "keep"])
def test_questions_that_test_asks_are_left_out_of_training_or_named(tmp_path, write_domain, leaks):
    folder = write_domain(tmp_path / "data")
    path = folder / "queries.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["text"], rows[4]["text"] = rows[0]["text"].upper(), rows[3]["text"]  # test, dev
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"leaks": leaks, "train_questions": 1000}
    config = AdaptConfig.from_dict({"data": str(folder), "data_options": options})
    dataset, told = read_data(config, tmp_path / "run", lambda line: None), []
    chosen = choose_questions(config, dataset, told.append)
    trained = {question.id for question in chosen["train"]}
    known = {question.id for question in dataset.questions["train"]}
    assert known - trained == ({"q0", "q3"} if leaks == "drop" else set())
    done = "left out of training" if leaks == "drop" else "trained on"
    (note,) = told
    assert (
        f"2 of the 27 training questions are also asked in dev or test, and {done}: q0, q3" in note
    )
    assert any("test questions are also asked in train: q2" in note for note in dataset.notes)


def test_training_on_nothing_but_test_questions_is_refused(tmp_path, write_domain):
    folder = write_domain(tmp_path / "data", splits=("test",))
    (folder / "qrels" / "train.tsv").write_text((folder / "qrels" / "test.tsv").read_text())
    config = AdaptConfig(data=str(folder), dev_fraction=0)
    dataset = read_data(config, tmp_path / "run", lambda line: None)
    with pytest.raises(ValueError, match="80 of the 80 .* --data_options.leaks keep"):
        choose_questions(config, dataset)


def test_the_fields_are_named_where_no_question_has_answers(tmp_path, write_domain):
    folder = write_domain(tmp_path / "data")
    path = folder / "queries.jsonl"
    path.write_text(path.read_text().replace('"answers"', '"solution"'))
    dataset = read_data(AdaptConfig(data=str(folder)), tmp_path / "run", lambda line: None)
    chosen = choose_questions(AdaptConfig(data=str(folder)), dataset)
    assert len(chosen["train"]) == 27  # without answers they train what needs none
    with pytest.raises(ValueError, match=r"other fields there: solution; .*fields='answers=NAME'"):
        require_answers(dataset, chosen["train"], "this")


def test_unknown_ids_are_skipped_where_asked(tmp_path, write_domain):
    folder = write_domain(tmp_path / "data")
    with open(folder / "qrels" / "test.tsv", "a") as file:
        file.write("q1\tnowhere\t1\n")
    config = AdaptConfig(data=str(folder))
    with pytest.raises(ValueError, match="on_unknown=skip"):
        read_data(config, tmp_path / "run", lambda line: None)
    options = dataclasses.replace(config.data_options, on_unknown="skip")
    told = []
    read_data(dataclasses.replace(config, data_options=options), tmp_path / "run", told.append)
    assert "name unknown ids (passage 'nowhere') and are dropped" in told[0]


def test_relevant_passages_on_both_sides_are_told(tmp_path):
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    long = "The lamp made in Oslo weighs one kilogram, is sold in spring and comes in five colours"
    texts = {"a": long + ".", "b": long.upper() + "!", "c": "The pump weighs two.", "d": "A fan."}
    lines = {
        "corpus": [{"_id": id, "title": "", "text": text} for id, text in texts.items()],
        "queries": [{"_id": f"q{n}", "text": f"question {n}?"} for n in range(4)],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "train.tsv").write_text("q0\ta\t1\nq1\td\t1\n")
    (folder / "qrels" / "test.tsv").write_text("q2\tb\t1\nq3\td\t1\nq3\tc\t1\n")
    dataset, told = read_beir(folder, cache=tmp_path / "cache", dev_fraction=0), []
    note_shared_passages(dataset, dataset.questions, told.append)
    assert told == [
        "1 of the 3 relevant passages of the test questions are also relevant to training"
        " questions",
        "1 of the 3 relevant passages of the test questions are almost the same as one of a"
        " training question: b ~ a",
    ]


def test_what_the_encoder_reads_before_a_text_is_an_option(tiny_inputs):
    options = {"query_prefix": "query: ", "doc_prefix": ""}
    given = load_encoders(AdaptConfig.from_dict(tiny_inputs | options)).doc
    assert (given.query_prefix, given.doc_prefix) == ("query: ", "")
    plain = load_encoders(AdaptConfig.from_dict(tiny_inputs)).doc
    assert plain.query_prefix == "" and plain.fingerprint != given.fingerprint
    question = Question(id="q", text="what?")
    read = plain.tokenizer.encode("query: what?").ids
    assert query_ids(given, [question]) == [read] != query_ids(plain, [question])
    # Of an evaluation: "" is none at all, and a run has its own.
    assert run_options(EvaluateConfig(query_prefix=""), None).query_prefix == ""
    with pytest.raises(ValueError, match="--doc_prefix : --run r says which models"):
        EvaluateConfig(run="r", doc_prefix="")


@pytest.mark.parametrize(
    ("kind", "asked", "scale", "note"),
    [
        ("bert", 0.0, 20.0, None),
        ("bert", 7.0, 7.0, None),
        ("dpr", 0.0, 1.0, "p_R is the softmax of their dot products, times 1"),
        ("dpr", 20.0, 20.0, "--retriever.scale 20 multiplies the dot products"),
    ],
)
def test_the_scale_of_scores_is_that_of_the_encoder_unless_asked(
    tmp_path, write_domain, kind, asked, scale, note
):
    config = AdaptConfig.from_dict({"retriever": {"scale": asked}})
    told = []
    encoder = tiny_encoder(family=kind)
    workspace = make_workspace(
        config,
        tmp_path,
        read_beir(write_domain(tmp_path / "data"), cache=tmp_path / "cache"),
        {"train": (), "dev": (), "test": ()},
        Encoders(encoder, encoder),
        tiny_language_model(),
        stop=StopFlag(),
        log=told.append,
    )
    assert workspace.scale == scale
    notes = [line for line in told if line.startswith("note: ")]
    assert len(notes) == (note is not None) and all(note in line for line in notes)

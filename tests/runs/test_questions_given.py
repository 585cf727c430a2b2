"""`--queries` and `--qrels`: questions and judgements of another place than the documents."""

import json
from dataclasses import replace

import pytest
from programs import load_script

from ragjax.runs import AdaptConfig, EvaluateConfig
from ragjax.runs.data import read_data
from ragjax.runs.options.evaluate import run_options
from ragjax.runs.program import parse_flags

PARAGRAPHS = [
    {
        "context": f"the {animal} likes {number}",
        "qas": [
            {
                "id": f"s{number}",
                "question": f"what does the {animal} like?",
                "answers": [{"text": str(number), "answer_start": 0}],
            }
        ],
    }
    for number, animal in enumerate(("cat", "dog", "owl", "fox", "hen"))
]


@pytest.fixture
def squad(tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "animals", "paragraphs": PARAGRAPHS}]}))
    return path


def read(config, tmp_path):
    return read_data(config, tmp_path / "run", lambda line: None)


def test_given_questions_and_judgements_take_the_place_of_those_in_the_folder(
    write_domain, tmp_path
):
    folder = write_domain(tmp_path / "domain")
    (tmp_path / "q.csv").write_text("id,question,answer\nx,what?,5\ny,who?,6\n")
    config = AdaptConfig(data=str(folder), queries=str(tmp_path / "q.csv"), dev_fraction=0)
    with pytest.raises(ValueError, match="unknown ids"):
        read(config, tmp_path)
    (tmp_path / "test.txt").write_text("x 0 red-cat 1\n")
    dataset = read(replace(config, qrels=str(tmp_path / "test.txt")), tmp_path)
    assert [q.id for q in dataset.questions["test"]] == ["x"]
    assert [q.id for q in dataset.questions["train"]] == ["y"] and len(dataset.corpus) == 80


def test_questions_and_judgements_without_documents_are_refused(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("question,answer\nwhat?,5\n")
    for given in ({"queries": str(path)}, {"qrels": str(tmp_path)}):
        with pytest.raises(ValueError, match="none are given; name them with data=FOLDER"):
            read(AdaptConfig(**given), tmp_path)


def test_questions_is_another_name_of_the_flag():
    for default in (AdaptConfig(), EvaluateConfig()):
        assert parse_flags(default, None, ["--questions", "q.csv"]).options.queries == "q.csv"


def test_paragraphs_are_the_documents_where_there_are_no_others(squad, tmp_path):
    dataset = read(AdaptConfig(queries=str(squad)), tmp_path)
    assert len(dataset.corpus) == 5 and dataset.supervision == "judgements"
    same = read(AdaptConfig(data=str(squad)), tmp_path)
    assert same.corpus.fingerprint == dataset.corpus.fingerprint
    assert not (tmp_path / "run" / "data" / "python-docs").exists()


def test_an_evaluation_has_the_questions_of_its_documents(squad, tmp_path):
    run = AdaptConfig(data="a", queries="b.csv", qrels="c.txt", output=str(tmp_path))
    kept = run_options(EvaluateConfig(run=str(tmp_path)), run)
    assert (kept.data, kept.queries, kept.qrels) == ("a", "b.csv", "c.txt")
    other = run_options(EvaluateConfig(run=str(tmp_path), data="d"), run)
    assert (other.data, other.queries, other.qrels) == ("d", "", "")
    asked = run_options(EvaluateConfig(run=str(tmp_path), queries="e.csv"), run)
    assert (asked.data, asked.queries) == ("a", "e.csv")
    own = run_options(EvaluateConfig(run=str(tmp_path)), replace(run, data=""))
    assert (own.data, own.queries) == ("", "b.csv")


def test_paragraphs_are_encoded_as_documents(squad, tiny_inputs, tmp_path, capsys):
    flags = [f"--data={squad}", f"--encoder={tiny_inputs['encoder']}", "--rank=0", "--world=1"]
    flags += [f"--output={tmp_path / 'store'}", f"--cache={tmp_path / 'cache'}"]
    assert load_script("experiments/encode.py").main(flags) == 0
    assert "5 embeddings of 16 dimensions" in capsys.readouterr().out

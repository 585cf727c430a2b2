"""Questions of every kind of file, beside a corpus or with passages of their own."""

import gzip
import json
from pathlib import Path

import pytest

from ragjax.data import DataError, read_beir
from ragjax.data.jsonl import Flaw

KILT = {"id": "k1", "input": "which?", "output": [{"answer": "this", "provenance": [{"a": 1}]}, {}]}
FLASHRAG = {"id": "f1", "question": "which?", "golden_answers": ["this", "that"], "metadata": {}}
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Cats",
            "paragraphs": [
                {
                    "context": "A cat purrs.",
                    "qas": [
                        {
                            "id": "s1",
                            "question": "What purrs?",
                            "answers": [{"text": "A cat", "answer_start": 0}] * 3,
                        },
                        {"id": "s2", "question": "What barks?", "is_impossible": True},
                    ],
                },
                {"context": "Nobody asks about this one.", "qas": []},
            ],
        }
    ],
}
DPR = [
    {
        "question": f"big city {n}?",
        "answers": ["Rome"],
        "positive_ctxs": [{"title": "Rome", "text": "Rome is big.", "passage_id": "d1"}],
        "negative_ctxs": [],
        "hard_negative_ctxs": [{"title": "Bari", "text": "Bari is not.", "passage_id": 7}],
    }
    for n in range(2)
]


@pytest.fixture
def documents(tmp_path):
    """A folder with five passages."""
    (tmp_path / "docs").mkdir()
    rows = [{"_id": f"d{n}", "text": f"text {n}"} for n in range(5)]
    (tmp_path / "docs" / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "docs"


@pytest.fixture
def read(tmp_path, documents):
    """Writes a file of questions and reads it, with the documents unless others are given."""

    def write_and_read(name, content, *, folder=documents, **options):
        path = tmp_path / name
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        options = {"dev_fraction": 0, "queries": path} | options
        return read_beir(folder, cache=tmp_path / "cache", **options)

    return write_and_read


def asked(dataset):
    """Text and answers of all questions."""
    return {q.text: q.answers for split in dataset.questions.values() for q in split}


ZIPPED = gzip.compress(json.dumps(FLASHRAG).encode())
CSV = 'Question,Answer,split\n"Who, me?",you,train\n"Who, me?",thou,train\nWhen?,,dev\n'
KINDS = {
    "flashrag": ("q.jsonl", FLASHRAG, {"which?": ("this", "that")}),
    "kilt": ("q.jsonl", KILT, {"which?": ("this",)}),
    "array": ("q.json", [FLASHRAG], {"which?": ("this", "that")}),
    "gzip": ("q.jsonl.gz", ZIPPED, {"which?": ("this", "that")}),
    "a name that lies": ("q.csv", FLASHRAG, {"which?": ("this", "that")}),
    "csv": ("q.csv", CSV, {"Who, me?": ("you", "thou"), "When?": ()}),
    "tsv": ("q.tsv", "id\tquestion\tanswer\n1\twhich?\tthis\n", {"which?": ("this",)}),
    "lists in cells": (
        "q.csv",
        "question,answers\na?,\"[\"\"x\"\", \"\"y, z\"\"]\"\nb?,\"['x']\"\nc?,[sic] x\n",
        {"a?": ("x", "y, z"), "b?": ("x",), "c?": ("[sic] x",)},
    ),
    "squad of datasets": (
        "q.jsonl",
        {"id": "1", "question": "which?", "answers": {"text": ["this"], "answer_start": [0]}},
        {"which?": ("this",)},
    ),
    "squad": ("q.json", SQUAD, {"What purrs?": ("A cat",), "What barks?": ()}),
    "dpr": ("q.json", DPR, {"big city 0?": ("Rome",), "big city 1?": ("Rome",)}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), KINDS.values(), ids=KINDS)
def test_questions_and_answers_of_every_kind(read, name, content, expected):
    dataset = read(name, content)
    assert asked(dataset) == expected and len(dataset.corpus) == 5
    assert any(name in note for note in dataset.notes)


def test_parquet(read, tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra [parquet] is not installed")
    from pyarrow import parquet

    table = arrow.table({"id": ["1", "2"], "question": ["a?", "b?"], "answers": [["x", "y"], None]})
    parquet.write_table(table, tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    assert asked(read("q.parquet", content)) == {"a?": ("x", "y"), "b?": ()}


def test_ids_are_made_of_the_text_where_there_are_none(read):
    one = read("a.csv", "question,answer\na?,x\nb?,y\n")
    other = read("b.csv", "question,answer\nc?,z\nb?,y\na?,x\n")
    ids = [{q.text: q.id for s in data.questions.values() for q in s} for data in (one, other)]
    assert ids[0].items() < ids[1].items()
    assert "their ids are made of their text" in " ".join(one.notes)
    (note,) = [note for note in read("c.csv", CSV).notes if "another row" in note]
    assert "1 rows ask what another row asks; their answers count together" in note


def test_passages_beside_questions_are_the_corpus_where_there_is_no_other(read):
    dataset = read("squad.json", SQUAD, folder=None)
    assert [(p.title, p.text) for p in dataset.corpus] == [
        ("Cats", "A cat purrs."),
        ("Cats", "Nobody asks about this one."),
    ]
    assert dataset.supervision == "judgements" and dataset.name == "squad"
    # What its paragraph does not answer is not trained on.
    assert asked(dataset) == {"What purrs?": ("A cat",)}
    assert dataset.graded_rows("train") == [{0: 1}]
    assert dataset.questions["train"][0].source == "Cats"
    again = read("squad.json", SQUAD, queries=None, folder=Path(dataset.notes[0].split(":")[0]))
    assert again.corpus.fingerprint == dataset.corpus.fingerprint and asked(again) == asked(dataset)


def test_a_corpus_of_dpr_and_of_a_column(read):
    dataset = read("dpr.json", DPR, folder=None)
    assert [(p.id, p.text) for p in dataset.corpus] == [
        ("d1", "Rome is big."),
        ("7", "Bari is not."),
    ]
    assert dataset.graded_rows("train") == [{0: 1}] and dataset.graded_rows("test") == [{0: 1}]
    rows = "question,answer,context\na?,x,holds x\nb?,y,holds y\nc?,y,holds y\n"
    dataset = read("rows.csv", rows, folder=None)
    assert [p.text for p in dataset.corpus] == ["holds x", "holds y"]
    assert dataset.supervision == "judgements"


def test_passages_of_dpr_that_a_corpus_has_are_judgements(read):
    dataset = read("dpr.json", DPR)
    assert dataset.graded_rows("train") == [{1: 1}] and dataset.supervision == "judgements"
    strangers = json.loads(json.dumps(DPR).replace("d1", "x1"))
    dataset = read("dpr.json", strangers)
    assert dataset.supervision == "answers"
    assert any("are not in the corpus, and not used" in note for note in dataset.notes)
    half = [DPR[0], strangers[1]]
    with pytest.raises(DataError, match=r"1 of 2 rows name unknown ids \(passage 'x1'\), more"):
        read("dpr.json", half)
    dataset = read("dpr.json", half, on_unknown="skip")
    assert dataset.graded_rows("train") == [{1: 1}]


def test_a_folder_with_a_file_for_each_split(read, tmp_path):
    (tmp_path / "splits").mkdir()
    for name, text in (("train.csv", "a?"), ("validation.tsv", "b?"), ("test.csv", "c?")):
        (tmp_path / "splits" / name).write_text(f"question\n{text}\n")
    dataset = read("unread.csv", "question\nd?\n", queries=tmp_path / "splits")
    assert {split: [q.text for q in asked] for split, asked in dataset.questions.items()} == {
        "train": ["a?"],
        "dev": ["b?"],
        "test": ["c?"],
    }
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no questions; expected a file for each split"):
        read("unread.csv", "question\nd?\n", queries=tmp_path / "empty")


def test_files_of_a_folder_are_told_by_the_split_in_their_names(read, tmp_path):
    folder = tmp_path / "squad"
    folder.mkdir()
    names = ("nq-train-v2.0.JSON", "dev-v2.0.ndjson", "test.csv", "hard-test.csv")
    for number, name in enumerate(names):
        row = "question\n%d?\n" if name.endswith("csv") else '{"question": "%d?"}\n'
        (folder / name).write_text(row % number)
    (folder / "more.xlsx").touch()
    dataset = read("unread.csv", "question\nd?\n", queries=folder)
    assert {split: [q.text for q in asked] for split, asked in dataset.questions.items()} == {
        "dev": ["1?"], "hard-test": ["3?"], "train": ["0?"], "test": ["2?"],
    }  # fmt: skip
    assert dataset.notes[:3] == (
        f"{folder}: 1 files are not read: more.xlsx",
        f"{folder / 'dev-v2.0.ndjson'} serves as dev",
        f"{folder / 'nq-train-v2.0.JSON'} serves as train",
    )


@pytest.mark.parametrize("name", ["queries.ndjson", "Questions.JSONL"])
def test_no_file_of_questions_is_passed_over_in_silence(documents, tmp_path, name):
    (documents / name).write_text('{"question": "a?", "answer": "x"}\n')
    assert asked(read_beir(documents, cache=tmp_path / "cache")) == {"a?": ("x",)}


def test_another_field_that_could_be_the_question_is_named(read):
    text = "text,question,answer\nthe passage,a?,x\n"
    (note,) = [note for note in read("q.csv", text).notes if isinstance(note, Flaw)]
    assert "read from the field 'text', and there is 'question', too" in note
    dataset = read("q.csv", text, fields={"query": "question"})
    assert asked(dataset) == {"a?": ("x",)}
    assert not any(isinstance(note, Flaw) for note in dataset.notes)


def test_passages_beside_questions_judge_what_qrels_do_not(tmp_path):
    qas = [{"id": f"q{n}", "question": f"{n}?", "answers": [{"text": "b"}]} for n in range(4)]
    paragraph = {"context": "a b c", "qas": qas}
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [paragraph]}]}))
    id = read_beir(squad, cache=tmp_path / "cache").corpus[0].id
    (tmp_path / "qrels.test.txt").write_text(f"q0 0 {id} 2\n")
    dataset = read_beir(
        squad, cache=tmp_path / "cache", qrels=tmp_path / "qrels.test.txt", dev_fraction=0
    )
    assert dataset.supervision == "judgements"
    assert dataset.qrels["test"] == {"q0": {id: 2}}
    assert dataset.qrels["train"] == {f"q{n}": {id: 1} for n in (1, 2, 3)}


def test_metadata_in_a_cell_are_json(read):
    text = 'text,metadata\na?,"{""answers"": [""x""], ""split"": ""test""}"\nb?,{}\n'
    dataset = read("q.csv", text)
    assert [q.answers for q in dataset.questions["test"]] == [("x",)]
    with pytest.raises(DataError, match="q.csv:2: metadata is a str; expected an object"):
        read("q.csv", "text,metadata\na?,none\n")


def test_questions_of_another_kind_in_the_folder(documents, tmp_path):
    (documents / "questions.csv").write_text("question,answer\na?,x\n")
    assert asked(read_beir(documents, cache=tmp_path / "cache")) == {"a?": ("x",)}
    (documents / "queries.tsv").write_text("question\tanswer\nb?\tx\n")
    with pytest.raises(DataError, match="queries.tsv and questions.csv, .* with queries='.*tsv'"):
        read_beir(documents, cache=tmp_path / "cache")
    (documents / "queries.jsonl").write_text('{"_id": "1", "text": "c?"}\n')
    dataset = read_beir(documents, cache=tmp_path / "cache")
    assert asked(dataset) == {"c?": ()}
    assert "2 files are not read: queries.tsv, questions.csv" in dataset.notes[0]


def test_judgements_of_trec_with_any_numbers(read, tmp_path):
    rows = "id,question\n" + "".join(f"q{n},{n}?\n" for n in range(3))
    (tmp_path / "qrels.dev.txt").write_text(
        "q0 Q0 d1 0.5\nq0\t0\td2\t2.0\nq1 0 d0 -1\nq1 0 d3 1e-1\n"
    )
    dataset = read("q.csv", rows, qrels=tmp_path / "qrels.dev.txt")
    assert dataset.graded_rows("dev") == [{1: 0.5, 2: 2}, {0: -1, 3: 0.1}]
    assert [type(grade) for grade in dataset.graded_rows("dev")[0].values()] == [float, int]
    (tmp_path / "judged").write_text("query-id\tcorpus-id\tscore\nq0\td1\t0.25\nq1\td1\t1\n")
    dataset = read("q.csv", rows, qrels=tmp_path / "judged")
    assert "judgements of train" in dataset.notes[0] and "test" in dataset.questions
    (tmp_path / "judged").write_text("q0 0 d1 1\nq1 0 d1\n")
    with pytest.raises(DataError, match="judged:2: 3 columns; expected 4, as in the first line"):
        read("q.csv", rows, qrels=tmp_path / "judged")


def squad(context="c", qas=()):
    """SQuAD's JSON with one paragraph, in lines."""
    paragraphs = [{"context": context, "qas": list(qas) if isinstance(qas, tuple) else qas}]
    return json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}, indent=1)


FAULTS = {
    "context": (squad(context=5), "3: data[0].paragraphs[0]: field 'context' is int 5"),
    "qas": (squad(qas={}), "3: data[0].paragraphs[0]: qas is a dict; expected a list of objects"),
    "question": (squad(qas=({"id": "1"},)), "3: data[0].paragraphs[0].qas[0]: no field 'question'"),
    "answers": (
        squad(qas=({"id": "1", "question": "q", "answers": [{"txt": 1}]},)),
        "3: data[0].paragraphs[0].qas[0]: no field 'text'; fields found: 'txt'",
    ),
    "article": ('{"data": [7, {"title": "t"}]}', "1: data[0]: "),
    "paragraphs": ('{"data": [{"title": "t"}]}', "1: data[0]: no field 'paragraphs'"),
    "NaN": ('{"data": [{"title": NaN}]}', "1: data[0]: not usable JSON: NaN"),
    "passage": (
        [{"question": "q", "positive_ctxs": [{"title": "t"}]}],
        "1: positive_ctxs[0]: no field 'text'",
    ),
    "surrogate": (
        '[{"question": "q", "context": "\\ud800"}]',
        "1: field 'context' holds half of a surrogate pair",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_bad_part_is_named_by_line_and_place_or_skipped(read, content, reason):
    with pytest.raises(DataError) as error:
        read("bad.json", content)
    assert f"bad.json:{reason}" in str(error.value)
    good = [{"question": f"{n}?", "context": "c"} for n in range(2)]
    if isinstance(content, list):
        dataset = read("bad.json", [*content, *good], on_bad_row="skip", folder=None)
        assert len(asked(dataset)) == 2 and reason in dataset.notes[-2]


def test_files_that_are_no_questions(read, documents, tmp_path):
    with pytest.raises(DataError, match="ends in the middle; the file was cut off"):
        read("cut.json", squad()[:-20])
    with pytest.raises(DataError, match=r"0 questions \(the file is empty\)"):
        read("empty.jsonl", "")
    with pytest.raises(DataError, match="has questions and no passages .*; give a folder of"):
        read("q.csv", "question,answer\na?,b\n", folder=None)
    with pytest.raises(DataError, match="nothing to read"):
        read_beir(None, cache=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="did you mean '.*q.csv'"):
        read_beir(documents, cache=tmp_path / "cache", queries=tmp_path / "p.csv")
    with pytest.raises(DataError, match="fields='query=question'"):
        read("two.csv", "question,query\na,b\n")
    with pytest.raises(DataError, match="fields='query_id=id,query=question'"):
        read("two.csv", "id,qid,question\na,b,c\n")
    two = [{"question": "q?", "positive_ctxs": [{"text": text, "id": 1}]} for text in "ab"]
    with pytest.raises(DataError, match="'1' stands for two different passages"):
        read("two.json", two, folder=None)

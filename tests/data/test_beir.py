import gzip
import json
import os
from pathlib import Path

import pytest
from beir_folders import DOCS, QUERIES, SPLITS, many, question, write_folder

from ragjax.data import DataError, Question, read_beir


def test_splits_answers_and_order(read):
    dataset = read(
        [
            question("q3", metadata={"answers": ["a", "b"], "doc": "d3", "split": "x"}),
            question("q2", answers=["c"]),
            question("q1", metadata={"answers": []}),
            question(4, metadata=None),
        ],
        {
            "test": [("4", "d1", 1), ("q3", "d3", 2), ("q3", "d1", 0), ("q2", "d2", 1)],
            "dev": [("q1", "d1", 1)],
            "liveqa": [("q3", "d2", 1)],
        },
    )
    assert dataset.name == "set0"
    assert dataset.notes == ()
    assert dataset.questions == {
        "test": (
            Question(id="q3", text="question q3?", answers=("a", "b"), source="d3"),
            Question(id="q2", text="question q2?", answers=("c",)),
            Question(id="4", text="question 4?"),
        ),
        "dev": (Question(id="q1", text="question q1?"),),
        "liveqa": (Question(id="q3", text="question q3?", answers=("a", "b"), source="d3"),),
    }
    assert dataset.qrels["test"] == {"4": {"d1": 1}, "q3": {"d3": 2, "d1": 0}, "q2": {"d2": 1}}
    assert dataset.graded_rows("test") == [{2: 2, 0: 0}, {1: 1}, {0: 1}]
    last = dataset.questions["test"][-1:]
    assert dataset.graded_rows("test", last) == [{0: 1}]
    # Whatever is judged, also in a split that the data do not have.
    written = [Question(id="d2-0", text="?", passage="d2")]
    for split in ("test", "train"):
        assert dataset.graded_rows(split, written) == [{1: 1}]
    with pytest.raises(DataError, match=r"no split 'train'; it has \['dev', 'liveqa', 'test'\]"):
        dataset.graded_rows("train")


def test_white_space_around_questions_and_answers_is_taken_off(read):
    rows = [{**question("q1", " why?\n"), "answers": ["  2 kilograms \n"]}]
    dataset = read(rows, {"test": [("q1", "d1", 1)]})
    assert dataset.questions["test"] == (Question(id="q1", text="why?", answers=("2 kilograms",)),)


def test_question_outside_every_qrels_file_is_noted(read):
    (note,) = read(QUERIES, SPLITS).notes
    assert note.startswith("1 questions stand in no qrels file and are left out; supervision=")


def test_qrels_without_header_lose_no_row(read):
    dataset = read(QUERIES[:3], SPLITS, header="")
    assert {split: list(judged) for split, judged in dataset.qrels.items()} == {
        "train": ["q1"],
        "dev": ["q2"],
        "test": ["q3"],
    }


BAD_QUERIES = {
    "string": ({"answers": "31 kb"}, r'answers is a str; .*\{"answers": \["31 kb"\]\}'),
    "nested": ({"metadata": {"answers": ["x", ["y"]]}}, r"answers\[1\] is a list"),
    "number": ({"answers": [5]}, r"answers\[0\] is a int"),
    "blank answer": ({"answers": [" "]}, r"answers\[0\] is empty"),
    "half a pair": ({"answers": ["\udc00"]}, "half of a surrogate pair"),
    "metadata": ({"metadata": [1]}, "metadata is a list; expected an object"),
    "blank": ({"text": "  "}, "the question in field 'text' is empty"),
    "text list": ({"text": ["x"]}, "field 'text' is list"),
    "id": ({"_id": None}, "expected a non-empty string or number"),
}


@pytest.mark.parametrize(("change", "reason"), BAD_QUERIES.values(), ids=BAD_QUERIES.keys())
def test_bad_question_stops_with_its_line_or_is_skipped(read, change, reason):
    queries = [*QUERIES[:3], {**question("bad"), **change}]
    with pytest.raises(DataError, match=rf"queries\.jsonl:4: .*{reason}"):
        read(queries, SPLITS)
    dataset = read(queries, SPLITS, on_bad_row="skip")
    assert sum(map(len, dataset.questions.values())) == 3
    (note,) = dataset.notes
    path = Path(note.split("see ")[1].split(";")[0])
    (recorded,) = map(json.loads, path.read_text().splitlines())
    assert recorded["line"] == 4 and recorded["reason"] in note


def test_own_field_names(read):
    queries = [{"qid": id, "question": f"{id}?", "golds": [id]} for id in ("q1", "q2", "q3")]
    notes = " ".join(read(queries, SPLITS).notes)
    assert "read from the field 'question'" in notes and "other fields there: golds;" in notes
    fields = {"query_id": "qid", "query": "question", "answers": "golds"}
    dataset = read(queries, SPLITS, fields=fields)
    assert dataset.questions["train"] == (Question(id="q1", text="q1?", answers=("q1",)),)


@pytest.mark.parametrize("second", ["q1", 1])
def test_duplicate_question_ids_name_both_lines(read, second):
    with pytest.raises(DataError, match=r"queries\.jsonl: the id '.*1' stands in line 1 and .* 3"):
        read([question("q1" if second == "q1" else "1"), question("q2"), question(second)], SPLITS)


BAD_QRELS = {
    "trec columns": (("q1", 0, "d1", 1), r"4 columns; expected 3"),
    "spaces": (("q1 d1 1",), "1 columns"),
    "score": (("q1", "d1", "high"), "the score is 'high'; expected a number"),
    "infinite": (("q1", "d1", "inf"), "the score is 'inf'"),
    "conflict": (("q2", "d2", 1), "question 'q2' and passage 'd2' have the grades 2 and 1"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_QRELS.values(), ids=BAD_QRELS.keys())
def test_bad_qrels_row_stops_with_its_line_or_is_skipped(read, bad, reason):
    qrels = {**SPLITS, "dev": [("q2", "d2", 2), bad]}
    with pytest.raises(DataError, match=rf"dev\.tsv:3: .*{reason}"):
        read(QUERIES[:3], qrels)
    dataset = read(QUERIES[:3], qrels, on_bad_row="skip")
    assert dataset.qrels["dev"] == {"q2": {"d2": 2}}
    assert reason.replace("\\", "") in dataset.notes[0]


@pytest.mark.parametrize(
    ("unknown", "name"), [(("q0", "dX", 1), "passage 'dX'"), (("qX", "d0", 1), "question 'qX'")]
)
def test_unknown_ids_are_noted_up_to_one_percent(read, unknown, name):
    docs, queries, rows = many(99)
    dataset = read(queries, {"test": [*rows, unknown]}, docs=docs)
    (note,) = dataset.notes
    assert f"1 of 100 rows name unknown ids ({name}) and are dropped" in note
    assert dataset.qrels["test"] == {question: {doc: grade} for question, doc, grade in rows}
    with pytest.raises(DataError, match=rf"test\.tsv: 2 of 100 .*\({name}\), more than 1%"):
        read(queries, {"test": [*rows[:98], unknown, unknown]}, docs=docs)


def test_unknown_ids_are_dropped_where_asked(read):
    docs, queries, rows = many(99)
    unknown = [("q0", "dX", 1), ("qX", "d0", 1)] * 5
    with pytest.raises(DataError, match="drop these rows with on_unknown=skip"):
        read(queries, {"test": [*rows, *unknown]}, docs=docs)
    dataset = read(queries, {"test": [*rows, *unknown]}, docs=docs, on_unknown="skip")
    assert "10 of 109 rows name unknown ids (passage 'dX', question 'qX')" in dataset.notes[0]
    assert len(dataset.questions["test"]) == 99
    with pytest.raises(DataError, match="on_unknown must be 'stop' or 'skip', got 'drop'"):
        read(queries, {"test": rows}, docs=docs, on_unknown="drop")


def test_rows_of_what_was_skipped_are_dropped_with_it(read):
    bad = [{"_id": f"bad{n}", "text": 5} for n in range(3)]
    qrels = {"test": [*(("q1", doc, 1) for doc in DOCS), *((f"bad{n}", "d1", 1) for n in range(3))]}
    dataset = read([question("q1"), *bad], qrels, on_bad_row="skip")
    assert any("3 of 6 rows name unknown ids (question 'bad0'" in note for note in dataset.notes)
    with pytest.raises(DataError, match="4 of 7 rows name unknown ids"):
        read([question("q1"), *bad], {"test": [*qrels["test"], ("qX", "d1", 1)]}, on_bad_row="skip")


@pytest.mark.parametrize(
    ("field", "value", "answers"),
    [
        ("golden_answers", ["31 kb", "31 kilobases "], ("31 kb", "31 kilobases")),
        ("answer", "31 kb", ("31 kb",)),
        ("output", [{"answer": "31 kb", "provenance": []}, {"provenance": []}], ("31 kb",)),
        ("output", {"text": "31 kb"}, ()),
        ("answer", True, ()),
        ("solution", "31 kb", ()),
    ],
)
def test_answers_under_other_names_are_read_or_the_fields_named(read, field, value, answers):
    for extra in ({field: value}, {"metadata": {field: value}}):
        dataset = read([question("q1", **extra)], {"test": [("q1", "d1", 1)]})
        assert dataset.questions["test"][0].answers == answers
        (note,) = dataset.notes
        if answers:
            assert note.endswith(f"the answers of 1 questions are read from the field '{field}'")
        else:
            assert f"other fields there: {field}; the right one is named with" in note


def test_one_text_under_an_own_name_is_one_answer(read):
    rows = [question("q1", solution="31 kb", answer="no")]
    fields = {"answers": "solution"}
    dataset = read(rows, {"test": [("q1", "d1", 1)]}, fields=fields)
    assert dataset.questions["test"][0].answers == ("31 kb",) and dataset.notes == ()


def test_question_without_relevant_passage_is_dropped_and_noted(read):
    dataset = read(QUERIES[:3], {**SPLITS, "test": [("q3", "d1", 0), ("q1", "d1", 1)]})
    assert [question.id for question in dataset.questions["test"]] == ["q1"]
    assert "test.tsv: 1 questions without a relevant passage are dropped" in dataset.notes[0]
    with pytest.raises(DataError, match=r"test\.tsv: no question has a relevant passage"):
        read(QUERIES[:3], {**SPLITS, "test": [("q3", "d1", 0)]})


def test_empty_files(read):
    with pytest.raises(DataError, match="train.tsv: 0 rows"):
        read(QUERIES, {**SPLITS, "train": []})
    with pytest.raises(DataError, match=r"0 questions \(the file is empty\)"):
        read([], SPLITS)
    with pytest.raises(DataError, match=r"0 questions \(.*queries.jsonl:1: .*answers"):
        read([question("q1", answers="x")], SPLITS, on_bad_row="skip")
    with pytest.raises(DataError, match="holds no .tsv file"):
        read(QUERIES, {})


def test_missing_parts_are_named(tmp_path):
    folder = write_folder(tmp_path / "set", QUERIES, SPLITS)
    with pytest.raises(FileNotFoundError, match="did you mean '.*set'"):
        read_beir(tmp_path / "sets", cache=tmp_path / "cache")
    (folder / "queries.jsonl.gz").touch()
    with pytest.raises(DataError, match="holds queries.jsonl and queries.jsonl.gz"):
        read_beir(folder, cache=tmp_path / "cache")
    (folder / "queries.jsonl.gz").unlink()
    (folder / "queries.jsonl").rename(folder / "query.jsonl")
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*query\.jsonl'"):
        read_beir(folder, cache=tmp_path / "cache")
    (folder / "qrels").rename(folder / "qrel")
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*qrel'"):
        read_beir(folder, cache=tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / os.fsdecode(b"d\xe9part"), QUERIES[:3], SPLITS)


def test_compressed_judgements_are_read(folder, tmp_path):
    text = (folder / "qrels" / "dev.tsv").read_bytes()
    (folder / "qrels" / "dev.tsv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text))
    with pytest.raises(DataError, match=r"holds dev.tsv and dev.tsv.gz; remove one"):
        read_beir(folder, cache=tmp_path / "cache")
    (folder / "qrels" / "dev.tsv").unlink()
    dataset = read_beir(folder, cache=tmp_path / "cache")
    assert dataset.notes == ()
    assert dataset.qrels["dev"] == {"q2": {"d2": 2}}


def test_files_that_are_not_read_are_named(folder, tmp_path):
    for name in ("queries-2.jsonl", "corpus.csv", "README.md", "qrels/dev.txt", "qrels/more"):
        (folder / name).touch()
    first, second = read_beir(folder, cache=tmp_path / "cache").notes
    assert first.endswith("2 files are not read: corpus.csv, queries-2.jsonl")
    assert second.endswith("2 files are not read: dev.txt, more; a split is a .tsv or .tsv.gz file")
    for split in SPLITS:
        (folder / "qrels" / f"{split}.tsv").unlink()
    with pytest.raises(DataError, match=r"holds no .tsv file; .* \(.*not read: dev.txt, more\)"):
        read_beir(folder, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), r"no data set: expected corpus.jsonl \(or .csv, .tsv, .parquet\), .* found nothing"),
        (("a.md", "b.txt"), r"found a.md, b.txt \(ragjax.data.folders makes a data set"),
        (("queries.jsonl", "qrels.tsv"), "qrels does not exist; there is qrels.tsv"),
        (("qrels/test.tsv", "queries.xml"), "there is queries.xml, which is .*; write it as queri"),
        (
            ("qrels/test.tsv", "queries.jsonl", "corpus.txt", "corpora.jsonl"),
            r"did you mean '.*corpora.jsonl'",
        ),
        (("qrels/test.tsv", "queries.jsonl", "corpus.txt"), "one JSON object a line"),
    ],
)
def test_no_other_format_is_what_was_meant(tmp_path, names, expected):
    (tmp_path / "set").mkdir()
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).touch()
    with pytest.raises((DataError, FileNotFoundError), match=expected) as error:
        read_beir(tmp_path / "set", cache=tmp_path / "cache")
    assert "did you mean" not in str(error.value) or "corpora" in names[-1]


def test_a_corpus_of_another_kind_stands_beside_questions_or_alone(folder, tmp_path):
    expected = read_beir(folder, cache=tmp_path / "cache")
    text = "".join(f"{id},text of {id}\n" for id in ("d1", "d2", "d3"))
    (folder / "corpus.csv").write_text("docid,contents\n" + text)
    (folder / "corpus.jsonl").unlink()
    dataset = read_beir(folder, cache=tmp_path / "cache")
    assert list(dataset.corpus) == list(expected.corpus) and dataset.qrels == expected.qrels
    first, second = dataset.notes
    assert "separated by commas" in first and "the text is read from 'contents'" in second
    alone = read_beir(folder / "corpus.csv", cache=tmp_path / "cache")
    assert list(alone.corpus) == list(expected.corpus) and alone.notes == dataset.notes
    assert (alone.name, alone.supervision, dict(alone.questions)) == ("corpus", "documents", {})

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from ragjax.data import Corpus, DataError, Question, hold_out, leaked_questions, read_beir
from ragjax.data.matching import holds_answer, rows_with_answers
from ragjax.data.truth import MAX_PASSAGES, AnswerPassages

HEADER = "query-id\tcorpus-id\tscore\n"
DOCS = ("d1", "d2", "d3")


def write_folder(folder, queries, qrels, *, docs=DOCS, header=HEADER):
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": id, "title": "", "text": f"text of {id}"} for id in docs]
    for name, content in (("corpus", rows), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    for split, lines in qrels.items():
        text = "".join("\t".join(map(str, line)) + "\n" for line in lines)
        (folder / "qrels" / f"{split}.tsv").write_text(header + text)
    return folder


def question(id, text=None, **extra):
    return {"_id": id, "text": text or f"question {id}?", **extra}


@pytest.fixture
def read(tmp_path):
    count = iter(range(100))

    def write_and_read(queries, qrels, *, docs=DOCS, header=HEADER, **options):
        folder = write_folder(
            tmp_path / f"set{next(count)}", queries, qrels, docs=docs, header=header
        )
        return read_beir(folder, cache=tmp_path / "cache", **options)

    return write_and_read


SPLITS = {"train": [("q1", "d1", 1)], "dev": [("q2", "d2", 2)], "test": [("q3", "d3", 1)]}
QUERIES = [question("q3"), question("q1"), question("q2"), question("q9")]


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
    with pytest.raises(DataError, match="fields='query_id=qid,query=question'"):
        read(queries, SPLITS)
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
    "score": (("q1", "d1", "high"), "the score is 'high'; expected a whole number"),
    "fraction": (("q1", "d1", "0.5"), "the score is '0.5'"),
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


def many(count):
    docs = [f"d{n}" for n in range(count)]
    return (
        docs,
        [question(f"q{n}") for n in range(count)],
        [(f"q{n}", f"d{n}", 1) for n in range(count)],
    )


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
    with pytest.raises(DataError, match="on_unknown=skip drops these rows"):
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
    with pytest.raises(DataError, match="is a file; expected a folder"):
        read_beir(folder / "queries.jsonl", cache=tmp_path / "cache")
    (folder / "queries.jsonl.gz").touch()
    with pytest.raises(DataError, match="holds queries.jsonl and queries.jsonl.gz"):
        read_beir(folder, cache=tmp_path / "cache")
    (folder / "queries.jsonl.gz").unlink()
    (folder / "queries.jsonl").rename(folder / "questions.jsonl")
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*questions\.jsonl'"):
        read_beir(folder, cache=tmp_path / "cache")
    (folder / "qrels").rename(folder / "qrel")
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*qrel'"):
        read_beir(folder, cache=tmp_path / "cache")


class TestHoldOut:
    def test_dev_is_the_lowest_hashes_of_train(self, read):
        docs, queries, rows = many(10)
        queries, test = [*queries, question("t")], [("t", "d0", 1)]
        dataset = read(queries, {"train": rows, "test": test}, docs=docs, dev_fraction=0.3)
        ids = sorted(
            (q["_id"] for q in queries[:-1]), key=lambda x: hashlib.sha256(x.encode()).digest()
        )
        assert {question.id for question in dataset.questions["dev"]} == set(ids[:3])
        assert {question.id for question in dataset.questions["train"]} == set(ids[3:])
        for split in ("train", "dev"):
            order = [question.id for question in dataset.questions[split]]
            assert order == sorted(order) == list(dataset.qrels[split])
        assert "3 of the 10 train questions" in dataset.notes[-1]
        judged = {"train": rows[::-1], "test": test}
        reordered = read(queries[::-1], judged, docs=docs, dev_fraction=0.3)
        assert reordered.qrels == dataset.qrels

    @pytest.mark.parametrize(("fraction", "expected"), [(0.0, None), (0.01, 1), (0.99, 4)])
    def test_neither_side_is_empty(self, read, fraction, expected):
        docs, queries, rows = many(5)
        queries, judged = [*queries, question("t")], {"train": rows, "test": [("t", "d0", 1)]}
        dataset = read(queries, judged, docs=docs, dev_fraction=fraction)
        assert ("dev" in dataset.questions) == (expected is not None)
        assert len(dataset.questions.get("dev", ())) == (expected or 0)

    def test_not_without_train_or_beside_dev(self, read):
        assert list(read([question("q3")], {"test": SPLITS["test"]}).questions) == ["test"]
        assert len(read(QUERIES, SPLITS).questions["dev"]) == 1

    def test_refusals(self, read):
        dataset = read(QUERIES, SPLITS)
        for fraction in (-0.1, 1.0):
            with pytest.raises(DataError, match=rf"in \[0, 1\), got {fraction}"):
                hold_out(dataset, split="train", into="dev", fraction=fraction)
        with pytest.raises(DataError, match="has 1 question, too few"):
            read(QUERIES, {"train": SPLITS["train"]})


@pytest.mark.parametrize("name", ["validation", "valid", "val", "Development", "DEV"])
def test_other_names_of_dev_serve_as_dev(read, name):
    dataset = read(QUERIES[:3], {"train": SPLITS["train"], name: SPLITS["dev"]})
    assert [question.id for question in dataset.questions["dev"]] == ["q2"]
    assert len(dataset.questions["train"]) == 1
    assert dataset.notes[0].endswith(f"{name}.tsv serves as dev")


def test_dev_and_validation_are_two_splits(read):
    dataset = read(QUERIES, {**SPLITS, "validation": [("q9", "d1", 1)]})
    assert set(dataset.questions) == {"train", "dev", "test", "validation"}
    assert [question.id for question in dataset.questions["dev"]] == ["q2"]
    assert "validation.tsv is a split of its own, because" in dataset.notes[0]


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
        ((), "no data set: expected corpus.jsonl, .* found nothing"),
        (("a.md", "b.txt"), r"found a.md, b.txt \(ragjax.data.folders makes a data set"),
        (("queries.jsonl", "qrels.tsv"), "qrels does not exist; there is qrels.tsv"),
        (
            ("qrels/test.tsv", "queries.csv"),
            "there is queries.csv, which is .*; write it as queries",
        ),
        (
            ("qrels/test.tsv", "queries.jsonl", "corpus.csv", "corpora.jsonl"),
            r"did you mean '.*corpora.jsonl'",
        ),
        (("qrels/test.tsv", "queries.jsonl", "corpus.csv"), "one JSON object a line"),
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


def test_leaked_questions_ignore_case_punctuation_and_unicode_form(read):
    dataset = read(
        [
            question("q1", "Où est le  café?"),
            question("q2", "OÙ EST LE CAFE\u0301 ?"),
            question("q3", "Where is it?"),
            question("q4", "What is C++?"),
            question("q5", "What is C#?"),
        ],
        {
            "train": [("q1", "d1", 1), ("q4", "d1", 1)],
            "dev": [("q1", "d1", 1)],
            "test": [("q2", "d1", 1), ("q3", "d1", 1), ("q5", "d1", 1)],
        },
    )
    assert leaked_questions(dataset) == ("q2",)
    assert leaked_questions(dataset, split="dev") == ("q1",)
    assert leaked_questions(dataset, against="none") == ()


class TestKinds:
    """What is read of folders that have less, and where less than they have is asked for."""

    @staticmethod
    def queries(count, **extra):
        return [question(f"q{n}", metadata={"answers": [f"text of d{n}"]} | extra)
                for n in range(count)]  # fmt: skip

    @staticmethod
    def ids(dataset):
        return {split: [q.id for q in asked] for split, asked in dataset.questions.items()}

    def write(self, folder, queries=None, qrels=None):
        folder = write_folder(folder, queries or [], qrels or {}, docs=[f"d{n}" for n in range(20)])
        if queries is None:
            (folder / "queries.jsonl").unlink()
        if qrels is None:
            (folder / "qrels").rmdir()
        return folder

    @pytest.fixture
    def read_kind(self, tmp_path):
        def write_and_read(queries=None, qrels=None, **options):
            folder = self.write(tmp_path / "kind", queries, qrels)
            return read_beir(folder, cache=tmp_path / "cache", **options)

        return write_and_read

    def test_documents_alone(self, read_kind):
        dataset = read_kind()
        assert dataset.questions == {} and dataset.qrels == {} and dataset.notes == ()
        assert dataset.supervision == "documents" and len(dataset.corpus) == 20

    def test_without_judgements_a_hash_of_the_ids_assigns_questions(self, read_kind):
        dataset = read_kind(self.queries(20))
        ids = sorted((f"q{n}" for n in range(20)),
                     key=lambda id: hashlib.sha256(id.encode()).digest())  # fmt: skip
        found = {split: set(asked) for split, asked in self.ids(dataset).items()}
        assert found == {"test": set(ids[:4]), "dev": set(ids[4:7]), "train": set(ids[7:])}
        assert "no test split: 4 of the 20 train questions" in dataset.notes[0]
        assert "no dev split: 3 of the 16 train questions" in dataset.notes[1]
        assert dataset.supervision == "answers"
        assert dataset.truth("test", dataset.questions["test"]) == "answers"
        asked = dataset.questions["test"]
        assert dataset.graded_rows("test") == [{int(q.id[1:]): 1} for q in asked]

    def test_the_split_of_the_metadata_comes_first(self, read_kind):
        queries = [
            *(question(f"q{n}", metadata={"split": split})
              for n, split in enumerate(["train", "Validation", "test", "hard"])),
            question("q4"),
        ]  # fmt: skip
        dataset = read_kind(queries)
        assert self.ids(dataset) == {
            "train": ["q0", "q4"], "dev": ["q1"], "test": ["q2"], "hard": ["q3"]
        }  # fmt: skip
        assert dataset.supervision == "questions" and dataset.notes == ()
        assert dataset.truth("test", dataset.questions["test"]) == "none"
        assert dataset.graded_rows("test") == [{}]

    def test_with_judgements_of_test_only_the_others_train(self, read_kind):
        queries = [*self.queries(6), question("q6", metadata={"split": "test"})]
        dataset = read_kind(queries, {"test": [("q0", "d9", 1), ("q1", "d1", 1)]})
        ids = self.ids(dataset)
        assert ids["test"] == ["q0", "q1"] and len(ids["dev"]) == 1
        assert sorted(ids["train"] + ids["dev"]) == ["q2", "q3", "q4", "q5"]
        assert "1 questions stand in no qrels file and are left out" in dataset.notes[0]
        assert dataset.graded_rows("test") == [{9: 1}, {1: 1}]  # not the passage with the answer
        assert dataset.truth("test", dataset.questions["test"]) == "judgements"
        assert dataset.truth("train", dataset.questions["train"]) == "answers"

    @pytest.mark.parametrize(
        ("supervision", "splits"),
        [
            ("judgements", {"train": 2, "dev": 2, "test": 2}),
            ("answers", {"train": 3, "dev": 1, "test": 2}),
            ("questions", {"train": 3, "dev": 1, "test": 2}),
            ("documents", {"test": 2}),
        ],
    )
    def test_what_lies_above_is_not_read_for_train_and_dev(self, tmp_path, supervision, splits):
        judged = {
            split: [(f"q{n}", "d19", 1) for n in pair]
            for split, pair in {"train": (0, 1), "valid": (2, 3), "test": (4, 5)}.items()
        }
        folder = self.write(tmp_path / "kind", self.queries(6), judged)
        dataset = read_beir(folder, cache=tmp_path / "cache", supervision=supervision)
        assert dataset.supervision == supervision
        assert {split: len(asked) for split, asked in dataset.questions.items()} == splits
        assert dataset.graded_rows("test") == [{19: 1}] * 2
        answered = {split: all(q.answers for q in asked)
                    for split, asked in dataset.questions.items()}  # fmt: skip
        assert answered == dict.fromkeys(splits, supervision != "questions") | {"test": True}
        if supervision == "judgements":
            return
        # Files that nobody reads may be anything.
        (folder / "qrels" / "train.tsv").write_text("what?\n")
        (folder / "qrels" / "valid.tsv").unlink()
        again = read_beir(folder, cache=tmp_path / "cache", supervision=supervision)
        assert (again.questions, again.qrels) == (dataset.questions, dataset.qrels)

    @pytest.mark.parametrize(
        ("queries", "supervision", "needed"),
        [
            (None, "questions", "has documents only for train and dev; add questions to queries"),
            (["q0", "q1", "q2"], "answers", "has questions only .* add answers to queries.jsonl"),
            (["q0", "q1", "q2"], "judgements", "add qrels/train.tsv, or use supervision=auto"),
            (None, "labels", "one of auto, documents, .* got 'labels'"),
        ],
    )
    def test_more_than_there_is_is_refused(self, read_kind, queries, supervision, needed):
        with pytest.raises(DataError, match=needed):
            read_kind(queries and [question(id) for id in queries], supervision=supervision)


class TestAnswerPassages:
    """Which passages answers tell of."""

    @pytest.fixture
    def rows(self, tmp_path):
        def passages(texts, answers, asked=()):
            lines = [json.dumps({"_id": f"d{n}", "text": text}) for n, text in enumerate(texts)]
            (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
            corpus = Corpus.open(tmp_path, cache=tmp_path / "cache")
            return AnswerPassages(corpus, [answers, *asked]).rows([answers])[0]

        return passages

    def test_whole_words_of_few_passages(self, rows):
        texts = ["it weighs 15 kg", "it weighs 5 KG.", "C++ is old", "5 kg, as said"]
        assert rows(texts, ["5 kg"]) == {1, 3}
        assert rows(texts, ["C"]) == rows(texts, ["none of it"]) == rows(texts, []) == set()
        assert rows(texts, ["++"]) == {2}  # without a word, as it is written

    def test_an_answer_in_many_passages_or_of_many_questions_tells_nothing(self, rows):
        texts = [*["the lamp"] * MAX_PASSAGES, "a pump"]
        assert rows(texts, ["lamp"]) == set(range(MAX_PASSAGES))
        assert rows([*texts, "lamp"], ["lamp"]) == set()
        assert rows(texts, ["pump"], [["Pump"]] * (MAX_PASSAGES - 1)) == {MAX_PASSAGES}
        assert rows(texts, ["pump"], [["Pump"]] * MAX_PASSAGES) == set()

    def test_of_several_answers_the_rarest_count(self, rows):
        texts = ["in Oslo", "in Oslo, Norway", "in Rome"]
        assert rows(texts, ["Oslo", "Norway", "nowhere"]) == {1}
        assert rows(texts, ["Norway", "Rome"]) == {1, 2}


def test_passages_with_answers_are_those_that_hold_them():
    texts = [
        "a .NET core",
        "C++ and C#",
        "minus -1 and 1,000",
        "the 1 000",
        "+= is",
        "\u4e2d\u6587",
    ]
    answers = ["NET", ".NET", "C", "C++", "1", "-1", "1000", "+=", "the core", "\u6587", " "]
    found = rows_with_answers(texts, answers)
    assert found == {
        answer: [row for row, text in enumerate(texts) if holds_answer(text, answer)]
        for answer in answers
    }
    assert found["C++"] == [1] and found["1000"] == [2]

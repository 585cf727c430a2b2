import json
import os

import pytest

from ragjax.data import Corpus, read_beir
from ragjax.data.documents.found import find_files, holds_data_set
from ragjax.data.folders import Asked, Cutting, write_documents, write_questions
from ragjax.data.jsonl import DataError

MANUAL = """# Kettle

Fill it with water.
It holds 1.7 litres.

## Care

Descale it every *two months*.

```
# not a heading
```

### Warranty ###

The warranty is two years.
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "manual"
    (folder / "more").mkdir(parents=True)
    (folder / "kettle.md").write_text(MANUAL)
    (folder / "more" / "lamp_guide.txt").write_text("The lamp has three settings.\n\nTap it twice.")
    (folder / ".hidden.md").write_text("secret")
    (folder / "empty.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"\x89PNG")
    return folder


def passages(output):
    return [json.loads(line) for line in (output / "corpus.jsonl").read_text().splitlines()]


def test_a_folder_becomes_passages_under_their_headings(folder, tmp_path):
    written = write_documents(folder, tmp_path / "data")
    left_out = {"hidden": [".hidden.md"], ".png": ["image.png"]}
    assert written == (2, 4, ("empty.txt",), {}, left_out)
    assert written.notes() == (
        "1 files have no text: empty.txt",
        "not read: .png: 1 (image.png); hidden: 1 (.hidden.md); documents are read from .md,"
        " .markdown, .txt, .rst, .htm, .html, .xhtml, .pdf files (convert others, for example with"
        " pandoc), passages from corpus.jsonl",
    )
    assert [(p["_id"], p["title"]) for p in passages(tmp_path / "data")] == [
        ("kettle.md#0", "kettle - Kettle"),
        ("kettle.md#1", "kettle - Kettle - Care"),
        ("kettle.md#2", "kettle - Kettle - Care - Warranty"),
        ("more/lamp_guide.txt#0", "lamp guide"),
    ]
    texts = [p["text"] for p in passages(tmp_path / "data")]
    assert texts[0] == "Fill it with water. It holds 1.7 litres."
    assert "# not a heading" in texts[1]
    assert texts[3] == "The lamp has three settings. Tap it twice."


def test_long_texts_are_cut_between_sentences_and_nothing_is_lost(tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    sentences = [f"Sentence number {n} says something of its own." for n in range(40)]
    (folder / "a.txt").write_text(" ".join(sentences))
    write_documents(folder, tmp_path / "data", cutting=Cutting(tokens=30))
    texts = [p["text"] for p in passages(tmp_path / "data")]
    assert all(len(text.split()) <= 30 and text.endswith(".") for text in texts)
    assert " ".join(texts) == " ".join(sentences)


@pytest.mark.parametrize(
    "text", ["\u6c34" * 700, "word " * 700, "\u0645\u0631\u062d\u0628\u0627 " * 300]
)
def test_a_text_without_sentences_or_spaces_is_cut_too(tmp_path, text):
    folder = tmp_path / "long"
    folder.mkdir()
    (folder / "a.txt").write_text(text, "utf-8")
    write_documents(folder, tmp_path / "data")
    texts = [p["text"] for p in passages(tmp_path / "data")]
    assert len(texts) > 1
    assert "".join(texts).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("text", ["A" * 12_000, "word " * 200 + "A" * 12_000 + " end"])
@pytest.mark.parametrize("ending", ["md", "txt"])
def test_a_word_of_thousands_of_letters_does_not_fill_a_passage(tmp_path, text, ending):
    folder = tmp_path / "long"
    folder.mkdir()
    (folder / f"a.{ending}").write_text(text)
    write_documents(folder, tmp_path / "data")
    texts = [p["text"] for p in passages(tmp_path / "data")]
    assert max(map(len, texts)) < 3000
    assert "".join(texts).replace(" ", "") == text.replace(" ", "")


def test_headings_without_text_are_passages_and_plain_text_has_no_headings(tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    (folder / "title.md").write_text("# C#\n")
    (folder / "list.txt").write_text("# 3 apples\n")
    write_documents(folder, tmp_path / "data")
    assert [(p["title"], p["text"]) for p in passages(tmp_path / "data")] == [
        ("list", "# 3 apples"),
        ("title - C#", "C#"),
    ]


def test_questions_are_judged_by_the_passages_that_hold_their_answers(folder, tmp_path):
    output = tmp_path / "data"
    write_documents(folder, output)
    asked = [
        Asked("How much does it hold?", ("1.7 LITRES",)),
        Asked("How long is the warranty?", ("2 years", "two  years")),
        Asked("How many settings?", ("three",), "more/lamp_guide.txt"),
        Asked("How do I switch it on?", ("Tap it twice",)),
    ]
    assert write_questions(output, asked) == {"train": 3, "test": 1}
    dataset = read_beir(output, cache=tmp_path / "cache", dev_fraction=0)
    assert dataset.qrels["train"]["q0"] == {"kettle.md#0": 1}
    assert dataset.qrels["train"]["q1"] == {"kettle.md#2": 1}
    assert [q.id for q in dataset.questions["test"]] == ["q2"]
    assert dataset.questions["train"][1].answers == ("2 years", "two  years")


def test_two_questions_are_one_to_learn_and_one_to_test(folder, tmp_path):
    write_documents(folder, tmp_path / "data")
    asked = [Asked("a?", ("water",)), Asked("b?", ("lamp",))]
    assert write_questions(tmp_path / "data", asked) == {"train": 1, "test": 1}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked("How heavy?", ("9 kg",)), ["How heavy?", "'9 kg'", "word for word"]),
        (Asked("How many?", ("three",), "kettle.md"), ["of kettle.md", "'three'"]),
        (Asked("", ("water",)), ["needs a text"]),
        (Asked("What?", (" ",)), ["needs a text and an answer"]),
    ],
)
def test_a_question_that_cannot_be_judged_is_named(folder, tmp_path, asked, words):
    write_documents(folder, tmp_path / "data")
    with pytest.raises(DataError) as error:
        write_questions(tmp_path / "data", [asked, asked])
    assert all(word in str(error.value) for word in words)


def test_folders_that_cannot_be_read_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_documents(folder / "nowhere", tmp_path / "data")
    (tmp_path / "bare").mkdir()
    with pytest.raises(
        DataError, match="bare: no text .*the folder is empty; documents are read from .md"
    ):
        write_documents(tmp_path / "bare", tmp_path / "data")
    for name in "abcd":
        (tmp_path / "bare" / f"{name}.DOC").write_text("text")
    with pytest.raises(
        DataError, match=r"not read: .doc: 4 \(a.DOC, b.DOC, c.DOC, ...\); documents"
    ):
        write_documents(tmp_path / "bare", tmp_path / "data")
    with pytest.raises(DataError, match=r"not read: .doc: 1 \(a.DOC\); documents are read"):
        write_documents(tmp_path / "bare" / "a.DOC", tmp_path / "data")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="latin.txt: not UTF-8 .byte 3"):
        write_documents(folder, tmp_path / "data")
    with pytest.raises(DataError, match="tokens must be at least 10, got 2"):
        write_documents(folder, tmp_path / "data", cutting=Cutting(tokens=2))
    with pytest.raises(DataError, match="overlap must be from 0 to half of tokens=20, got 11"):
        write_documents(folder, tmp_path / "data", cutting=Cutting(tokens=20, overlap=11))
    assert not (tmp_path / "data").exists()  # nothing half-written


def test_files_are_found_in_order_at_any_depth(folder):
    names = [path.name for path in find_files(folder).files]
    assert names == ["empty.txt", "kettle.md", "lamp_guide.txt"]


def test_passages_that_hold_an_answer_inside_a_word_are_not_relevant(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "a.md").write_text(
        "# Drill\n\nThe drill weighs 15 kg.\n\n# Pump\n\nThe pump weighs 5 kg and costs $5.\n\n"
        "# Fan\n\nThe fan is partly red, in vitamin C.\n\n# Gallery\n\nIt shows art on C++.\n"
    )
    data = tmp_path / "data"
    write_documents(folder, data)
    asked = [Asked(f"What about {answer}?", (answer,)) for answer in ("5 kg", "art", "C++", "$5")]
    write_questions(data, asked, test_every=5)
    rows = "".join(path.read_text() for path in (data / "qrels").glob("*.tsv")).splitlines()
    assert sorted(row for row in rows if row.startswith("q") and row[1].isdigit()) == [
        f"q{number}\ta.md#{passage}\t1" for number, passage in enumerate((1, 3, 3, 1))
    ]


def test_answers_that_are_one_string_are_refused(folder, tmp_path):
    write_documents(folder, tmp_path / "data")
    asked = [Asked("How long is the warranty?", "two years")] * 2
    with pytest.raises(TypeError, match="the answers of 'How long is the warranty"):
        write_questions(tmp_path / "data", asked)


def test_one_file_is_read_too(folder, tmp_path):
    assert write_documents(folder / "kettle.md", tmp_path / "data").left_out == {}
    assert [p["_id"] for p in passages(tmp_path / "data")] == [f"kettle.md#{n}" for n in range(3)]


def test_linked_folders_and_files_are_read_once(folder, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "a.md").write_text("from elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "a_link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "a_copy.md").symlink_to(folder / "kettle.md")
    (folder / "gone.md").symlink_to(tmp_path / "nowhere")
    written = write_documents(folder, tmp_path / "data")
    files = list(dict.fromkeys(p["_id"].rpartition("#")[0] for p in passages(tmp_path / "data")))
    assert files == ["a_link/deep/a.md", "kettle.md", "more/lamp_guide.txt"]
    assert written.left_out["read under another name"] == ["a_copy.md", "loop", "a_link/back"]
    assert written.left_out["broken links"] == ["gone.md"]


def test_a_file_name_that_is_no_utf8_is_an_id_that_can_be_read(tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.md")).write_text("opens at nine")
    write_documents(folder, tmp_path / "data")
    corpus = Corpus.open(tmp_path / "data", cache=tmp_path / "cache")
    assert corpus[0][:3] == ("caf\\xe9.md#0", "caf\\xe9", "opens at nine")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("corpus.jsonl.gz", True),
        ("queries.csv", True),
        ("qrels/test.tsv", True),
        ("part-0.parquet", True),
        ("dataset_dict.json", True),
        ("corpus.md", False),
        ("package.json", False),
        ("corpus/a.txt", False),
        ("data/train-00000-of-00001.parquet", True),  # a clone of a data set of the hub
        ("Questions.CSV", True),
        ("queries.sql", False),
    ],
)
def test_a_folder_with_parts_of_a_data_set_is_one(tmp_path, name, expected):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / "README.md").touch()
    assert holds_data_set(tmp_path) is expected


@pytest.mark.parametrize(
    "name",
    [
        "passages.jsonl",
        "a.json",
        "passages.gz",
        "passages",
        "a.CSV",
        "a.ndjson",
        "a.psv",
        "a.tsv.xz",
    ],
)
def test_a_file_may_hold_passages(tmp_path, name):
    (tmp_path / name).touch()
    assert holds_data_set(tmp_path / name)
    for name in ("manual.md", "table.csv.MD", "manual.docx"):
        (tmp_path / name).touch()
        assert not holds_data_set(tmp_path / name)


@pytest.mark.parametrize("name", ["queries.jsonl", "questions.csv.gz", "qrels/test.tsv"])
def test_questions_may_stand_beside_documents(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    assert not holds_data_set(folder)
    assert find_files(folder, [folder / name.partition("/")[0]]).left_out.keys() == {
        "hidden", ".png",
    }  # fmt: skip

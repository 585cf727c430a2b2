"""A folder of Markdown, HTML and PDF files as a data set."""

import importlib.util
import json
import os
import tracemalloc

import pytest
from pdf_files import make_pdf
from tokenizers import Tokenizer, models, pre_tokenizers

from ragjax.data.folders import Cutting, prepared_documents, write_documents
from ragjax.data.jsonl import Flaw

DEFAULT = Cutting()
needs_readers = pytest.mark.skipif(
    not (importlib.util.find_spec("lxml") and importlib.util.find_spec("pypdfium2")),
    reason="needs the [documents] extra",
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    (folder / "a.md").write_text("# Kettle\n\nIt holds 1.7 litres.\n")
    return folder


def passages(data):
    return [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]


def count_words():
    """A tokenizer whose tokens are words and signs."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@needs_readers
def test_files_of_all_kinds_are_read_and_their_places_kept(folder, tmp_path):
    (folder / "b.HTM").write_text("<h1>Lamp</h1><nav>Home</nav><p>It has three settings.")
    (folder / "deep").mkdir()
    pages = [["Fan", "It turns."], ["Care", "Dust it."]]
    outline = [("Fan", 0), ("Care", 1)]
    (folder / "deep" / "my_fan.pdf").write_bytes(make_pdf(pages, outline=outline))
    written = write_documents(folder, tmp_path / "data")
    assert written == (3, 4, (), {}, {})
    assert [(p["_id"], p["title"], p["text"]) for p in passages(tmp_path / "data")] == [
        ("a.md#0", "a - Kettle", "It holds 1.7 litres."),
        ("b.HTM#0", "b - Lamp", "It has three settings."),
        ("deep/my_fan.pdf#0", "my fan - Fan", "It turns."),
        ("deep/my_fan.pdf#1", "my fan - Care", "Dust it."),
    ]
    assert [p["metadata"]["source"] for p in passages(tmp_path / "data")] == [
        "a.md", "b.HTM", "deep/my_fan.pdf, page 1", "deep/my_fan.pdf, page 2",
    ]  # fmt: skip


@needs_readers
def test_files_that_cannot_be_read_are_counted_and_named(folder, tmp_path):
    (folder / "locked.pdf").write_bytes(make_pdf([["secret"]], needs_password=True))
    (folder / "scan1.pdf").write_bytes(make_pdf([[]]))
    (folder / "scan2.pdf").write_bytes(make_pdf([[], []]))
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 ...")
    (folder / "old.html").write_bytes(b"<p>caf\xe9")
    (folder / "menu.html").write_text("<nav>Home</nav>")
    written = write_documents(folder, tmp_path / "data")
    assert written.files == written.passages == len(passages(tmp_path / "data")) == 1
    empty, unread = written.notes()
    assert empty == "1 files have no text: menu.html"
    assert isinstance(empty, Flaw) and isinstance(unread, Flaw)
    assert unread == (
        "could not be read: PDF files without text (scanned: ocrmypdf reads them): 2 (scan1.pdf,"
        " scan2.pdf); HTML files that are not UTF-8 and do not declare a known encoding: 1"
        " (old.html); PDF files that need a password: 1 (locked.pdf); broken PDF files: 1"
        " (broken.pdf)"
    )


def test_what_reads_a_file_must_be_installed(folder, tmp_path, monkeypatch):
    (folder / "b.pdf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        write_documents(folder, tmp_path / "data")
    assert str(error.value) == (
        f'{folder / "b.pdf"}: pypdfium2 reads such files: pip install "ragjax[documents]", or take'
        " them out of the folder"
    )
    assert not (tmp_path / "data").exists()


SENTENCES = [f"Sentence {number} says something." for number in range(40)]


@pytest.mark.parametrize(("tokens", "overlap"), [(20, 0), (20, 10), (12, 6), (200, 0)])
def test_passages_have_whole_sentences_and_as_many_tokens_as_asked(tmp_path, tokens, overlap):
    (tmp_path / "a.txt").write_text(" ".join(SENTENCES))
    tokenizer = count_words()
    write_documents(tmp_path, tmp_path / "data", cutting=Cutting(tokens, overlap, tokenizer))
    texts = [p["text"] for p in passages(tmp_path / "data")]
    counts = [len(tokenizer.encode(text).ids) for text in texts]
    assert max(counts) <= tokens
    assert min(counts[:-1], default=tokens) > tokens - 5  # the next sentence has 5
    found = [[f"{s}." for s in text.removesuffix(".").split(". ")] for text in texts]
    said = [number for sentences in found for number in map(SENTENCES.index, sentences)]
    again = overlap // 5  # sentences
    starts = [SENTENCES.index(sentences[0]) for sentences in found[1:]]
    ends = [SENTENCES.index(sentences[-1]) for sentences in found[:-1]]
    assert sorted(set(said)) == list(range(40))
    assert starts == [end + 1 - again for end in ends]


def test_passages_are_of_one_heading_and_paragraphs_stay_whole(tmp_path):
    text = "# A\n\none two\n\n" + "three " * 9 + "\n\nfour five\n\n## B\n\nsix\n"
    (tmp_path / "a.md").write_text(text)
    write_documents(tmp_path, tmp_path / "data", cutting=Cutting(11, 0, count_words()))
    assert [(p["title"], p["text"].split()[0]) for p in passages(tmp_path / "data")] == [
        ("a - A", "one"), ("a - A", "four"), ("a - A - B", "six"),
    ]  # fmt: skip


@pytest.fixture
def prepare(folder, tmp_path):
    told = []

    def prepare(cutting=DEFAULT):
        told.clear()
        data, written = prepared_documents(folder, tmp_path / "made", cutting, log=told.append)
        assert written.passages == len(passages(data))
        return data, bool(told)

    return prepare


def test_documents_are_prepared_once_for_as_long_as_they_are_the_same(folder, prepare):
    (folder / "c.txt").write_text("About the lamp.")
    data, is_new = prepare()
    assert is_new and data.name == "manual"
    assert prepare() == (data, False)
    other, is_new = prepare(Cutting(tokens=20))
    assert is_new and other != data
    assert prepare(Cutting(tokens=20)) == (other, False)
    assert prepare(Cutting(tokens=20, overlap=5))[1]
    assert prepare(Cutting(tokens=20, tokenizer=count_words()))[1]
    (folder / "b.md").write_text("# Fan\n\nIt turns.\n")
    assert prepare() == (data, True)
    assert [p["_id"] for p in passages(data)] == ["a.md#0", "b.md#0", "c.txt#0"]
    (folder / "b.md").write_text("# Fan\n\nIt stops.\n")
    assert prepare() == (data, True)
    (data / "corpus.jsonl").unlink()
    assert prepare() == (data, True)


def test_files_that_are_not_read_are_those_of_today(folder, tmp_path):
    for name in ("a.docx", "b.docx"):
        (folder / name).touch()
        _, written = prepared_documents(folder, tmp_path / "made", DEFAULT, log=[].append)
        assert name in written.left_out[".docx"]


def test_a_file_put_in_place_of_another_is_read(folder, prepare):
    stamp = (folder / "a.md").stat()
    prepare()
    text = (folder / "a.md").read_text()
    (folder / "new").write_text(text.swapcase())
    os.utime(folder / "new", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (folder / "new").rename(folder / "a.md")
    data, is_new = prepare()
    assert is_new and passages(data)[0]["text"] not in text


def test_documents_that_could_not_be_prepared_are_read_again(folder, prepare):
    prepare()
    (folder / "b.txt").write_bytes(b"caf\xe9")
    for _ in range(2):
        with pytest.raises(ValueError, match="not UTF-8"):
            prepare()
    (folder / "b.txt").unlink()
    assert prepare()[1]


def test_memory_does_not_grow_with_the_folder(tmp_path):
    peaks = []
    for count in (2, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.txt").write_text(f"About {number}. " * 5_000)
        tracemalloc.start()
        write_documents(folder, tmp_path / "data")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]

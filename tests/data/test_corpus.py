import gzip
import hashlib
import json
import os
import shutil
import threading
import tracemalloc

import numpy as np
import pytest

from ragjax.data import Corpus, DataError, corpus_cache, overlap, passage_text
from ragjax.data.overlap import find_twins
from ragjax.data.tables import sources

ROWS = [
    {"_id": "a", "title": "First", "text": "one two"},
    {"_id": "b", "title": "", "text": "three"},
    {"_id": 7, "text": "no title, a number as id"},
]


def write(path, rows, **options):
    path.write_text("".join(json.dumps(row, **options) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def opened(tmp_path):
    def open_rows(rows, **options):
        path = write(tmp_path / "corpus.jsonl", rows)
        return Corpus.open(path, cache=tmp_path / "cache", **options)

    return open_rows


def test_rows_and_ids(opened):
    corpus = opened(ROWS)
    assert list(corpus) == [
        ("a", "First", "one two", ""),
        ("b", "", "three", ""),
        ("7", "", "no title, a number as id", ""),
    ]
    assert len(corpus) == 3
    assert [corpus.row_of(id) for id in ("7", "a", "b")] == [2, 0, 1]
    assert corpus.id_of(np.int32(2)) == "7"
    assert "b" in corpus and "c" not in corpus and 7 not in corpus
    with pytest.raises(KeyError, match="no passage has the id 'c'"):
        corpus.row_of("c")
    for row in (-1, 3):
        with pytest.raises(IndexError, match=rf"row {row} is not in \[0, 3\)"):
            corpus[row]


def test_folder_and_compressed_file_give_the_same_corpus(tmp_path):
    write(tmp_path / "corpus.jsonl", ROWS)
    plain = Corpus.open(tmp_path, cache=tmp_path / "cache")
    packed = tmp_path / "packed"
    packed.mkdir()
    bom_crlf = b"\xef\xbb\xbf" + b"\r\n".join(
        json.dumps(row, ensure_ascii=False).encode() for row in ROWS
    )
    (packed / "corpus.jsonl.gz").write_bytes(gzip.compress(bom_crlf))
    compressed = Corpus.open(packed, cache=tmp_path / "cache")
    assert compressed.fingerprint == plain.fingerprint
    assert list(compressed) == list(plain)
    expected = hashlib.sha256(
        b'{"id":"a","title":"First","text":"one two"}\n{"id":"b","title":"","text":"three"}\n'
        b'{"id":"7","title":"","text":"no title, a number as id"}\n'
    )
    assert plain.fingerprint == expected.hexdigest()


def test_folder_with_two_corpora_or_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl does not exist"):
        Corpus.open(tmp_path, cache=tmp_path / "cache")
    write(tmp_path / "corpus.jsonl", ROWS)
    write(tmp_path / "corpus.jsonl.gz", ROWS)
    with pytest.raises(DataError, match="remove one of them"):
        Corpus.open(tmp_path, cache=tmp_path / "cache")


TEXTS = [
    "שלום עולם",
    "👩‍👩‍👧 family",
    "a\u200bb",
    "e\u0301",
    "\u00e9",
    "tab\tnewline\n end ",
    "\x00 nul",
]


def test_text_is_kept_to_the_byte(opened):
    corpus = opened([{"_id": text, "title": text, "text": text} for text in TEXTS])
    assert [tuple(passage) for passage in corpus] == [(text, text, text, "") for text in TEXTS]
    assert [corpus.row_of(text) for text in TEXTS] == list(range(len(TEXTS)))


def test_blank_texts_are_skipped_and_counted(opened):
    blanks = ["", " \t\n", "\u200b\ufeff", "\u00a0\u3000"]
    rows = [{"_id": f"blank{n}", "text": text} for n, text in enumerate(blanks)]
    corpus = opened([*rows[:2], *ROWS, *rows[2:]])
    assert [passage.id for passage in corpus] == ["a", "b", "7"]
    assert corpus.report.blank == 4
    assert corpus.report.notes() == ("4 passages without text or title are skipped",)


def test_a_title_without_a_text_is_a_passage(opened):
    corpus = opened([{"_id": "x", "title": "Pump", "text": ""}, {"_id": "y", "text": "a"}])
    assert corpus[0] == ("x", "Pump", "", "")
    assert corpus.report.notes() == ()
    assert passage_text(corpus[0]) == "Pump"


BAD_ROWS = {
    "text missing": ({"_id": "x", "contents": "t"}, r"no field 'text'.*fields='text=contents'"),
    "text null": ({"_id": "x", "text": None}, "field 'text' is NoneType null; expected a string"),
    "title number": ({"_id": "x", "title": 3, "text": "t"}, "field 'title' is int 3"),
    "id empty": ({"_id": "", "text": "t"}, "expected a non-empty string or number"),
    "id float": ({"_id": 1.0, "text": "t"}, "id '_id' is float 1.0"),
    "id bool": ({"_id": True, "text": "t"}, "id '_id' is bool true"),
    "half a pair": ({"_id": "x", "text": "\ud83d"}, r"half of a surrogate pair, U\+D83D"),
    "half a pair in id": ({"_id": "\ud83d", "text": "t"}, "half of a surrogate pair"),
    "too long": ({"_id": "x", "text": "t" * 101}, "101 characters, above max_chars = 100"),
    "far too long": ({"_id": "x", "text": "t" * 100_000}, "the line has 100025 bytes"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_stops_with_its_line_or_is_skipped(opened, bad, reason):
    with pytest.raises(DataError, match=rf"corpus\.jsonl:2: .*{reason}"):
        opened([ROWS[0], bad, ROWS[1]], max_chars=100)
    corpus = opened([ROWS[0], bad, ROWS[1]], max_chars=100, on_bad_row="skip")
    assert [passage.id for passage in corpus] == ["a", "b"]
    assert corpus.report.rejected == 1
    (recorded,) = map(json.loads, corpus.report.rejected_path.read_text().splitlines())
    assert recorded["line"] == 2
    assert recorded["reason"] in corpus.report.first_rejection
    assert "1 bad corpus rows are skipped" in corpus.report.notes()[0]


def test_longest_allowed_text_of_escapes_passes(opened):
    text = "\U0001f642" * 20_000  # twelve bytes a character in the file
    assert opened([{"_id": "x", "text": text}], max_chars=20_000)[0].text == text


def test_wrong_field_names(opened):
    rows = [{"key": "x", "contents": "t", "body": "b", "name": "n"}]
    message = (
        r"corpus\.jsonl:1: no field '_id' \(the id\) and 'text' \(the text\); fields found: 'key',"
        r" 'contents', 'body', 'name'; name them with fields='id=NAME,text=contents'$"
    )
    with pytest.raises(DataError, match=message):
        opened(rows)
    corpus = opened(rows, fields={"id": "key", "text": "contents", "title": "name"})
    assert corpus[0] == ("x", "n", "t", "") and corpus.report.notes() == ()
    with pytest.raises(DataError, match="unknown name 'txt'.*did you mean 'text'"):
        opened(rows, fields={"txt": "contents"})


@pytest.mark.parametrize(("rows", "count"), [([], 0), ([{"_id": "x", "text": " "}], 1)])
def test_zero_passages(opened, rows, count):
    with pytest.raises(DataError, match="0 passages") as error:
        opened(rows)
    assert (f"{count} passages without text" in str(error.value)) == bool(count)


def test_zero_passages_after_skipping_names_the_first_reason(opened):
    with pytest.raises(DataError, match=r"0 passages \(2 bad corpus rows .*no field '_id'"):
        opened([{"key": "x", "words": "t"}] * 2, on_bad_row="skip")


def test_duplicate_ids_name_the_first_two_places(opened, tmp_path):
    rows = [{"_id": id, "text": "t"} for id in ("z", "a", "b", "a", "b", "z")]
    with pytest.raises(DataError, match=r"id 'a' stands in line 2 and again in line 4 \(3 repe"):
        opened(rows, on_bad_row="skip")
    with pytest.raises(DataError, match="id '1' stands in line 1 and again in line 3"):
        opened([{"_id": 1, "text": "t"}, {"_id": "2", "text": "t"}, {"_id": "1", "text": "t"}])
    assert list((tmp_path / "cache").iterdir()) == []


def test_ids_with_equal_hashes_are_told_apart(opened, monkeypatch):
    monkeypatch.setattr(corpus_cache, "id_digest", lambda _: b"\xff" * 8)
    corpus = opened(ROWS)
    assert [corpus.row_of(id) for id in ("a", "b", "7")] == [0, 1, 2]
    assert "c" not in corpus


def test_missing_file_suggests_the_nearest(tmp_path):
    write(tmp_path / "corpus.jsonl", ROWS)
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*corpus\.jsonl'"):
        Corpus.open(tmp_path / "corpsu.jsonl", cache=tmp_path / "cache")


class TestCache:
    @pytest.fixture
    def builds(self, monkeypatch):
        calls = []
        build = corpus_cache._build
        monkeypatch.setattr(
            corpus_cache, "_build", lambda *args: calls.append(args) or build(*args)
        )
        return calls

    @pytest.fixture
    def source(self, tmp_path):
        return write(tmp_path / "corpus.jsonl", ROWS)

    def open(self, source, **options):
        return Corpus.open(source, cache=source.parent / "cache", **options)

    def test_second_opening_reads_nothing(self, source, builds, monkeypatch):
        first = self.open(source, on_bad_row="skip")
        monkeypatch.setattr(sources, "sha256", None)
        second = self.open(source, on_bad_row="skip")
        assert len(builds) == 1
        assert list(second) == list(first)
        assert (second.report, second.fingerprint) == (first.report, first.fingerprint)

    def test_touched_file_is_compared_by_content_once(self, source, builds, monkeypatch):
        self.open(source)
        os.utime(source, ns=(1, 1))
        self.open(source)
        monkeypatch.setattr(sources, "sha256", None)
        self.open(source)
        assert len(builds) == 1

    def test_changed_content_of_equal_size_and_time_is_seen(self, source):
        status = source.stat()
        before = self.open(source)
        text = source.read_text()
        source.write_text(text.replace("three", "THREE"))
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        after = self.open(source)
        assert (before[1].text, after[1].text) == ("three", "THREE")
        assert before.fingerprint != after.fingerprint

    def test_options_have_their_own_copies(self, source, builds):
        write(source, [*ROWS, {"_id": "long", "text": "t" * 50}])
        assert len(self.open(source, max_chars=60)) == 4
        assert len(self.open(source, max_chars=40, on_bad_row="skip")) == 3
        assert len(self.open(source, max_chars=60)) == 4
        assert len(builds) == 2

    @pytest.mark.parametrize(
        "name", ["passages.jsonl", "id_rows.npy", "offsets.npy", "manifest.json"]
    )
    def test_damaged_copy_is_made_again(self, source, builds, name):
        self.open(source)
        (damaged,) = (source.parent / "cache").glob(f"corpus-*/{name}")
        damaged.write_bytes(damaged.read_bytes()[:-3])
        assert [passage.id for passage in self.open(source)] == ["a", "b", "7"]
        assert len(builds) == 2

    @pytest.mark.parametrize(
        "name", ["passages.jsonl", "id_rows.npy", "id_hashes.npy", "offsets.npy", "manifest.json"]
    )
    def test_a_flipped_bit_anywhere_is_seen_and_told(self, source, builds, name, caplog):
        first = self.open(source)
        passages, fingerprint = list(first), first.fingerprint
        (damaged,) = (source.parent / "cache").glob(f"corpus-*/{name}")
        whole = damaged.read_bytes()
        for place in range(0, len(whole), 97):
            content = bytearray(whole)
            content[place] ^= 1
            damaged.write_bytes(content)
            count, told = len(builds), len(caplog.records)
            after = self.open(source)
            assert list(after) == passages and after.fingerprint == fingerprint
            # White space between the fields of a manifest says nothing.
            assert len(builds) - count == len(caplog.records) - told
            assert len(builds) > count or name == "manifest.json"
        assert len(builds) > 1 and "is damaged" in caplog.text

    def test_unreadable_pointer_is_made_again(self, source, builds):
        self.open(source)
        (pointer,) = (source.parent / "cache").glob("corpus-*.json")
        pointer.write_text("{")
        assert len(self.open(source)) == 3

    def test_failed_reading_leaves_nothing(self, source):
        source.write_text('{"_id": "a", "text": "t"}\nbroken\n')
        with pytest.raises(DataError):
            self.open(source)
        assert list((source.parent / "cache").iterdir()) == []

    def test_file_that_changes_while_read_is_refused(self, source, monkeypatch):
        build = corpus_cache._build

        def build_then_append(*args):
            name = build(*args)
            with open(source, "a") as file:
                file.write('{"_id": "new", "text": "t"}\n')
            return name

        monkeypatch.setattr(corpus_cache, "_build", build_then_append)
        with pytest.raises(DataError, match="changed while it was read"):
            self.open(source)

    def test_copy_published_by_another_process_meanwhile_is_used(self, source, monkeypatch):
        rename = os.rename

        def publish_first(building, folder):
            shutil.copytree(building, folder)
            rename(building, folder)

        monkeypatch.setattr(os, "rename", publish_first)
        assert len(self.open(source)) == 3

    def test_openings_at_the_same_time_agree(self, source):
        barrier = threading.Barrier(4)
        found = []

        def open_together():
            barrier.wait()
            found.append([passage.id for passage in self.open(source)])

        threads = [threading.Thread(target=open_together) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [["a", "b", "7"]] * 4
        assert not list((source.parent / "cache").glob("building-*"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    path = tmp_path / "corpus.jsonl"
    with open(path, "w") as file:
        for number in range(50_000):
            file.write(f'{{"_id": "doc-{number}", "text": "{f"word{number} " * 60}"}}\n')
    tracemalloc.start()
    try:
        corpus = Corpus.open(path, cache=tmp_path / "cache")
        assert corpus[49_999].id == "doc-49999"
        assert corpus.row_of("doc-777") == 777
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 25e6
    assert peak < 8e6  # 24 bytes a passage and a few buffers


def test_texts_that_stand_twice_are_found_without_reading_the_passages_again(tmp_path, monkeypatch):
    passages = [
        ("1", "Cat", "red  cats"), ("2", "", "owls"), ("3", "cat", "Red cats"), ("4", "", "Cat"),
        ("5", "Elk", "what is an elk?"), ("6", "", "owls"), ("7", "", "OWLS"),
    ]  # fmt: skip
    rows = [{"_id": id, "title": title, "text": text} for id, title, text in passages]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = Corpus.open(tmp_path, cache=tmp_path / "cache")
    questions = [("q1", "What is an elk?"), ("6", "owl"), ("q3", "owls"), ("q4", "none")]
    copies = {0: {0, 2}, 2: {0, 2}, 1: {1, 5, 6}, 5: {1, 5, 6}, 6: {1, 5, 6}}
    own = {"q1": {4}, "6": {5}, "q3": {1, 5, 6}}
    assert find_twins(corpus, questions) == (copies, own)
    # Passages whose digests begin alike are told apart by the rest of them.
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "_head", lambda digest: 0)
        other = Corpus.open(tmp_path, cache=tmp_path / "other")
        assert find_twins(other, questions) == (copies, own)
    monkeypatch.setattr(Corpus, "__iter__", lambda self: 1 / 0)
    assert find_twins(corpus, questions) == (copies, own)
    assert find_twins(corpus, []) == (copies, {})

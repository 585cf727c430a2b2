"""Corpora of every kind of table and place."""

import gzip
import json
import os
import re
import textwrap
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.data import Corpus, DataError, Passage, read_beir
from ragjax.data.jsonl import parse_object
from ragjax.data.tables import PassageReader, find_tables, table_files

ROWS = [
    {"_id": "a", "title": "First", "text": "one, two"},
    {"_id": "b", "title": "", "text": "é 🙂\nsecond line"},
]


@pytest.fixture
def opened(tmp_path):
    def open_file(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Corpus.open(path, cache=tmp_path / "cache", **options)

    return open_file


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv_of(rows, separator=","):
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    quoted = (['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells)
    return "".join(separator.join(row) + "\n" for row in quoted)


def test_every_kind_of_text_is_the_same_corpus(opened):
    plain = opened("a.jsonl", lines(*ROWS))
    for name, content in {
        "a.csv": csv_of(ROWS),
        "a.tsv": csv_of(ROWS, "\t"),
        "a.json": json.dumps(ROWS, indent=2),
        "b.csv.gz": gzip.compress(csv_of(ROWS, ";").encode()),
    }.items():
        corpus = opened(name, content)
        assert corpus.fingerprint == plain.fingerprint and list(corpus) == list(plain)
        (note,) = corpus.report.notes()
        assert name in note and ("array" in note or "columns: _id, title, text" in note)


def test_usual_names_are_taken_where_they_are_clear_and_said(opened):
    corpus = opened("a.jsonl", lines({"docid": 1, "contents": "t", "Title": "x"}))
    assert corpus[0] == ("1", "x", "t", "")
    (note,) = corpus.report.notes()
    assert note.endswith(
        "a.jsonl: the id is read from 'docid'; the title is read from 'Title'; the text is read"
        " from 'contents'"
    )
    with pytest.raises(DataError, match="no field '_id' .the id.; fields found: 'id', 'docid'"):
        opened("a.jsonl", lines({"id": 1, "docid": 2, "text": "t"}))
    with pytest.raises(DataError, match="no field 'text' .* name them with fields='text=passage'"):
        opened("a.jsonl", lines({"id": 1, "body": "t", "passage": "u"}))
    with pytest.raises(DataError, match="a.jsonl:2: no field 'contents' .the text."):
        opened("a.jsonl", lines({"id": 1, "contents": "t"}, {"id": 2, "text": "u"}))
    with pytest.raises(DataError, match="no field 'text' .the text."):
        opened("a.jsonl", lines({"id": 1, "contents": "t"}), fields={"text": "text"})


def test_tables_without_a_header_or_without_ids(opened):
    corpus = opened("dpr.tsv", '7\t"Aaron ""A"" is"\tAaron\n8\t"Second, here."\tX\n')
    assert list(corpus) == [("7", "Aaron", 'Aaron "A" is', ""), ("8", "X", "Second, here.", "")]
    assert "the title is read from 'column3'" in corpus.report.notes()[1]
    corpus = opened("marco.tsv", "7\tOne two.\n8\tSecond, here.\n")
    assert corpus[1] == ("8", "", "Second, here.", "")

    corpus = opened("a.csv", "text\nfirst\n\nsecond\n")
    assert [passage.id for passage in corpus] == ["line-2", "line-4"]
    assert "no field of ids, so passages are called by their place" in corpus.report.notes()[1]
    # A program shows this as its own flag: `in_own_flags`.
    assert "name a field with fields='id=NAME'" in corpus.report.notes()[1]
    corpus = opened("a.json", '[{"text": "first"}, {"text": "second"}]')
    assert [passage.id for passage in corpus] == ["row-1", "row-2"]
    with pytest.raises(DataError, match="a.jsonl:2: an id in the field 'pid', which the first row"):
        opened("a.jsonl", lines({"text": "t"}, {"text": "u", "pid": 3}))


def test_the_source_of_a_passage_is_kept_where_there_is_one(opened):
    rows = [
        {"_id": "a", "text": "t", "source": "own.pdf", "url": "http://x"},
        {"_id": "b", "text": "t", "metadata": {"source": "manual.pdf, page 3"}},
        {"_id": "c", "text": "t", "url": "http://x"},
        {"_id": "d", "text": "t", "source": 3, "metadata": [], "url": None},
    ]
    corpus = opened("a.jsonl", lines(*rows))
    sources = ["own.pdf", "manual.pdf, page 3", "http://x", ""]
    assert [passage.source for passage in corpus] == sources
    corpus = opened("b.jsonl", lines({"_id": "a", "text": "t", "page": "p. 3"}, ROWS[1]))
    assert corpus[0].source == ""
    named = opened("b.jsonl", lines({"_id": "a", "text": "t", "page": "p. 3"}, ROWS[1]),
                   fields={"source": "page"})  # fmt: skip
    assert [passage.source for passage in named] == ["p. 3", ""]
    with pytest.raises(DataError, match="field 'page' is int 3; expected a string"):
        opened("c.jsonl", lines({"_id": "a", "text": "t", "page": 3}), fields={"source": "page"})
    with pytest.raises(DataError, match=r"field 'source' holds half of a surrogate pair"):
        opened("d.jsonl", lines({"_id": "a", "text": "t", "source": "\ud83d"}))
    with pytest.raises(DataError, match=r"d.jsonl:1: field 'contents' holds half of a surrogate"):
        opened("d.jsonl", lines({"_id": "a", "contents": "\ud83d"}))


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text(), st.text(), st.text())
def test_passages_are_written_as_the_standard_library_writes_them(id, title, text, source):
    passage = Passage(id, title, text, source)
    record = {"id": id, "title": title, "text": text} | ({"source": source} if source else {})
    expected = json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
    raw = PassageReader({}, 1000).encoded(passage)
    assert raw == expected.encode()
    assert Passage(**orjson.loads(raw)) == passage


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), JSON), st.booleans())
def test_json_is_read_as_the_standard_library_reads_it(value, ascii):
    raw = json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(raw.decode())
    except UnicodeDecodeError:
        with pytest.raises(DataError, match="not UTF-8"):
            parse_object(raw)
    else:
        assert parse_object(raw) == expected
        assert json.dumps(parse_object(raw)) == json.dumps(expected)  # 1 == 1.0


class TestPlaces:
    def names(self, folder):
        found = find_tables(folder, "corpus", others=("queries", "qrels"))
        return [str(path.relative_to(folder)) for path in found]

    @pytest.mark.parametrize(
        ("there", "expected"),
        [
            ("corpus.csv README.md queries.csv", "corpus.csv"),
            ("corpus.jsonl.gz corpus.csv", "corpus.jsonl.gz"),
            ("corpus.parquet extra.parquet", "corpus.parquet"),
            ("b.parquet a.parquet queries.parquet .c.parquet", "a.parquet b.parquet"),
            ("corpus-2.parquet corpus-1.parquet a.parquet", "corpus-1.parquet corpus-2.parquet"),
            ("corpus/x-2.parquet corpus/x-1.parquet", "corpus/x-1.parquet corpus/x-2.parquet"),
            ("data/train-1.parquet README.md", "data/train-1.parquet"),
            ("queries.jsonl qrels.tsv", ""),
        ],
    )
    def test_a_table_is_found_in_its_folder(self, tmp_path, there, expected):
        for name in there.split():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert self.names(tmp_path) == expected.split()

    def test_several_tables_or_none_are_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="corpus.jsonl does not exist"):
            table_files(tmp_path, "corpus")
        for name in ("corpus.csv", "corpus.tsv.gz"):
            (tmp_path / name).touch()
        with pytest.raises(DataError, match="holds corpus.csv and corpus.tsv.gz; remove one"):
            table_files(tmp_path, "corpus")

    def save(self, folder, key="_data_files", names=("data-0.arrow",)):
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({key: [{"filename": n} for n in names]}))
        for name in names:
            if "/" not in name:
                (folder / name).touch()

    def test_saved_data_sets(self, tmp_path):
        self.save(tmp_path / "one", names=("data-1.arrow", "data-0.arrow"))
        assert self.names(tmp_path / "one") == ["data-1.arrow", "data-0.arrow"]
        for folder, splits in {"two": ["train", "test"], "three": ["corpus", "queries"]}.items():
            for split in splits:
                self.save(tmp_path / folder / split)
            (tmp_path / folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        assert self.names(tmp_path / "three") == ["corpus/data-0.arrow"]
        with pytest.raises(DataError, match="holds the splits train, test; name .*two/train"):
            self.names(tmp_path / "two")
        os.unlink(tmp_path / "one" / "data-0.arrow")
        with pytest.raises(FileNotFoundError, match="data-0.arrow does not exist"):
            self.names(tmp_path / "one")

    @pytest.mark.parametrize("names", [("../x.arrow",), ("/etc/passwd",), ()])
    def test_a_saved_folder_names_only_its_own_files(self, tmp_path, names):
        self.save(tmp_path / "one", names=names)
        with pytest.raises(DataError, match="state.json: damaged .* save the data set again"):
            self.names(tmp_path / "one")

    @pytest.mark.parametrize("text", ["", "[]", '{"splits": 3}', '{"splits": [3]}', "[" * 10_000])
    def test_a_damaged_saved_folder_is_named(self, tmp_path, text):
        (tmp_path / "dataset_dict.json").write_text(text)
        with pytest.raises(DataError, match="dataset_dict.json: damaged"):
            self.names(tmp_path)


class TestShards:
    @pytest.fixture
    def write(self, tmp_path):
        pa = pytest.importorskip("pyarrow", reason="needs the [parquet] extra")
        from pyarrow import parquet

        folder = tmp_path / "set"
        folder.mkdir()

        def write_shard(name, rows):
            parquet.write_table(pa.Table.from_pylist(rows), folder / name)
            return folder

        return write_shard

    def test_shards_are_one_corpus_read_again_when_one_changes(self, write, tmp_path):
        folder = write("b.parquet", ROWS[1:])
        write("a.parquet", ROWS[:1])
        calls = []

        def progress(done, total):
            calls.append((done, total))

        corpus = Corpus.open(folder, cache=tmp_path / "cache", progress=progress)
        assert [tuple(p)[:3] for p in corpus] == [tuple(row.values()) for row in ROWS]
        first, second = corpus.report.notes()
        assert first == f"{folder}: 2 files, in this order: a.parquet, b.parquet"
        assert second == f"{folder}: Parquet with the columns _id, title, text"
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert calls == sorted(calls) and calls[-1] == (size, size)
        os.utime(folder / "b.parquet", ns=(1, 1))
        again = Corpus.open(folder, cache=tmp_path / "cache", progress=progress)
        assert again.fingerprint == corpus.fingerprint and len(calls) == 2
        write("b.parquet", [ROWS[1] | {"text": "new"}])
        assert Corpus.open(folder, cache=tmp_path / "cache")[1].text == "new"

    def test_places_in_shards_have_the_name_of_the_file(self, write, tmp_path):
        folder = write("a.parquet", [{"text": "t"}])
        write("b.parquet", [{"text": "t"}])
        corpus = Corpus.open(folder, cache=tmp_path / "cache")
        assert [passage.id for passage in corpus] == ["a.parquet:1", "b.parquet:1"]
        write("a.parquet", [{"id": "x", "text": "t"}, {"id": "y", "text": "t"}])
        write("b.parquet", [{"id": "y", "text": "t"}])
        message = "id 'y' stands in row 2 of a.parquet and again in row 1 of b.parquet"
        with pytest.raises(DataError, match=re.escape(message)):
            Corpus.open(folder, cache=tmp_path / "cache")

    def test_names_of_files_count_where_ids_are_made_of_them(self, write, tmp_path):
        folder = write("a.parquet", [{"text": "t"}])
        write("b.parquet", [{"text": "u"}])
        Corpus.open(folder, cache=tmp_path / "cache")
        (folder / "b.parquet").rename(folder / "c.parquet")
        corpus = Corpus.open(folder, cache=tmp_path / "cache")
        assert corpus.id_of(1) == "c.parquet:1"

    def test_notes_name_the_file_that_is_opened_whichever_was_read(self, write, tmp_path):
        path = write("a.parquet", ROWS) / "a.parquet"
        Corpus.open(path, cache=tmp_path / "cache")
        other = path.rename(tmp_path / "other.parquet")
        (note,) = Corpus.open(other, cache=tmp_path / "cache").report.notes()
        assert note.startswith(f"{other}: Parquet")

    def test_values_of_other_types_are_bad_rows(self, write, tmp_path):
        folder = write("a.parquet", [{"id": "x", "text": b"bytes"}])
        with pytest.raises(DataError, match=r"a.parquet:1: field 'text' is bytes .*expected a str"):
            Corpus.open(folder, cache=tmp_path / "cache")
        write("a.parquet", [{"id": 1.5, "text": "t"}])
        with pytest.raises(DataError, match="a.parquet:1: id 'id' is float 1.5"):
            Corpus.open(folder, cache=tmp_path / "cache")

    def test_the_example_of_the_page_runs(self, write, tmp_path, monkeypatch, capsys):
        page = Path(__file__).parents[3] / "docs" / "runs.rst"
        section = page.read_text("utf-8").partition("Documents in tables")[2]
        block = section.partition(".. code-block:: python\n")[2].partition("\nIds, titles")[0]
        write("a.parquet", ROWS).rename(tmp_path / "shards")
        monkeypatch.chdir(tmp_path)
        exec(textwrap.dedent(block), {})
        assert "Parquet with the columns" in (shown := capsys.readouterr().out)
        assert shown.endswith("2 a \n")


@pytest.mark.parametrize("place", ["", "corpus", "queries"])
def test_corpus_and_questions_of_one_saved_or_downloaded_data_set(tmp_path, place):
    datasets = pytest.importorskip("datasets", reason="needs the [datasets] extra")
    datasets.disable_progress_bars()
    parts = {"corpus": datasets.Dataset.from_list(ROWS), "queries": datasets.Dataset.from_list(
        [{"_id": f"q{n}", "text": f"question {n}?", "answers": ["one"]} for n in range(3)]
    )}  # fmt: skip
    folder = tmp_path / "set"
    if place == "":
        datasets.DatasetDict(parts).save_to_disk(folder)
    for name, part in parts.items():
        if place == "corpus":
            part.to_parquet(folder / name / f"{name}-00000-of-00001.parquet")
        elif place == "queries":
            part.to_parquet(folder / f"{name}.parquet")
    dataset = read_beir(folder, cache=tmp_path / "cache")
    assert len(dataset.corpus) == 2 and dataset.supervision == "answers"
    assert sum(map(len, dataset.questions.values())) == 3
    assert not any("not read" in note for note in dataset.notes)

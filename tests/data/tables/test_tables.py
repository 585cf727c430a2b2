import gzip
import json

import pytest

from ragjax.data.jsonl import DataError, RejectedRows
from ragjax.data.tables import TableFile, read_rows

CSV = 'id,text,title\n1,"a ""q"", b\nline 2",T\n\n2,x,\n'
DPR = 'id\ttext\ttitle\n1\t"Aaron ""A"" is, here"\tAaron\n2\t"x"\t"y ""z"""\n'


def read(path, content, policy="stop", **options):
    """The rows as (line, record), what was rejected, and the notes."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    notes = []
    with RejectedRows(path.with_name("rejected.jsonl"), policy) as rejected:
        rows = [(r.line, r.record) for r in read_rows(path, rejected, notes=notes, **options)]
    return rows, rejected, notes


@pytest.mark.parametrize(
    ("content", "expected", "said"),
    [
        (
            CSV,
            [
                (2, {"id": "1", "text": 'a "q", b\nline 2', "title": "T"}),
                (5, {"id": "2", "text": "x", "title": ""}),
            ],
            "separated by commas, in quotes where needed; columns: id, text, title",
        ),
        (
            DPR,
            [
                (2, {"id": "1", "text": 'Aaron "A" is, here', "title": "Aaron"}),
                (3, {"id": "2", "text": "x", "title": 'y "z"'}),
            ],
            "separated by tabs, in quotes where needed; columns: id, text, title",
        ),
        (
            '7\t"Hello" he said\n8\tfoo, bar\n',
            [
                (1, {"column1": "7", "column2": '"Hello" he said'}),
                (2, {"column1": "8", "column2": "foo, bar"}),
            ],
            "separated by tabs; no header, columns named: column1, column2",
        ),
        (
            "docid;Text\n1;a, b\n2;c\n",
            [(2, {"docid": "1", "Text": "a, b"}), (3, {"docid": "2", "Text": "c"})],
            "separated by semicolons",
        ),
        ("key|wert\n1|a\n", [(2, {"key": "1", "wert": "a"})], "separated by bars"),
        (",id,text\n0,1,a\n", [(2, {"column1": "0", "id": "1", "text": "a"})], "column1, id, text"),
        ('text\na\n"b, c"\n', [(2, {"text": "a"}), (3, {"text": "b, c"})], "columns: text"),
        ("who wrote it?,Ann Lee\n", [(1, {"column1": "who wrote it?", "column2": "Ann Lee"})], ""),
    ],
    ids=["csv", "dpr", "raw tsv", "semicolons", "bars", "pandas", "one column", "no header"],
)
def test_separator_quotes_and_header_are_found_and_said(tmp_path, content, expected, said):
    for number, form in enumerate((
        content.encode(),
        b"\xef\xbb\xbf" + content.encode(),
        gzip.compress(content.encode()),
    )):  # fmt: skip
        rows, _, (note,) = read(tmp_path / f"rows{number}", form)
        assert rows == expected
        assert note.startswith(str(tmp_path / f"rows{number}")) and said in note


def test_line_ends_within_and_between_rows_are_told_apart(tmp_path):
    rows, *_ = read(tmp_path / "x.csv", 'id,text\r\n1,"a\r\n\r\nb"\r\n2,c')
    assert rows == [(2, {"id": "1", "text": "a\r\n\r\nb"}), (5, {"id": "2", "text": "c"})]


BAD_ROWS = {
    "too many cells": ("1,a,b", "2: 3 cells, but 2 columns; a cell that holds commas"),
    "too few cells": ("1", "2: 1 cells, but 2 columns"),
    "text behind quotes": ('1,"a"b', "2: broken row: ',' expected after '\"'; double the quotes"),
    "latin1": (b"1,caf\xe9", "2: byte 0xe9 at position 5 of the line is not UTF-8"),
    "long line": ("1," + "x" * 5000, "2: the line has 5003 bytes, above the limit"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_stops_with_its_line_or_is_recorded(tmp_path, bad, reason):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    content = b"id,text\n" + bad + b"\n2,good\n3,good\n"
    path = tmp_path / "x.csv"
    with pytest.raises(DataError) as error:
        read(path, content, max_row_bytes=1000)
    assert f"x.csv:{reason}" in str(error.value)
    rows, rejected, _ = read(path, content, "skip", max_row_bytes=1000)
    assert [record["id"] for _, record in rows] == ["2", "3"]
    assert rejected.count == 1 and reason in rejected.first_reason


def test_a_quote_that_is_never_closed_stops_in_bounded_memory(tmp_path):
    content = 'id,text\n1,"open\n' + "2,more text\n" * 1000
    with pytest.raises(DataError, match=r"x\.csv:2: a quote opens in this row and is not closed"):
        read(tmp_path / "x.csv", content, "skip", max_row_bytes=1000)
    with pytest.raises(DataError, match=r"x\.csv:2: broken row: unexpected end of data"):
        read(tmp_path / "x.csv", content)


REFUSED = {
    "prose": ("One, two.\nThis is prose.\nYes.\n", "neither JSON nor a table: no separator"),
    "column twice": ("id,text,text\n1,a,b\n", "1: the column 'text' stands twice in the header"),
    "utf-16": ("id,text\n1,a\n".encode("utf-16"), "UTF-16 text"),
    "latin1 header": (b"id,t\xe9xt\n1,a\n", "1: byte 0xe9 at position 4"),
    "zip": (b"PK\x03\x04...", "a zip archive (or a workbook); unpack it, or save it as CSV"),
    "zstd": (b"\x28\xb5\x2f\xfd...", "compressed by zstd"),
    "pickle": (b"\x80\x04\x95...", "a Python pickle, which can run code"),
    "cut gzip": (gzip.compress(CSV.encode())[:-9], "damaged gzip file"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_what_is_no_table_is_refused_whatever_the_policy(tmp_path, content, reason, policy):
    with pytest.raises(DataError) as error:
        read(tmp_path / "x.csv", content, policy)
    assert str(error.value).startswith(f"{tmp_path / 'x.csv'}") and reason in str(error.value)


def test_kind_is_told_by_content_and_json_by_name_where_its_first_line_is_broken(tmp_path):
    def kind(name, content):
        (tmp_path / name).write_text(content)
        return TableFile(tmp_path / name).kind

    assert kind("a.csv", '{"id": 1}\n') == "JSON lines"
    assert kind("a.jsonl", "broken\n") == "JSON lines"
    assert kind("a.jsonl.gz", "") == "JSON lines"
    assert kind("a.json", ' \n[{"id": 1}]') == "JSON array"
    assert kind("a.tsv", "[id]\t[text]\n") == "delimited text"
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*a\.jsonl'"):
        TableFile(tmp_path / "a.jsnl")
    with pytest.raises(DataError, match="is not a file"):
        TableFile(tmp_path)


def test_a_json_array_is_read_an_object_at_a_time(tmp_path):
    objects = [{"id": n, "text": f"é {n}" * (n % 7 * 40_000)} for n in range(20)]
    for indent in (None, 1):
        text = json.dumps(objects, ensure_ascii=False, indent=indent)
        rows, _, (note,) = read(tmp_path / "x.json", text)
        assert rows == list(enumerate(objects, 1))
        assert "a JSON array of objects" in note
    assert read(tmp_path / "x.json", " [ ] ")[0] == []
    rows, rejected, _ = read(tmp_path / "x.json", '[{"a": 1}, 3, {"a": 2}]', "skip")
    assert [line for line, _ in rows] == [1, 3]
    assert rejected.first_reason.endswith("x.json:2: expected a JSON object, got int")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"a": 1}, {"a": ', "x.json:2: broken JSON in this element of the array: Exp"),
        ('[{"a": 1}, {"a": 2}', "expected ',' or ']' behind an element; the file ends here"),
        ('[{"a": 1} {"a": 2}]', "expected ',' or ']' behind an element"),
        ('[{"a": NaN}]', "x.json:1: not usable JSON: NaN is not JSON"),
        ('[{"a": 1}] {"a": 2}', "text behind the end of the array"),
        (b'[{"a": "\xe9"}]', "not UTF-8 (byte 0xe9)"),
        ('[{"a":' + "[" * 100_000, "not usable JSON"),
        ('[{"a": "' + "x" * 5_000_000, "broken JSON in this element"),
    ],
    ids=["cut", "not ended", "no comma", "nan", "more", "latin1", "deep", "long"],
)
def test_a_broken_array_stops_whatever_the_policy(tmp_path, content, reason):
    with pytest.raises(DataError) as error:
        read(tmp_path / "x.json", content, "skip", max_row_bytes=1000)
    assert reason in str(error.value)

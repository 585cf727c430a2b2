import gzip
import json

import pytest

from ragjax.data.jsonl import (
    DataError,
    RejectedRows,
    SourceFile,
    read_jsonl,
    require_path,
)
from ragjax.storage import write_jsonl

GOOD = b'{"a": 1}'


def read(path, policy="stop", **options):
    with RejectedRows(path.with_name("rejected.jsonl"), policy) as rejected:
        return list(read_jsonl(SourceFile(path, **options), rejected)), rejected


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n{"a": "\xc3\xa9"}\n',
        b'{"a": 1}\n{"a": "\xc3\xa9"}',
        b'{"a": 1}\r\n\r\n{"a": "\xc3\xa9"}\r\n',
        b'\xef\xbb\xbf{"a": 1}\n{"a": "\\u00e9"}\n',
        gzip.compress(b'{"a": 1}\n{"a": "\xc3\xa9"}\n'),
    ],
    ids=["plain", "no last newline", "crlf and blank line", "bom", "gzip by content"],
)
def test_accepted_forms_read_alike(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    assert [row.record for row in read(path)[0]] == [{"a": 1}, {"a": "é"}]


BAD_LINES = {
    "broken": (b'{"a": ', r"broken JSON at column 7"),
    "nan": (b'{"a": NaN}', "NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "latin1": (b'{"a": "caf\xe9"}', "byte 0xe9 at position 10 of the line is not UTF-8"),
    "list": (b"[1, 2]", "expected a JSON object, got list"),
    "array of objects": (b'[{"a": 1},', "one object per line is expected, not one array"),
    "deep": (b'{"a":' + b"[" * 100_000, "not usable JSON"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "not usable JSON"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line_stops_with_its_number_or_is_recorded(tmp_path, bad, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"\n" + bad + b"\n" + GOOD + b"\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:2: .*{reason}"):
        read(path)
    assert not (tmp_path / "rejected.jsonl").exists()

    rows, rejected = read(path, "skip")
    assert [row.line for row in rows] == [1, 3]
    assert rejected.count == 1
    (recorded,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert recorded["line"] == 2
    assert recorded["row"] == bad.decode(errors="replace")[:1000]
    assert str(rejected.first_reason).endswith(recorded["reason"])


def test_rejected_file_of_an_earlier_reading_goes_away(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"nonsense\n" + GOOD)
    read(path, "skip")
    assert (tmp_path / "rejected.jsonl").exists()
    path.write_bytes(GOOD)
    read(path, "skip")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]


def test_no_partial_rejected_file_after_an_error(tmp_path):
    with pytest.raises(KeyError), RejectedRows(tmp_path / "rejected.jsonl", "skip") as rejected:
        rejected.add(tmp_path, 1, "reason")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_unknown_policy_is_refused(tmp_path):
    with pytest.raises(DataError, match="'stop' or 'skip', got 'ignore'"):
        RejectedRows(tmp_path / "rejected.jsonl", "ignore")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_utf16_is_refused_whatever_the_policy(tmp_path, encoding, policy):
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"a": 1}\n'.encode(encoding))
    with pytest.raises(DataError, match=r"x\.jsonl:1: UTF-16 .*bytes [0-9a-f ]{11}.*iconv"):
        read(path, policy)


@pytest.mark.parametrize("end", [b"\n", b""])
def test_overlong_line_is_refused_without_holding_it(tmp_path, end):
    path = tmp_path / "x.jsonl"
    long = b'{"a": "' + b"x" * 200_000 + b'"}'
    path.write_bytes(long + b"\n" + GOOD + b"\n" + long + end)
    rows, rejected = read(path, "skip", max_line_bytes=100)
    assert [row.line for row in rows] == [2]
    assert rejected.count == 2
    assert f"the line has {len(long) + 1} bytes" in rejected.first_reason
    assert "max_chars" in rejected.first_reason
    kept = (line.raw for line in SourceFile(path, max_line_bytes=100).lines())
    assert max(map(len, kept)) <= 1000


def test_line_of_exactly_the_limit_is_accepted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD)
    assert len(read(path, max_line_bytes=len(GOOD))[0]) == 2


def test_damaged_gzip_is_named(tmp_path):
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    flipped = whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:]
    bad_block = whole[:10] + b"\xff" * 9 + whole[19:]
    for content in (whole[:-10], flipped, bad_block):
        path = tmp_path / "x.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jsonl\.gz: damaged gzip file"):
            read(path)


def test_progress_ends_at_the_size_and_digest_is_of_the_file(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 3))
    calls = []
    source = SourceFile(path, progress=lambda done, total: calls.append((done, total)))
    assert len(list(source.lines())) == 1
    assert calls[-1] == (path.stat().st_size, path.stat().st_size)


def test_written_rows_come_back(tmp_path):
    rows = [{"text": "naïve 🙂\u2028line\n"}, {"text": ""}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert [row.record for row in read(tmp_path / "x.jsonl")[0]] == rows
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]


def test_missing_path_suggests_the_nearest_name(tmp_path):
    (tmp_path / "covid-qa").mkdir()
    (tmp_path / "covid-qa" / "corpus.jsonl.gz").touch()
    with pytest.raises(FileNotFoundError, match="did you mean '.*covid-qa'"):
        require_path(tmp_path / "covid_qa")
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*corpus\.jsonl\.gz'"):
        require_path(tmp_path / "covid-qa" / "corpus.jsonl")
    with pytest.raises(FileNotFoundError, match=r"covid_qa does not exist; did you mean"):
        require_path(tmp_path / "covid_qa" / "small" / "corpus.jsonl")
    with pytest.raises(FileNotFoundError, match="has no such name"):
        require_path(tmp_path / "zzz")


def test_folder_in_place_of_a_file_is_an_ordinary_error(tmp_path):
    with pytest.raises(IsADirectoryError):
        read(tmp_path)

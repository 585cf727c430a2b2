import datetime
import gzip
import json
import sys

import pytest

from ragjax.data.jsonl import DataError, RejectedRows
from ragjax.data.tables import TableFile

pa = pytest.importorskip("pyarrow", reason="needs the [parquet] extra")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the [parquet] extra")

ROWS = [
    {"id": 1, "text": "é", "when": datetime.date(2020, 1, 2), "parts": {"a": [1]}},
    {"id": 2, "text": None, "when": None, "parts": None},
    {"id": 3, "text": "c\n", "when": None, "parts": {"a": []}},
]


def write(path, table, kind):
    if kind == "Parquet":
        parquet.write_table(table, path, row_group_size=2)
        return
    new = pa.ipc.new_file if kind == "Arrow file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def read(path, policy="stop", progress=None):
    table = TableFile(path, progress=progress)
    with RejectedRows(path.with_name("rejected.jsonl"), policy) as rejected:
        return [(row.line, row.record) for row in table.rows(rejected)], rejected, table


@pytest.mark.parametrize("kind", ["Parquet", "Arrow file", "Arrow stream"])
def test_rows_come_back_without_embeddings(tmp_path, kind):
    vectors = pa.array([[0.5, 1.5]] * 3, pa.list_(pa.float32(), 2))
    whole = pa.Table.from_pylist(ROWS).append_column("vector", vectors)
    write(tmp_path / "x", whole, kind)
    calls = []
    rows, _, table = read(tmp_path / "x", progress=lambda done, total: calls.append((done, total)))
    assert rows == list(enumerate(ROWS, 1))
    assert table.kind == kind.split()[0] and table.unit == "row"
    (note,) = table.notes
    assert note.endswith(
        f"{table.kind} with the columns id, text, when, parts; left out, as embeddings: vector"
    )
    assert 0 < calls[-1][0] <= calls[-1][1] == (tmp_path / "x").stat().st_size
    (row,) = (row for row in table.rows(RejectedRows(tmp_path / "bad", "stop")) if row.line == 1)
    assert json.loads(row.raw) == {**ROWS[0], "when": "2020-01-02"}


def test_text_that_is_no_utf8_is_a_bad_row(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"]).cast(pa.string(), safe=False)
    bad = pa.StringArray.from_buffers(3, *pa.array([b"a", b"\xff", b"c"]).buffers()[1:])
    assert texts.type == bad.type
    parquet.write_table(pa.table({"text": bad}), tmp_path / "x")
    with pytest.raises(DataError, match="x:2: text that is not UTF-8"):
        read(tmp_path / "x")
    rows, rejected, _ = read(tmp_path / "x", "skip")
    assert rows == [(1, {"text": "a"}), (3, {"text": "c"})] and rejected.count == 1


@pytest.mark.parametrize("kind", ["Parquet", "Arrow file", "Arrow stream"])
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / "x"
    write(path, pa.table({"text": [str(n) * 50 for n in range(100)]}), kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="x: damaged, or of a kind that pyarrow does not read"):
        read(path, "skip")
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match="within gzip; unpack it"):
        read(path)


def test_a_flipped_bit_of_a_page_with_a_checksum_is_seen(tmp_path):
    path = tmp_path / "x"
    table = pa.table({"text": [str(n) * 50 for n in range(100)]})
    form = {"compression": "none", "use_dictionary": False}
    parquet.write_table(table, path, write_page_checksum=True, **form)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"77" * 50)] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match="CRC checksum"):
        read(path)


def test_a_column_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    write(tmp_path / "x", table, "Parquet")
    with pytest.raises(DataError, match="the column 'a' stands twice"):
        read(tmp_path / "x")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path / "x", pa.table({"a": [1]}), "Parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'x: Parquet and Arrow need pyarrow: pip install "ragja'):
        read(tmp_path / "x")

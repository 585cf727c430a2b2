"""Whatever the bytes of a table are: rows or one error, soon, in little memory."""

import gzip
import json
import random
import resource
import time

import pytest

from ragjax.data.jsonl import DataError, RejectedRows
from ragjax.data.tables import PassageReader, TableFile

SEED, FEW, MANY = 7, 150, 10_000
ROWS = [
    {"_id": f"d{n}", "title": "a, b" * (n % 3), "text": f'One "word"; é 🙂\n{n}\t' * (n % 5)}
    for n in range(12)
]
TOKENS = [
    *(b'"', b'""', b",", b"\t", b";", b"\n", b"\r", b"\r\n", b"\x00", b"[", b"]", b"{", b"}"),
    *(
        b"\\ud800",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\x1f\x8b",
        b"NaN",
        b"1e999",
        b"null",
    ),
    *(b"9" * 400, b"[" * 3000, b'{"a":' * 1500, b"x" * 30_000, b'"' * 999, b"\xff\xff\xff\x7f"),
]


def cells(separator):
    rows = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    quoted = (['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows)
    return "".join(separator.join(row) + "\n" for row in quoted).encode()


def columnar(kind):
    pa = pytest.importorskip("pyarrow", reason="needs the [parquet] extra")
    from pyarrow import parquet

    table = pa.Table.from_pylist([row | {"metadata": {"source": "x"}, "n": [1]} for row in ROWS])
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        parquet.write_table(table, sink, row_group_size=5)
    elif kind == "packed parquet":
        parquet.write_table(table, sink, compression="gzip", data_page_version="2.0")
    else:
        new = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return sink.getvalue().to_pybytes()


def whole(kind):
    """A table without faults."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    texts = {
        "json lines": lambda: lines,
        "json array": lambda: json.dumps(ROWS, indent=1).encode(),
        "csv": lambda: cells(","),
        "tsv": lambda: cells("\t"),
        "gzip": lambda: gzip.compress(lines, mtime=0),
    }
    return texts[kind]() if kind in texts else columnar(kind)


def damaged(rng, content):
    """The content with a few faults: cut, flipped, taken out, put in, put elsewhere."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place, size = rng.randrange(len(content) + 1), rng.choice((1, 1, 4, 50, 500))
        match rng.randrange(6):
            case 0:
                del content[place:]
            case 1:
                del content[place : place + size]
            case 2:
                content[place:place] = rng.choice(TOKENS)
            case 3:
                content[place : place + size] = rng.randbytes(len(content[place : place + size]))
            case 4:
                content[place:place] = content[rng.randrange(len(content) + 1) :][:size]
            case _ if place < len(content):
                content[place] ^= 1 << rng.randrange(8)
    return bytes(content)


class Counted(RejectedRows):
    """Counts bad rows, and writes none of them."""

    def add(self, source, line, reason, raw=b""):
        assert reason and line > 0 and isinstance(raw, bytes)
        self.count += 1


def read(path):
    """The passages of a table; bad rows are skipped."""
    reader, passages, rejected = PassageReader({}, 10_000), [], Counted(path, "skip")
    for row in TableFile(path, max_row_bytes=20_000).rows(rejected):
        try:
            passages.append(reader.encoded(reader.read(row, "row-")))
        except DataError as error:
            rejected.add(path, row.line, str(error), row.raw)
    return passages


TEXT = ("json lines", "json array", "csv", "tsv", "gzip")
COLUMNS = ("parquet", "packed parquet", "arrow file", "arrow stream")


def check(kind, count, tmp_path):
    rng, content, path = random.Random(f"{SEED} {kind}"), whole(kind), tmp_path / "table"
    path.write_bytes(content)
    assert len(read(path)) == len(ROWS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = longest = 0
    for number in range(count):
        path.write_bytes(damaged(rng, content))
        started = time.perf_counter()
        try:
            read(path)
        except DataError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error), number
        longest = max(longest, time.perf_counter() - started)
    assert 0 < refused
    assert longest < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # KiB


@pytest.mark.parametrize("kind", TEXT + COLUMNS)
def test_a_damaged_table_is_read_or_refused(kind, tmp_path):
    check(kind, FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEXT + COLUMNS)
def test_ten_thousand_damaged_tables_are_read_or_refused(kind, tmp_path):
    check(kind, MANY, tmp_path)

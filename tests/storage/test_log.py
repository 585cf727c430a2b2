"""Logs: every complete line counts, a torn end is dropped, rows can be taken back."""

import pytest

from ragjax.storage import JsonLog, read_lines


def rows(path):
    return [row for _, row in read_lines(path)]


@pytest.mark.parametrize("sync", [False, True])
def test_rows_come_back_with_their_numbers(tmp_path, sync):
    log = JsonLog(tmp_path / "new" / "log.jsonl")
    log.append([{"a": 1}, {"a": "ü\u2028\n"}], sync=sync)
    log.append([{"a": None}], sync=sync)
    assert list(read_lines(log.path)) == [(1, {"a": 1}), (2, {"a": "ü\u2028\n"}), (3, {"a": None})]


def test_a_torn_end_is_not_read_and_the_next_row_takes_its_place(tmp_path):
    path = tmp_path / "log.jsonl"
    JsonLog(path).append([{"a": 1}, {"a": 2}])
    path.write_bytes(path.read_bytes()[:-3])
    assert rows(path) == [{"a": 1}]
    JsonLog(path).append([{"a": 3}])
    assert rows(path) == [{"a": 1}, {"a": 3}]
    path.write_bytes(b'{"torn')
    JsonLog(path).append([{"a": 4}])
    assert rows(path) == [{"a": 4}]


def test_lines_that_hold_no_object_are_told_by_their_number(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n\nnonsense\n[1]\n\xff\n{"a": 2}\n')
    lines = [(1, {"a": 1}), (3, None), (4, None), (5, None), (6, {"a": 2})]
    assert list(read_lines(path)) == lines
    with pytest.raises(FileNotFoundError):
        rows(tmp_path / "none")


def test_lines_that_are_left_out_are_logged_with_their_file(tmp_path, caplog):
    log = JsonLog(tmp_path / "metrics.jsonl")
    log.path.write_bytes(b'{"a": 1}\n{"a": \xff}\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    log.keep(lambda row: True)
    assert rows(log.path) == [{"a": 1}, {"a": 2}]
    assert "metrics.jsonl: 2 lines hold no JSON object (the first is line 2)" in caplog.text


def test_kept_rows_are_as_they_were_written(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    log.keep(bool)  # there is none
    log.append([{"a": 0.1}, {"a": 2}, {"a": 1e-07}])
    before = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([*before, b"nonsense\n", b'{"torn']))
    log.keep(lambda row: row["a"] != 2)
    assert log.path.read_bytes() == before[0] + before[2]
    log.append([{"a": 3}])
    assert rows(log.path) == [{"a": 0.1}, {"a": 1e-07}, {"a": 3}]

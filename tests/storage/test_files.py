"""Files: complete or absent, also where the disk is full or another process writes them too."""

import errno
import json
import math
import resource

import numpy as np
import pytest

from ragjax.storage import (
    DiskFullError,
    named_if_full,
    replacing,
    sha256,
    write_array,
    write_json,
    write_jsonl,
    write_text,
)


@pytest.fixture
def small_files():
    """A limit on the size of a file stands for a full disk: the same error, one number off."""
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_appears_complete_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": "ü"})
    assert path.read_bytes() == '{\n  "a": "ü"\n}\n'.encode()
    with replacing(path) as file:
        file.write(b"half")
        assert json.loads(path.read_text("utf-8")) == {"a": "ü"}
    assert path.read_bytes() == b"half"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_block_leaves_the_old_file_and_nothing_beside_it(tmp_path, shared):
    path = tmp_path / "x"
    write_text(path, "old", shared=shared)
    with pytest.raises(KeyError), replacing(path, shared=shared) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_two_writers_of_one_shared_file_do_not_disturb_each_other(tmp_path):
    with replacing(tmp_path / "x", shared=True) as first:
        with replacing(tmp_path / "x", shared=True) as second:
            first.write(b"first"), second.write(b"2")
        assert (tmp_path / "x").read_bytes() == b"2"
    assert (tmp_path / "x").read_bytes() == b"first"


def test_a_full_disk_names_the_file_and_the_bytes_and_keeps_the_old_file(tmp_path, small_files):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(DiskFullError, match=r"5,000 bytes are needed, [\d,]+ are free.*x\.txt'$"):
        write_text(path, "n" * 5000)
    with pytest.raises(DiskFullError, match=r"make room and start again.*y\.jsonl"):
        write_jsonl(tmp_path / "y.jsonl", [{"a": "n" * 5000}])
    with pytest.raises(DiskFullError, match=r"8,128 bytes are needed.*z\.npy'$"):
        write_array(tmp_path / "z.npy", np.zeros(1000))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "nothing named"),
        ValueError(
            "RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code=28]"
        ),
        RuntimeError("SafetensorError: I/O error: something (os error 28)"),
        OSError(errno.EDQUOT, "nothing named"),
    ],
)
def test_a_full_disk_is_named_whoever_meets_it(tmp_path, error):
    (tmp_path / "part").write_bytes(b"0" * 1234)
    with pytest.raises(DiskFullError, match=r"more than 1,234 bytes are needed, .*free.*'") as told:
        with named_if_full(tmp_path, 0):
            raise error
    assert told.value.filename == str(tmp_path)
    with pytest.raises(DiskFullError) as outer, named_if_full(tmp_path / "outer", 0):
        raise told.value
    assert outer.value is told.value


def test_other_errors_stay_as_they_are(tmp_path):
    for error in (ValueError("device memory: RESOURCE_EXHAUSTED"), PermissionError(1, "no")):
        with pytest.raises(type(error)) as found, named_if_full(tmp_path, 0):
            raise error
        assert found.value is error


def test_an_array_comes_back_with_its_bits_and_objects_are_refused(tmp_path):
    for array in (np.arange(6).reshape(2, 3).T, np.float16([1.5]), np.array(3), np.zeros((0, 2))):
        write_array(tmp_path / "a.npy", array)
        found = np.load(tmp_path / "a.npy", allow_pickle=False)
        np.testing.assert_array_equal(found, array)
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
    with pytest.raises(ValueError, match="objects"):
        write_array(tmp_path / "b.npy", np.array([{}]))


def test_what_no_json_reader_accepts_is_refused_and_half_characters_become_escapes(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x", math.nan)
    write_json(tmp_path / "x", "\ud800")
    assert (tmp_path / "x").read_text() == '"\\ud800"\n'
    write_jsonl(tmp_path / "y", [{"a": "\udcff"}])
    assert (tmp_path / "y").read_text() == '{"a": "\\udcff"}\n'


def test_the_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")

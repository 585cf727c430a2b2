"""An index as plain files: the same rows under the same ids, whole or not at all."""

import json
import sys

import numpy as np
import pytest

from ragjax.index import ExactIndex, StoreSpec
from ragjax.index import files as index_files
from ragjax.index.files import write_index
from ragjax.index.shards import write_store

SPEC = StoreSpec(
    size=23, dim=4, model_fingerprint="m", corpus_fingerprint="c", settings={"pooling": "mean"},
    rows_per_shard=5,
)  # fmt: skip
# Line breaks are a part of an id; JSON does not escape all that Unicode has.
IDS = [f"doc {row}\n\x85\u2028" for row in range(23)]


@pytest.fixture
def store(tmp_path, rng):
    return write_store(tmp_path / "store", SPEC, rng.normal(size=(23, 4)).astype(np.float32))


def test_rows_and_ids_are_those_of_the_store(store, tmp_path):
    told = []
    sizes = write_index(tmp_path / "out", store, IDS, on_rows=told.append)
    written = np.load(tmp_path / "out" / "embeddings.npy")
    np.testing.assert_array_equal(written, store.read())
    assert written.dtype == np.float32 and told == [5, 5, 5, 5, 3]
    lines = (tmp_path / "out" / "ids.jsonl").read_text("utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [{"_id": id} for id in IDS]
    facts = json.loads((tmp_path / "out" / "index.json").read_text())
    assert facts == {
        "documents": 23, "dimensions": 4, "dtype": "float32", "similarity": "inner product",
        "model_fingerprint": "m", "corpus_fingerprint": "c", "settings": {"pooling": "mean"},
    }  # fmt: skip
    assert sizes == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}


def test_half_precision_becomes_single(tmp_path, rng):
    spec = StoreSpec(size=3, dim=2, model_fingerprint="m", corpus_fingerprint="c", dtype="float16")
    store = write_store(tmp_path / "store", spec, rng.normal(size=(3, 2)).astype(np.float32))
    write_index(tmp_path / "out", store, ["a", "b", "c"])
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "embeddings.npy"), store.read())


def test_faiss_finds_what_exact_search_finds(store, tmp_path, rng):
    faiss = pytest.importorskip("faiss", reason="needs the [faiss] extra")
    (tmp_path / "out").mkdir()  # an empty folder gives way
    write_index(tmp_path / "out", store, IDS, faiss=True)
    index = faiss.read_index(str(tmp_path / "out" / "index.faiss"))
    queries = rng.normal(size=(6, 4)).astype(np.float32)
    scores, rows = index.search(queries, 5)
    expected = ExactIndex(store.read()).search(queries, 5)
    np.testing.assert_array_equal(rows, expected.doc_ids)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [(IDS[:-1], "22 ids for 23 rows"), ([*IDS[:-1], IDS[0]], "two of its documents have the same")],
)
def test_ids_that_do_not_fit_are_refused(store, tmp_path, ids, message):
    with pytest.raises(ValueError, match=message):
        write_index(tmp_path / "out", store, ids)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["embeddings.npy", "ids.jsonl", "index.faiss"])
def test_a_file_that_reads_back_differently_is_not_published(store, tmp_path, monkeypatch, name):
    pytest.importorskip("faiss", reason="needs the [faiss] extra")
    check = index_files._check

    def damage_and_check(folder, *rest):
        data = bytearray((folder / name).read_bytes())
        data[-4] ^= 1
        (folder / name).write_bytes(data)
        check(folder, *rest)

    monkeypatch.setattr(index_files, "_check", damage_and_check)
    with pytest.raises((OSError, ValueError)):
        write_index(tmp_path / "out", store, IDS, faiss=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_what_is_there_is_never_written_over(store, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OSError):
        write_index(tmp_path / "out", store, IDS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_without_faiss_the_remedy_is_named(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'ragjax\[faiss\]'"):
        write_index(tmp_path / "out", store, IDS, faiss=True)
    assert not (tmp_path / "out").exists()

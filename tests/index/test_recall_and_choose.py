"""Recall against exact search, and which index is taken for a corpus."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ragjax.index import ExactIndex, base, choose, choose_index, recall, recall_against_exact


class Fixed:
    """An index that answers every query with given ids."""

    def __init__(self, doc_ids, size):
        self.doc_ids = np.asarray(doc_ids)
        self.size = size

    def search(self, queries, k):
        ids = self.doc_ids[: len(queries), :k]
        return base.pad_result(ids, np.ones(ids.shape), k)


def test_recall_counts_the_exact_neighbours_found():
    docs = np.eye(4, dtype=np.float32)
    queries = np.array([[4.0, 3, 2, 1], [1, 2, 3, 4]], np.float32)
    index = Fixed([[0, 2], [3, 2]], size=4)  # exact: 0, 1 and 3, 2
    assert recall_against_exact(index, docs, queries, k=2) == 0.75


def test_without_queries_a_document_does_not_count_as_its_own_neighbour(rng):
    docs = rng.normal(size=(30, 4)).astype(np.float32)
    docs /= np.linalg.norm(docs, axis=1, keepdims=True)
    assert recall_against_exact(ExactIndex(docs), docs) == 1.0
    only_itself = Fixed(np.tile(np.arange(30)[:, None], (1, 11)), size=30)
    assert recall_against_exact(only_itself, docs) == 0.0
    assert recall_against_exact(ExactIndex(docs[:1]), docs[:1]) == 1.0


def test_exact_ids_do_not_depend_on_the_block_size(rng, monkeypatch):
    docs = rng.normal(size=(50, 4)).astype(np.float32)
    expected = np.argsort(-(docs[:5] @ docs.T), axis=1, kind="stable")[:, :7]
    for rows in (1, 7, 64):
        monkeypatch.setattr(recall, "_DOC_ROWS", rows)
        assert recall_against_exact(Fixed(expected, size=50), docs, docs[:5], k=7) == 1.0
        assert recall_against_exact(Fixed(expected[::-1], size=50), docs, docs[:5], k=7) < 1.0


def test_exact_while_it_fits_a_quarter_of_the_memory():
    choice = choose_index(1000, 256, memory_bytes=4 * 1000 * 256 * 4)
    assert choice.name == "exact" and isinstance(choice.build(np.ones((3, 2))), ExactIndex)
    assert "1,000 documents x 256 dimensions" in choice.reason
    assert choose_index(1000, 256).name == "exact"


@pytest.mark.parametrize(
    ("size", "memory", "why"),
    [(1000, 4 * 1000 * 256 * 4 - 1, "quarter of"), (1_000_001, 2**50, "1,000,000 documents")],
)
def test_scann_beyond_or_exact_with_the_reason_it_cannot_be_had(
    monkeypatch, caplog, size, memory, why
):
    monkeypatch.setattr(choose.scann, "scann_problem", lambda: None)
    choice = choose_index(size, 256, memory_bytes=memory)
    assert choice.name == "scann" and why in choice.reason
    monkeypatch.setattr(choose.scann, "scann_problem", lambda: "ScaNN is away.")
    choice = choose_index(size, 256, memory_bytes=memory)
    assert choice.name == "exact" and "ScaNN is away." in choice.reason and why in choice.reason
    assert caplog.messages == ["ScaNN is away."]


def test_the_chosen_builder_builds(rng):
    docs = rng.normal(size=(30, 4)).astype(np.float32)
    assert choose_index(*docs.shape).build(docs).search(docs[:2], 3).doc_ids.shape == (2, 3)


def test_no_documents_cannot_be_indexed():
    with pytest.raises(ValueError, match="got 0 and 4"):
        choose_index(0, 4)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_the_memory_of_a_cpu_is_that_of_the_machine():
    kibibytes = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert choose._device_memory(None) == pytest.approx(kibibytes * 1024, rel=0.01)


@pytest.mark.parametrize(
    ("size", "name", "dtype"),
    [
        (2**20, "exact", "float32"),
        (2**21, "exact", "bfloat16"),
        (2**22, "exact", "int8"),
        (2**23, "scann", "int8"),
    ],
)
def test_an_accelerator_holds_documents_as_its_memory_allows(monkeypatch, size, name, dtype):
    monkeypatch.setattr(choose.scann, "scann_problem", lambda: None)
    devices = [SimpleNamespace(platform="tpu", memory_stats=lambda: {"bytes_limit": 2**33})] * 2
    choice = choose_index(size, 1024, devices=devices)
    assert choice.name == name and choose.exact_dtype(size, 1024, devices=devices) == dtype
    assert (f"in {dtype}" in choice.reason) == (dtype != "float32")
    if name == "exact":
        assert choice.build.keywords["dtype"] == dtype
    assert choose.exact_dtype(size, 1024) == "float32"

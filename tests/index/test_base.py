"""The checks and the padding that every index shares."""

import logging

import ml_dtypes
import numpy as np
import pytest

from ragjax.index import base


def test_embeddings_come_back_as_contiguous_float32(rng):
    values = rng.normal(size=(6, 4))
    for given in (values.astype(np.float16), values, values.astype(ml_dtypes.bfloat16)):
        checked = base.check_embeddings(given, name="x")
        assert checked.dtype == np.float32 and checked.flags.c_contiguous
        np.testing.assert_array_equal(checked, np.asarray(given, np.float32))
    assert base.check_embeddings(values.astype(np.float32).T, name="x").flags.c_contiguous


def test_rows_that_are_not_finite_are_named(rng):
    values = rng.normal(size=(30, 4)).astype(np.float32)
    values[3, 1] = np.nan
    values[7] = [np.inf, -np.inf, 0, 0]
    with pytest.raises(ValueError, match=r"in 2 of 30 rows \(row 3, 7\)"):
        base.check_embeddings(values, name="x")
    with pytest.raises(ValueError, match=r"row 103, 107\)"):
        base.check_embeddings(values, name="x", rows=range(100, 130))
    values[10:25, 0] = np.inf
    with pytest.raises(ValueError, match="17 of 30 rows .* and 7 more"):
        base.check_embeddings(values, name="x")


def test_a_float16_overflow_is_refused_and_a_large_finite_row_is_not():
    with np.errstate(over="ignore"):
        overflowed = np.array([[1.0, 2.0], [7e4, 0.0]]).astype(np.float16)
    with pytest.raises(ValueError, match="row 1"):
        base.check_embeddings(overflowed, name="x")
    with pytest.raises(ValueError, match="row 0"):
        base.check_embeddings(np.array([[1e300, 0.0]]), name="x")
    # Its sum overflows float32 but every value is finite.
    base.check_embeddings(np.full((2, 8), 3e38, np.float32), name="x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros(3), r"must be a matrix \[rows, size\], got shape \(3,\)"),
        (np.zeros((3, 0)), r"got shape \(3, 0\)"),
        (np.array([["a", "b"]]), "must be numbers, got dtype <U1"),
        (np.array([[None, 1.0]]), "must be numbers, got dtype object"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        base.check_embeddings(given, name="x")


def test_no_documents_are_refused():
    with pytest.raises(ValueError, match="at least 1 document embedding, got 0"):
        base.check_documents(np.zeros((0, 4), np.float32))


def test_a_query_of_another_size_shows_three_numbers():
    with pytest.raises(ValueError, match=r"size 5 .* size 4 \(2 queries\)"):
        base.check_query_embeddings(np.zeros((2, 5)), dim=4)


@pytest.mark.parametrize("k", [0, -3, 2.0, True, "3"])
def test_k_must_be_a_positive_integer(k):
    with pytest.raises(ValueError, match="k must be a positive integer, got"):
        base.check_k(k, size=10)


def test_more_results_than_documents_are_noted_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert [base.check_k(np.int64(913), size=7) for _ in range(3)] == [7, 7, 7]
        assert base.check_k(7, size=7) == 7
    assert caplog.messages == [
        "Asked for 913 results but the index holds 7 documents; the last 906 slots are masked."
    ]


def test_padding_masks_missing_columns_negative_ids_and_nan():
    result = base.pad_result(
        np.array([[4, 0, -1], [2, 0, 0]]), np.array([[0.5, 0.25, 9.0], [0.5, np.nan, -np.inf]]), 5
    )
    np.testing.assert_array_equal(result.doc_ids, [[4, 0, -1, -1, -1], [2, -1, -1, -1, -1]])
    np.testing.assert_array_equal(result.mask, result.doc_ids >= 0)
    np.testing.assert_array_equal(
        result.scores, np.array([[0.5, 0.25] + [-np.inf] * 3, [0.5] + [-np.inf] * 4])
    )
    assert [array.dtype for array in result] == [np.int32, np.float32, np.bool_]


@pytest.mark.parametrize(
    ("query_scale", "doc_scale", "warned"), [(1, 1, 0), (3, 3, 0), (1, 3, 1), (3, 1, 1)]
)
def test_one_normalised_side_is_warned_about_once(rng, caplog, query_scale, doc_scale, warned):
    vectors = rng.normal(size=(50, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    check = base.NormCheck(base.norm_range(doc_scale * vectors))
    with caplog.at_level(logging.WARNING):
        check.check(np.zeros((0, 4), np.float32))
        check.check(query_scale * vectors)
        check.check(query_scale * vectors)
    assert len(caplog.messages) == warned
    assert all("one side is normalised" in message for message in caplog.messages)


def test_a_snapshot_is_frozen_and_knows_its_age():
    snapshot = base.IndexSnapshot(
        index=None, version=2, encoder_step=30, corpus_hash="x", built_at=0.0
    )
    assert snapshot.staleness_steps(42) == 12
    assert (snapshot.recall, snapshot.doc_embeddings) == (1.0, None)
    with pytest.raises(AttributeError):
        snapshot.version = 3


def test_parts_of_a_result_keep_its_three_fields_together():
    doc_ids = np.array([[3, 1, -1], [4, -1, -1], [5, 9, 2]], np.int32)
    found = base.pad_result(doc_ids, np.where(doc_ids < 0, -np.inf, doc_ids / 2), 3)
    for part, expected in (
        (found.take(np.array([2, 0])), doc_ids[[2, 0]]),
        (found.take(slice(1)), doc_ids[:1]),
        (found.top(2), doc_ids[:, :2]),
        (found.top(5), doc_ids),
    ):
        np.testing.assert_array_equal(part.doc_ids, expected)
        np.testing.assert_array_equal(part.mask, expected >= 0)
        np.testing.assert_array_equal(part.scores[part.mask], expected[expected >= 0] / 2)

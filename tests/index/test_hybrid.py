"""Fusion against the formula, and the weight chosen on held-out questions."""

import numpy as np
import pytest

from ragjax.index import (
    Bm25Index,
    ExactIndex,
    HybridIndex,
    HybridQueries,
    base,
    choose_dense_weight,
)


class Lexical:
    """A lexical index with given scores; 0 = no word in common."""

    def __init__(self, scores):
        self.scores = np.asarray(scores, np.float32)  # [B, N]
        self.size = self.scores.shape[1]

    def search(self, queries, k):
        result = base.empty_result(len(queries), k)
        for row, query in enumerate(queries):
            scores = self.scores[int(query)]
            order = [doc for doc in np.argsort(-scores, kind="stable")[:k] if scores[doc] > 0]
            result.doc_ids[row, : len(order)] = order
            result.scores[row, : len(order)] = scores[order]
            result.mask[row, : len(order)] = True
        return result


def one_query(dense_scores, lexical_scores, weight, k, depth=1000):
    """Searches a corpus whose dense scores are the coordinates of the documents."""
    dense = ExactIndex(np.asarray(dense_scores, np.float32)[:, None])
    hybrid = HybridIndex(dense, Lexical([lexical_scores]), dense_weight=weight, depth=depth)
    result = hybrid.search(HybridQueries(np.ones((1, 1)), ["0"]), k)
    return result.doc_ids[0].tolist(), result.scores[0]


def z(values):
    values = np.asarray(values, np.float64)
    return (values - values.mean()) / values.std()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_equals_the_weighted_sum_of_z_scores(weight):
    dense, lexical = [0.9, 0.1, -0.4, 0.3], [1.0, 3.0, 0.5, 2.0]
    expected = weight * z(dense) + (1 - weight) * z(lexical)
    ids, scores = one_query(dense, lexical, weight, 4)
    assert ids == np.argsort(-expected).tolist()
    np.testing.assert_allclose(scores, expected[ids], rtol=1e-5)


def test_what_a_full_list_left_out_gets_its_lowest_score():
    dense, lexical = [0.9, 0.8, 0.2, 0.1, 0.0], [0.5, 1.0, 3.0, 2.0, 0.7]
    # Depth 2: dense returns 0 and 1, lexical 2 and 3; document 4 is no candidate.
    expected = 0.4 * z([0.9, 0.8, 0.8, 0.8]) + 0.6 * z([2.0, 2.0, 3.0, 2.0])
    ids, scores = one_query(dense, lexical, 0.4, 2, depth=2)
    assert ids == np.argsort(-expected)[:2].tolist()
    np.testing.assert_allclose(scores, expected[ids], rtol=1e-5)


def test_another_dense_side_leaves_the_rest_as_it_was():
    lexical, queries = Lexical([[1.0, 3.0, 0.5, 2.0]]), HybridQueries(np.ones((1, 1)), ["0"])
    sides = [ExactIndex(np.array([scores]).T) for scores in ([0.9, 0.1, -0.4, 0.3], [1, 2, 4, 3])]
    first, second = (HybridIndex(side, lexical, dense_weight=0.3, depth=2) for side in sides)
    found, expected = first.with_dense(sides[1]).search(queries, 3), second.search(queries, 3)
    assert found.doc_ids.tolist() == expected.doc_ids.tolist()
    np.testing.assert_array_equal(found.scores, expected.scores)
    with pytest.raises(ValueError, match="holds 1 documents and the lexical one 4"):
        first.with_dense(ExactIndex(np.ones((1, 1))))


def test_what_shares_no_word_with_the_query_has_lexical_score_0():
    dense, lexical = [0.9, 0.1, -0.4, 0.3], [0.0, 3.0, 0.0, 0.0]
    expected = 0.5 * z(dense) + 0.5 * z(lexical)
    ids, scores = one_query(dense, lexical, 0.5, 4)
    assert ids == np.argsort(-expected).tolist()
    np.testing.assert_allclose(scores, expected[ids], rtol=1e-5)


def test_a_side_that_finds_nothing_or_tells_nothing_apart_leaves_the_order_to_the_other():
    dense = [0.1, 0.9, 0.3]
    assert one_query(dense, [0.0, 0.0, 0.0], 0.2, 3)[0] == [1, 2, 0]
    assert one_query(dense, [2.0, 2.0, 2.0], 0.2, 3)[0] == [1, 2, 0]
    assert one_query([0.5, 0.5, 0.5], [1.0, 0.0, 2.0], 0.9, 3)[0] == [2, 0, 1]


def test_equal_scores_are_ordered_by_the_lower_id():
    assert one_query([0.5] * 6, [1.0, 2.0] * 3, 0.5, 6)[0] == [1, 3, 5, 0, 2, 4]


@pytest.mark.parametrize(("weight", "side"), [(0.0, "lexical"), (1.0, "dense")])
def test_the_extreme_weights_are_the_single_indexes(rng, weight, side):
    words = np.array("virus cell protein study drug mouse gene lung fever".split())
    texts = [" ".join(rng.choice(words, 5)) for _ in range(80)]
    embeddings = rng.normal(size=(80, 8)).astype(np.float32)
    indexes = {"dense": ExactIndex(embeddings), "lexical": Bm25Index.build(texts)}
    queries = HybridQueries(
        embeddings[:6] + 0.1, ["virus", "cell gene", "zzz", "", "fever", "lung"]
    )
    result = HybridIndex(**indexes, dense_weight=weight).search(queries, 5)
    single = indexes[side].search(queries.embeddings if weight else queries.texts, 5)
    np.testing.assert_array_equal(result.doc_ids[single.mask], single.doc_ids[single.mask])
    assert result.mask.all()


def test_more_results_than_documents_are_masked():
    ids, scores = one_query([0.3, 0.2], [1.0, 2.0], 0.6, 4)
    assert ids[2:] == [-1, -1] and np.isneginf(scores[2:]).all()


@pytest.mark.parametrize(
    ("gold", "best", "weight"),
    [
        ([{0}, {1}], 1.0, 1.0),  # the dense side ranks these first
        ([{3}, {3}], 1.0, 0.4),  # and the lexical side these, alone or mixed: the usual weight
        ([{2}, {2}], 0.5, 0.0),  # second on each side, third in between
    ],
)
def test_the_weight_with_the_best_reciprocal_rank_is_chosen(gold, best, weight):
    dense = ExactIndex(np.array([[0.9, 0.0], [0.0, 0.9], [0.5, 0.5], [0.1, 0.1]], np.float32))
    lexical = Lexical([[0.0, 0.0, 2.0, 9.0]] * 2)
    queries = HybridQueries(np.eye(2), ["0", "1"])
    chosen = choose_dense_weight(dense, lexical, queries, gold, grid=(0.0, 0.4, 1.0))
    by_hand = []
    for tried in chosen.grid:
        ids = HybridIndex(dense, lexical, dense_weight=tried).search(queries, 4).doc_ids.tolist()
        by_hand.append(np.mean([1 / (1 + ids[i].index(min(gold[i]))) for i in range(2)]))
    assert chosen.mrr == pytest.approx(by_hand)
    assert (chosen.weight, max(chosen.mrr)) == (weight, best)


@pytest.mark.parametrize(("num_dense", "weight"), [(5, 0.4), (12, 1.0)])
def test_a_weight_departs_from_the_usual_one_by_more_than_noise(num_dense, weight):
    # Some questions find the gold document by the dense side alone, three by the words alone.
    dense = ExactIndex(np.array([[0.9, 0.0], [0.0, 0.9], [0.5, 0.5], [0.1, 0.1]], np.float32))
    lexical = Lexical([[0.0, 0.0, 2.0, 9.0]] * (num_dense + 3) + [[9.0, 0.0, 2.0, 0.0]] * 25)
    count = num_dense + 28
    queries = HybridQueries(np.tile([[1.0, 0.0]], (count, 1)), [str(row) for row in range(count)])
    gold = [{0}] * num_dense + [{3}] * 3 + [{0}] * 25
    chosen = choose_dense_weight(dense, lexical, queries, gold, grid=(0.0, 0.4, 1.0))
    assert chosen.mrr[2] == max(chosen.mrr) > chosen.mrr[1]
    assert chosen.weight == weight


def test_bad_input_is_refused():
    dense, lexical = ExactIndex(np.eye(3)), Lexical([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="dense index holds 3 documents and the lexical one 2"):
        HybridIndex(dense, Lexical([[1.0, 2.0]]), dense_weight=0.5)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="dense_weight must be between 0 and 1, got"):
            HybridIndex(dense, lexical, dense_weight=weight)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        HybridIndex(dense, lexical, dense_weight=0.5, depth=0)
    queries = HybridQueries(np.eye(3)[:1], ["0"])
    with pytest.raises(ValueError, match="1 query embeddings and 2 query texts"):
        HybridIndex(dense, lexical, dense_weight=0.5).search(queries._replace(texts=["0"] * 2), 1)
    with pytest.raises(ValueError, match="0 weights, 1 gold sets and 1 questions"):
        choose_dense_weight(dense, lexical, queries, [{0}], grid=())
    with pytest.raises(ValueError, match="11 weights, 2 gold sets and 1 questions"):
        choose_dense_weight(dense, lexical, queries, [{0}, {1}])
    with pytest.raises(ValueError, match="got 2"):
        choose_dense_weight(dense, lexical, queries, [{0}], grid=(0.5, 2))

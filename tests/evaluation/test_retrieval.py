"""Cross-checked with trec_eval itself, through pytrec-eval-terrier."""

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.evaluation import ndcg, recall_at_k, reciprocal_rank, retrieval_metrics

DOCS = [f"d{number}" for number in range(30)]
MEASURES = {"recall.1,5,20", "ndcg_cut.10", "recip_rank"}
TREC_NAMES = {
    "recall@1": "recall_1",
    "recall@5": "recall_5",
    "recall@20": "recall_20",
    "ndcg@10": "ndcg_cut_10",
}


def rank_by_score(scores: dict[str, float]) -> list[str]:
    """As trec_eval orders: higher float32 score first, equal ones by id downwards."""
    return sorted(scores, key=lambda doc: (np.float32(scores[doc]), doc), reverse=True)


def trec_eval(run: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]]):
    """Per query, our names; trec_eval knows no cut for the reciprocal rank, so the run is cut."""
    cut = {q: {d: scores[d] for d in rank_by_score(scores)[:10]} for q, scores in run.items()}
    whole = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(run)
    first_ten = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(cut)
    return {
        query: {name: values[trec_name] for name, trec_name in TREC_NAMES.items()}
        | {"mrr@10": first_ten[query]["recip_rank"]}
        for query, values in whole.items()
    }


def check_against_trec_eval(run, qrels):
    ours = retrieval_metrics([rank_by_score(run[q]) for q in run], [qrels[q] for q in run])
    theirs = trec_eval(run, qrels)
    for place, query in enumerate(run):
        got = {name: values[place] for name, values in ours.items()}
        assert got == pytest.approx(theirs[query], abs=1e-9), query


# Few distinct scores, so that most runs have ties; one pair differs below float32 only.
SCORES = st.sampled_from([0.0, 0.5, 1.0, 1.0 + 1e-9, 2.5, -1.0])
RUNS = st.dictionaries(st.sampled_from(DOCS), SCORES, min_size=1, max_size=30)
# At least one relevant document: without any, trec_eval says 0 and we say NaN.
QRELS = st.dictionaries(st.sampled_from(DOCS), st.integers(-1, 4), min_size=1, max_size=12).filter(
    lambda graded: max(graded.values()) >= 1
)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(run=RUNS, graded=QRELS)
def test_metrics_equal_trec_eval_with_ties_and_grades(run, graded):
    check_against_trec_eval({"q": run}, {"q": graded})


def test_metrics_equal_trec_eval_over_many_queries(rng):
    queries = [f"q{number}" for number in range(40)]
    run = {
        query: {
            str(doc): float(score)
            for doc, score in zip(rng.permutation(DOCS)[:25], rng.normal(size=25), strict=True)
        }
        for query in queries
    }
    qrels = {query: {"d0": 1} | {str(d): 1 for d in rng.choice(DOCS, 3)} for query in queries}
    qrels["q0"] = {"elsewhere": 1}  # nothing relevant is retrieved
    qrels["q1"] = {"d3": 0, "d4": 2, "d5": 0}
    check_against_trec_eval(run, qrels)


def test_masked_slots_take_no_rank():
    rankings = np.array([[-1, 7, -1, 3, -1]], dtype=np.int32)
    grades = [{3: 2}]
    assert recall_at_k(rankings, grades, k=1) == [0.0]
    assert recall_at_k(rankings, grades, k=2) == [1.0]
    assert reciprocal_rank(rankings, grades) == [0.5]
    assert ndcg(rankings, grades) == pytest.approx([1 / np.log2(3)])


def test_rows_and_ids_give_the_same_values(rng):
    rows = np.stack([rng.permutation(30)[:20] for _ in range(5)]).astype(np.int32)  # [5, 20]
    by_row = [
        {int(row): 1 + int(row) % 3 for row in rng.choice(30, 4, replace=False)} for _ in rows
    ]
    by_id = [{DOCS[row]: grade for row, grade in grades.items()} for grades in by_row]
    from_rows = retrieval_metrics(rows, by_row)
    from_lists = retrieval_metrics([list(row) for row in rows], by_row)
    from_ids = retrieval_metrics([[DOCS[row] for row in ranked] for ranked in rows], by_id)
    for name, values in from_rows.items():
        np.testing.assert_array_equal(values, from_ids[name])
        np.testing.assert_array_equal(values, from_lists[name])


@pytest.mark.parametrize("grades", [{}, {"d1": 0}, {"d1": -1}])
def test_query_without_relevant_documents_has_no_value(grades):
    for values in retrieval_metrics([["d1", "d2"], ["d1"]], [grades, {"d1": 1}]).values():
        assert np.isnan(values[0])
        assert values[1] == 1.0


@pytest.mark.parametrize("empty", [[], np.array([-1, -1])])
def test_query_that_retrieved_nothing_scores_zero(empty):
    for values in retrieval_metrics([empty], [{"d1": 1}]).values():
        assert values == [0.0]


@pytest.mark.parametrize("metric", [recall_at_k, reciprocal_rank, ndcg])
@pytest.mark.parametrize(
    ("rankings", "grades", "k", "message"),
    [
        ([["d1"]], [], 5, "1 rankings and grades for 0 queries"),
        ([["d1"]], [{"d1": 1}], 0, "k must be at least 1, got 0"),
        (
            [["d2"], ["d1", "d1"]],
            [{"d1": 1}] * 2,
            5,
            "ranking 1 holds document 'd1' more than once",
        ),
        ([[3]], [{"d3": 1}], 5, "corpus rows in both"),
        (np.array([[-1, 3]], dtype=np.int32), [{"d3": 1}], 5, "corpus rows in both"),
        ([["d3"]], [{3: 1}], 5, "corpus rows in both"),
    ],
)
def test_bad_input_is_named(metric, rankings, grades, k, message):
    with pytest.raises(ValueError, match=message):
        metric(rankings, grades, k=k)

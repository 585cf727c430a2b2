"""BM25 against the formula."""

import math

import numpy as np
import pytest
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from ragjax.index import Bm25Index

WORDS = "virus cell protein infection study drug mouse gene lung fever".split()


def formula(texts, query, k1=0.9, b=0.4):
    """Lucene's BM25, one document at a time."""
    stemmer = Stemmer.Stemmer("english")

    def stems(text):
        return stemmer.stemWords([w for w in text.lower().split() if w not in STOPWORDS_EN])

    documents = [stems(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(documents))
    for word in stems(query):
        containing = sum(word in document for document in documents)
        idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
        for row, document in enumerate(documents):
            count = document.count(word)
            scores[row] += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
    return scores


def random_texts(rng, size):
    return [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(size)]


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.1, 1.0)])
def test_equals_the_formula(rng, k1, b):
    texts = random_texts(rng, 60)
    queries = ["the Viruses of a lung", "fever fever mouse", "genes"]
    result = Bm25Index.build(texts, k1=k1, b=b).search(queries, 15)
    for row, query in enumerate(queries):
        expected = formula(texts, query, k1, b)
        found = result.doc_ids[row][result.mask[row]]
        np.testing.assert_allclose(result.scores[row][result.mask[row]], expected[found], rtol=1e-5)
        best = np.sort(expected[expected > 0])[::-1][:15]
        np.testing.assert_allclose(np.sort(expected[found])[::-1], best, rtol=1e-5)
    assert [array.dtype for array in result] == [np.int32, np.float32, np.bool_]


def test_equal_scores_are_ordered_by_the_lower_id():
    texts = ["cat dog", "dog cat", "bird"] * 40
    result = Bm25Index.build(texts).search(["cat"], 50)
    assert result.doc_ids[0].tolist() == [row for row in range(120) if row % 3 != 2][:50]


def test_documents_without_a_word_of_the_query_are_masked():
    index = Bm25Index.build(["cat sat", "", "dogs barked", "a cat and a dog"])
    result = index.search(["cats", "unicorn", "", "the of and"], 4)
    assert result.mask.sum(axis=1).tolist() == [2, 0, 0, 0]
    assert set(result.doc_ids[0, :2].tolist()) == {0, 3}
    assert (result.doc_ids[~result.mask] == -1).all()
    assert np.isneginf(result.scores[~result.mask]).all()


def test_titles_are_part_of_the_texts():
    titled = Bm25Index.build(["sat", "ran"], titles=["cat", "dog"])
    joined = Bm25Index.build(["cat sat", "dog ran"])
    for left, right in zip(titled.search(["dog"], 2), joined.search(["dog"], 2), strict=True):
        np.testing.assert_array_equal(left, right)
    with pytest.raises(ValueError, match="one title for each text"):
        Bm25Index.build(["sat", "ran"], titles=["cat"])


def test_words_of_one_letter_and_numbers_count():
    index = Bm25Index.build(["vitamin c", "vitamin d", "vitamin 5"])
    assert index.search(["c", "d", "5"], 1).doc_ids.tolist() == [[0], [1], [2]]


def test_texts_are_read_once_and_nothing_is_printed(capfd):
    index = Bm25Index.build(text for text in ["cat", "dog"])
    index.search(["cat"], 1)
    assert index.size == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no words in 0 documents"),
        (["", "the"], {}, "no words in 2 documents"),
        (["cat"], {"k1": -1.0}, "got k1=-1.0 and b=0.4"),
        (["cat"], {"b": 1.5}, "got k1=0.9 and b=1.5"),
    ],
)
def test_what_cannot_be_indexed_is_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        Bm25Index.build(texts, **options)


def test_bad_queries_are_refused():
    index = Bm25Index.build(["cat", "dog"])
    with pytest.raises(ValueError, match="got one string"):
        index.search("cat", 1)
    with pytest.raises(ValueError, match="positive integer"):
        index.search(["cat"], 0)
    assert index.search(["cat"], 5).mask.tolist() == [[True, False, False, False, False]]


def test_question_words_count_in_a_query_only_if_nothing_else_does():
    texts = ["how it works", "a key opens it", "when to go, where to go"]
    index = Bm25Index.build(texts)
    np.testing.assert_array_equal(
        index.search(["how does a key open?"], 3).scores, index.search(["key open"], 3).scores
    )
    assert index.search(["when and where?"], 3).doc_ids[0].tolist() == [2, -1, -1]

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
    with pytest.raises(ValueError, match="lists of strings, got one string"):
        Bm25Index.build("cat")
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


# Language to passages, and a query for each of the first ones in another form of its words.
WRITTEN = {
    "german": (
        ["Die Katze saß auf der Straße.", "Der Hund läuft mit dem Kind.", "Das ist ein Haus."],
        ["Katzen STRASSE", "Hunde"],
    ),
    "french": (
        ["Le chat est sur le toit de l'école.", "Les chiens de la ville.", "Un toit et des murs."],
        ["l'École des chats", "quel chien ?"],
    ),
    "russian": (
        ["Кошка сидела на крыше и спала.", "Собаки бегают по лесу с детьми.", "Это дом, не сад."],
        ["КОШКИ", "собака"],
    ),
    "hindi": (
        ["बिल्ली छत पर है और यह एक घर में है", "कुत्ते जंगल में हैं", "यह घर है"],
        ["बिल्ली", "कुत्ते"],
    ),
    "turkish": (
        ["IŞIK bu ev için çok eski.", "Köpekler bir çocuk ile daha mutlu.", "Kedi ve ev."],
        ["ışık", "köpek"],
    ),
    "none": (
        ["猫は屋根の上で眠る。", "犬は子供と森を走る。", "庭に木がある。"],
        ["猫", "犬は子供"],
    ),
}


@pytest.mark.parametrize("language", WRITTEN)
def test_words_of_a_language_are_found_in_their_other_forms(language):
    texts, queries = WRITTEN[language]
    index = Bm25Index.build(texts)
    assert index.language == language
    assert index.search(queries, 1).doc_ids[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("texts", "query"),
    [
        (["奥斯陆生产的灯重1公斤", "北京生产的钟重6公斤"], "北京的公司"),
        (["奥斯陆生产的灯重1公斤", "北京生产的钟重6公斤"], "钟"),
        (["แมวนั่งอยู่บนหลังคา", "สุนัขวิ่งในป่า"], "สุนัข"),
        (["고양이는 지붕 위에서 잤다", "개는 서울에서 달린다"], "서울의"),
        (["tea house", "cafe\u0301 bar"], "CAFÉ"),
        (["tea house", "café bar"], "cafe\u0301"),
        (["tea house", "ｃａｆé bar"], "café"),
        (["tea house", "co\u00adoperate"], "cooperate"),
        (["tea house", "ﬁsh"], "fish"),
    ],
)
def test_scripts_and_unicode_forms_match(texts, query):
    assert Bm25Index.build(texts).search([query], 1).doc_ids.tolist() == [[1]]


def test_the_language_can_be_given_or_left_out():
    texts = ["the drills and the pumps of a shop", "it is as red as a drill in the sun"]
    assert Bm25Index.build(texts).language == "english"
    plain = Bm25Index.build(texts, language="none")
    assert plain.search(["drills", "the"], 2).mask.sum(axis=1).tolist() == [1, 2]
    assert Bm25Index.build(texts, language="german").describe() == "german stems (as given)"
    with pytest.raises(ValueError, match="did you mean 'german'"):
        Bm25Index.build(texts, language="germn")


def test_the_choice_of_language_is_described():
    assert "no language is clear" in Bm25Index.build(["red drill", "blue lamp"]).describe()
    assert Bm25Index.build(["Con mèo ngồi trên mái nhà"]).language == "none"
    described = Bm25Index.build(["北京的钟", "the lamp in the city"]).describe()
    assert described.startswith("pairs of characters where a script has no spaces (58%), else")


def test_a_document_is_found_by_the_words_of_its_expansions():
    texts, questions = ["a cell divides", "a lamp burns"], {1: ["what gives light?", "how bright?"]}
    expanded = Bm25Index.build(texts, expansions=questions)
    joined = Bm25Index.build([texts[0], " ".join([texts[1], *questions[1]])])
    for query in ("light", "brightness of cells"):
        for mine, theirs in zip(
            expanded.search([query], 2), joined.search([query], 2), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)
    assert not Bm25Index.build(texts).search(["light"], 2).mask.any()
    with pytest.raises(ValueError, match="document 2: there are 2 documents"):
        Bm25Index.build(texts, expansions={2: ["what?"]})


def test_building_says_nothing(caplog):
    with caplog.at_level("DEBUG"):
        Bm25Index.build(["one two", "two three"])
    assert not caplog.records


def test_a_saved_index_is_the_one_that_was_built(rng, tmp_path):
    texts = [f"{text} und der die das nicht" for text in random_texts(rng, 60)]
    built = Bm25Index.build(texts, language="auto", k1=1.2, b=0.75)
    built.save(tmp_path)
    opened = Bm25Index.open(tmp_path)
    assert opened.describe() == built.describe() and opened.language == built.language
    assert opened.size == 60 and opened.content_words(texts[3]) == built.content_words(texts[3])
    for one, other in zip(built.search(texts[:9], 20), opened.search(texts[:9], 20), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_index_is_built_once_for_the_same_documents_and_options(tmp_path):
    read = []

    def texts():
        read.append(1)
        return ["a red cat", "green owls", "a red owl"]

    def kept(identity="one", **options):
        return Bm25Index.kept(tmp_path, texts, identity=identity, **options)

    found = [kept().search(["red owls"], 3) for _ in range(2)]
    assert len(read) == 1 and found[0].doc_ids.tolist() == found[1].doc_ids.tolist() == [[2, 0, 1]]
    for count, options in enumerate(
        ({"identity": "two"}, {"k1": 2.0}, {"b": 0.1}, {"language": "none"},
         {"expansions": {1: ["red"]}}, {"expansions": {0: ["red"]}}),
        start=2,
    ):  # fmt: skip
        kept(**options)
        assert len(read) == count
    assert kept(language="none").search(["owls"], 3).doc_ids.tolist() == [[1, -1, -1]]
    assert len(read) == 7

"""Which passages answers tell of, and which hold them."""

import json

import pytest

from ragjax.data import Corpus
from ragjax.data.matching import holds_answer, rows_with_answers
from ragjax.data.truth import MAX_PASSAGES, AnswerPassages


class TestAnswerPassages:
    """Which passages answers tell of."""

    @pytest.fixture
    def rows(self, tmp_path):
        def passages(texts, answers, asked=()):
            lines = [json.dumps({"_id": f"d{n}", "text": text}) for n, text in enumerate(texts)]
            (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
            corpus = Corpus.open(tmp_path, cache=tmp_path / "cache")
            return AnswerPassages(corpus, [answers, *asked]).rows([answers])[0]

        return passages

    def test_whole_words_of_few_passages(self, rows):
        texts = ["it weighs 15 kg", "it weighs 5 KG.", "C++ is old", "5 kg, as said"]
        assert rows(texts, ["5 kg"]) == {1, 3}
        assert rows(texts, ["C"]) == rows(texts, ["none of it"]) == rows(texts, []) == set()
        assert rows(texts, ["++"]) == {2}  # without a word, as it is written

    def test_an_answer_in_many_passages_or_of_many_questions_tells_nothing(self, rows):
        texts = [*["the lamp"] * MAX_PASSAGES, "a pump"]
        assert rows(texts, ["lamp"]) == set(range(MAX_PASSAGES))
        assert rows([*texts, "lamp"], ["lamp"]) == set()
        assert rows(texts, ["pump"], [["Pump"]] * (MAX_PASSAGES - 1)) == {MAX_PASSAGES}
        assert rows(texts, ["pump"], [["Pump"]] * MAX_PASSAGES) == set()

    def test_of_several_answers_the_rarest_count(self, rows):
        texts = ["in Oslo", "in Oslo, Norway", "in Rome"]
        assert rows(texts, ["Oslo", "Norway", "nowhere"]) == {1}
        assert rows(texts, ["Norway", "Rome"]) == {1, 2}


def test_passages_with_answers_are_those_that_hold_them():
    texts = [
        "a .NET core",
        "C++ and C#",
        "minus -1 and 1,000",
        "the 1 000",
        "+= is",
        "\u4e2d\u6587",
    ]
    answers = ["NET", ".NET", "C", "C++", "1", "-1", "1000", "+=", "the core", "\u6587", " "]
    found = rows_with_answers(texts, answers)
    assert found == {
        answer: [row for row, text in enumerate(texts) if holds_answer(text, answer)]
        for answer in answers
    }
    assert found["C++"] == [1] and found["1000"] == [2]

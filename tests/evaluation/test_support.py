import math

import pytest

from ragjax.evaluation.support import Support, answer_support, is_empty, support_rates

CURIE = "Radium was discovered by Marie Curie and her husband in Paris in 1898."
LONG = "radium discovered by Curie with her husband in Paris 1898"  # 6 content tokens of CURIE


def test_a_short_answer_counts_where_it_stands_word_for_word():
    found = answer_support("the Marie Curie!", ["Nothing here.", CURIE])
    assert found == Support(supported=True, containment=1.0)


@pytest.mark.parametrize("answer", ["Marie", "1898", "MARIE CURIE", "discovered by Marie Curie"])
def test_runs_of_whole_words_are_found(answer):
    assert answer_support(answer, [CURIE]).supported


@pytest.mark.parametrize("answer", ["Mari", "898", "Curie Marie", "Paris 1898"])
def test_parts_of_words_and_other_orders_are_not_a_short_answers_support(answer):
    assert not answer_support(answer, [CURIE]).supported


def test_a_long_answer_counts_by_its_content_words():
    found = answer_support(LONG, [CURIE])
    assert found == Support(supported=True, containment=1.0)
    # One word of six missing is 5/6 >= .8; two are 4/6.
    one_off = LONG.replace("Paris", "Warsaw")
    assert answer_support(one_off, [CURIE]).containment == pytest.approx(5 / 6)
    assert answer_support(one_off, [CURIE]).supported
    two_off = one_off.replace("1898", "1903")
    assert answer_support(two_off, [CURIE]).containment == pytest.approx(4 / 6)
    assert not answer_support(two_off, [CURIE]).supported


def test_the_threshold_decides():
    one_off = LONG.replace("Paris", "Warsaw")
    assert not answer_support(one_off, [CURIE], threshold=0.9).supported
    assert answer_support(one_off, [CURIE], threshold=0.5).supported
    with pytest.raises(ValueError, match=r"\(0, 1\], got 0"):
        answer_support("x", [], threshold=0)


def test_function_words_support_nothing():
    passage = "It was the best of times, it was the worst of times."
    answer = "it was the age of wisdom and the epoch of belief in season"
    assert answer_support(answer, [passage]).containment == 0.0
    # Of "the of" nothing else is left, so it is what is looked for.
    assert answer_support("of the of", [passage]).containment == 1.0


def test_words_of_two_passages_do_not_add_up():
    one, other = "alpha beta gamma delta.", "epsilon zeta eta theta."
    found = answer_support("alpha beta gamma epsilon zeta", [one, other])
    assert found.containment == pytest.approx(3 / 5)
    assert not found.supported


@pytest.mark.parametrize(
    ("answer", "passage"),
    [
        ("北京", "中国的首都是北京。"),
        ("Москва", "Столица — Москва."),
        ("القاهرة", "عاصمة مصر هي القاهرة."),
        ("עולם", "שלום עולם"),
        ("ความรัก", "เพลงความรักของเรา"),
        ("🦊", "the fox is 🦊 here"),
        ("+=", "use the operator += to add"),
    ],
)
def test_any_script_and_symbols(answer, passage):
    assert answer_support(answer, [passage]).supported
    assert not answer_support(answer, ["something else"]).supported


def test_scripts_without_spaces_are_compared_by_pairs_of_characters():
    passage = "中国的首都是北京。"
    # The same characters in another order share no pair.
    assert answer_support("京北是都首的国中", [passage]).containment == 0.0
    # Eight characters, seven pairs, five of them in the passage.
    found = answer_support("中国的首都在北京", [passage])
    assert found.containment == pytest.approx(5 / 7)
    assert not found.supported
    assert answer_support("中国的首都是北", [passage]).supported
    # A lone character between words of another script is a word.
    assert answer_support("go 北 now", ["now go 北"]).containment == 1.0


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_answer_that_says_nothing_is_not_supported(answer):
    assert is_empty(answer)
    assert answer_support(answer, [CURIE]) == Support(False, 0.0)


def test_no_passage_supports_nothing():
    assert answer_support("Marie", []) == Support(False, 0.0)


def rates(supported, **kwargs):
    return support_rates(Support(supported, float(supported)), **kwargs)


def test_rates_of_right_and_wrong_answers():
    right = rates(True, right=1.0, empty=False)
    assert (right.supported, right.supported_if_right, right.hallucination) == (1.0, 1.0, 0.0)
    assert math.isnan(right.supported_if_wrong)
    wrong = rates(True, right=0.0, empty=False)
    assert (wrong.supported_if_wrong, wrong.hallucination) == (1.0, 0.0)
    invented = rates(False, right=0.0, empty=False)
    assert (invented.supported, invented.hallucination) == (0.0, 1.0)
    lucky = rates(False, right=1.0, empty=False)
    assert lucky.hallucination == 0.0  # right from memory


def test_an_empty_answer_counts_in_no_rate():
    assert all(math.isnan(value) for value in rates(False, right=0.0, empty=True))


def test_without_a_known_answer_nothing_is_called_wrong():
    found = rates(False, right=math.nan, empty=False)
    assert found.supported == 0.0
    assert math.isnan(found.hallucination) and math.isnan(found.supported_if_wrong)
    with pytest.raises(ValueError, match="right must be"):
        rates(True, right=0.5, empty=False)

import pytest

from ragjax.evaluation.robustness import PassageSets, passage_sets, same_answers


def test_the_four_conditions():
    found = passage_sets([7], [3, 7, 9, 4], num_gold=1, num_distractors=2)
    assert found == PassageSets(
        gold=(7,), gold_first=(7, 3, 9), gold_last=(3, 9, 7), distractors=(3, 9)
    )


def test_no_relevant_passage_is_a_distractor_even_beyond_those_read():
    found = passage_sets([7, 3], [3, 7, 9], num_gold=1, num_distractors=5)
    assert found.gold == (7,) and found.distractors == (9,)


def test_empty_slots_are_no_passages():
    found = passage_sets([0], [2, -1, -1], num_gold=2, num_distractors=3)
    assert found.distractors == (2,)


@pytest.mark.parametrize(("gold", "ranked"), [([], [1, 2]), ([1], [1, -1]), ([1], [])])
def test_a_question_that_lacks_a_side_has_no_conditions(gold, ranked):
    assert passage_sets(gold, ranked, num_gold=1, num_distractors=1) is None


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(ValueError, match="at least 1"):
        passage_sets([1], [2], num_gold=numbers[0], num_distractors=numbers[1])


def test_answers_are_compared_after_normalisation():
    assert same_answers(["The Cat.", "dog", ""], ["cat", "owl", " "]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="1 and to 0"):
        same_answers(["a"], [])

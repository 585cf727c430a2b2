"""Passages of the robustness conditions: relevant ones, distractors, and both orders of the two.

Example:
    sets = passage_sets(gold=[7], ranked=[3, 7, 9], num_gold=1, num_distractors=2)
    sets.gold_first  # (7, 3, 9)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ragjax.data.matching import refuse_string
from ragjax.evaluation.answers import normalize_answer


class PassageSets(NamedTuple):
    """Passages to answer one question from, in the order they are read."""

    gold: tuple[int, ...]  # relevant passages only
    gold_first: tuple[int, ...]  # then the distractors
    gold_last: tuple[int, ...]  # behind the distractors
    distractors: tuple[int, ...]  # retrieved, not relevant


def passage_sets(
    gold: Sequence[int], ranked: Sequence[int], *, num_gold: int, num_distractors: int
) -> PassageSets | None:
    """Chooses the passages of each condition for one question.

    Distractors are the passages that a retriever ranks highest among those not labelled relevant:
    the mistakes it would make. Some of them may be relevant all the same.

    Args:
        gold: Corpus rows of the relevant passages, most relevant first.
        ranked: Corpus rows that the retriever found, best first; -1 marks an empty slot.
        num_gold: Most relevant passages to read, at least 1.
        num_distractors: Most distractors to read, at least 1.

    Returns:
        The sets; None for a question without a relevant passage, or without a distractor.

    Raises:
        ValueError: A number is below 1.
    """
    if num_gold < 1 or num_distractors < 1:
        raise ValueError(
            f"num_gold and num_distractors must be at least 1, got {num_gold}, {num_distractors}"
        )
    relevant = frozenset(gold)
    distractors = [doc for doc in ranked if doc >= 0 and doc not in relevant][:num_distractors]
    if not gold or not distractors:
        return None
    kept, wrong = tuple(gold[:num_gold]), tuple(distractors)
    return PassageSets(kept, kept + wrong, wrong + kept, wrong)


def same_answers(one: Sequence[str], other: Sequence[str]) -> np.ndarray:
    """Returns for each question whether two answers are the same after `normalize_answer`.

    Args:
        one: Q answers.
        other: Q answers to the same questions.

    Returns:
        [Q] float64 of 1.0 and 0.0.

    Raises:
        ValueError: The lengths differ.
        TypeError: One of them is a string.
    """
    refuse_string(one, "one")
    refuse_string(other, "other")
    if len(one) != len(other):
        raise ValueError(f"got answers to {len(one)} and to {len(other)} questions")
    return np.array(
        [
            float(normalize_answer(a) == normalize_answer(b))
            for a, b in zip(one, other, strict=True)
        ],
        dtype=np.float64,
    )

"""Answer metrics: SQuAD normalisation, exact match, F1, and answers found in passages.

A question has one or more acceptable answers; the best one counts. A question without answers has
no defined value: the metrics return NaN, which `intervals` leaves out. One string where a list of
answers or passages is expected raises TypeError.

Example:
    f1_score("the Eiffel Tower, Paris", ["Eiffel Tower"])  # 0.8
"""

import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ragjax.data import matching
from ragjax.data.matching import ARTICLES, SPACELESS, fold, holds_answer, refuse_string


def normalize_answer(text: str) -> str:
    """Normalises an answer as SQuAD does: case, punctuation, articles and white space.

    Beyond SQuAD's script, Unicode forms are unified (NFKC), punctuation of every script is
    removed, and a text that consists of nothing but punctuation and articles ("+=", "A") keeps
    them, so that only a blank text becomes empty.

    Args:
        text: Any text.

    Returns:
        The normalised text: lower case, single spaces; "" only for a blank text.

    References:
        Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016,
        evaluation script v1.1.
    """
    folded = fold(text)
    words = folded.translate(_WITHOUT_PUNCTUATION).split()
    kept = [word for word in words if word not in ARTICLES]
    return " ".join(kept or words or folded.split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether a prediction equals one of the answers after `normalize_answer`.

    Args:
        prediction: Generated text.
        answers: Acceptable answers.

    Returns:
        1.0 or 0.0; 1.0 if both are blank; NaN if there are no answers.
    """
    refuse_string(answers, "answers")
    if not answers:
        return float("nan")
    predicted = normalize_answer(prediction)
    return float(any(predicted == normalize_answer(answer) for answer in answers))


def f1_score(prediction: str, answers: Sequence[str]) -> float:
    """Computes the F1 of the prediction's tokens, the best over the answers.

    F1 = 2 P R / (P + R) with P and R the shares of common tokens (with multiplicity) after
    `normalize_answer`. In scripts written without spaces each character is a token.

    Args:
        prediction: Generated text.
        answers: Acceptable answers.

    Returns:
        Fraction in [0, 1]; 1.0 if both are blank, 0.0 if one is; NaN if there are no answers.

    References:
        Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016.
        Rajpurkar et al., Know What You Don't Know, 2018, evaluation script v2.0 (blank texts).
    """
    refuse_string(answers, "answers")
    if not answers:
        return float("nan")
    predicted = _f1_tokens(prediction)
    return max(_token_f1(predicted, _f1_tokens(answer)) for answer in answers)


def answer_in_text(text: str, answers: Sequence[str]) -> bool:
    """Returns whether a text contains one of the answers as a run of whole tokens.

    Case, Unicode form, punctuation and an article at the answer's start do not matter. Unlike in
    `normalize_answer`, punctuation separates instead of vanishing, so "jax.vmap" is found in
    "jax.vmap(fun)"; signs, decimal points and inner underscores stay, so "1" is not found in "-1",
    nor "axes" in "out_axes". Symbols of the answer must be there: "C++" is not found in "vitamin
    C", nor "$5" in "5 kg". An answer of punctuation only ("+=") is searched for as it is.

    Args:
        text: A passage.
        answers: Acceptable answers; blank ones are never contained.

    Returns:
        True if at least one answer is contained.
    """
    refuse_string(answers, "answers")
    return any(holds_answer(text, answer) for answer in answers)


def answer_at_k(
    passages: Sequence[Sequence[str]], answers: Sequence[Sequence[str]], *, k: int
) -> np.ndarray:
    """Returns for each question whether one of the first k passages contains an answer.

    Args:
        passages: Q lists of retrieved passage texts, best first.
        answers: Q lists of acceptable answers.
        k: Cut-off in ranks, at least 1.

    Returns:
        [Q] float64 of 1.0 and 0.0; NaN for a question without answers.

    Raises:
        ValueError: If the lengths differ or k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for name, lists in (("passages", passages), ("answers", answers)):
        refuse_string(lists, name)
        for row, strings in enumerate(lists):
            refuse_string(strings, f"{name}[{row}]")
    if len(passages) != len(answers):
        raise ValueError(f"got passages of {len(passages)} and answers of {len(answers)} questions")
    return np.array(
        [
            float(any(answer_in_text(text, accepted) for text in texts[:k])) if accepted else np.nan
            for texts, accepted in zip(passages, answers, strict=True)
        ],
        dtype=np.float64,
    )


def passage_tokens(text: str) -> list[str]:
    """Splits a text as `answer_in_text` compares it.

    Args:
        text: Any text.

    Returns:
        Folded tokens; characters of scripts written without spaces are tokens of their own.
        Symbols such as emoji are none.
    """
    return matching.words(text)


def is_spaceless(token: str) -> bool:
    """Returns whether a token of `passage_tokens` is a character of a script without spaces."""
    return SPACELESS.fullmatch(token) is not None


class _CharacterTable(dict[int, str]):
    """A table for `str.translate` that judges each character once."""

    def __init__(self, dropped: str, kept: str, replacement: str):
        super().__init__(dict.fromkeys(map(ord, string.punctuation), replacement))
        self.update((ord(character), character) for character in kept)
        self._dropped = dropped
        self._replacement = replacement

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        result = self._replacement if category[0] in self._dropped else character
        self[code] = result
        return result


_WITHOUT_PUNCTUATION = _CharacterTable(dropped="P", kept="", replacement="")


def _f1_tokens(text: str) -> list[str]:
    return SPACELESS.sub(r" \1 ", normalize_answer(text)).split()


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2.0 * common / (len(predicted) + len(gold))

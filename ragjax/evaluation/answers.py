"""Answer metrics: SQuAD normalisation, exact match, F1, and answers found in passages.

A question has one or more acceptable answers; the best one counts. A question without answers has
no defined value: the metrics return NaN, which `intervals` leaves out.

Example:
    f1_score("the Eiffel Tower, Paris", ["Eiffel Tower"])  # 0.8
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

ARTICLES = frozenset({"a", "an", "the"})
# Thai, Lao, Burmese, Khmer, kana and Han are written without spaces: one character, one token.
SPACELESS = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff])"
)
# Only a decimal point, a sign and an underscore inside a name belong to a token.
_SEPARATING = re.compile(r"(?<!\d)\.|\.(?!\d)|(?<=\w)-|-(?!\d)|(?<!\w)_+|_+(?!\w)")


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
    folded = _fold(text)
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
    if not answers:
        return float("nan")
    predicted = _f1_tokens(prediction)
    return max(_token_f1(predicted, _f1_tokens(answer)) for answer in answers)


def answer_in_text(text: str, answers: Sequence[str]) -> bool:
    """Returns whether a text contains one of the answers as a run of whole tokens.

    Case, Unicode form, punctuation and an article at the answer's start do not matter. Unlike in
    `normalize_answer`, punctuation separates instead of vanishing, so "jax.vmap" is found in
    "jax.vmap(fun)"; signs, decimal points and inner underscores stay, so "1" is not found in "-1",
    nor "axes" in "out_axes". An answer of punctuation only ("+=") is searched for as it is.

    Args:
        text: A passage.
        answers: Acceptable answers; blank ones are never contained.

    Returns:
        True if at least one answer is contained.
    """
    folded = _fold(text)
    padded = f" {' '.join(_tokens(folded))} "
    return any(_contains(folded, padded, _fold(answer)) for answer in answers)


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
        Lower-case tokens; characters of scripts written without spaces are tokens of their own.
        Symbols such as emoji are none.
    """
    return _tokens(_fold(text))


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
# Letters, numbers and marks stay: marks are the vowels of Indic scripts, and no `\w`.
_SEPARATED = _CharacterTable(dropped="PSZC", kept=".-_", replacement=" ")


def _fold(text: str) -> str:
    # NFKC first: it turns letter-like symbols into letters, capitals among them.
    return unicodedata.normalize("NFKC", text).lower()


def _f1_tokens(text: str) -> list[str]:
    return SPACELESS.sub(r" \1 ", normalize_answer(text)).split()


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2.0 * common / (len(predicted) + len(gold))


def _tokens(folded: str) -> list[str]:
    separated = _SEPARATING.sub(" ", folded.translate(_SEPARATED))
    return SPACELESS.sub(r" \1 ", separated).split()


def _contains(folded: str, padded: str, folded_answer: str) -> bool:
    tokens = _tokens(folded_answer)
    if not tokens:
        literal = folded_answer.strip()
        return bool(literal) and literal in folded
    while len(tokens) > 1 and tokens[0] in ARTICLES:
        tokens = tokens[1:]
    return f" {' '.join(tokens)} " in padded

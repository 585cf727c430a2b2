"""Support of a generated answer by passages: a measure of hallucination.

An answer is supported by a passage that contains it as a run of whole tokens. A longer answer,
which is seldom a quotation, is also supported by a passage that holds most of its content words.
Support is no correctness: "Paris" in a passage on Texas supports "Paris".

Example:
    answer_support("Marie Curie", ["Radium was found by Marie Curie."]).supported  # True
"""

from collections.abc import Sequence
from typing import NamedTuple

from ragjax.data.matching import refuse_string
from ragjax.evaluation.answers import (
    answer_in_text,
    is_spaceless,
    normalize_answer,
    passage_tokens,
)

# Below, chance alone finds most words of an answer somewhere in a passage of a hundred words.
LONG_ANSWER_TOKENS = 5
# One word in five may be another form ("closes" for "closed") or the answer's own joint.
CONTAINMENT_THRESHOLD = 0.8
# Words that are in every English passage and support nothing.
_FUNCTION_WORDS = frozenset(
    "a an the and or but of in on at to for from by with as is are was were be been it its this "
    "that these those he she they his her their not no".split()
)


class Support(NamedTuple):
    """Support of an answer by passages."""

    supported: bool  # some passage contains it, or most of it where it is long
    containment: float  # largest share, over the passages, of its content tokens, 0 to 1


class SupportRates(NamedTuple):
    """Values of one answer whose means are rates; NaN leaves it out of that mean."""

    supported: float  # of answers that are not empty
    supported_if_right: float
    supported_if_wrong: float
    hallucination: float  # wrong and not supported, of answers that are not empty


def answer_support(
    answer: str, passages: Sequence[str], *, threshold: float = CONTAINMENT_THRESHOLD
) -> Support:
    """Looks for an answer in passages: those that its writer read, or all that bear on it.

    Content tokens are those of `passage_tokens` without English function words (all of them, if it
    has no others), each counted once; in scripts written without spaces they are pairs of adjacent
    characters. An answer with at least `LONG_ANSWER_TOKENS` of them is supported by a passage that
    holds `threshold` of them; a shorter one, or one of symbols, only where it stands verbatim.

    Args:
        answer: Generated text.
        passages: Texts; none where no document was read.
        threshold: Share of content tokens that supports a long answer, in (0, 1].

    Returns:
        The support; none for a blank answer.

    Raises:
        ValueError: The threshold is out of range.
        TypeError: `passages` is one string.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    refuse_string(passages, "passages")
    if is_empty(answer):
        return Support(False, 0.0)
    content = _content(answer)
    verbatim = [answer_in_text(passage, [answer]) for passage in passages]
    # A quotation holds all of it, also where no token is left of it ("+=").
    shares = [
        1.0 if found else _share(content, passage)
        for found, passage in zip(verbatim, passages, strict=True)
    ]
    containment = max(shares, default=0.0)
    long = len(content) >= LONG_ANSWER_TOKENS and containment >= threshold
    return Support(any(verbatim) or long, containment)


def support_rates(support: Support, *, right: float, empty: bool) -> SupportRates:
    """Computes values of an answer whose means over the questions are rates.

    Args:
        support: From `answer_support`.
        right: 1.0 if the answer is right, 0.0 if it is wrong, NaN without a known answer.
        empty: The answer is empty: it counts in no rate.

    Raises:
        ValueError: `right` is something else.
    """
    if right not in (0.0, 1.0) and right == right:
        raise ValueError(f"right must be 1.0, 0.0 or NaN, got {right}")
    nan = float("nan")
    if empty:
        return SupportRates(nan, nan, nan, nan)
    supported = float(support.supported)
    return SupportRates(
        supported=supported,
        supported_if_right=supported if right == 1.0 else nan,
        supported_if_wrong=supported if right == 0.0 else nan,
        hallucination=nan if right != right else (1.0 - right) * (1.0 - supported),
    )


def is_empty(answer: str) -> bool:
    """Returns whether nothing is left of an answer after `normalize_answer`."""
    return not normalize_answer(answer)


def _content(text: str) -> frozenset[str]:
    tokens = passage_tokens(text)
    kept = [token for token in tokens if token not in _FUNCTION_WORDS] or tokens
    return frozenset(_units(kept))


def _units(tokens: Sequence[str]) -> list[str]:
    """Returns words, and adjacent pairs of characters that are tokens of their own."""
    spaceless = [is_spaceless(token) for token in tokens]
    units = []
    for place, token in enumerate(tokens):
        pairs = spaceless[place] and place + 1 < len(tokens) and spaceless[place + 1]
        ends_a_run = spaceless[place] and place > 0 and spaceless[place - 1] and not pairs
        if not ends_a_run:
            units.append(token + tokens[place + 1] if pairs else token)
    return units


def _share(content: frozenset[str], passage: str) -> float:
    if not content:
        return 0.0
    return len(content & frozenset(_units(passage_tokens(passage)))) / len(content)

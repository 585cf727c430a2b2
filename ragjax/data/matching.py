"""Where an answer stands in a text: whole words, in any script, with the symbols that it has.

holds_answer("The drill weighs 15 kg.", "5 kg")  # False
holds_answer("rich in vitamin C", "C++")  # False
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import regex

ARTICLES = frozenset({"a", "an", "the"})
# Thai, Lao, Burmese, Khmer, kana and Han are written without spaces: one character, one token.
SPACELESS = regex.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff])"
)
_LETTER = rf"[\w--[_]--{SPACELESS.pattern[1:-1]}]"
# A number keeps its sign, its decimal point and what parts its thousands; a name its inner
# underscores, and a plus or sharp that ends it ("C++", "F#", "Na+"), but no operator ("x+=1").
_TOKEN = regex.compile(
    rf"""
      (?P<symbol>(?<!\.)\.(?={_LETTER}) | [\#@](?=\w) | [%&] | [\p{{Sm}}\p{{Sc}}\p{{So}}--[|~©®]])
    | {SPACELESS.pattern}\p{{M}}*
    | (?:(?<!\w)-(?=\d))?
      {_LETTER}+ (?:_+{_LETTER}+ | (?<=\d)\.(?=\d){_LETTER}+ | (?<=\d),\d{{3}}(?!\d))*
      (?:(?<=\p{{L}}) (?:\+\+(?![+=]) | \+(?![\w+=])) | (?<=(?<!\w)\p{{L}})\#)?
    """,
    regex.VERBOSE | regex.VERSION1,
)


class Token(NamedTuple):
    """A word, number, character or symbol of a text."""

    text: str  # folded
    start: int  # first character, in the text as it is written
    end: int  # behind the last character
    is_symbol: bool


def refuse_string(values: object, name: str) -> None:
    """Raises TypeError for one string where several are expected: it would count as its letters."""
    if isinstance(values, str | bytes):
        raise TypeError(f"{name}: expected a list of strings, got the string {values!r}")


def fold(text: str) -> str:
    """Returns a text without differences of Unicode form and case; the minus sign is a hyphen."""
    # NFKC first: it turns letter-like symbols into letters, capitals among them.
    plain = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", plain).replace("\u2212", "-")


def tokenize(text: str) -> list[Token]:
    """Returns the tokens of a text with their places in it, symbols among them."""
    if text.isascii():
        return _tokens(text.casefold())
    places: list[tuple[int, int]] = []
    folded: list[str] = []
    for found in regex.finditer(r"\X", text):  # a letter with its marks, or a whole syllable
        folded.append(fold(found[0]))
        places += [found.span()] * len(folded[-1])
    return [
        token._replace(start=places[token.start][0], end=places[token.end - 1][1])
        for token in _tokens("".join(folded))
    ]


def words(text: str) -> list[str]:
    """Returns the folded words of a text, without symbols."""
    return [token.text for token in _tokens(fold(text)) if not token.is_symbol]


def holds_answer(text: str, answer: str) -> bool:
    """Returns whether the words of an answer follow each other in a text; see `find_answer`."""
    wanted = _wanted(answer)
    if not wanted:
        literal = fold(answer).strip()
        return bool(literal) and literal in fold(text)
    folded = fold(text)
    bare = folded.replace(",", "")  # thousands are parted or not
    if not all(word in bare for word in wanted):
        return False
    return next(_runs(_tokens(folded), wanted), None) is not None


def find_answer(text: str, answer: str) -> list[tuple[int, int]]:
    """Finds the places where the words of an answer follow each other in a text.

    Case, Unicode form, punctuation between words and an article in front do not matter; symbols of
    the answer must stand in the text, further ones there do not matter. "1" is not found in "-1",
    "1.5" or "1,000", nor "axes" in "out_axes", nor "C" in "C++" or the other way round.

    Args:
        text: A passage.
        answer: A generated or a given answer.

    Returns:
        (first character, behind the last) of all places that do not overlap, in order; none for a
        blank answer. An answer without any word ("+=") is searched for as it is.
    """
    wanted = _wanted(answer)
    if not wanted:
        literal = answer.strip()
        found = regex.finditer(regex.escape(literal), text) if literal else ()
        return [(match.start(), match.end()) for match in found]
    tokens = tokenize(text)
    return [(tokens[first].start, tokens[last].end) for first, last in _runs(tokens, wanted)]


def rows_with_answers(texts: Iterable[str], answers: Iterable[str]) -> dict[str, list[int]]:
    """Finds the texts that hold each answer, as `holds_answer` does, reading each text once.

    Args:
        texts: Passages.
        answers: Distinct or not.

    Returns:
        Answer to the places of the texts that hold it, in order.
    """
    found: dict[str, list[int]] = {answer: [] for answer in answers}
    wanted = {answer: _wanted(answer) for answer in found}
    # By its longest word, which few texts have.
    by_word: dict[str, list[str]] = {}
    for answer, tokens in wanted.items():
        if tokens:
            by_word.setdefault(max(tokens, key=len), []).append(answer)
    literals = {answer: fold(answer).strip() for answer in found if not wanted[answer]}
    for row, text in enumerate(texts):
        folded = fold(text)
        tokens = _tokens(folded)
        words = {token.text for token in tokens}
        for word in words & by_word.keys():
            for answer in by_word[word]:
                run = wanted[answer]
                if words.issuperset(run) and next(_runs(tokens, run), None):
                    found[answer].append(row)
        for answer, literal in literals.items():
            if literal and literal in folded:
                found[answer].append(row)
    return found


def _tokens(folded: str) -> list[Token]:
    return [
        Token(found[0].replace(",", ""), *found.span(), found["symbol"] is not None)
        for found in _TOKEN.finditer(folded)
    ]


def _wanted(answer: str) -> list[str]:
    """Returns the tokens that a text must have; none for an answer without any word."""
    tokens = _tokens(fold(answer))
    # A dot counts in front (".NET", ".5"); between words it parts them like other punctuation.
    kept = [token for place, token in enumerate(tokens) if not place or token.text != "."]
    if all(token.is_symbol for token in kept):
        return []
    while len(kept) > 1 and kept[0].text in ARTICLES and not kept[1].is_symbol:
        kept = kept[1:]
    return [token.text for token in kept]


def _runs(tokens: Sequence[Token], wanted: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yields (first token, last token) of each run, symbols between its words aside."""
    place = 0
    while place < len(tokens):
        last = _run_end(tokens, place, wanted) if tokens[place].text == wanted[0] else None
        if last is not None:
            yield place, last
        place = place + 1 if last is None else last + 1


def _run_end(tokens: Sequence[Token], place: int, wanted: Sequence[str]) -> int | None:
    matched = 0
    while place < len(tokens):
        if tokens[place].text == wanted[matched]:
            matched += 1
            if matched == len(wanted):
                return place
        elif not tokens[place].is_symbol:
            return None
        place += 1
    return None

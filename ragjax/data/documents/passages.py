"""Cuts the text under a heading into passages, by tokens, at paragraphs and sentences."""

import re
from collections.abc import Callable, Iterator, Sequence

from semantic_text_splitter import TextSplitter
from tokenizers import Tokenizer

# (paragraphs) -> passages
Cut = Callable[[Sequence[str]], Iterator[str]]

# Words whose tokens are kept, and their length.
_KNOWN_WORDS, _LONGEST_KNOWN = 200_000, 40
# About a token: a letter of a script without spaces, a short word or a part of a long one, up to
# three digits, or a sign.
_PIECE = re.compile(r"[\u0e00-\u0eff\u2e80-\U0010ffff]|[^\W\d_]{1,9}|\d{1,3}|[^\w\s]|_")


def make_cut(tokens: int, overlap: int, tokenizer: Tokenizer | None) -> Cut:
    """Returns what cuts paragraphs into passages.

    A passage has whole paragraphs; one that is too long is cut between sentences, a sentence that
    is too long between words, by the rules of Unicode for each script.

    Args:
        tokens: Of a passage, at most.
        overlap: Tokens at the end of a passage that the next one begins with, at most: whole
            sentences or words of a paragraph that is cut.
        tokenizer: Counts the tokens, without special ones; None: they are estimated.
    """
    count = token_counter(tokenizer) if tokenizer else estimated_tokens
    splitter = TextSplitter.from_callback(count, tokens, overlap)

    def cut(paragraphs: Sequence[str]) -> Iterator[str]:
        for passage in splitter.chunks("\n\n".join(paragraphs)):
            yield " ".join(passage.split())

    return cut


def token_counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """Returns what counts the tokens of a text, word by word: many times faster than the text.

    The count is exact for tokenizers that divide texts at spaces first, as nearly all do.
    """
    known = _WordTokens(tokenizer)
    return lambda text: sum(map(known.__getitem__, text.split()))


class _WordTokens(dict[str, int]):
    """The number of tokens of each word that was asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> int:
        count = len(self._tokenizer.encode(f" {word}", add_special_tokens=False).ids)
        if len(word) <= _LONGEST_KNOWN:
            if len(self) == _KNOWN_WORDS:
                self.clear()
            self[word] = count
        return count


def estimated_tokens(text: str) -> int:
    """Returns about how many tokens a text has for a model of its language."""
    return len(_PIECE.findall(text))

"""Which texts are questions that say what they ask for, and have not been asked."""

from collections.abc import Callable, Iterable, Sequence

from ragjax.data.matching import words

# The Latin mark, and those of Arabic, Armenian, Ethiopic, Greek, and of Chinese and Japanese.
MARKS = "?؟՞፧;？"
_FEWEST_WORDS, _MOST_WORDS = 4, 40
# Words that are neither common ones of the language nor question words.
_FEWEST_CONTENT_WORDS = 2


def first_question(text: str) -> str:
    """Returns a generated text up to its first question mark, on one line, without what is around.

    A language model that has asked may go on with an answer or the next question.
    """
    line = " ".join(text.split())
    ends = [line.index(mark) + 1 for mark in MARKS if mark in line]
    return line[: min(ends)].strip() if ends else line


def normalised(text: str) -> str:
    """Returns the words of a text, by which two questions are the same."""
    return " ".join(words(text)) or text


def ends_asking(texts: Iterable[str]) -> bool:
    """Tells whether most of some questions end with a question mark, so that others should."""
    marked = [text.rstrip()[-1:] in MARKS for text in texts if text.strip()]
    return 2 * sum(marked) >= len(marked)


class Rules:
    """Says what is wrong with a text as a question; each text counts as asked afterwards.

    Args:
        content_words: Text to the words in it that tell passages apart.
        asked: Questions that must not be written: those of dev and test, and those that are there.
        marked: A question ends with a question mark.
    """

    def __init__(
        self,
        content_words: Callable[[str], Sequence[object]],
        asked: Iterable[str],
        *,
        marked: bool,
    ):
        """Remembers what has been asked."""
        self._content_words, self._marked = content_words, marked
        self._asked = {normalised(text) for text in asked}
        self._written: set[str] = set()

    def against(self, text: str) -> str:
        """Returns why a text is no question to train on, "" if it is one."""
        plain, count = normalised(text), len(words(text))
        if plain in self._asked:
            return "asked by others"
        if plain in self._written:
            return "written twice"
        self._written.add(plain)
        if count < _FEWEST_WORDS:
            return "too short"
        if count > _MOST_WORDS:
            return "too long"
        if self._marked and text[-1:] not in MARKS:
            return "not a question"
        if len(set(self._content_words(text))) < _FEWEST_CONTENT_WORDS:
            return "names nothing"
        return ""

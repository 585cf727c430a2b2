"""Words of a text as BM25 counts them: split by script, normalised, stemmed by language."""

import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import regex
from numpy.typing import NDArray

from ragjax.storage import nearest_name

# A character of a script that is written without spaces between words, or (Korean) with particles
# attached to them, and the marks on it.
_CHARACTER = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Bopomofo}\p{Line_Break=Complex_Context}\u30fc]"
    r"\p{M}*"
)
_CHARACTERS = regex.compile(_CHARACTER)
_RUN = regex.compile(rf"(?:{_CHARACTER})+|(?:(?!{_CHARACTER})\w)+")
_ASCII_WORD = regex.compile(r"\w+", regex.ASCII)
# In the order in which they tell a language.
_SCRIPTS = {
    "japanese": regex.compile(r"[\p{Hiragana}\p{Katakana}]"),
    "korean": regex.compile(r"\p{Hangul}"),
    "southeast asian": regex.compile(r"\p{Line_Break=Complex_Context}"),
    "chinese": regex.compile(r"[\p{Han}\p{Bopomofo}]"),
}
# Soft hyphens, joiners and the like are invisible; the zero-width space is a space.
_INVISIBLE = regex.compile(r"(?!\u200b)\p{Default_Ignorable_Code_Point}")
# From this share of its function words on, a language is taken for that of the documents.
_LEAST_SHARE = 0.08
# Fewer different ones may be letters or names ("vitamin c").
_LEAST_DIFFERENT = 4
# Undecided texts are taken for English as long as hardly a word of them has another letter.
_LEAST_ASCII = 0.98

# The commonest words of a language, which tell it from others and are left out as stop words;
# behind "|" question words, which are left out of queries: rare in passages, BM25 would weigh them
# like names, and they only say that a question is asked.
_COMMON_WORDS = {
    "arabic": "من في على أن إلى عن هذا مع كان لا ما هذه أو ان الى | هل متى كيف أين لماذا كم",
    "armenian": "և է են որ մեջ եւ այս համար հետ էր մի | ինչ երբ ինչպես որտեղ",
    "basque": "eta da ez du bat zen dira ere izan baina | zer nor noiz non nola",
    "catalan": "de la i el que a en un per els amb una del no es al és l d s | què qui quan on com",
    "czech": "a se v na je že s z do i to o k za by ve pro jsou jako | kdo co kdy kde jak proč",
    "danish": "og i at det en den til er som på de af for ikke der et har | hvad hvem hvor hvornår",
    "dutch": "de het een en van in is dat op te zijn met voor niet aan | wat wie waar wanneer hoe",
    "english": (
        "a an and are as at be but by for if in into is it no not of on or such that the their then"
        " there these they this to was will with | what which who whom whose when where why how am"
        " been being do does did done has have had having were can could would shall should may"
        " might must"
    ),
    "esperanto": "la kaj de en estas al ne por kun ke mi estis | kio kiu kie kiam kiel",
    "estonian": "ja on ei et ta see oli ka kui mis ning aga või | kes kus millal kuidas",
    "finnish": "ja on ei se että oli hän mutta ovat kun myös tai | mikä kuka missä milloin miten",
    "french": (
        "de la le et les des en un du une que est pour dans qui par au sur ne pas il l d n s qu c j"
        " | quel quelle quels quelles quand où comment pourquoi combien"
    ),
    "german": (
        "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch |"
        " was wer wen wem wann wo wie warum welche welcher welches"
    ),
    "greek": "και το να του η της με που την από για είναι τα στο ο | τι ποιος πότε πού πώς",
    "hindi": "के में की है और से का को पर हैं यह एक नहीं ने | क्या कौन कब कहाँ कैसे",
    "hungarian": "a az és hogy nem is egy meg de volt csak el | mi ki mikor hol hogyan",
    "indonesian": "yang dan di ini itu dengan untuk dari tidak adalah ke | apa siapa kapan mana",
    "irish": "an agus na a ar i is le do go bhí sé | cad cé cathain conas",
    "italian": (
        "di e il la che in un per è una del non da della le i al dell l nell all | chi quando dove"
        " come quale quali perché quanto"
    ),
    "lithuanian": "ir kad yra į su iš ne tai bei buvo ar | kas kada kur kaip",
    "nepali": "र को मा छ हो यो ले पनि लाई | के कहिले कहाँ कसरी",
    "norwegian": "og i det på er som en til å for av at med har ikke | hva hvem hvor når hvordan",
    "persian": "و در به از که این را با است برای آن یک می تا | چه کی کجا چگونه چرا",
    "polish": "w i na z się nie do to że jest o od po za ale są | co kto kiedy gdzie jak dlaczego",
    "portuguese": (
        "de a o que e do da em um para com não uma os no se na por mais as | qual quais quem quando"
        " onde como quanto"
    ),
    "romanian": "de și în la a cu pe nu este din să un o că | ce cine când unde cum",
    "russian": "и в не на что с по это из у за он к от для о | кто когда где как почему сколько",
    "serbian": "је и у да на се за су од са који je u da na se za su od sa | шта ко где šta ko",
    "spanish": (
        "de la que el en y los se del las un por con no una para es al lo su | qué quién cuándo"
        " dónde cómo cuál cuánto"
    ),
    "swedish": "och i att det som en på är av för med till inte om ett har | vad vem var när hur",
    "tamil": "ஒரு என்று இந்த மற்றும் அது என்ற இது | என்ன யார் எப்போது எங்கே",
    "turkish": "ve bir bu da de için ile çok olarak daha gibi | ne kim nerede nasıl hangi",
    "yiddish": "און די פון איז אין דער צו האט א | וואס ווער ווען",
}
_STOP_WORDS, _QUESTION_WORDS = (
    {name: frozenset(words.split("|")[part].split()) for name, words in _COMMON_WORDS.items()}
    for part in (0, 1)
)
_NONE: frozenset[str] = frozenset()


def languages() -> tuple[str, ...]:
    """Returns the languages whose words the installed Snowball stemmer knows, by name."""
    import Stemmer  # pyrefly: ignore[missing-import]  (a compiled module without stubs)

    return tuple(sorted(set(Stemmer.algorithms()) & set(_COMMON_WORDS)))


def check_language(language: str) -> None:
    """Raises ValueError for a language that is neither known, nor "auto", nor "none"."""
    if language in ("auto", "none") or language in languages():
        return
    near = nearest_name(language, ("auto", "none", *languages()))
    hint = f"; did you mean {near!r}?" if near else ""
    raise ValueError(f"language {language!r}: expected auto, none, {', '.join(languages())}{hint}")


class Analyzer:
    """Text to word ids: Unicode words in lower case, stop words out, Snowball stems.

    Runs of Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese are cut into pairs of adjacent
    characters (and, in documents, single ones, for queries of one). Question words are left out of
    queries, if anything else is in them; documents keep them.

    References:
        Nie, Gao, Zhang and Zhou, "On the Use of Words and N-grams for Chinese Information
        Retrieval", 2000.
    """

    def __init__(self, language: str) -> None:
        """Starts without words.

        Args:
            language: One of `languages()`; "none": no stems and no stop words; "auto": chosen by
                the words of the documents.

        Raises:
            ValueError: Another language.
        """
        check_language(language)
        self.language = language
        self.reason = "as given"
        self.vocabulary: dict[str, int] = {}  # stem to id
        self._pairs = 0.0  # share of the words that are pairs of characters
        self._stem = list[str]

    def learn(self, texts: Iterable[str]) -> "WordIds":
        """Returns the ids of the words of each text; afterwards the vocabulary is complete."""
        places: dict[str, int] = {}  # word as it is written to its number
        numbers, ends = array("i"), array("q", [0])
        for text in texts:
            words = split_words(text, singles=True)
            numbers.extend(places.setdefault(word, len(places)) for word in words)
            ends.append(len(numbers))
        written, offsets = np.frombuffer(numbers, np.int32), np.frombuffer(ends, np.int64)
        counts = np.bincount(written, minlength=len(places)).tolist()
        if self.language == "auto":
            self.language, self.reason = _guess(dict(zip(places, counts, strict=True)))
        paired = sum(n for word, n in zip(places, counts, strict=True) if _CHARACTERS.match(word))
        self._pairs = paired / max(len(written), 1)
        self._load_stems()
        stop_words = _STOP_WORDS.get(self.language, _NONE)
        folded = [_fold(word, self.language) for word in places]
        ids = [
            -1 if word in stop_words else self.vocabulary.setdefault(stem, len(self.vocabulary))
            for word, stem in zip(folded, self._stem(folded), strict=True)
        ]
        found = np.array([*ids, -1], np.int32)[written]
        kept = found >= 0
        return WordIds(found[kept], np.concatenate([[0], np.cumsum(kept)])[offsets])

    def as_json(self) -> dict[str, Any]:
        """Returns what was learnt, for `from_json`."""
        return {
            "language": self.language,
            "reason": self.reason,
            "pairs": self._pairs,
            "vocabulary": list(self.vocabulary),
        }

    @classmethod
    def from_json(cls, learnt: Mapping[str, Any]) -> Self:
        """Returns an analyzer that looks words up as the one whose `as_json` it was."""
        analyzer = cls(learnt["language"])
        analyzer.reason, analyzer._pairs = learnt["reason"], learnt["pairs"]
        analyzer.vocabulary = {stem: id for id, stem in enumerate(learnt["vocabulary"])}
        analyzer._load_stems()
        return analyzer

    def _load_stems(self) -> None:
        if self.language != "none":
            import Stemmer  # pyrefly: ignore[missing-import]  (as above)

            self._stem = Stemmer.Stemmer(self.language).stemWords

    def look_up(self, text: str) -> list[int]:
        """Returns the ids of the words of `text` that some document has."""
        stop_words = _STOP_WORDS.get(self.language, _NONE)
        asking = _QUESTION_WORDS.get(self.language, _NONE)
        folded = [_fold(word, self.language) for word in split_words(text, singles=False)]
        words = [word for word in folded if word not in stop_words]
        stems = self._stem([word for word in words if word not in asking] or words)
        return [self.vocabulary[stem] for stem in stems if stem in self.vocabulary]

    def describe(self) -> str:
        """Returns how words are made, in one sentence."""
        stems = "words as written" if self.language == "none" else f"{self.language} stems"
        sentence = f"{stems} ({self.reason})"
        if self._pairs < 0.01:
            return sentence
        return (
            f"pairs of characters where a script has no spaces ({self._pairs:.0%}), else {sentence}"
        )


class WordIds(Sequence[list[int]]):
    """The ids of the words of many texts, in 4 bytes a word and 8 a text."""

    def __init__(self, ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> None:
        """Takes the ids of all texts, and where each begins and the last ends."""
        self._ids, self._offsets = ids, offsets

    def __len__(self) -> int:
        """Returns the number of texts."""
        return len(self._offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        """Returns the ids of one text, or of the texts of a slice."""
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        return self._ids[self._offsets[row] : self._offsets[row + 1]].tolist()


def language_of(text: str) -> str:
    """Returns the language of a text by its commonest words, or its script if that has no spaces.

    A few words tell nothing, and English is what only has its letters.

    Returns:
        A name of Snowball's, "chinese", "japanese", "korean" or "southeast asian"; "" where
        nothing is clear.
    """
    words = split_words(text, singles=False)
    letters = "".join(word for word in words if _CHARACTERS.match(word))
    if 2 * sum(map(bool, map(_CHARACTERS.match, words))) > len(words):
        counts = {name: len(script.findall(letters)) for name, script in _SCRIPTS.items()}
        # Chinese characters stand between the Japanese ones.
        return next((name for name, count in counts.items() if 8 * count > len(letters)), "")
    name, _ = _guess(Counter(words))
    return "" if name == "none" else name


def split_words(text: str, *, singles: bool) -> list[str]:
    """Returns the words of a text as they are written, pairs of characters among them."""
    if text.isascii():
        return _ASCII_WORD.findall(text)
    # Before the words are found: marks join their letters, and symbols become letters.
    plain = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    words: list[str] = []
    for run in _RUN.findall(plain):
        if not _CHARACTERS.match(run):
            words.append(run)
            continue
        characters = _CHARACTERS.findall(run)
        if singles or len(characters) == 1:
            words += characters
        words += map("".join, zip(characters, characters[1:], strict=False))
    return words


def _fold(word: str, language: str) -> str:
    if word.isascii() and language != "turkish":
        return word.lower()
    if language == "turkish":
        word = word.replace("I", "ı").replace("İ", "i")
    # Folding may take letters and marks apart; a dotted capital I leaves its dot behind.
    return unicodedata.normalize("NFC", word.casefold()).replace("i\u0307", "i")


def _guess(written: Mapping[str, int]) -> tuple[str, str]:
    """Returns the language of the documents and why it was chosen."""
    counts: Counter[str] = Counter()
    for word, count in written.items():
        if not _CHARACTERS.match(word):
            counts[_fold(word, "none")] += count
    total = counts.total()
    if not total:
        return "none", "no script with spaces"
    found = {name: _STOP_WORDS[name] & counts.keys() for name in languages()}
    share, best = max(
        (sum(counts[word] for word in words) / total, name)
        for name, words in found.items()
        if len(words) >= _LEAST_DIFFERENT or name == "english"
    )
    if share >= _LEAST_SHARE:
        return best, f"{share:.0%} of the words are its commonest ones"
    ascii_share = sum(count for word, count in counts.items() if word.isascii()) / total
    if ascii_share >= _LEAST_ASCII:
        return "english", "no language is clear, and all letters are English ones"
    return "none", "no language is clear"

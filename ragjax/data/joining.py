"""Token ids of a text that is put together from parts: those of the whole text.

Tokenised apart, parts lose what happens at their borders: a tokenizer that puts a space before
every text gives each part one, and merges across a border do not happen. So a text is tokenised
as one, except that a part which was tokenised before (a document) keeps its tokens between its
first and its last safe border. A safe border stands before a space between two words; what is left
around it are the tokens of the two sides for every tokenizer that passes `_splits_at_words`. With
another one nothing is kept, and every text is tokenised from its start.

Control tokens are tokens only where `literal` has put them; spelled out in any other text they are
characters.
"""

import functools
import itertools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

# No text can spell a control token of the private tokenizer, whose name holds this.
_NONCE = uuid.uuid4().hex
# ASCII beside the space: no normaliser joins or moves these.
_SAFE = re.compile(r"(?<=[a-zA-Z.,:;?!]) (?=[a-zA-Z])")
# What stands before a text that does not begin one; the first that shares no token with it counts.
_BEFORE = ("a", "\n", ".", ")", "?\n")
_PROBES = [f"one tw{left} {right}ree four" for left in "oO.,:;?!" for right in "tTiI"]
_NORMALIZERS = ("Prepend", "Replace", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents")
_NORMALIZERS += ("BertNormalizer", "Strip", "Nmt", "Precompiled", "Sequence")
_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "BertPreTokenizer", "Whitespace", "WhitespaceSplit")
_PRE_TOKENIZERS += ("Digits", "Punctuation", "Split", "Sequence")
_TEXTS_PER_CALL = 1024
_SHORT = 80  # characters of texts whose ids are kept
_SPACES = " ▁Ġ"  # how vocabularies write a space


class DocumentIds(list[int]):
    """Token ids of a document's text, which they were made of.

    Attributes:
        text: The text, as much of it as the ids stand for.
    """

    def __init__(self, ids: Iterable[int], text: str):
        """Takes both; they must belong together."""
        super().__init__(ids)
        self.text = text


class _Piece(NamedTuple):
    """A text cut at its first and its last safe border."""

    first: str
    ids: Sequence[int]  # of what stands between
    last: str


class TextJoiner:
    """Tokenises texts that are put together from literals and other texts.

    Args:
        tokenizer: Any; a private copy is kept. It never adds special tokens.
        control_ids: Tokens that texts must not produce, beside the special ones.

    Attributes:
        words: A few words that are in the vocabulary with a space before them.
    """

    def __init__(self, tokenizer: Tokenizer, control_ids: Iterable[int] = ()):
        """Hides the control tokens of the private copy."""
        spec = json.loads(tokenizer.to_str())
        names = _control_names(spec, set(control_ids))
        self._names = {name: f"<{_NONCE}{token_id}>" for name, token_id in names.items()}
        _rename(spec, self._names)
        self.tokenizer = Tokenizer.from_str(json.dumps(spec))
        vocab = spec["model"].get("vocab", ())  # of a Unigram: pairs of piece and score
        pieces = (piece if isinstance(piece, str) else piece[0] for piece in vocab)
        words = (piece[1:] for piece in pieces if piece[:1] in _SPACES and piece[1:].isalpha())
        self.words = tuple(itertools.islice(words, 8))
        self._safe = _splits_at_words(self.tokenizer, spec)
        self._short = functools.lru_cache(1 << 13)(self.encode)

    def literal(self, text: str) -> str:
        """Returns a text of the template in which control tokens are tokens."""
        if not self._names:
            return text
        longest_first = sorted(self._names, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, longest_first)), lambda m: self._names[m[0]], text)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a whole text."""
        return self.encoding(text).ids

    def encoding(self, text: str) -> Encoding:
        """Returns the ids of a whole text and the characters that each stands for."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_texts(self, texts: Iterable[str], length: int) -> Iterator[tuple[DocumentIds, bool]]:
        """Yields as much of each text as takes at most `length` tokens, and whether that is all."""
        iterator = iter(texts)
        while batch := list(itertools.islice(iterator, _TEXTS_PER_CALL)):
            encodings = self.tokenizer.encode_batch(batch, add_special_tokens=False)
            for text, encoding in zip(batch, encodings, strict=True):
                yield self.cut(text, length, encoding), len(encoding) <= length

    def cut(self, text: str, length: int, encoding: Encoding | None = None) -> DocumentIds:
        """Returns as much of a text as takes at most `length` tokens, between characters."""
        encoding = encoding or self.encoding(text)
        while len(encoding) > length:
            end = encoding.offsets[length - 1][1] if length else 0
            text = text[: min(end, len(text) - 1)]
            encoding = self.encoding(text)
        return DocumentIds(encoding.ids, text)

    def join(self, parts: Sequence[str | Sequence[int]]) -> list[int]:
        """Returns the ids of the text that the parts make together.

        Args:
            parts: Texts and `DocumentIds`. Ids without a text stay as they are, whatever stands
                beside them.
        """
        ids: list[int] = []
        pending, encode = "", self._start
        last = len(parts) - 1
        for place, part in enumerate(parts):
            text = part if isinstance(part, str) else getattr(part, "text", None)
            if text is None:
                ids += [*encode(pending), *map(int, part)] if pending else map(int, part)
                pending, encode = "", self.after
            elif (piece := self._piece(text, part, whole=place == last)) is None:
                pending += text
            else:
                ids += [*encode(pending + piece.first), *piece.ids]
                pending, encode = piece.last, self._inside
        return [*ids, *encode(pending)] if pending else ids

    def after(self, text: str, before: str = "") -> list[int]:
        """Returns the ids of a text that goes on where another one ends.

        Args:
            text: The text.
            before: What stands before it; where a token would stand for parts of both, or there
                is nothing, some other text does.
        """
        for other in filter(None, (before, *_BEFORE)):
            encoding = self.encoding(other + text)
            first = sum(1 for _, end in encoding.offsets if end <= len(other))
            if all(start >= len(other) for start, _ in encoding.offsets[first:]):
                return encoding.ids[first:]
        return self.encode(text)

    def is_border(self, text: str, place: int) -> bool:
        """Tells whether no token stands for characters on both sides of a place in a text."""
        return all(end <= place or start >= place for start, end in self.encoding(text).offsets)

    def _start(self, text: str) -> list[int]:
        """Returns the ids of a text; the first and last words of documents often come again."""
        return self._short(text) if len(text) <= _SHORT else self.encode(text)

    def _inside(self, text: str) -> list[int]:
        """Returns the ids of a text that begins at a safe border."""
        return self._start("a" + text)[len(self._short("a")) :]

    def _piece(self, text: str, part: str | Sequence[int], *, whole: bool) -> _Piece | None:
        """Cuts a text at safe borders, None where it has none; `whole`: nothing follows it."""
        if not (borders := self._borders(text)):
            return None
        first, last = text[: borders[0]], text[borders[1] :]
        if isinstance(part, str):
            if whole:
                return _Piece(first, self._inside(text[borders[0] :]), "")
            return _Piece(first, self._inside(text[borders[0] : borders[1]]), last)
        start, behind = len(self._start(first)), len(self._inside(last))
        return _Piece(first, part[start : len(part) - behind], last)

    def _borders(self, text: str) -> tuple[int, int] | None:
        """Returns the places of the first and the last safe border."""
        if (first := _SAFE.search(text)) is None or not self._safe:
            return None
        place, last = len(text), first
        while place > first.start():  # from the end, in strides
            place = max(place - 64, first.start())
            if found := list(_SAFE.finditer(text, place)):
                last = found[-1]
                break
        return first.start(), last.start()


def _control_names(spec: Mapping[str, Any], control_ids: set[int]) -> dict[str, int]:
    """Returns the control tokens of a tokenizer: the special ones, and those of the ids."""
    names = {
        token["content"]: token["id"]
        for token in spec["added_tokens"]
        if token["content"] and (token["special"] or token["id"] in control_ids)
    }
    return names


def _rename(spec: dict[str, Any], names: Mapping[str, str]) -> None:
    """Gives the control tokens of a tokenizer names that no text holds; their ids stay."""
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    vocab = model.get("vocab", {})
    if isinstance(vocab, list):  # Unigram: [piece, score] in the order of the ids
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocab.items()}
    if isinstance(unknown := model.get("unk_token"), str):
        model["unk_token"] = names.get(unknown, unknown)
    if model.get("merges"):
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]


def _splits_at_words(tokenizer: Tokenizer, spec: Mapping[str, Any]) -> bool:
    """Tells whether no token stands on both sides of a safe border, and neither side looks over it.

    That holds where words are cut there before the model sees them; or where nothing cuts words and
    no merge of a BPE goes across. (Unigram sums scores along a text, so what stands before may
    decide between segmentations of the same score.)
    """
    parts = [*_parts(spec["normalizer"], "normalizers", _NORMALIZERS)]
    parts += _parts(spec["pre_tokenizer"], "pretokenizers", _PRE_TOKENIZERS)
    replaced = [part for part in parts if part and part["type"] == "Replace"]
    added = [token["content"] for token in spec["added_tokens"]]
    if None in parts or not all(map(_only_spaces, replaced)) or spec["model"].get("dropout"):
        return False
    if " " in added or any(re.search(r"\S\s", content) for content in added):
        return False
    cut = [_is_cut(tokenizer, probe) for probe in _PROBES]
    if all(cut):
        return True
    return not any(cut) and spec["model"]["type"] == "BPE" and _no_merge_goes_across(spec["model"])


def _parts(spec: Any, key: str, known: Sequence[str]) -> Iterable[dict[str, Any] | None]:
    """Yields the parts of a normaliser or pre-tokenizer, None for one that is not known."""
    if spec is None:
        return
    if spec["type"] == "Sequence":
        for part in spec[key]:
            yield from _parts(part, key, known)
        return
    yield spec if spec["type"] in known else None


def _only_spaces(replace: Mapping[str, Any]) -> bool:
    pattern = replace["pattern"]
    return pattern.get("String", "").strip(" ") == "" and pattern.get("Regex", "") in ("", " {2,}")


def _is_cut(tokenizer: Tokenizer, probe: str) -> bool:
    """Tells whether the pre-tokenizer cuts a text of four words before its third."""
    place = probe.index(" ", 4)
    if (normalizer := tokenizer.normalizer) is not None:
        normal = normalizer.normalize_str(probe)
        place += len(normal) - len(probe)  # what is put before a text
        probe = normal
    if (pre_tokenizer := tokenizer.pre_tokenizer) is None:
        return False
    spans = [span for _, span in pre_tokenizer.pre_tokenize_str(probe)]
    return all(end <= place or start >= place for start, end in spans)


def _no_merge_goes_across(model: Mapping[str, Any]) -> bool:
    across = re.compile(f"[^{_SPACES}][{_SPACES}]")
    vocab = model["vocab"]
    return any(space in vocab for space in _SPACES) and not any(map(across.search, vocab))

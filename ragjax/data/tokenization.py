"""Text to token ids and fixed-shape arrays, over any `tokenizers.Tokenizer`.

B is the number of texts, L the padded length in tokens.
"""

import functools
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from tqdm import tqdm

from ragjax import storage
from ragjax.data.matching import refuse_string

DEFAULT_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
_TEXTS_PER_CALL = 1024
# Files of `CorpusTokens`.
_IDS, _OFFSETS, _CUT = "ids.bin", "offsets.npy", "num_truncated.npy"


class EncodedTexts(NamedTuple):
    """Token ids of several texts."""

    ids: list[list[int]]  # one list a text
    num_truncated: int  # texts that were longer than max_length


class PaddedIds(NamedTuple):
    """Token ids of several texts as one array."""

    ids: np.ndarray  # int32 [B, L]
    mask: np.ndarray  # bool [B, L], True = real token


def encode_texts(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    max_length: int | None,
    add_special_tokens: bool = True,
) -> EncodedTexts:
    """Encodes texts in batches, cutting on the right.

    A text that is cut keeps the special tokens at its end (BERT's [SEP]). The tokenizer is not
    changed; its own truncation and padding must be off.

    Args:
        tokenizer: Any tokenizer of the `tokenizers` package.
        texts: Any number of texts; they are taken about a thousand at a time.
        max_length: Tokens kept of each text, special tokens included; None keeps all.
        add_special_tokens: Whether the tokenizer adds those of its post-processor.

    Returns:
        The ids and the number of texts that were cut.

    Raises:
        ValueError: `max_length` leaves no room beside the special tokens, or the tokenizer
            truncates or pads by itself.
    """
    refuse_string(texts, "texts")
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        raise ValueError(
            "the tokenizer truncates or pads by itself; call its no_truncation() and no_padding()"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length}")
    ids: list[list[int]] = []
    num_truncated = 0
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, _TEXTS_PER_CALL)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=add_special_tokens):
            if max_length is not None and len(encoding) > max_length:
                num_truncated += 1
                ids.append(_cut(encoding, max_length))
            else:
                ids.append(encoding.ids)
    return EncodedTexts(ids, num_truncated)


class EncodedPairs(NamedTuple):
    """Token ids of (query, document) pairs and the types of the tokens."""

    ids: list[list[int]]
    types: list[list[int]]  # 1 for tokens of the second text, where the tokenizer says so


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> EncodedPairs:
    """Tokenises pairs of texts with the special tokens around and between them.

    Args:
        tokenizer: Truncates by itself, as that of `ragjax.models.CrossEncoder` does.
        pairs: Query and document.
    """
    encoded = tokenizer.encode_batch(list(pairs))
    return EncodedPairs([pair.ids for pair in encoded], [pair.type_ids for pair in encoded])


class CorpusTokens(Sequence[list[int]]):
    """Token ids of many texts: all tokenised at once, when one is first asked for.

    Takes 2 or 4 bytes a token and 8 a text, on disk where a folder is given.
    """

    def __init__(
        self,
        size: int,
        texts: Callable[[], Iterable[str]],
        tokenizer: Tokenizer,
        *,
        max_length: int | None,
        report: Callable[[str], None] = lambda note: None,
        folder: Path | None = None,
        identity: str = "",
    ) -> None:
        """Names the texts; none is read yet.

        Args:
            size: Number of texts.
            texts: Returns them in order.
            tokenizer: As in `encode_texts`.
            max_length: As in `encode_texts`.
            report: Told when more than 5 % of the texts are cut.
            folder: Keeps the ids for later calls, in a folder of their own; None: memory does.
            identity: Of the texts, such as the digest of a corpus and what is put before each.
        """
        self._size, self._texts, self._tokenizer = size, texts, tokenizer
        self._max_length, self._report = max_length, report
        self._folder, self._identity = folder, identity

    def __len__(self) -> int:
        """Returns the number of texts."""
        return self._size

    def __getitem__(self, row: Any) -> Any:
        """Returns the token ids of one text, or of the texts of a slice."""
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        ids, offsets = self._table
        row = range(self._size)[row]
        return ids[offsets[row] : offsets[row + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [size]."""
        return np.diff(self._table[1])

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, and where each begins and the last ends, int64."""
        if self._folder is None:
            buffer = io.BytesIO()
            offsets, cut = self._tokenise(buffer)
            ids = np.frombuffer(buffer.getbuffer(), self._dtype)
        else:
            folder = storage.kept_folder(
                self._folder / f"tokens-{self._digest()}", self._write, what="tokens", version=1
            )
            offsets, cut = np.load(folder / _OFFSETS, mmap_mode="r"), np.load(folder / _CUT)
            # An empty file cannot be mapped.
            ids = np.memmap(folder / _IDS, self._dtype, "r") if offsets[-1] else np.empty(0, int)
        note = truncation_note(
            int(cut), self._size, max_length=self._max_length or 0, what="documents"
        )
        if note:
            self._report(note)
        return ids, offsets

    def _write(self, folder: Path) -> None:
        with storage.whole_file(folder / _IDS) as file:
            offsets, cut = self._tokenise(file)
        storage.write_array(folder / _OFFSETS, offsets)
        storage.write_array(folder / _CUT, np.array(cut))

    @functools.cached_property
    def _dtype(self) -> np.dtype:
        """Of the ids, as narrow as the vocabulary allows."""
        last = max(self._tokenizer.get_vocab().values(), default=0)
        return np.dtype(np.int32 if last >= 1 << 16 else np.uint16)

    def _tokenise(self, file: IO[bytes]) -> tuple[np.ndarray, int]:
        """Writes the ids of all texts; returns where each begins, and how many were cut."""
        offsets = np.zeros(self._size + 1, np.int64)
        texts, num_truncated, done = iter(self._texts()), 0, 0
        # Shown from the fifth second on.
        with tqdm(total=self._size, desc="tokenising", unit=" texts", delay=5) as bar:
            while batch := list(itertools.islice(texts, _TEXTS_PER_CALL)):
                encoded = encode_texts(self._tokenizer, batch, max_length=self._max_length)
                num_truncated += encoded.num_truncated
                lengths = [len(tokens) for tokens in encoded.ids]
                ids = itertools.chain.from_iterable(encoded.ids)
                file.write(np.fromiter(ids, self._dtype, sum(lengths)).tobytes())
                offsets[done + 1 : done + len(batch) + 1] = lengths
                done += len(batch)
                bar.update(len(batch))
        return np.cumsum(offsets), num_truncated

    def _digest(self) -> str:
        """Names what the ids depend on."""
        parts = [self._identity, self._size, self._max_length, self._tokenizer.to_str()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def pad_right(ids: Sequence[Sequence[int]], *, length: int, pad_id: int) -> PaddedIds:
    """Pads token lists at their end.

    Args:
        ids: B lists of at most `length` ids.
        length: L.
        pad_id: Fills the masked positions.

    Raises:
        ValueError: A list is longer than `length`; nothing is cut silently.
    """
    padded, mask = _blank(ids, length, pad_id)
    for row, tokens in enumerate(ids):
        padded[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return PaddedIds(padded, mask)


def pad_left(ids: Sequence[Sequence[int]], *, length: int, pad_id: int) -> PaddedIds:
    """Pads token lists at their start, so that all end in the same column; see `pad_right`."""
    padded, mask = _blank(ids, length, pad_id)
    for row, tokens in enumerate(ids):
        padded[row, length - len(tokens) :] = tokens
        mask[row, length - len(tokens) :] = True
    return PaddedIds(padded, mask)


def truncation_note(num_truncated: int, num_texts: int, *, max_length: int, what: str) -> str:
    """Returns a sentence when more than 5 % of the texts were cut, else ""."""
    if num_truncated <= 0.05 * num_texts:
        return ""
    return (
        f"{num_truncated} of {num_texts} {what} ({num_truncated / num_texts:.0%}) are longer than "
        f"{max_length} tokens and were cut"
    )


def _cut(encoding: Encoding, max_length: int) -> list[int]:
    special = encoding.special_tokens_mask
    num_last = sum(1 for _ in itertools.takewhile(bool, reversed(special)))
    num_first = sum(1 for _ in itertools.takewhile(bool, special))
    if num_first + num_last >= max_length:
        raise ValueError(
            f"max_length = {max_length} leaves no room beside {num_first + num_last} special tokens"
        )
    return encoding.ids[: max_length - num_last] + encoding.ids[len(special) - num_last :]


def _blank(ids: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, ids), default=0)
    if longest > length:
        raise ValueError(f"{longest} tokens do not fit into a length of {length}")
    return np.full((len(ids), length), pad_id, np.int32), np.zeros((len(ids), length), bool)

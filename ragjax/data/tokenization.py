"""Text to token ids and fixed-shape arrays, over any `tokenizers.Tokenizer`.

B is the number of texts, L the padded length in tokens.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

DEFAULT_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
_TEXTS_PER_CALL = 1024


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

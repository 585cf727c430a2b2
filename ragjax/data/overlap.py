"""Texts that stand twice: copied passages, questions that are passages, both sides of a split."""

import hashlib
import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ragjax.data.corpus import Corpus
from ragjax.data.matching import fold
from ragjax.data.prompts import passage_text
from ragjax.storage import kept_folder, write_array

Key = TypeVar("Key", bound=Hashable)
NEAR = 0.8  # of the runs of characters of two texts that both have; 1: all
_RUN = 12  # characters, white space aside
# Files of the first 8 bytes of digests.
_WHOLES, _TEXTS = "wholes.npy", "texts.npy"
_SKETCH = 64  # runs compared of a text; exact for shorter texts


class NearCopy(NamedTuple):
    """A passage and one that is almost the same."""

    row: int
    other: int


class Twins(NamedTuple):
    """Texts that stand more than once."""

    copies: Mapping[int, frozenset[int]]  # row to all rows of its title and text, where several
    own: Mapping[str, frozenset[int]]  # question id to the passages that are the question itself


def find_twins(corpus: Corpus, questions: Iterable[tuple[str, str]]) -> Twins:
    """Finds passages with the same title and text, and questions that are passages.

    A passage is a question itself if its text, with or without the title, is the question's, or if
    it has its id. Case, Unicode form and white space do not matter.

    Args:
        corpus: The passages, read once; later calls compare what is kept of them in its cache.
        questions: (id, text) of each.
    """
    asked: dict[bytes, list[str]] = defaultdict(list)
    own: dict[str, set[int]] = defaultdict(set)
    for id, text in questions:
        asked[_digest(text)].append(id)
        if id in corpus:
            own[id].add(corpus.row_of(id))
    name = f"digests-{corpus.fingerprint[:16]}"
    kept = kept_folder(
        corpus.cache / name, lambda folder: _write_heads(corpus, folder), what="digests", version=1
    )
    wholes, texts = (np.load(kept / name, mmap_mode="r") for name in (_WHOLES, _TEXTS))
    sought = np.array([_head(digest) for digest in asked], np.uint64)
    for row in np.flatnonzero(np.isin(wholes, sought) | np.isin(texts, sought)).tolist():
        for digest in {_digest(passage_text(corpus[row])), _digest(corpus[row].text)}:
            for id in asked.get(digest, ()):
                own[id].add(row)
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row in _repeated(wholes):
        groups[_digest(passage_text(corpus[row]))].append(row)
    repeated = [frozenset(group) for group in groups.values() if len(group) > 1]
    copies = {row: group for group in repeated for row in sorted(group)}
    return Twins(copies, {id: frozenset(rows) for id, rows in own.items()})


def _write_heads(corpus: Corpus, folder: Path) -> None:
    """Writes the heads of the digests of all passages, with their title and without, `[N]` each."""
    heads = np.empty((2, len(corpus)), np.uint64)
    for row, passage in enumerate(tqdm(corpus, desc="comparing passages", delay=5)):
        heads[:, row] = _head(_digest(passage_text(passage))), _head(_digest(passage.text))
    for name, array in zip((_WHOLES, _TEXTS), heads, strict=True):
        write_array(folder / name, array)


def _head(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


def _repeated(values: NDArray[np.uint64]) -> list[int]:
    """Returns the places of values that stand more than once, ascending."""
    order = np.argsort(values, kind="stable")
    same = values[order[1:]] == values[order[:-1]]
    return np.sort(order[np.append(same, False) | np.append(False, same)]).tolist()


def near_copies(corpus: Corpus, rows: Iterable[int], others: Iterable[int]) -> list[NearCopy]:
    """Finds the passages that are almost the same as one of the others, the same row aside.

    The likeness is the share of their runs of twelve characters that two texts have in common
    (Jaccard), case, Unicode form and white space aside, estimated on the runs of lowest hash.

    Args:
        corpus: The passages.
        rows: Rows looked at.
        others: Rows that they are compared with.

    Returns:
        Each row of likeness `NEAR` or more with the most similar other, in the order of the rows.

    References:
        Broder, "On the Resemblance and Containment of Documents", 1997.
    """

    def texts(rows: Iterable[int]) -> Iterator[tuple[int, str]]:
        return ((row, passage_text(corpus[row])) for row in sorted(set(rows)))

    pairs = near_texts(texts(rows), texts(others))
    return [NearCopy(row, other) for row, other in pairs]


def near_texts(
    texts: Iterable[tuple[Key, str]], others: Iterable[tuple[Key, str]]
) -> list[tuple[Key, Key]]:
    """Finds the texts that are almost the same as one of the others, as `near_copies` does.

    Args:
        texts: (key, text) of each.
        others: Likewise; the same key is no copy.

    Returns:
        The key of each that is, with that of the most similar other.
    """
    sketches = {key: _sketch(text) for key, text in others}
    places = {key: place for place, key in enumerate(sketches)}
    holders: Mapping[int, list[Key]] = defaultdict(list)
    for key, sketch in sketches.items():
        for run in sketch:
            holders[run].append(key)
    found = []
    for key, text in texts:
        sketch = _sketch(text)
        shared = Counter(other for run in sketch if run in holders for other in holders[run])
        likeness = {
            other: _likeness(sketch, sketches[other])
            for other, count in shared.items()
            if other != key and 2 * count >= len(sketch)
        }
        best = max(likeness, key=lambda other: (likeness[other], -places[other]), default=None)
        if best is not None and likeness[best] >= NEAR:
            found.append((key, best))
    return found


def _digest(text: str) -> bytes:
    plain = " ".join(fold(text).split())
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _sketch(text: str) -> frozenset[int]:
    text = "".join(fold(text).split())
    runs = {text[start : start + _RUN] for start in range(max(1, len(text) - _RUN + 1))}
    hashes = sorted({zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs})
    return frozenset(hashes[:_SKETCH])


def _likeness(one: frozenset[int], other: frozenset[int]) -> float:
    """Returns the share of the lowest hashes of both that both have."""
    lowest = sorted(one | other)[:_SKETCH]
    return sum(run in one and run in other for run in lowest) / len(lowest)

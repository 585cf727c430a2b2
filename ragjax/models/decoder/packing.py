"""Packs several (question, answer) pairs behind one shared document, so that it is read once.

A row is `document, suffix, suffix, ..., padding`, or several such groups before the padding. Each
suffix attends to its document and to itself and starts at the position after the document, so it is
scored as if it stood there alone.
Shapes: R rows, L slots, P scored tokens per row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import Array

GROUP = 1024
"""Numbers of segments for a document and its suffixes; the next document's are above them."""


class PackedBatch(NamedTuple):
    """Rows of documents and their suffixes."""

    ids: Array  # [R, L] int32
    # [R, L] int32: 0 padding, 1 document, 2.. its suffixes; of the next document GROUP more each
    segments: Array
    positions: Array  # [R, L] int32, rotary position of each slot
    predictors: Array  # [R, P] int32, slot whose output predicts the target
    target_ids: Array  # [R, P] int32
    target_mask: Array  # [R, P] bool, True = token counts


class Suffix(NamedTuple):
    """What follows the document: tokens that are read, then tokens that are scored."""

    context_ids: Sequence[int]
    target_ids: Sequence[int]


def pack_row(
    document_ids: Sequence[int],
    suffixes: Sequence[Suffix],
    *,
    length: int,
    num_targets: int,
    pad_id: int,
) -> PackedBatch:
    """Lays out one row of one document; stack the fields of several for a batch.

    The scored tokens of all suffixes follow each other on the P axis in the order of the suffixes.

    Args:
        document_ids: Tokens of the shared document; may be empty if every suffix has a context.
        suffixes: What follows it.
        length: Slots L of the row.
        num_targets: Scored tokens P of the row, at least those there are.
        pad_id: Token of the unused slots.

    Returns:
        One row, fields `[L]` and `[P]`.

    Raises:
        ValueError: The row is too short, or a target has nothing before it.
    """
    return pack_groups(
        [(document_ids, suffixes)], length=length, num_targets=num_targets, pad_id=pad_id
    )


def pack_groups(
    groups: Sequence[tuple[Sequence[int], Sequence[Suffix]]],
    *,
    length: int,
    num_targets: int,
    pad_id: int,
) -> PackedBatch:
    """Lays out one row of several documents, each with its suffixes, one after the other.

    Args:
        groups: Documents as of `pack_row`, and what follows each.
        length: Slots L of the row.
        num_targets: Scored tokens P of the row, at least those there are.
        pad_id: Token of the unused slots.

    Returns:
        One row, fields `[L]` and `[P]`.

    Raises:
        ValueError: The row is too short, a target has nothing before it, or a document has too many
            suffixes.
    """
    pairs = [suffix for _, suffixes in groups for suffix in suffixes]
    used = sum(len(document) for document, _ in groups) + sum(len(c) + len(t) for c, t in pairs)
    targets = sum(len(suffix.target_ids) for suffix in pairs)
    if used > length or targets > num_targets:
        raise ValueError(
            f"the row needs {used} slots and {targets} scored tokens; it has room for {length} and "
            f"{num_targets}"
        )
    ids = np.full(length, pad_id, np.int32)
    segments, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    predictors, target_ids = np.zeros(num_targets, np.int32), np.zeros(num_targets, np.int32)
    start = scored = 0
    for place, (document, suffixes) in enumerate(groups):
        if len(suffixes) > GROUP - 2:
            raise ValueError(f"a document has {len(suffixes)} suffixes, at most {GROUP - 2} fit")
        slots = slice(start, start + len(document))
        ids[slots], segments[slots] = document, GROUP * place + 1
        positions[slots] = np.arange(len(document))
        start = slots.stop
        behind = start - 1  # the last slot of the document
        for number, (context, target) in enumerate(suffixes):
            if not document and not context:
                raise ValueError(f"suffix {number} has a target but no token before it")
            tokens = [*context, *target]
            slots = slice(start, start + len(tokens))
            ids[slots], segments[slots] = tokens, GROUP * place + number + 2
            positions[slots] = len(document) + np.arange(len(tokens))
            before = start + len(context) - 1 + np.arange(len(target))
            if not context and target:
                # Nothing stands between the document and the target: the document predicts it.
                before[0] = behind
            predictors[scored : scored + len(target)] = before
            target_ids[scored : scored + len(target)] = target
            start, scored = slots.stop, scored + len(target)
    mask = np.arange(num_targets) < targets
    fields = (ids, segments, positions, predictors, target_ids, mask)
    return PackedBatch(*fields)  # pyrefly: ignore[bad-argument-type]  (jax takes numpy arrays)

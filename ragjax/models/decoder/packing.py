"""Packs several (question, answer) pairs behind one shared document, so that it is read once.

A row is `document, suffix, suffix, ..., padding`. Each suffix attends to the document and to itself
and starts at the position after the document, so it is scored as if it stood there alone.
Shapes: R rows, L slots, P scored tokens per row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import Array


class PackedBatch(NamedTuple):
    """Rows of one document and several suffixes."""

    ids: Array  # [R, L] int32
    segments: Array  # [R, L] int32: 0 padding, 1 document, 2.. the suffixes
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
    """Lays out one row; stack the fields of several for a batch.

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
    used = len(document_ids) + sum(len(part) + len(target) for part, target in suffixes)
    targets = sum(len(suffix.target_ids) for suffix in suffixes)
    if used > length or targets > num_targets:
        raise ValueError(
            f"the row needs {used} slots and {targets} scored tokens; it has room for {length} and "
            f"{num_targets}"
        )
    ids = np.full(length, pad_id, np.int32)
    segments, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    predictors, target_ids = np.zeros(num_targets, np.int32), np.zeros(num_targets, np.int32)
    start, scored = len(document_ids), 0
    ids[:start], segments[:start], positions[:start] = document_ids, 1, np.arange(start)
    for number, (context, target) in enumerate(suffixes):
        if not document_ids and not context:
            raise ValueError(f"suffix {number} has a target but no token before it")
        tokens = [*context, *target]
        slots = slice(start, start + len(tokens))
        ids[slots], segments[slots] = tokens, number + 2
        positions[slots] = len(document_ids) + np.arange(len(tokens))
        before = start + len(context) - 1 + np.arange(len(target))
        if not context and target:
            # Nothing stands between the document and the target: the document predicts it.
            before[0] = len(document_ids) - 1
        predictors[scored : scored + len(target)] = before
        target_ids[scored : scored + len(target)] = target
        start, scored = slots.stop, scored + len(target)
    mask = np.arange(num_targets) < targets
    fields = (ids, segments, positions, predictors, target_ids, mask)
    return PackedBatch(*fields)  # pyrefly: ignore[bad-argument-type]  (jax takes numpy arrays)

"""Batches of few static shapes in which a language model scores parts of texts.

Rows that share a document are packed behind it, so it is read once, where the language model's
family can do that (a causal decoder); elsewhere each row is read alone.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ragjax.data import LengthBatch, PromptBuilder, buckets_up_to, fill_rows, length_buckets
from ragjax.models.decoder.packing import PackedBatch, Suffix, pack_groups
from ragjax.models.inputs import LMBatch
from ragjax.models.language_model import LanguageModel
from ragjax.storage.processes import host
from ragjax.training.mesh import rows_multiple, spread_rows

# Lengths in tokens that prompts are padded to: a document of the default 140 and a question fall
# into a few of them.
_CONTEXT_BUCKETS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 768, 1024, 1536, 2048)
# Slots of several questions behind their document, at most; and of a row, which holds several such
# groups.
_PACKED_SLOTS, _ROW_SLOTS = 384, 512
_SCORED_MULTIPLE = 32
# Lengths of targets that are read alone are padded to a multiple of this.
_TARGET_MULTIPLE = 16


class Part(NamedTuple):
    """Tokens of a target that are summed."""

    key: str  # of their sum
    start: int
    end: int


class Row(NamedTuple):
    """A context behind a document, and a target of which some parts are scored."""

    doc: int  # rows of one document are packed behind it
    context: list[int]
    target: list[int]
    parts: tuple[Part, ...]

    @property
    def keys(self) -> list[str]:
        """Keys of the parts."""
        return [part.key for part in self.parts]


class RowBatch(NamedTuple):
    """Rows that are read together."""

    groups: list[list[Row]]  # by row of the batch
    tokens: PackedBatch | LMBatch

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for group in self.groups for row in group]


def row_batches(
    lm: LanguageModel, prompts: PromptBuilder, rows: Sequence[Row], batch_tokens: int
) -> Iterator[RowBatch]:
    """Yields batches of about so many tokens that hold every row once."""
    if lm.family.packed_token_log_probs:
        yield from _packed_batches(prompts, rows, batch_tokens, rows_multiple(lm.params))
        return
    contexts = [row.context for row in rows]
    devices = rows_multiple(lm.params)
    for batch in context_batches(prompts, list(map(len, contexts)), batch_tokens, devices):
        chosen = [rows[place] for place in batch.rows]
        longest = max(len(row.target) for row in chosen)
        length = max(prompts.max_target_length, -(-longest // _TARGET_MULTIPLE) * _TARGET_MULTIPLE)
        packed = pack_batch(
            prompts, batch, contexts, [row.target for row in chosen], target_length=length
        )
        yield RowBatch([[row] for row in chosen], packed)


def scored_batches(
    lm: LanguageModel, params: Any, batches: Iterable[RowBatch]
) -> Iterator[tuple[RowBatch, dict[str, tuple[float, int]]]]:
    """Yields each batch with the log-probability in nats of each part, and its tokens.

    The device computes a batch while the next one is packed.
    """
    function = lm.family.packed_token_log_probs or lm.family.token_log_probs
    computing: list[tuple[RowBatch, jax.Array]] = []
    for batch in batches:
        log_probs = _score(function, lm.config, params, spread_rows(batch.tokens, params))
        computing.append((batch, log_probs))
        if len(computing) > 1:
            yield _fetched(*computing.pop(0))
    for given in computing:
        yield _fetched(*given)


def _fetched(
    batch: RowBatch, log_probs: jax.Array
) -> tuple[RowBatch, dict[str, tuple[float, int]]]:
    scores = {}
    for group, row in zip(batch.groups, host(log_probs), strict=False):
        first = 0
        for target, parts in ((one.target, one.parts) for one in group):
            for key, start, end in parts:
                scores[key] = float(row[first + start : first + end].sum()), end - start
            first += len(target)
    return batch, scores


def context_batches(
    prompts: PromptBuilder, lengths: Sequence[int], batch_tokens: int, devices: int = 1
) -> list[LengthBatch]:
    """Groups prompts of similar length into batches of few static shapes; see `length_buckets`."""
    # A packed row holds targets too, and so may be longer than any context.
    longest = max([prompts.max_context_length, *lengths])
    buckets = buckets_up_to(longest, _CONTEXT_BUCKETS)
    return length_buckets(lengths, batch_tokens=batch_tokens, buckets=buckets, devices=devices)


def pack_batch(
    prompts: PromptBuilder,
    batch: LengthBatch,
    contexts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    target_length: int | None = None,
) -> LMBatch:
    """Returns the rows of a batch in its static shape; padding rows are masked.

    Args:
        prompts: Pads the rows.
        batch: Which rows of `contexts`, and the shape.
        contexts: All contexts.
        targets: Targets of the batch's rows only.
        target_length: T; None: that of the longest answer.
    """
    filler: list[list[int]] = [[]] * (batch.batch_size - len(batch.rows))
    packed = prompts.pack(
        [contexts[row] for row in batch.rows] + filler,
        [*targets, *filler],
        context_length=batch.length,
        target_length=target_length,
    )
    return LMBatch(*packed)  # pyrefly: ignore[bad-argument-type]  (jax takes numpy arrays)


def _packed_batches(
    prompts: PromptBuilder, rows: Sequence[Row], batch_tokens: int, devices: int
) -> Iterator[RowBatch]:
    """Yields batches of one shape, whose rows are documents, each with what follows it."""
    groups = _groups(rows)
    sizes = list(map(_packed_length, groups))
    if not groups:
        return
    total = sum(sizes)
    needed = max(*sizes, min(_ROW_SLOTS, total))
    multiple = -(-needed // _ROW_SLOTS) * _ROW_SLOTS
    length = next((size for size in _CONTEXT_BUCKETS if size >= needed), multiple)
    # Few rows, such as those of a training step, in one of few shapes.
    full = max(1, batch_tokens // length) * devices
    count = min(full, 1 << max(0, -(-total // length) - 1).bit_length())
    count = -(-count // devices) * devices
    # The largest first: what is small fills the gaps.
    order = sorted(range(len(groups)), key=lambda place: -sizes[place])
    planned = fill_rows(order, sizes, rows=count, length=length, window=len(order))
    by_row = [[[row for p in places for row in groups[p]] for places in batch] for batch in planned]
    scored = max(sum(len(row.target) for row in one) for batch in by_row for one in batch)
    scored = -(-scored // _SCORED_MULTIPLE) * _SCORED_MULTIPLE
    for batch, chosen in zip(planned, by_row, strict=True):
        packed = [
            pack_groups(
                [_shared_and_rest(groups[place]) for place in places],
                length=length, num_targets=scored, pad_id=prompts.pad_id,
            )
            for places in batch
        ]  # fmt: skip
        yield RowBatch(chosen, jax.tree.map(lambda *parts: np.stack(parts), *packed))


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Splits the rows of each document into groups of at most `_PACKED_SLOTS` tokens."""
    by_doc: dict[int, list[Row]] = {}
    for row in rows:
        by_doc.setdefault(row.doc, []).append(row)
    groups: list[list[Row]] = []
    for same_doc in by_doc.values():
        groups.append([])
        for row in same_doc:
            if groups[-1] and _packed_length([*groups[-1], row]) > _PACKED_SLOTS:
                groups.append([])
            groups[-1].append(row)
    return groups


def _shared_and_rest(group: Sequence[Row]) -> tuple[list[int], list[Suffix]]:
    shared = _shared(group)
    return group[0].context[:shared], [Suffix(row.context[shared:], row.target) for row in group]


def _packed_length(group: Sequence[Row]) -> int:
    shared = _shared(group)
    return shared + sum(len(row.context) - shared + len(row.target) for row in group)


def _shared(group: Sequence[Row]) -> int:
    """Returns how many first tokens all contexts of a group share."""
    columns = zip(*(row.context for row in group), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    token_log_probs: Callable[..., jax.Array], config: Any, params: Any, batch: Any
) -> jax.Array:
    return token_log_probs(config, params, batch)

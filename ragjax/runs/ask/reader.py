"""The language model at a prompt: few fixed shapes, compiled once, each document read once.

Shapes: K documents, L prompt slots, C cache slots, T answer tokens, W windows, V vocabulary.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ragjax.data import pad_left, pad_right
from ragjax.generation import Decoder, Limits
from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Prefilled
from ragjax.generation.streaming import prefill
from ragjax.models.decoder.cache import KVCache
from ragjax.models.inputs import LMBatch
from ragjax.runs.ask.prompts import Prompt, Prompts, ReaderOptions, fitting
from ragjax.runs.compare.answers import stop_ids
from ragjax.runs.system import System


class Reading(NamedTuple):
    """Prompts that were read."""

    prefilled: Prefilled  # K rows
    width: int  # L: the prompts end at this slot


class Reader(Prompts):
    """Reads, scores and leaves out, each document once.

    Attributes:
        limits: Where an answer ends.
    """

    def __init__(self, system: System, options: ReaderOptions) -> None:
        """Finds the shapes that questions of this corpus need; see `Prompts`."""
        super().__init__(system, options)
        self.limits = Limits(
            max_new_tokens=self.max_target,
            stop_ids=stop_ids(system.workspace.lm),
            # An un-adapted model often begins its answer on a new line; that is no empty answer.
            min_new_tokens=1,
        )

    def read(self, prompt: Prompt) -> Reading:
        """Reads a question beside each of its documents, or closed book if it has none."""
        contexts = prompt.contexts or [prompt.closed_book]
        length = self.fitting_length(contexts)
        return self.read_contexts(contexts, rows=self.rows, length=length, slots=self.cache_length)

    def read_contexts(
        self, contexts: Sequence[Sequence[int]], *, rows: int, length: int, slots: int
    ) -> Reading:
        """Reads contexts in rows of one length; rows to spare are masked."""
        filler: list[Sequence[int]] = [[]] * (rows - len(contexts))
        padded = pad_left([*contexts, *filler], length=length, pad_id=self.prompts.pad_id)
        lm = self.system.workspace.lm
        ids, mask = jnp.asarray(padded.ids), jnp.asarray(padded.mask)
        params = self.system.lm_params
        return Reading(prefill(lm.decoder, params, ids, mask, cache_length=slots), length)

    def score(self, reading: Reading, target_ids: Sequence[int]) -> np.ndarray:
        """Scores one answer after every prompt that was read: `[K, T]` nats, 0 where padded."""
        rows = reading.prefilled.logits.shape[0]
        padded = pad_right([target_ids] * rows, length=self.max_target, pad_id=self.prompts.pad_id)
        lm = self.system.workspace.lm
        scores = _score(
            lm.decoder,
            self.system.lm_params,
            reading.prefilled,
            jnp.asarray(padded.ids),
            jnp.asarray(padded.mask),
        )
        return np.asarray(scores)

    def score_closed_book(self, prompt: Prompt, target_ids: Sequence[int]) -> np.ndarray:
        """Scores an answer without documents: `[1, T]` nats, 0 where padded."""
        length = fitting(self.closed_lengths, len(prompt.closed_book))
        # In one pass: so few tokens take as long as the weights take to come from memory.
        packed = self.prompts.pack(
            [prompt.closed_book],
            [target_ids],
            context_length=length,
            target_length=self.max_target,
        )
        lm = self.system.workspace.lm
        batch = LMBatch(*map(jnp.asarray, packed))
        scores = _score_alone(lm.family.token_log_probs, lm.config, self.system.lm_params, batch)
        return np.asarray(scores)

    def leave_out(
        self,
        prompt: Prompt,
        reading: Reading,
        row: int,
        left_out: Sequence[Iterable[int]],
        target_ids: Sequence[int],
    ) -> np.ndarray:
        """Scores an answer with parts of one document left out, all in one forward pass.

        A causal decoder does not read the document again: what follows it, question and answer, is
        read with the keys of the part masked. (What comes later in the document has seen the part.)
        Another model reads the whole prompt again with the part masked.

        Args:
            prompt: The prompt.
            reading: Of `read` of this prompt; an answer may have been appended.
            row: Which of its documents.
            left_out: For each of at most `options.windows` variants, places of tokens in the
                document.
            target_ids: The answer.

        Returns:
            Log-probs of the answer in nats: the first with everything in place, then one for each
            variant.
        """
        context = prompt.contexts[row]
        start, size = prompt.places[row]
        shift = reading.width - len(context)  # prompts are padded on the left
        keep = np.zeros((self.options.windows + 1, reading.width), bool)
        keep[:, shift:] = True
        for variant, places in enumerate(left_out, start=1):
            taken = [shift + start + place for place in places if place < size]
            keep[variant, taken] = False
        if isinstance(reading.prefilled.cache, KVCache):
            end = start + size
            log_probs = self._without_keys(
                reading, row, keep, shift + end, context[end:], target_ids
            )
        else:
            log_probs = self._without_tokens(context, keep, target_ids)
        return log_probs[: len(left_out) + 1]

    def _without_keys(
        self,
        reading: Reading,
        row: int,
        keep: np.ndarray,
        end: int,
        suffix: Sequence[int],
        target_ids: Sequence[int],
    ) -> np.ndarray:
        tokens = [*suffix, *target_ids]
        length = fitting(self.suffix_lengths, len(tokens))
        padded = pad_right([tokens], length=length, pad_id=self.prompts.pad_id)
        visible = np.zeros((len(keep), self.cache_length), bool)
        visible[:, :end] = keep[:, :end]
        scores = _score_without_keys(
            self.system.workspace.lm.decoder,
            self.system.lm_params,
            reading.prefilled,
            jnp.asarray(row),
            jnp.asarray(visible),
            # Positions stay, so that what is left stands where it stood.
            jnp.asarray(keep[0, :end].sum(), jnp.int32),
            jnp.asarray(padded.ids),
            jnp.asarray(padded.mask),
        )
        return np.asarray(scores)[:, len(suffix) : len(tokens)].sum(axis=1)

    def _without_tokens(
        self, context: Sequence[int], keep: np.ndarray, target_ids: Sequence[int]
    ) -> np.ndarray:
        width = keep.shape[1]
        padded = pad_left([context], length=width, pad_id=self.prompts.pad_id)
        decoder, params = self.system.workspace.lm.decoder, self.system.lm_params
        ids, mask = jnp.asarray(np.repeat(padded.ids, len(keep), axis=0)), jnp.asarray(keep)
        slots = width + self.max_target
        prefilled = prefill(decoder, params, ids, mask, cache_length=slots)
        return self.score(Reading(prefilled, width), target_ids).sum(axis=1)


@functools.partial(jit_decoding, static_argnames="decoder")
def _score(
    decoder: Decoder, params: Any, prefilled: Any, target_ids: Array, target_mask: Array
) -> Array:
    return decoder.score(params, prefilled, target_ids, target_mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_alone(token_log_probs: Any, config: Any, params: Any, batch: LMBatch) -> Array:
    return token_log_probs(config, params, batch)


@functools.partial(jit_decoding, static_argnames="decoder")
def _score_without_keys(
    decoder: Decoder,
    params: Any,
    prefilled: Any,
    row: Array,
    visible: Array,
    position: Array,
    ids: Array,
    mask: Array,
) -> Array:
    """Scores tokens after one row's cache, of which each variant `[W + 1, C]` sees its own part."""
    variants = visible.shape[0]

    def repeat(leaf: Array) -> Array:  # [N, R, H, ...]
        chosen = jnp.take(leaf, row[None], axis=1)
        return jnp.broadcast_to(chosen, (leaf.shape[0], variants, *leaf.shape[2:]))

    cache = prefilled.cache._replace(
        keys_values=jax.tree.map(repeat, prefilled.cache.keys_values),
        mask=visible,
        positions=jnp.broadcast_to(position, (variants,)),
    )
    logits = jnp.take(prefilled.logits, row[None], axis=0)
    logits = jnp.broadcast_to(logits, (variants, logits.shape[1]))
    tokens, kept = (jnp.broadcast_to(part, (variants, part.shape[1])) for part in (ids, mask))
    return decoder.score(params, prefilled._replace(logits=logits, cache=cache), tokens, kept)

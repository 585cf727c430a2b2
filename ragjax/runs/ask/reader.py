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

from ragjax.data import PaddedIds, pad_left, pad_right
from ragjax.generation import Decoder
from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Prefilled
from ragjax.generation.streaming import prefill
from ragjax.models.decoder.cache import KVCache
from ragjax.models.inputs import LMBatch
from ragjax.models.seq2seq.fusion import FusionDecoder, fusion_decoder
from ragjax.runs.ask.prompts import Prompt, ReaderOptions, ShapedPrompts, fitting
from ragjax.runs.compare.answers import answer_limits
from ragjax.runs.system import System


class Reading(NamedTuple):
    """Prompts that were read."""

    prefilled: Prefilled  # K rows; one where they are fused
    width: int  # L: the prompts end at this slot
    fused: bool = False  # the decoder attends to all prompts at once


class Joint(NamedTuple):
    """Log-probs of an answer's tokens under documents that are read at once, in nats."""

    whole: np.ndarray  # [T] log p_LM(y_t | all documents, x, y_<t)
    without: np.ndarray  # [K, T] the same without each of them
    alone: np.ndarray  # [K, T] with that one alone: log p_LM(y_t | c∘x, y_<t)


class Reader:
    """Reads prompts, scores answers and masks parts of documents, each document read once.

    Attributes:
        prompts: Makes the prompts.
        lm: The language model.
        params: Its parameters, adapted or not.
        limits: Where an answer ends.
    """

    def __init__(self, system: System, options: ReaderOptions) -> None:
        """Computes the shapes that questions of this corpus need; see `ShapedPrompts`."""
        self.lm, self.params = system.workspace.lm, system.lm_params
        self.prompts = ShapedPrompts(self.lm, system.workspace.dataset.corpus, options)
        self.limits = answer_limits(self.lm, self.prompts.max_target)
        self._num_null = int(system.workspace.config.fuses_null)

    def read(self, prompt: Prompt) -> Reading:
        """Reads a question beside each of its documents, or closed book if it has none."""
        prompts, contexts = self.prompts, prompt.contexts or [prompt.closed_book]
        length = prompts.fitting_length(contexts)
        padding: list[Sequence[int]] = [[]] * (prompts.rows - len(contexts))
        return self._read([*contexts, *padding], length, prompts.cache_length)

    def read_joined(self, prompt: Prompt) -> Reading:
        """Reads the context with all documents, in one row."""
        lengths = self.prompts.concat_lengths
        length = fitting(lengths, len(prompt.joined))
        return self._read([prompt.joined], length, lengths[-1] + self.prompts.max_target)

    def read_fused(self, prompt: Prompt) -> Reading:
        """Reads a question beside each of its documents, for a decoder that attends to them all."""
        return self._read_fused(
            self._fused_contexts(prompt), self.prompts.fitting_length(prompt.contexts)
        )

    def score_jointly(self, reading: Reading, target_ids: Sequence[int]) -> Joint:
        """Scores one answer given all documents of `read_fused`, without each, and with it alone.

        The documents are encoded apart, so none is read again: leaving one out is exact.
        """
        each = np.eye(self.prompts.rows, dtype=bool)
        keep = np.concatenate([np.ones((1, len(each)), bool), ~each, each])
        # The null document is there whichever are left out, and no document stands beside it.
        null = np.arange(len(keep))[:, None] <= len(each)
        keep = np.concatenate([keep, np.repeat(null, self._num_null, axis=1)], axis=1)
        scores = self._score_subsets(reading, keep, target_ids)
        return Joint(scores[0], *np.split(scores[1:], 2))

    def score(self, reading: Reading, target_ids: Sequence[int]) -> np.ndarray:
        """Scores one answer after every prompt that was read: `[K, T]` nats, 0 where padded."""
        targets = [target_ids] * reading.prefilled.logits.shape[0]
        padded = self._pad_right(targets, self.prompts.max_target)
        return np.asarray(_score(self.lm.decoder, self.params, reading.prefilled, *padded))

    def score_closed_book(self, prompt: Prompt, target_ids: Sequence[int]) -> np.ndarray:
        """Scores an answer without documents: `[1, T]` nats, 0 where padded."""
        length = fitting(self.prompts.closed_lengths, len(prompt.closed_book))
        # In one pass: so few tokens take as long as the weights take to come from memory.
        packed = self.prompts.builder.pack(
            [prompt.closed_book], [target_ids], context_length=length
        )
        batch = LMBatch(*packed)  # pyrefly: ignore[bad-argument-type]  (jax takes numpy arrays)
        function = self.lm.family.token_log_probs
        return np.asarray(_score_alone(function, self.lm.config, self.params, batch))

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
        Another model reads the whole prompt again with the part masked, and beside it, where the
        documents are fused, the others.

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
        keep = np.zeros((self.prompts.options.windows + 1, reading.width), bool)
        keep[:, shift:] = True
        for variant, places in enumerate(left_out, start=1):
            taken = [shift + start + place for place in places if place < size]
            keep[variant, taken] = False
        if reading.fused:
            log_probs = self._without_tokens_fused(prompt, row, keep, target_ids)
        elif isinstance(reading.prefilled.cache, KVCache):
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
        visible = np.zeros((len(keep), self.prompts.cache_length), bool)
        visible[:, :end] = keep[:, :end]
        scores = _score_without_keys(
            self.lm.decoder,
            self.params,
            reading.prefilled,
            np.int32(row),
            visible,
            # Positions stay, so that what is left stands where it stood.
            np.int32(keep[0, :end].sum()),
            *self._pad_right([tokens], fitting(self.prompts.suffix_lengths, len(tokens))),
        )
        return np.asarray(scores)[:, len(suffix) : len(tokens)].sum(axis=1)

    def _without_tokens(
        self, context: Sequence[int], keep: np.ndarray, target_ids: Sequence[int]
    ) -> np.ndarray:
        width = keep.shape[1]
        slots = width + self.prompts.max_target
        reading = self._read([context] * len(keep), width, slots, mask=keep)
        return self.score(reading, target_ids).sum(axis=1)

    def _without_tokens_fused(
        self, prompt: Prompt, row: int, keep: np.ndarray, target_ids: Sequence[int]
    ) -> np.ndarray:
        # Each variant is one more context; the answer sees the other documents and one of them.
        variants, others = len(keep), self._fused_contexts(prompt)
        others[row] = []
        contexts = [*others, *[prompt.contexts[row]] * variants]
        reading = self._read_fused(contexts, keep.shape[1], last=keep)
        seen = np.ones((variants, len(others)), bool)
        subsets = np.concatenate([seen, np.eye(variants, dtype=bool)], axis=1)
        return self._score_subsets(reading, subsets, target_ids).sum(axis=1)

    def _read(
        self,
        contexts: Sequence[Sequence[int]],
        length: int,
        slots: int,
        mask: np.ndarray | None = None,
    ) -> Reading:
        """Reads contexts in rows of one length; `mask` in place of their own."""
        padded = pad_left(contexts, length=length, pad_id=self.lm.pad_id)
        arrays = padded.ids, padded.mask if mask is None else mask
        return Reading(prefill(self.lm.decoder, self.params, *arrays, cache_length=slots), length)

    def _fused_contexts(self, prompt: Prompt) -> list[Sequence[int]]:
        padding: list[Sequence[int]] = [[]] * (self.prompts.rows - len(prompt.contexts))
        return [*prompt.contexts, *padding, *[prompt.closed_book] * self._num_null]

    def _read_fused(
        self, contexts: Sequence[Sequence[int]], length: int, last: np.ndarray | None = None
    ) -> Reading:
        """Reads contexts in one row; `last` `[V, L]` in place of the masks of the last V."""
        padded = pad_left(contexts, length=length, pad_id=self.lm.pad_id)
        if last is not None:
            padded.mask[-len(last) :] = last
        arrays = padded.ids[None], padded.mask[None]
        slots = len(contexts) + self.prompts.max_target
        state = prefill(self._fusion, self.params, *arrays, cache_length=slots)
        return Reading(state, length, fused=True)

    def _score_subsets(
        self, reading: Reading, keep: np.ndarray, target_ids: Sequence[int]
    ) -> np.ndarray:
        """Scores an answer given subsets `[V, C]` of the contexts that were read: `[V, T]` nats."""
        ids, mask = self._pad_right([target_ids], self.prompts.max_target)
        arrays = keep, ids[0], mask[0]
        return np.asarray(_score_subsets(self._fusion, self.params, reading.prefilled, *arrays))

    @functools.cached_property
    def _fusion(self) -> FusionDecoder:
        return fusion_decoder(self.lm.config)

    def _pad_right(self, ids: Sequence[Sequence[int]], length: int) -> PaddedIds:
        return pad_right(ids, length=length, pad_id=self.lm.pad_id)


@functools.partial(jit_decoding, static_argnames="decoder")
def _score(
    decoder: Decoder, params: Any, prefilled: Any, target_ids: Array, target_mask: Array
) -> Array:
    return decoder.score(params, prefilled, target_ids, target_mask)


@functools.partial(jit_decoding, static_argnames="decoder")
def _score_subsets(
    decoder: FusionDecoder, params: Any, prefilled: Any, keep: Array, ids: Array, mask: Array
) -> Array:
    return decoder.score_subsets(params, prefilled, keep, ids, mask)


@functools.partial(jit_decoding, static_argnames=("token_log_probs", "config"))
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

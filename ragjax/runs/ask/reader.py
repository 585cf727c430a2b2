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
from ragjax.generation import Decoder, mix_log_probs
from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Prefilled
from ragjax.models.decoder.cache import KVCache
from ragjax.models.inputs import LMBatch
from ragjax.runs.ask.prompts import Prompt, Prompts, ReaderOptions, fitting
from ragjax.runs.compare.answers import stop_ids
from ragjax.runs.system import System


class Choice(NamedTuple):
    """The next token of an answer."""

    token_id: Array  # [] int32
    doc_log_probs: Array  # [K] float32 nats, log p_LM(token | c∘x, y so far) of each document


class Reading(NamedTuple):
    """Prompts that were read."""

    prefilled: Prefilled  # K rows
    width: int  # L: the prompts end at this slot


class Reader(Prompts):
    """Reads, scores and leaves out, each document once.

    Attributes:
        stops: Tokens that end an answer.
    """

    def __init__(self, system: System, options: ReaderOptions) -> None:
        """Finds the shapes that questions of this corpus need; see `Prompts`."""
        super().__init__(system, options)
        lm = system.workspace.lm
        self.stops = stop_ids(system.workspace)
        self._stop_mask = jnp.asarray(np.isin(np.arange(lm.config.vocab_size), self.stops))

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
        return Reading(_read(lm.decoder, self.system.lm_params, ids, mask, slots), length)

    def first(self, reading: Reading, weights: Array) -> Choice:
        """Chooses the first token of an answer, which does not end it; `weights` `[K]`: log p_R."""
        return _choose(reading.prefilled.logits, weights, self._stop_mask)

    def advance(self, reading: Reading, choice: Choice, weights: Array) -> tuple[Choice, Reading]:
        """Appends a token to every prompt and chooses the next; the old reading is used up."""
        prefilled = reading.prefilled
        chosen, prefilled = _advance(
            self.system.workspace.lm.decoder,
            self.system.lm_params,
            prefilled.cache,
            choice.token_id,
            weights,
        )
        return chosen, Reading(prefilled, reading.width)

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
        lm = self.system.workspace.lm
        ids = jnp.asarray(np.repeat(padded.ids, len(keep), axis=0))
        slots = width + self.max_target
        prefilled = _read(lm.decoder, self.system.lm_params, ids, jnp.asarray(keep), slots)
        return self.score(Reading(prefilled, width), target_ids).sum(axis=1)


@functools.partial(jit_decoding, static_argnames=("decoder", "slots"))
def _read(decoder: Decoder, params: Any, ids: Array, mask: Array, slots: int) -> Any:
    return decoder.prefill(params, ids, mask, cache_length=slots)


@jit_decoding
def _choose(logits: Array, log_weights: Array, banned: Array) -> Choice:
    mixed = mix_log_probs(logits[None], log_weights[None])[0]
    token_id = jnp.argmax(jnp.where(banned, -jnp.inf, mixed)).astype(jnp.int32)
    return Choice(token_id, jax.nn.log_softmax(logits, axis=-1)[:, token_id])


# The cache holds the prompts and grows in place.
@functools.partial(jit_decoding, static_argnames="decoder", donate_argnames="cache")
def _advance(
    decoder: Decoder, params: Any, cache: Any, token_id: Array, log_weights: Array
) -> tuple[Choice, Any]:
    token_ids = jnp.broadcast_to(token_id, log_weights.shape)
    prefilled = decoder.decode_step(params, cache, token_ids)
    nothing = jnp.zeros(prefilled.logits.shape[1], bool)
    return _choose(prefilled.logits, log_weights, nothing), prefilled


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

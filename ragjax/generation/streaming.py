"""Streaming: the tokens of one answer as they are generated, over one document or several.

    tokens = stream_greedy(decoder, params, prompts, limits)
    for piece in decode_stream(tokenizer, tokens):
        print(piece, end="", flush=True)

Shapes: K documents, L prompt slots, V vocabulary. Each step is one compiled call whose cache is
donated to it; steps, and questions whose prompts are padded to the same shape, share one program.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from tokenizers import Tokenizer

from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder, Prefilled
from ragjax.generation.greedy import choose_best
from ragjax.generation.prompts import Limits, Prompts, mix_log_probs, prompt_log_weights
from ragjax.generation.sampling import Sampling, sampler

# What decoders put in place of bytes that are not a whole character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Step(NamedTuple):
    """The next token of an answer."""

    token_id: Array  # [] int32
    doc_log_probs: Array  # [K] float32 nats, log p_LM(token | c_k, x, y so far) of each document
    prefilled: Prefilled  # K rows, read up to the token before this one


def stream_greedy(decoder: Decoder, params: Any, prompts: Prompts, limits: Limits) -> Iterator[int]:
    """Yields the tokens that `generate_ensemble` gives one question, each once it is known.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: Of one question: as in `generate_ensemble` without the axis B, `[K, L]`; K = 1 for
            one prompt.
        limits: Where the answer ends; stop tokens are not yielded.

    Returns:
        Iterator over token ids.

    Raises:
        ValueError: The shapes do not fit together.
    """
    return _stream(decoder, params, prompts, limits, Partial(choose_best))


def stream_sampled(
    decoder: Decoder,
    params: Any,
    prompts: Prompts,
    limits: Limits,
    *,
    key: Array,
    sampling: Sampling,
) -> Iterator[int]:
    """Yields the tokens that `generate_ensemble_sampled` draws for one question with key `[1]`.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: Of one question, `[K, L]`, as in `stream_greedy`.
        limits: Where the answer ends; stop tokens are not yielded.
        key: A `jax.random` key; the same key draws the same answer.
        sampling: How tokens are drawn.

    Returns:
        Iterator over token ids.

    Raises:
        ValueError: The shapes do not fit together.
    """
    return _stream(decoder, params, prompts, limits, sampler(key[None], sampling))


def decode_stream(tokenizer: Tokenizer, token_ids: Iterable[int]) -> Iterator[str]:
    """Decodes a stream of tokens to text; characters whose bytes span tokens come whole.

    Args:
        tokenizer: Of the language model.
        token_ids: Tokens, from a stream or a list.

    Yields:
        Pieces of text that are not empty; together they are the decoded text.
    """
    stream = TextStream(tokenizer)
    for token_id in token_ids:
        if piece := stream.add(token_id):
            yield piece
    if piece := stream.end():
        yield piece


class TextStream:
    """Decodes a growing list of tokens, returning text once its characters are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begins with no tokens."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def add(self, token_id: int) -> str:
        """Returns the text that a token completes; empty within a character."""
        self._ids.append(token_id)
        # All of it each time: what a token means may depend on those before (a leading space).
        return self._give(self._tokenizer.decode(self._ids).rstrip(_INCOMPLETE))

    def end(self) -> str:
        """Returns the text held back as an incomplete character."""
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece


def decode_steps(
    decoder: Decoder,
    params: Any,
    prefilled: Prefilled,
    log_weights: Array,
    choose: Partial,
    limits: Limits,
) -> Iterator[Step]:
    """Yields the tokens of an answer, a stop token included.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prefilled: The prompts of one question: K rows, with room for the answer. Its cache, like
            that of each step, is used up by the step that follows.
        log_weights: `[K]` float32, log p_R.
        choose: `(log-probabilities [1, V], step) -> token ids [1]`; a pytree.
        limits: Where the answer ends.
    """
    first = _choose(prefilled.logits, 0, log_weights, choose, limits)
    step = Step(first[0], first[1], prefilled)
    for place in range(1, limits.max_new_tokens):
        yield step
        if int(step.token_id) in limits.stop_ids:
            return
        cache = step.prefilled.cache
        step = _advance(decoder, params, cache, step.token_id, place, log_weights, choose, limits)
    yield step


@functools.partial(jit_decoding, static_argnames=("decoder", "cache_length"))
def prefill(
    decoder: Decoder, params: Any, ids: Array, mask: Array, *, cache_length: int
) -> Prefilled:
    """Reads left-padded prompts `[R, L]` as `Decoder.prefill` does, compiled."""
    return decoder.prefill(params, ids, mask, cache_length=cache_length)


def _stream(
    decoder: Decoder, params: Any, prompts: Prompts, limits: Limits, choose: Partial
) -> Iterator[int]:
    log_weights = prompt_log_weights(prompts, axes="K, L")
    length = limits.cache_length(prompts.ids.shape[1])
    prefilled = prefill(decoder, params, prompts.ids, prompts.mask, cache_length=length)
    steps = decode_steps(decoder, params, prefilled, log_weights, choose, limits)
    tokens = (int(step.token_id) for step in steps)
    return (token for token in tokens if token not in limits.stop_ids)


# The cache holds the prompts and grows in place.
@functools.partial(jit_decoding, static_argnames=("decoder", "limits"), donate_argnames="cache")
def _advance(
    decoder: Decoder,
    params: Any,
    cache: Any,
    token_id: Array,
    place: int | Array,
    log_weights: Array,
    choose: Partial,
    limits: Limits,
) -> Step:
    token_ids = jnp.broadcast_to(token_id, log_weights.shape)
    prefilled = decoder.decode_step(params, cache, token_ids)
    chosen = _choose(prefilled.logits, place, log_weights, choose, limits)
    return Step(chosen[0], chosen[1], prefilled)


@functools.partial(jit_decoding, static_argnames="limits")
def _choose(
    logits: Array, place: int | Array, log_weights: Array, choose: Partial, limits: Limits
) -> tuple[Array, Array]:
    """Returns a token `[]` and its log-probability beside each document `[K]`."""
    log_probs = mix_log_probs(logits[None], log_weights[None])
    allowed = limits.without_stops(log_probs, where=place < limits.min_new_tokens)
    token_id = choose(allowed, place)[0]
    return token_id, jax.nn.log_softmax(logits, axis=-1)[:, token_id]

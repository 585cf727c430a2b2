"""Answers token by token, as they come: for one question, over one document or several.

    tokens = stream_greedy(decoder, params, context_ids, context_mask, doc_scores, ...)
    for piece in decode_stream(tokenizer, tokens):
        print(piece, end="", flush=True)

Shapes: K documents, L prompt slots, V vocabulary. Each step is one compiled call whose cache is
donated to it; steps, and questions whose prompts are padded to the same shape, share one program.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from tokenizers import Tokenizer

from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder, Prefilled
from ragjax.generation.ensemble import doc_log_weights, mix_log_probs
from ragjax.generation.greedy import choose_best, read_prompts, without_stops
from ragjax.generation.sampling import check_sampling, sampler

# What decoders put in place of bytes that are not a whole character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def stream_greedy(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    doc_scores: Array,
    *,
    doc_mask: Array | None = None,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    min_new_tokens: int = 0,
) -> Iterator[int]:
    """Yields the tokens that `generate_ensemble` gives one question, each once it is known.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[K, L]` int32, left-padded prompts, one per document; K = 1 for one prompt.
        context_mask: `[K, L]` bool, True = real token.
        doc_scores: `[K]` float, logits of p_R.
        doc_mask: `[K]` bool, True = there is a document; None: all there. Without any document,
            all K prompts count the same.
        max_new_tokens: At least 1.
        stop_ids: Tokens that end an answer; they are not yielded.
        min_new_tokens: Stop tokens are not chosen before this many tokens.

    Returns:
        Iterator over token ids.

    Raises:
        ValueError: The shapes do not fit together, or `max_new_tokens` is below 1.
    """
    options = _Options(decoder, _take_best, stop_ids, min_new_tokens)
    return _stream(options, params, context_ids, context_mask, doc_scores, doc_mask,
                   max_new_tokens, None)  # fmt: skip


def stream_sampled(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    doc_scores: Array,
    key: Array,
    *,
    doc_mask: Array | None = None,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    min_new_tokens: int = 0,
) -> Iterator[int]:
    """Yields the tokens that `generate_ensemble_sampled` draws for one question with key `[1]`.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[K, L]` int32, as in `stream_greedy`, like all that is not named here.
        context_mask: `[K, L]` bool.
        doc_scores: `[K]` float.
        key: A `jax.random` key; the same key draws the same answer.
        doc_mask: `[K]` bool or None.
        temperature: As in `generate_sampled`.
        top_k: As in `generate_sampled`.
        top_p: As in `generate_sampled`.
        max_new_tokens: At least 1.
        stop_ids: Tokens that end an answer.
        min_new_tokens: Stop tokens are not drawn before this many tokens.

    Returns:
        Iterator over token ids.

    Raises:
        ValueError: The shapes do not fit together, or an option is out of its range.
    """
    check_sampling(temperature, top_k, top_p)
    options = _Options(decoder, _Draw(top_k, top_p), stop_ids, min_new_tokens)
    state = _DrawState(key[None], jnp.asarray(temperature, jnp.float32))
    return _stream(options, params, context_ids, context_mask, doc_scores, doc_mask,
                   max_new_tokens, state)  # fmt: skip


def decode_stream(tokenizer: Tokenizer, token_ids: Iterable[int]) -> Iterator[str]:
    """Turns tokens into text as they come; no character is cut where tokens cut its bytes.

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
    """The text of a growing list of tokens, given out once its characters are whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begins with no tokens."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def add(self, token_id: int) -> str:
        """Returns the text that a token completes; empty where a character is still open."""
        self._ids.append(token_id)
        # All of it each time: what a token means may depend on those before (a leading space).
        return self._give(self._tokenizer.decode(self._ids).rstrip(_INCOMPLETE))

    def end(self) -> str:
        """Returns what was held back because it might have become a character."""
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece


# (state, log-probabilities [1, V], step) -> token id [1]
_StatefulChoose = Callable[[Any, Array, Array], Array]


class _Options(NamedTuple):
    """What a program is compiled for, beside shapes; hashable."""

    decoder: Decoder
    choose: _StatefulChoose
    stop_ids: tuple[int, ...]
    min_new_tokens: int


class _DrawState(NamedTuple):
    keys: Array  # [1]
    temperature: Array  # [] float32


@dataclass(frozen=True)
class _Draw:
    top_k: int
    top_p: float

    def __call__(self, state: _DrawState, log_probs: Array, step: Array) -> Array:
        choose = sampler(
            state.keys, temperature=state.temperature, top_k=self.top_k, top_p=self.top_p
        )
        return choose(log_probs, step)


def _take_best(state: None, log_probs: Array, step: Array) -> Array:
    del state
    return choose_best(log_probs, step)


class _Stepped(NamedTuple):
    token_id: Array  # [] int32
    step: Array  # [] int32, of the next token
    cache: Any


def _stream(
    options: _Options,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    doc_scores: Array,
    doc_mask: Array | None,
    max_new_tokens: int,
    state: Any,
) -> Iterator[int]:
    if context_ids.ndim != 2 or context_ids.shape[:1] != doc_scores.shape:
        raise ValueError(
            "context_ids [K, L] and doc_scores [K] of one question are needed, got "
            f"{context_ids.shape} and {doc_scores.shape}"
        )
    mask = None if doc_mask is None else jnp.asarray(doc_mask)[None]
    log_weights = doc_log_weights(jnp.asarray(doc_scores)[None], doc_mask=mask)
    stepped = _begin(options, params, context_ids, context_mask, log_weights, state, max_new_tokens)
    return _go_on(options, params, stepped, log_weights, state, max_new_tokens)


def _go_on(
    options: _Options,
    params: Any,
    stepped: _Stepped,
    log_weights: Array,
    state: Any,
    max_new_tokens: int,
) -> Iterator[int]:
    for left in range(max_new_tokens - 1, -1, -1):
        token_id = int(stepped.token_id)
        if token_id in options.stop_ids:
            return
        yield token_id
        if left:
            stepped = _append(options, params, stepped, log_weights, state)


@functools.partial(jit_decoding, static_argnames=("options", "max_new_tokens"))
def _begin(
    options: _Options,
    params: Any,
    ids: Array,
    mask: Array,
    log_weights: Array,
    state: Any,
    max_new_tokens: int,
) -> _Stepped:
    prefilled = read_prompts(options.decoder, params, ids, mask, max_new_tokens=max_new_tokens)
    return _choose(options, prefilled, log_weights, state, jnp.zeros((), jnp.int32))


@functools.partial(jit_decoding, static_argnames="options", donate_argnames="stepped")
def _append(
    options: _Options, params: Any, stepped: _Stepped, log_weights: Array, state: Any
) -> _Stepped:
    token_ids = jnp.broadcast_to(stepped.token_id[None], log_weights.shape[1:])
    prefilled = options.decoder.decode_step(params, stepped.cache, token_ids)
    return _choose(options, prefilled, log_weights, state, stepped.step)


def _choose(
    options: _Options, prefilled: Prefilled, log_weights: Array, state: Any, step: Array
) -> _Stepped:
    log_probs = mix_log_probs(prefilled.logits[None], log_weights)
    early = step < options.min_new_tokens
    allowed = without_stops(log_probs, options.stop_ids, where=early)
    return _Stepped(options.choose(state, allowed, step)[0], step + 1, prefilled.cache)

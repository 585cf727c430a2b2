"""How an answer comes out of the documents: one function per way, all of one signature.

K documents, T answer tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from ragjax.data import pad_left
from ragjax.generation import (
    generate_rag_sequence_fast,
    generate_rag_sequence_thorough,
    generate_rag_token,
)
from ragjax.runs.ask.prompts import Prompt
from ragjax.runs.ask.reader import Reader, Reading

# An un-adapted model often begins its answer on a new line; that is no empty answer.
_MIN_NEW_TOKENS = 1
# Hypotheses of the ways that search.
_BEAMS = 4

# Called with the tokens so far, each time there is one more.
Listener = Callable[[Sequence[int]], None]


class Generated(NamedTuple):
    """An answer, and what was learnt on the way."""

    ids: list[int]  # without the token that ends it
    ended: bool  # False: cut at the limit of tokens
    reading: Reading  # every document beside the question
    token_log_probs: np.ndarray | None  # [K, T] of each document, nats; None: not known yet


class Decode(Protocol):
    """Writes an answer to a prompt."""

    def __call__(self, reader: Reader, prompt: Prompt, listen: Listener) -> Generated:
        """Returns the answer; `listen` hears each token, or nothing where a search decides last."""
        ...


def decode_ensemble(reader: Reader, prompt: Prompt, listen: Listener) -> Generated:
    """Takes the most likely token of Σ_c p_R(c) p_LM(y_t | c∘x, y_<t) again and again.

    Each document is read once: the log-probabilities behind the attribution come with the tokens.

    References:
        Shi et al., REPLUG: Retrieval-Augmented Black-Box Language Models, 2023, section 3.2.
    """
    steps = _greedy(reader, reader.read(prompt), _weights(reader, prompt), listen)
    log_probs = np.zeros((reader.rows, reader.max_target), np.float32)
    for place, column in enumerate(steps.log_probs):
        log_probs[:, place] = column
    return Generated(steps.ids, steps.ended, steps.reading, log_probs)


def decode_concat(reader: Reader, prompt: Prompt, listen: Listener) -> Generated:
    """Reads all documents one after the other in one prompt, and takes the most likely tokens."""
    if not prompt.docs:
        return decode_ensemble(reader, prompt, listen)
    if not prompt.joined:
        raise ValueError(
            f"--decode concat: {len(prompt.docs)} documents and the question do not fit into one"
            " prompt of the language model; use --decode ensemble, or a smaller --k"
        )
    length = reader.concat_length(len(prompt.joined))
    slots = reader.concat_lengths[-1] + reader.max_target
    joined = reader.read_contexts([prompt.joined], rows=1, length=length, slots=slots)
    steps = _greedy(reader, joined, np.zeros(1, np.float32), listen)
    return Generated(steps.ids, steps.ended, reader.read(prompt), None)


def decode_rag_sequence_thorough(reader: Reader, prompt: Prompt, listen: Listener) -> Generated:
    """Searches beside each document and scores every hypothesis under every document.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.5.
    """
    return _searched(generate_rag_sequence_thorough, reader, prompt)


def decode_rag_sequence_fast(reader: Reader, prompt: Prompt, listen: Listener) -> Generated:
    """As `decode_rag_sequence_thorough`, but scores a hypothesis where the search came upon it."""
    return _searched(generate_rag_sequence_fast, reader, prompt)


def decode_rag_token(reader: Reader, prompt: Prompt, listen: Listener) -> Generated:
    """Searches for the most likely answer under the mixture over documents at every token."""
    return _searched(generate_rag_token, reader, prompt)


DECODES: dict[str, Decode] = {
    "ensemble": decode_ensemble,
    "concat": decode_concat,
    "rag_sequence_thorough": decode_rag_sequence_thorough,
    "rag_sequence_fast": decode_rag_sequence_fast,
    "rag_token": decode_rag_token,
}


class _Steps(NamedTuple):
    ids: list[int]
    ended: bool
    reading: Reading
    log_probs: list[np.ndarray]  # [rows] of each token


def _greedy(reader: Reader, reading: Reading, log_weights: np.ndarray, listen: Listener) -> _Steps:
    weights = jnp.asarray(log_weights)
    ids: list[int] = []
    log_probs: list[np.ndarray] = []
    choice = reader.first(reading, weights)
    while True:
        token = int(choice.token_id)
        if token in reader.stops and len(ids) >= _MIN_NEW_TOKENS:
            return _Steps(ids, True, reading, log_probs)
        ids.append(token)
        log_probs.append(np.asarray(choice.doc_log_probs))
        listen(ids)
        if len(ids) == reader.max_target:
            return _Steps(ids, False, reading, log_probs)
        choice, reading = reader.advance(reading, choice, weights)


def _weights(reader: Reader, prompt: Prompt) -> np.ndarray:
    """Returns log p_R; without documents the closed-book prompt, which stands first, decides."""
    if prompt.docs:
        return prompt.log_weights
    return np.where(np.arange(reader.rows) == 0, 0, -np.inf).astype(np.float32)


def _searched(search: Callable[..., Any], reader: Reader, prompt: Prompt) -> Generated:
    contexts = prompt.contexts or [prompt.closed_book]
    length = reader.fitting_length(contexts)
    filler: list[list[int]] = [[]] * (reader.rows - len(contexts))
    padded = pad_left([*contexts, *filler], length=length, pad_id=reader.prompts.pad_id)
    weights = _weights(reader, prompt)
    mask = np.isfinite(weights)
    found = search(
        reader.system.workspace.lm.decoder,
        reader.system.lm_params,
        jnp.asarray(padded.ids)[None],
        jnp.asarray(padded.mask)[None],
        jnp.asarray(np.where(mask, weights, 0))[None],
        doc_mask=jnp.asarray(mask)[None],
        beams=_BEAMS,
        max_new_tokens=reader.max_target,
        stop_ids=reader.stops,
        min_new_tokens=_MIN_NEW_TOKENS,
    )
    size = int(found.lengths[0, 0])
    ids = np.asarray(found.ids)[0, 0, :size].tolist()
    return Generated(ids, size < reader.max_target, reader.read(prompt), None)

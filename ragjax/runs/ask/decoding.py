"""Decoding strategies over retrieved documents, all with one signature.

K documents, T answer tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.tree_util import Partial

from ragjax.data import pad_left
from ragjax.generation import Prompts
from ragjax.generation.greedy import choose_best
from ragjax.generation.streaming import decode_steps
from ragjax.runs.ask.prompts import Prompt
from ragjax.runs.ask.reader import Reader, Reading
from ragjax.runs.options.modes import MODES

# Hypotheses of the modes that search.
_BEAMS = 4

# Called with the tokens so far, each time there is one more.
Listener = Callable[[Sequence[int]], None]


class Generated(NamedTuple):
    """An answer, and what decoding computed for it."""

    ids: list[int]  # without the token that ends it
    ended: bool  # False: truncated at the limit of tokens
    reading: Reading  # every document beside the question
    token_log_probs: np.ndarray | None  # [K, T] of each document, nats; None: not computed


class Decode(Protocol):
    """Writes an answer to a prompt."""

    def __call__(self, reader: Reader, prompt: Prompt, listen: Listener) -> Generated:
        """Returns the answer; `listen` is called at each token, but not by a search."""
        ...


def decode_ensemble(reader: Reader, prompt: Prompt, listen: Listener) -> Generated:
    """Decodes greedily from the mixture Σ_c p_R(c) p_LM(y_t | c∘x, y_<t).

    Each document is read once: the log-probabilities behind the attribution come with the tokens.

    References:
        Shi et al., REPLUG: Retrieval-Augmented Black-Box Language Models, 2023, section 3.2.
    """
    return _greedy(reader, reader.read(prompt), _weights(reader, prompt), listen)


def decode_concat(reader: Reader, prompt: Prompt, listen: Listener) -> Generated:
    """Decodes greedily from one prompt with all documents."""
    if not prompt.docs:
        return decode_ensemble(reader, prompt, listen)
    if not prompt.joined:
        raise ValueError(
            f"--decode concat: {len(prompt.docs)} documents and the question do not fit into one"
            " prompt of the language model; use --decode ensemble, or fewer --documents"
        )
    written = _greedy(reader, reader.read_joined(prompt), np.zeros(1, np.float32), listen)
    return written._replace(reading=reader.read(prompt), token_log_probs=None)


def decode_fusion(reader: Reader, prompt: Prompt, listen: Listener) -> Generated:
    """Decodes greedily with a decoder that attends to all documents, each encoded alone.

    References:
        Izacard and Grave, Leveraging Passage Retrieval with Generative Models for Open Domain
        Question Answering, 2021, section 3.
    """
    if not prompt.docs:
        return decode_ensemble(reader, prompt, listen)
    written = _greedy(reader, reader.read_fused(prompt), np.zeros(1, np.float32), listen)
    return written._replace(token_log_probs=None)


def _searched(
    search: Callable[..., Any], reader: Reader, prompt: Prompt, listen: Listener
) -> Generated:
    """Searches with beams by a function of `ragjax.generation`; `listen` is not called."""
    contexts = prompt.contexts or [prompt.closed_book]
    padding: list[list[int]] = [[]] * (reader.prompts.rows - len(contexts))
    length = reader.prompts.fitting_length(contexts)
    padded = pad_left([*contexts, *padding], length=length, pad_id=reader.lm.pad_id)
    weights = _weights(reader, prompt)
    mask = np.isfinite(weights)
    arrays = padded.ids, padded.mask, np.where(mask, weights, 0), mask
    found = search(
        reader.lm.decoder,
        reader.params,
        Prompts(*(x[None] for x in arrays)),  # pyrefly: ignore[bad-argument-type]  (numpy's)
        reader.limits,
        beams=_BEAMS,
    )
    size = int(found.lengths[0, 0])
    ids = np.asarray(found.ids)[0, 0, :size].tolist()
    return Generated(ids, size < reader.prompts.max_target, reader.read(prompt), None)


DECODES: dict[str, Decode] = {
    "ensemble": decode_ensemble,
    "concat": decode_concat,
    "fusion": decode_fusion,
    **{
        name: functools.partial(_searched, mode.generate)
        for name, mode in MODES.items()
        if mode.beams
    },
}


def _greedy(
    reader: Reader, reading: Reading, log_weights: np.ndarray, listen: Listener
) -> Generated:
    log_probs = np.zeros((len(log_weights), reader.prompts.max_target), np.float32)
    ids: list[int] = []
    steps = decode_steps(
        reader.lm.decoder,
        reader.params,
        reading.prefilled,
        log_weights,  # pyrefly: ignore[bad-argument-type]  (jax takes numpy arrays)
        Partial(choose_best),
        reader.limits,
    )
    for step in steps:
        reading = reading._replace(prefilled=step.prefilled)
        token = int(step.token_id)
        if token in reader.limits.stop_ids:
            return Generated(ids, True, reading, log_probs)
        log_probs[:, len(ids)] = step.doc_log_probs
        ids.append(token)
        listen(ids)
    return Generated(ids, False, reading, log_probs)


def _weights(reader: Reader, prompt: Prompt) -> np.ndarray:
    """Returns log p_R; without documents the closed-book prompt, which stands first, decides."""
    if prompt.docs:
        return prompt.log_weights
    return np.where(np.arange(reader.prompts.rows) == 0, 0, -np.inf).astype(np.float32)

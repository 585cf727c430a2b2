"""Decoding modes: how a language model answers from several documents, one table for all programs.

Options, answers, forecasts and `ask` read it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from ragjax.generation import (
    generate_ensemble,
    generate_greedy,
    generate_rag_sequence_fast,
    generate_rag_sequence_thorough,
    generate_rag_token,
)
from ragjax.losses import rag_sequence_loss, rag_token_loss


class Mode(NamedTuple):
    """How several documents make one answer.

    Attributes:
        generate: The function of `ragjax.generation`.
        loss: The matching function of `ragjax.losses`: -log p of a given answer, in nats.
        apart: True: each document in a prompt of its own; False: all in one prompt.
        beams: True: a beam search; False: the most likely token each time.
    """

    generate: Callable[..., Any]
    loss: Callable[..., Any] = rag_sequence_loss
    apart: bool = True
    beams: bool = True


MODES: dict[str, Mode] = {
    "concat": Mode(generate_greedy, apart=False, beams=False),
    "ensemble": Mode(generate_ensemble, beams=False),
    "rag_token": Mode(generate_rag_token, rag_token_loss),
    "rag_sequence_fast": Mode(generate_rag_sequence_fast),
    "rag_sequence_thorough": Mode(generate_rag_sequence_thorough),
}
ModeName = Literal[tuple(MODES)]  # pyrefly: ignore  (names of a table)

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
from ragjax.models.language_model import LanguageModel


class Mode(NamedTuple):
    """How several documents make one answer.

    Attributes:
        generate: The function of `ragjax.generation`.
        loss: The matching function of `ragjax.losses`: -log p of a given answer, in nats.
        apart: True: each document in a prompt of its own; False: all in one prompt.
        beams: True: a beam search; False: the most likely token each time.
        fused: True: the decoder attends to all documents, which are encoded apart, and p_R has no
            part in the answer.
        note: What becomes of the documents, for tables and reports.
    """

    generate: Callable[..., Any]
    loss: Callable[..., Any] = rag_sequence_loss
    apart: bool = True
    beams: bool = True
    fused: bool = False
    note: str = "each read alone, whole answers weighed by p_R"


_MIXED = "each read alone, next tokens mixed by p_R"
MODES: dict[str, Mode] = {
    "concat": Mode(
        generate_greedy, apart=False, beams=False, note="one after the other in one prompt"
    ),
    "ensemble": Mode(generate_ensemble, beams=False, note=_MIXED),
    "rag_token": Mode(generate_rag_token, rag_token_loss, note=_MIXED),
    "rag_sequence_fast": Mode(generate_rag_sequence_fast),
    "rag_sequence_thorough": Mode(generate_rag_sequence_thorough),
    "fusion": Mode(
        generate_greedy,
        beams=False,
        fused=True,
        note="each encoded alone, all attended to at once (Fusion-in-Decoder)",
    ),
}
ModeName = Literal[tuple(MODES)]  # pyrefly: ignore  (names of a table)
AUTO = "auto"
ModeOption = Literal[(AUTO, *MODES)]  # pyrefly: ignore  (names of a table)


def check_mode(name: str, lm: LanguageModel, flag: str) -> None:
    """Refuses a mode that the language model cannot read in.

    Args:
        name: Of a mode.
        lm: The language model that answers.
        flag: That chooses the mode.

    Raises:
        ValueError: The model is a causal decoder, and the mode that of an encoder-decoder.
    """
    if MODES[name].fused and not lm.family.has_encoder:
        raise ValueError(
            f"{flag} {name}: {lm.source} is a causal decoder, which cannot attend to documents that"
            f" were encoded apart; use an encoder-decoder (T5, BART), or {flag} ensemble"
        )

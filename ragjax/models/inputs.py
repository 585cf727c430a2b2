"""What the models take: fixed-shape token arrays. B texts, R rows, L and T tokens."""

from typing import NamedTuple

from jax import Array


class Tokens(NamedTuple):
    """A batch of token sequences for an encoder, padded on the right."""

    ids: Array  # [B, L] int32
    mask: Array  # [B, L] bool, True = real token


class LMBatch(NamedTuple):
    """Contexts and the targets that follow them, for a language model.

    Contexts are padded on the left and targets on the right, so the target slots are static.
    """

    context_ids: Array  # [R, L] int32
    context_mask: Array  # [R, L] bool, True = real token
    target_ids: Array  # [R, T] int32
    target_mask: Array  # [R, T] bool, True = token counts

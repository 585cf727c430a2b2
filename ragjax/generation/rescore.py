"""Scoring many answers under prompts that have been read once.

Shapes: R rows, H answers each, T answer slots.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ragjax.generation.decoder import Decoder, Prefilled


def score_answers(
    decoder: Decoder,
    params: Any,
    prefilled: Prefilled,
    target_ids: Array,
    target_mask: Array,
    *,
    count: int | Array | None = None,
) -> Array:
    """Scores several answers to each prompt, one at a time: no prompt is copied.

    Args:
        decoder: The language model's functions.
        params: Its parameters.
        prefilled: R prompts that have been read; not changed.
        target_ids: `[R, H, T]` int32, right-padded.
        target_mask: `[R, H, T]` bool, True = token counts.
        count: Only the first this many of the H answers are scored; None: all.

    Returns:
        `[R, H, T]` float32 log-probabilities in nats, 0 where masked or not scored.
    """
    rows, answers, slots = target_ids.shape

    def score(index: Array | int, scores: Array) -> Array:
        ids, mask = (
            lax.dynamic_index_in_dim(array, index, axis=1, keepdims=False)
            for array in (target_ids, target_mask)
        )
        new = decoder.score(params, prefilled, ids, mask)
        return lax.dynamic_update_index_in_dim(scores, new, index, axis=1)

    start = jnp.zeros((rows, answers, slots), jnp.float32)
    return lax.fori_loop(0, answers if count is None else count, score, start)

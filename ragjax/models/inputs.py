"""What the models take: fixed-shape token arrays. B texts, R rows, L and T tokens."""

from typing import Any, NamedTuple

from jax import Array


class Tokens(NamedTuple):
    """A batch of token sequences for an encoder, padded on the right."""

    ids: Array  # [B, L] int32
    mask: Array  # [B, L] bool, True = real token


class PairTokens(NamedTuple):
    """Pairs of texts for a cross-encoder, as `Tokens`."""

    ids: Array  # [B, L] int32
    mask: Array  # [B, L] bool, True = real token
    types: Array | None = None  # [B, L] int32, BERT's token types; None: all of type 0


class LMBatch(NamedTuple):
    """Contexts and the targets that follow them, for a language model.

    Contexts are padded on the left and targets on the right, so the target slots are static.
    """

    context_ids: Array  # [R, L] int32
    context_mask: Array  # [R, L] bool, True = real token
    target_ids: Array  # [R, T] int32
    target_mask: Array  # [R, T] bool, True = token counts


def check_batch(batch: Any, *, context_rank: int = 2) -> None:
    """Refuses contexts and targets that do not fit together.

    Args:
        batch: `LMBatch`, or `FusionBatch` with `context_rank` 3.
        context_rank: Axes of the contexts.

    Raises:
        ValueError: Says which shapes were received.
    """
    for name, rank in (("context", context_rank), ("target", 2)):
        ids, mask = getattr(batch, f"{name}_ids"), getattr(batch, f"{name}_mask")
        if ids.ndim != rank or ids.shape != mask.shape or min(ids.shape[1:]) < 1:
            expected = "[rows, length >= 1]" if rank == 2 else "[rows, contexts >= 1, length >= 1]"
            raise ValueError(
                f"{name}_ids and {name}_mask must both have one shape {expected}, got {ids.shape} "
                f"and {mask.shape}"
            )
    if batch.context_ids.shape[0] != batch.target_ids.shape[0]:
        raise ValueError(
            f"as many contexts as targets are needed, got {batch.context_ids.shape[0]} and "
            f"{batch.target_ids.shape[0]} rows"
        )


def check_prompts(ids: Array, mask: Array, cache_length: int) -> None:
    """Refuses prompts that do not fit their mask or the cache.

    Args:
        ids: `[R, L]` int32.
        mask: `[R, L]` bool.
        cache_length: Slots of the cache, at least L.

    Raises:
        ValueError: The cache is shorter than the prompts, or the shapes differ.
    """
    if ids.ndim != 2 or ids.shape != mask.shape or ids.shape[1] < 1:
        raise ValueError(f"ids and mask must both be [R, L >= 1], got {ids.shape} and {mask.shape}")
    if cache_length < ids.shape[1]:
        raise ValueError(
            f"cache_length={cache_length} is shorter than the prompts ({ids.shape[1]} tokens)"
        )

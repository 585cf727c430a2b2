"""Turns the hidden states of tokens into one embedding per text. B texts, L tokens, D sizes.

A pooling takes `hidden [B, L, D]` float and `mask [B, L]` bool (True = real token, right-padded)
and returns `[B, D]`: zeros, with finite gradients, for a text without tokens.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

Pool = Callable[[Array, Array], Array]


def mean_pool(hidden: Array, mask: Array) -> Array:
    """Averages the hidden states of the real tokens.

    Args:
        hidden: `[B, L, D]` float.
        mask: `[B, L]` bool, True = real token.

    Returns:
        `[B, D]`; zeros for a text without tokens.

    Gradients:
        To `hidden` of the real tokens.

    References:
        Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
        2019, section 3.
    """
    return _weighted_mean(hidden, mask.astype(hidden.dtype))


def cls_pool(hidden: Array, mask: Array) -> Array:
    """Takes the hidden state of the first token.

    Args:
        hidden: `[B, L, D]` float.
        mask: `[B, L]` bool, True = real token.

    Returns:
        `[B, D]`; zeros for a text without tokens.

    Gradients:
        To `hidden[:, 0]`.

    References:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding", 2019, section 3.
    """
    return hidden[:, 0] * mask[:, :1].astype(hidden.dtype)


def max_pool(hidden: Array, mask: Array) -> Array:
    """Takes the largest value of each dimension over the real tokens.

    Args:
        hidden: `[B, L, D]` float.
        mask: `[B, L]` bool, True = real token.

    Returns:
        `[B, D]`; zeros for a text without tokens.

    Gradients:
        To the largest values, in equal parts where several are equal.

    References:
        Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
        2019, section 3.
    """
    largest = jnp.where(mask[:, :, None], hidden, -jnp.inf).max(axis=1)
    return jnp.where(mask.any(axis=1)[:, None], largest, 0)


def last_token_pool(hidden: Array, mask: Array) -> Array:
    """Takes the hidden state of the last real token, which in a causal model has read them all.

    Args:
        hidden: `[B, L, D]` float.
        mask: `[B, L]` bool, True = real token; padded on the right.

    Returns:
        `[B, D]`; zeros for a text without tokens.

    Gradients:
        To `hidden` of the last tokens.

    References:
        Wang et al., "Improving Text Embeddings with Large Language Models", 2024, section 3.2.
    """
    last = jnp.maximum(mask.sum(axis=1) - 1, 0)[:, None, None]  # [B, 1, 1]
    taken = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    return taken * mask[:, :1].astype(hidden.dtype)


def weighted_mean_pool(hidden: Array, mask: Array) -> Array:
    """Averages the hidden states of the real tokens, the t-th with a weight of t.

    Args:
        hidden: `[B, L, D]` float.
        mask: `[B, L]` bool, True = real token; padded on the right.

    Returns:
        `[B, D]`; zeros for a text without tokens.

    Gradients:
        To `hidden` of the real tokens.

    References:
        Muennighoff, "SGPT: GPT Sentence Embeddings for Semantic Search", 2022, section 3.1.
    """
    weights = jnp.arange(1, mask.shape[1] + 1, dtype=hidden.dtype)[None]  # [1, L]
    return _weighted_mean(hidden, mask.astype(hidden.dtype) * weights)


def mean_sqrt_length_pool(hidden: Array, mask: Array) -> Array:
    """Sums the hidden states of the real tokens and divides by the root of their number.

    Args:
        hidden: `[B, L, D]` float.
        mask: `[B, L]` bool, True = real token.

    Returns:
        `[B, D]`; zeros for a text without tokens.

    Gradients:
        To `hidden` of the real tokens.

    References:
        Cer et al., "Universal Sentence Encoder", 2018, section 3.1.
    """
    weights = mask.astype(hidden.dtype)
    counts = jnp.maximum(weights.sum(axis=1, keepdims=True), 1)  # [B, 1]
    return (hidden * weights[:, :, None]).sum(axis=1) / jnp.sqrt(counts)


# Under the names of sentence-transformers, in the order in which it concatenates the modes that an
# old folder switches on.
POOLINGS: dict[str, Pool] = {
    "cls": cls_pool,
    "max": max_pool,
    "mean": mean_pool,
    "mean_sqrt_len_tokens": mean_sqrt_length_pool,
    "weightedmean": weighted_mean_pool,
    "lasttoken": last_token_pool,
}


def pooling_modes(name: str) -> tuple[str, ...]:
    """Splits the name of a pooling, such as "mean" or "cls+mean", into the modes it concatenates.

    Args:
        name: Keys of `POOLINGS`, joined by "+".

    Raises:
        ValueError: A mode is unknown.
    """
    modes = tuple(name.split("+"))
    if unknown := [mode for mode in modes if mode not in POOLINGS]:
        raise ValueError(
            f"pooling {name!r}: {unknown[0]!r} is not one of {', '.join(POOLINGS)} (several joined "
            'by "+" are concatenated)'
        )
    return modes


def concatenated(modes: Sequence[str]) -> Pool:
    """Makes the pooling that puts the results of several modes behind each other.

    Args:
        modes: Keys of `POOLINGS`.

    Returns:
        A pooling with `[B, D * len(modes)]` results; the mode's own function for a single mode.
    """
    if len(modes) == 1:
        return POOLINGS[modes[0]]
    return lambda hidden, mask: jnp.concatenate(
        [POOLINGS[mode](hidden, mask) for mode in modes], axis=1
    )


def l2_normalize(embeddings: Array) -> Array:
    """Scales each embedding to length 1.

    Args:
        embeddings: `[B, D]` float.

    Returns:
        `[B, D]`; an embedding that is (almost) zero is returned as it is.

    Gradients:
        Finite everywhere, the identity at zero.
    """
    squares = jnp.sum(embeddings * embeddings, axis=-1, keepdims=True)  # [B, 1]
    # The root is taken of a safe value: its gradient at 0 is NaN even where it is not selected.
    return embeddings / jnp.sqrt(jnp.where(squares > 1e-24, squares, 1.0))


def _weighted_mean(hidden: Array, weights: Array) -> Array:
    total = jnp.maximum(weights.sum(axis=1, keepdims=True), 1)  # [B, 1]; no token weighs less
    return (hidden * weights[:, :, None]).sum(axis=1) / total

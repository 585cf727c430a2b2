"""Turns the hidden states of tokens into one embedding per text. B texts, L tokens, D sizes."""

import jax.numpy as jnp
from jax import Array


def mean_pool(hidden: Array, mask: Array) -> Array:
    """Average the hidden states of the real tokens.

    Args:
      hidden: `[B, L, D]` float.
      mask: `[B, L]` bool, True = real token.

    Returns:
      `[B, D]`; zeros for a text without tokens.

    Gradients: to `hidden` of the real tokens.

    References:
      Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
      2019, section 3.
    """
    weights = mask.astype(hidden.dtype)[:, :, None]  # [B, L, 1]
    counts = jnp.maximum(weights.sum(axis=1), 1)  # [B, 1]
    return (hidden * weights).sum(axis=1) / counts


def cls_pool(hidden: Array, mask: Array) -> Array:
    """Take the hidden state of the first token.

    Args:
      hidden: `[B, L, D]` float.
      mask: `[B, L]` bool, True = real token.

    Returns:
      `[B, D]`; zeros for a text without tokens.

    Gradients: to `hidden[:, 0]`.

    References:
      Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
      Understanding", 2019, section 3.
    """
    return hidden[:, 0] * mask[:, :1].astype(hidden.dtype)


def l2_normalize(embeddings: Array) -> Array:
    """Scale each embedding to length 1.

    Args:
      embeddings: `[B, D]` float.

    Returns:
      `[B, D]`; an embedding that is (almost) zero is returned as it is.

    Gradients: finite everywhere, the identity at zero.
    """
    squares = jnp.sum(embeddings * embeddings, axis=-1, keepdims=True)  # [B, 1]
    # The root is taken of a safe value: its gradient at 0 is NaN even where it is not selected.
    return embeddings / jnp.sqrt(jnp.where(squares > 1e-24, squares, 1.0))

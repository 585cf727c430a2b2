"""From hidden states to the vocabulary: logits, and log-probabilities of targets.

Parameters: `{"embed": {"embedding": [V, H]}, "unembed": {"kernel": [H, V]}, "final_bias": {"bias":
[1, V]}}`; without "unembed" the embedding table is used (tied), without "final_bias" it is zero.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ragjax.losses import chunked_token_log_probs


def logits(params: dict[str, Any], hidden: Array) -> Array:
    """Multiplies hidden states by the unembedding.

    Args:
        params: Parameters, as the module docstring says.
        hidden: `[..., H]`.

    Returns:
        `[..., V]` float32.
    """
    if "unembed" in params:
        kernel = params["unembed"]["kernel"]
        scores = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    else:
        table = params["embed"]["embedding"]
        contracted = (((hidden.ndim - 1,), (1,)), ((), ()))
        scores = lax.dot_general(hidden, table, contracted, preferred_element_type=jnp.float32)
    if "final_bias" not in params:
        return scores
    bias = params["final_bias"]["bias"].astype(jnp.float32)
    return scores + bias.reshape((1,) * (scores.ndim - 1) + bias.shape[1:])


def score(params: dict[str, Any], hidden: Array, target_ids: Array, mask: Array) -> Array:
    """Returns the log-probabilities of targets, a bounded number of logits at a time.

    Args:
        params: Parameters, as the module docstring says.
        hidden: `[R, T, H]`, the hidden states that predict the targets.
        target_ids: `[R, T]` int32.
        mask: `[R, T]` bool, True = token counts.

    Returns:
        `[R, T]` float32 in nats, 0 where masked.
    """
    table = params["unembed"]["kernel"].T if "unembed" in params else params["embed"]["embedding"]
    if "final_bias" in params:
        # One more hidden unit, always 1, adds the bias to the logits of every block.
        bias = params["final_bias"]["bias"].astype(table.dtype)
        table = jnp.concatenate([table, bias.T], axis=1)
        hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
    return chunked_token_log_probs(hidden, table, target_ids, mask=mask)

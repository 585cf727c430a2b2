"""Splits a decoder's parameters into those that learn and those that stay, and joins them."""

from typing import Any

import jax
import jax.numpy as jnp

from ragjax.models.decoder.model import layer_stacks

_EMBEDDINGS = ("embed", "unembed")


def split_trainable(
    params: dict[str, Any], num_layers: int | None, *, embeddings: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates the top layers and the final norm, which learn, from the rest.

    A gradient with respect to the first result costs no backward work below the layers in it,
    unless `embeddings` is True: the embedding's gradient passes through every layer.

    Args:
        params: Parameters; the layers in one stack or several.
        num_layers: How many layers from the top learn; None: all.
        embeddings: True: the embedding and unembedding learn too.

    Returns:
        `(trainable, frozen)`, two nested dicts for `merge_trainable`. Arrays are sliced (copied)
        only where the boundary lies inside a stack.

    Raises:
        ValueError: `num_layers` is negative or above the number of layers.
    """
    params = join_layers(params)
    layers = params["layers"]
    total = jax.tree.leaves(layers)[0].shape[0]
    learning = total if num_layers is None else num_layers
    if not 0 <= learning <= total:
        raise ValueError(f"num_layers must be between 0 and {total} (or None), got {num_layers}")
    trainable: dict[str, Any] = {"final_norm": params["final_norm"]}
    frozen: dict[str, Any] = {}
    chosen = trainable if embeddings else frozen
    chosen.update({name: params[name] for name in _EMBEDDINGS if name in params})
    if learning == total:
        trainable["layers"] = layers
    elif learning == 0:
        frozen["layers"] = layers
    else:
        boundary = total - learning
        frozen["layers"] = jax.tree.map(lambda leaf: leaf[:boundary], layers)
        trainable["layers"] = jax.tree.map(lambda leaf: leaf[boundary:], layers)
    return trainable, frozen


def merge_trainable(trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """Puts the two halves together; the result goes into every function of the decoder.

    Args:
        trainable: From `split_trainable`, or its updated copy.
        frozen: From `split_trainable`.

    Returns:
        Parameters in which the frozen and the learning layers are separate stacks. Nothing is
        copied.
    """
    stacks = [half["layers"] for half in (frozen, trainable) if "layers" in half]
    layers = stacks[0] if len(stacks) == 1 else tuple(stacks)
    return {**frozen, **trainable, "layers": layers}


def join_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Puts all layers into one stack, as a checkpoint has them.

    Args:
        params: Parameters; the layers in one stack or several.

    Returns:
        The same parameters with one stack of layers.
    """
    stacks = layer_stacks(params)
    if len(stacks) == 1:
        return {**params, "layers": stacks[0]}
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)}

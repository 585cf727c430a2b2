"""Splits an encoder's parameters into those that learn and those that stay, and joins them."""

import jax
import jax.numpy as jnp

from ragjax.models.layers.stacks import Params

# What comes after the layers; everything else comes before them, or is not known to come after.
# ModernBERT's norms before the attention are one stack of all layers: training those at the top
# only would take the backward pass through all of them.
_ABOVE = ("final_norm", "output", "projection")


def split_trainable(params: Params, num_layers: int | None) -> tuple[Params, Params]:
    """Separate the top layers and what follows them, which learn, from the rest.

    A gradient with respect to the first result costs no backward work below the layers in it.
    ModernBERT's norms before the attention stay as they are.

    Args:
      params: parameters of a text encoder; the layers in one stack or several.
      num_layers: how many layers from the top learn, at least 1; None: everything learns, the
        embeddings too.

    Returns:
      `(trainable, frozen)`, two nested dicts for `merge_trainable`. Arrays are sliced (copied)
      only where the boundary lies inside a stack.

    Raises:
      ValueError: `num_layers` is below 1 or above the number of layers.
    """
    if num_layers is None:
        return params, {}
    params = join_layers(params)
    layers = params["layers"]
    total = jax.tree.leaves(layers)[0].shape[0]
    if not 1 <= num_layers <= total:
        raise ValueError(f"num_layers must be between 1 and {total} (or None), got {num_layers}")
    trainable: Params = {name: params[name] for name in _ABOVE if name in params}
    frozen: Params = {
        name: leaf for name, leaf in params.items() if name not in (*_ABOVE, "layers")
    }
    boundary = total - num_layers
    if boundary:
        frozen["layers"] = jax.tree.map(lambda leaf: leaf[:boundary], layers)
        layers = jax.tree.map(lambda leaf: leaf[boundary:], layers)
    return {**trainable, "layers": layers}, frozen


def merge_trainable(trainable: Params, frozen: Params) -> Params:
    """Put the two halves together; the result goes into the encoder's `encode`.

    Args:
      trainable: from `split_trainable`, or its updated copy.
      frozen: from `split_trainable`.

    Returns:
      Parameters in which the frozen and the learning layers are separate stacks. Nothing is
      copied.
    """
    if "layers" in frozen and "layers" in trainable:
        return {**frozen, **trainable, "layers": (frozen["layers"], trainable["layers"])}
    return {**frozen, **trainable}


def join_layers(params: Params) -> Params:
    """Put all layers into one stack, as a checkpoint has them.

    Args:
      params: parameters; the layers in one stack or several.

    Returns:
      The same parameters with one stack of layers.
    """
    stacks = params["layers"]
    if not isinstance(stacks, tuple | list):
        return params
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)}

"""Splits an encoder-decoder's parameters into those that learn and those that stay."""

from typing import Any

import jax
import jax.numpy as jnp

from ragjax.models.seq2seq.model import DECODER, ENCODER, Params, layer_stacks

_EMBEDDINGS = ("embed", "unembed")


def split_trainable(
    params: Params, num_layers: int | None, *, embeddings: bool = False
) -> tuple[Params, Params]:
    """Separates the decoder's top layers, or everything between the embeddings, from the rest.

    With a number, the top layers of the decoder and what stands after them (T5's final norm)
    learn; the encoder, the decoder's lower layers and its position parameters stay, and a gradient
    costs no backward work in them. With None, both sides learn whole: all layers, norms and
    position parameters. BART's `final_bias` is no parameter of training and stays.

    Args:
        params: Parameters; the decoder's layers in one stack or several.
        num_layers: How many decoder layers from the top learn; None: encoder and decoder.
        embeddings: True: the token embedding and the unembedding learn too. The embedding's
            gradient passes through every layer.

    Returns:
        `(trainable, frozen)`, two nested dicts for `merge_trainable`. Arrays are sliced (copied)
        only where the boundary lies inside a stack.

    Raises:
        ValueError: `num_layers` is negative or above the number of decoder layers.
    """
    params = join_layers(params)
    total = jax.tree.leaves(params[DECODER]["layers"])[0].shape[0]
    if num_layers is not None and not 0 <= num_layers <= total:
        raise ValueError(f"num_layers must be between 0 and {total} (or None), got {num_layers}")
    trainable: Params = {}
    frozen: Params = {name: params[name] for name in ("final_bias",) if name in params}
    chosen = trainable if embeddings else frozen
    chosen.update({name: params[name] for name in _EMBEDDINGS if name in params})
    if num_layers is None:
        return {**trainable, ENCODER: params[ENCODER], DECODER: params[DECODER]}, frozen
    upper, lower = _split_side(params[DECODER], total - num_layers)
    return {**trainable, DECODER: upper}, {**frozen, ENCODER: params[ENCODER], DECODER: lower}


def merge_trainable(trainable: Params, frozen: Params) -> Params:
    """Puts the two halves together; the result goes into every function of the model.

    Args:
        trainable: From `split_trainable`, or its updated copy.
        frozen: From `split_trainable`.

    Returns:
        Parameters in which the decoder's frozen and learning layers are separate stacks. Nothing
        is copied.
    """
    sides = [half[DECODER] for half in (frozen, trainable) if DECODER in half]
    stacks = [side["layers"] for side in sides if "layers" in side]
    layers = stacks[0] if len(stacks) == 1 else tuple(stacks)
    outer = {name: value for side in sides for name, value in side.items()}
    return {**frozen, **trainable, DECODER: {**outer, "layers": layers}}


def join_layers(params: Params) -> Params:
    """Puts each side's layers into one stack, as a checkpoint has them.

    Args:
        params: Parameters; the layers in one stack or several.

    Returns:
        The same parameters with one stack of layers a side.
    """
    sides: dict[str, Any] = {}
    for side in (ENCODER, DECODER):
        stacks = layer_stacks(params[side])
        joined = stacks[0]
        if len(stacks) > 1:
            joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)
        sides[side] = {**params[side], "layers": joined}
    return {**params, **sides}


def _split_side(side: Params, boundary: int) -> tuple[Params, Params]:
    """Returns what learns and what stays of a side whose layers learn from `boundary` on."""
    layers = side["layers"]
    total = jax.tree.leaves(layers)[0].shape[0]
    # What follows the layers learns with them; what precedes them would need their whole backward.
    upper = {name: value for name, value in side.items() if name == "final_norm"}
    lower = {name: value for name, value in side.items() if name not in (*upper, "layers")}
    if boundary == 0:
        upper["layers"] = layers
    elif boundary == total:
        lower["layers"] = layers
    else:
        lower["layers"] = jax.tree.map(lambda leaf: leaf[:boundary], layers)
        upper["layers"] = jax.tree.map(lambda leaf: leaf[boundary:], layers)
    return upper, lower

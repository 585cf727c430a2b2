"""Splits a model's parameters into trainable and frozen ones, and puts them together again.

    trainable, frozen = split_trainable(lm.params, lm.family.layout, num_layers=2)
    loss = lambda trainable: f(merge_trainable(trainable, frozen))

A gradient with respect to `trainable` costs no backward work below the layers in it, unless the
embeddings are trained as well: their gradient passes through every layer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ragjax.models.layers.stacks import Params, stacks_in


class Layout(NamedTuple):
    """Which parameters of a family of models are trained with how many layers."""

    # What follows the layers is trained with any number of them. Everything else precedes them, or
    # is not known to follow: training it takes the backward pass through all layers. (ModernBERT's
    # norms before the attention are one stack for all layers.)
    above: tuple[str, ...] = ("final_norm",)
    side: str | None = None  # node that holds those layers; None: the parameters themselves
    embeddings: tuple[str, ...] = ("embed", "unembed")  # trained on request only
    constants: tuple[str, ...] = ()  # never trained
    fewest_layers: int = 0


ENCODER = Layout(above=("final_norm", "output", "projection"), embeddings=(), fewest_layers=1)
DECODER = Layout()
SEQ2SEQ = Layout(side="decoder", constants=("final_bias",))


def split_trainable(
    params: Params, layout: Layout, num_layers: int | None, *, embeddings: bool = False
) -> tuple[Params, Params]:
    """Separates the top layers and what follows them, which are trained, from the rest.

    Args:
        params: Parameters; the layers in one stack or several.
        layout: `ENCODER`, or the `layout` of a language model's family. Of an encoder-decoder, the
            layers are the decoder's.
        num_layers: Number of layers from the top that are trained; None: everything is (of an
            encoder-decoder both sides) but the embeddings that `layout` names.
        embeddings: True: these are trained as well.

    Returns:
        `(trainable, frozen)`, two nested dicts for `merge_trainable`. Arrays are sliced (copied)
        only where the boundary lies inside a stack.

    Raises:
        ValueError: `num_layers` is out of range.
    """
    params = join_layers(params)
    side = params if layout.side is None else params[layout.side]
    total, fewest = jax.tree.leaves(side["layers"])[0].shape[0], layout.fewest_layers
    if num_layers is not None and not fewest <= num_layers <= total:
        raise ValueError(
            f"num_layers must be between {fewest} and {total} (or None), got {num_layers}"
        )
    fixed = layout.constants if embeddings else (*layout.constants, *layout.embeddings)
    if num_layers is None:
        return _partition(params, [name for name in params if name not in fixed])
    upper, lower = _partition(side, [name for name in layout.above if name in side])
    layers = lower.pop("layers")
    boundary = total - num_layers
    if boundary < total:
        upper["layers"] = jax.tree.map(lambda leaf: leaf[boundary:], layers) if boundary else layers
    if boundary > 0:
        lower["layers"] = jax.tree.map(lambda leaf: leaf[:boundary], layers)
    if layout.side is not None:
        upper, lower = {layout.side: upper}, {**params, layout.side: lower}
    if embeddings:
        upper |= {name: lower.pop(name) for name in layout.embeddings if name in lower}
    return upper, lower


def merge_trainable(trainable: Params, frozen: Params) -> Params:
    """Puts the two parts together; the result goes wherever the model's parameters go.

    Args:
        trainable: From `split_trainable`, or its updated copy.
        frozen: From `split_trainable`.

    Returns:
        Parameters in which the frozen and the trainable layers are separate stacks. Nothing is
        copied.
    """
    merged = {**frozen, **trainable}
    for name in frozen.keys() & trainable.keys():
        parts = frozen[name], trainable[name]
        merged[name] = parts if name == "layers" else merge_trainable(parts[1], parts[0])
    return merged


def join_layers(params: Params) -> Params:
    """Puts all layers into one stack, as a checkpoint has them.

    Args:
        params: Parameters; the layers in one stack or several.

    Returns:
        The same parameters with one stack of layers (one for each side of an encoder-decoder).
    """
    return {name: _joined(name, node) for name, node in params.items()}


def _joined(name: str, node: Any) -> Any:
    if name != "layers":
        return join_layers(node) if isinstance(node, dict) else node
    stacks = stacks_in(node)
    if len(stacks) == 1:
        return stacks[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)


def _partition(node: Params, names: list[str]) -> tuple[Params, Params]:
    rest = {name: value for name, value in node.items() if name not in names}
    return {name: node[name] for name in names}, rest

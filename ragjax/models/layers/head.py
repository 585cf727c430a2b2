"""What happens to pooled embeddings: dense layers, normalisation and truncation, in any order.

Parameters of the dense layers: `{"0": {"kernel": [I, O], "bias": [O]}, "1": ...}`, numbered in the
order in which they run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from ragjax.models.layers.pooling import l2_normalize
from ragjax.models.layers.stacks import Params

# Under the class names of torch.nn, which sentence-transformers writes into its folders.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "ReLU": jax.nn.relu,
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
}


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A linear layer and an activation."""

    inputs: int
    outputs: int
    use_bias: bool = True
    activation: str = "Tanh"  # a key of ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class Normalize:
    """Scales each embedding to length 1."""


@dataclass(frozen=True, kw_only=True)
class Truncate:
    """Keeps the first dimensions of each embedding; does not scale what is left.

    References:
        Kusupati et al., "Matryoshka Representation Learning", 2022, section 3.
    """

    size: int


Step = Dense | Normalize | Truncate


def apply_steps(steps: Sequence[Step], projection: Params, embeddings: Array) -> Array:
    """Runs the steps one after the other.

    Args:
        steps: What to do.
        projection: Parameters of the dense layers, as the module docstring says.
        embeddings: `[B, D]` float.

    Returns:
        `[B, size]` float.
    """
    layers = 0
    for step in steps:
        if isinstance(step, Dense):
            layer = projection[str(layers)]
            embeddings = embeddings @ layer["kernel"]
            if step.use_bias:
                embeddings = embeddings + layer["bias"][None]
            embeddings = ACTIVATIONS[step.activation](embeddings)
            layers += 1
        elif isinstance(step, Normalize):
            embeddings = l2_normalize(embeddings)
        else:
            embeddings = embeddings[:, : step.size]
    return embeddings


def output_size(steps: Sequence[Step], size: int) -> int:
    """Returns the size of the embeddings that the steps make of pooled ones of `size`.

    Raises:
        ValueError: A dense layer takes embeddings of another size, or truncation asks for more
            dimensions than there are.
    """
    for step in steps:
        if isinstance(step, Dense):
            if step.inputs != size:
                raise ValueError(
                    f"a Dense layer takes {step.inputs} dimensions, but gets embeddings of {size}"
                )
            size = step.outputs
        elif isinstance(step, Truncate):
            if not 1 <= step.size <= size:
                raise ValueError(f"truncate_dim {step.size} is not between 1 and {size}")
            size = step.size
    return size


def is_normalized(steps: Sequence[Step]) -> bool:
    """Says whether the embeddings come out with length 1."""
    return bool(steps) and isinstance(steps[-1], Normalize)


def with_normalization(steps: Sequence[Step], normalize: bool | None) -> tuple[Step, ...]:
    """Makes the embeddings come out with length 1, or as they are; None changes nothing."""
    steps = tuple(steps)
    if normalize is None or (normalize and is_normalized(steps)):
        return steps
    if normalize:
        return (*steps, Normalize())
    # A normalisation before a dense layer is part of the model, one after it scales the result.
    last = max((i for i, step in enumerate(steps) if isinstance(step, Dense)), default=-1)
    return (
        *steps[: last + 1],
        *(step for step in steps[last + 1 :] if not isinstance(step, Normalize)),
    )

"""Low-rank adapters beside frozen weights, as ordinary nested dicts of arrays.

    adapters = init_adapters(params, rank=8, alpha=16.0, key=key)       # the trainable parameters
    loss = lambda adapters: f(attach(params, adapters))                 # starts equal to f(params)
    exported = merge(attach(params, adapters))                          # plain parameters again

A `Linear` with an adapter computes x·W + (x·down)·up·scale, so neither the adapted kernel nor its
gradient is ever formed. The adapter lies in the node of its `Linear`, under "lora". A stack of N
layers has adapters `[N, in, rank]`; where the layers are a tuple of stacks, so are the adapters.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.
"""

import fnmatch
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ragjax.models.layers.stacks import Params

Adapters = Any  # the nesting of the parameters, with nothing in it but the adapters


def init_adapters(
    params: Params, *, rank: int, alpha: float, targets: Sequence[str] = ("*",), key: Array
) -> Adapters:
    """Makes adapters that change nothing yet: "up" is zero.

    Args:
        params: Parameters with their layers under a "layers" node; only linear layers in there are
            adapted, not embeddings or output tables.
        rank: Of the added matrices, at least 1.
        alpha: The scale is alpha / rank, so that another rank needs no other learning rate.
        targets: Patterns (`fnmatch`) of the names of linear layers, such as "query", or of their
            paths, such as "decoder/layers/*" ("layers/1/*" in the second of several stacks); all of
            them, as QLoRA found it best (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized
            LLMs", 2023, section 4).
        key: A `jax.random` key.

    Returns:
        Nested dict that holds, for each adapted layer, "lora" with "down" `[in, rank]` (normal,
        variance 1/in), "up" `[rank, out]` (zeros) and the constant "scale" `[]`; float32.

    Raises:
        ValueError: The rank or alpha is out of range, or a pattern fits no linear layer.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not alpha > 0:
        raise ValueError(f"alpha must be greater than 0, got {alpha}")
    names: set[str] = set()

    def make(path: tuple[str, ...], node: Mapping[str, Any]) -> Mapping[str, Any]:
        names.add("/".join(path))
        if not any(_fits("/".join(path), pattern) for pattern in targets):
            return {}
        *stack, inputs, outputs = node["kernel"].shape
        # One key for each path: another choice of targets draws the same numbers.
        seed = zlib.crc32("/".join(path).encode())
        draw = jax.random.normal(jax.random.fold_in(key, seed), (*stack, inputs, rank))
        return {
            "lora": {
                "down": draw * inputs**-0.5,
                "up": jnp.zeros((*stack, rank, outputs)),
                "scale": jnp.full(stack, alpha / rank),
            }
        }

    adapters = _map_linear_layers(make, params, ())
    for pattern in targets:
        if not any(_fits(name, pattern) for name in names):
            known = ", ".join(sorted(names)) or "none"
            raise ValueError(f"targets: {pattern!r} fits no linear layer; there are {known}")
    return adapters


def attach(params: Params, adapters: Adapters) -> Params:
    """Puts adapters into parameters; the result goes wherever the parameters go.

    Args:
        params: Parameters without these adapters.
        adapters: From `init_adapters`, or their updated copy.

    Returns:
        Parameters with adapters. No array is copied, and a gradient with respect to `adapters` does
        no work for the frozen kernels' own gradients.

    Raises:
        ValueError: The adapters are of other parameters.
    """
    return _attach(params, adapters, ())


def merge(params: Params) -> Params:
    """Folds the adapters into the kernels, for export and for fast inference.

    Args:
        params: From `attach`, or without adapters.

    Returns:
        Parameters without adapters that compute the same up to rounding; kernels keep their dtype.
        Arrays that have no adapter are not copied.
    """
    if isinstance(params, tuple | list):
        return type(params)(merge(part) for part in params)
    if not isinstance(params, Mapping):
        return params
    merged = {name: merge(child) for name, child in params.items() if name != "lora"}
    if "lora" in params:
        adapter, kernel = params["lora"], params["kernel"]
        product = jnp.matmul(adapter["down"], adapter["up"], precision=jax.lax.Precision.HIGHEST)
        scaled = product * adapter["scale"][..., None, None]
        # Added in float32 whatever both are; spelt out for projects that let no dtypes mix.
        wide = kernel.astype(jnp.float32) + scaled.astype(jnp.float32)
        merged["kernel"] = wide.astype(kernel.dtype)
    return merged


def _fits(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(
        path.rpartition("/")[2], pattern
    )


def _map_linear_layers(
    make: Callable[[tuple[str, ...], Mapping[str, Any]], Mapping[str, Any]],
    node: Any,
    path: tuple[str, ...],
) -> Any:
    """Returns what `make` makes of each linear layer, in the nesting of the parameters."""
    if isinstance(node, tuple | list):
        return tuple(
            _map_linear_layers(make, part, (*path, str(number))) for number, part in enumerate(node)
        )
    if not isinstance(node, Mapping):
        return {}
    if "layers" in path and hasattr(node.get("kernel"), "shape"):
        return make(path, node)
    made = {name: _map_linear_layers(make, child, (*path, name)) for name, child in node.items()}
    return {name: child for name, child in made.items() if child}


def _attach(params: Any, adapters: Any, path: tuple[str, ...]) -> Any:
    if not adapters:
        return params
    where = "/".join(path)
    if isinstance(params, tuple | list) and isinstance(adapters, tuple | list):
        if len(params) == len(adapters):
            pairs = zip(params, adapters, strict=True)
            return tuple(_attach(part, adapter, path) for part, adapter in pairs)
    elif isinstance(params, Mapping) and isinstance(adapters, Mapping):
        if "lora" in adapters:
            return {**params, "lora": adapters["lora"]}
        strangers = sorted(adapters.keys() - params.keys())
        if not strangers:
            return {
                name: _attach(child, adapters.get(name), (*path, name))
                for name, child in params.items()
            }
        where = f"{where}/{strangers[0]}".lstrip("/")
    raise ValueError(
        f"{where}: the adapters are of other parameters than these; make them with init_adapters "
        "from parameters of the same structure"
    )

"""The only place that converts between Flax NNX modules and plain nested dicts of arrays."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ragjax.models.layers.linear import Linear

Params = dict[str, Any]
# Layers of a stack that `over_layers` writes out; each is compiled anew.
LONGEST_WRITTEN_OUT = 4
# Tokens of the carry from which they are.
FEWEST_WRITTEN_OUT = 256


def split(module: nnx.Module) -> tuple[Any, Params]:
    """Splits a module into its static structure and its parameters.

    Args:
        module: Any NNX module whose whole state is arrays.

    Returns:
        `(graphdef, params)`: `params` is a nested dict, keyed by attribute name, of arrays (of
        `jax.ShapeDtypeStruct` for an abstract module). `graphdef` is hashable and holds no array.
    """
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: Any, params: Params) -> Any:
    """Rebuilds the module that `split` took apart; works under `jax.jit` and `jax.grad`.

    Args:
        graphdef: From `split`.
        params: Nested dict of the same structure as `split` returned; leaves may be tracers. The
            node of a `Linear` may also hold an adapter under "lora" (`ragjax.models.lora`), and in
            place of a stack of layers there may be a tuple of stacks, which `scan_layers` runs in
            turn.

    Returns:
        A module of the same class, holding `params`.

    Raises:
        ValueError: An adapter hangs on something that is not a `Linear`.
    """
    found = _Found({}, {})
    module = nnx.merge(graphdef, _take_apart(params, (), found))
    for path, adapter in found.adapters.items():
        linear = _descend(module, path)
        if not isinstance(linear, Linear):
            raise ValueError(
                f"{'/'.join(path)} has a LoRA adapter, but it is a {type(linear).__name__}; "
                "adapters belong to Linear layers"
            )
        linear.adapt(adapter)
    for path, stacks in found.stacks.items():
        structure = nnx.split(_descend(module, path))[0]
        parts = nnx.List([merge(structure, stack) for stack in stacks])
        setattr(_descend(module, path[:-1]), path[-1], parts)
    return module


def abstract(make_module: Callable[[], nnx.Module]) -> tuple[Any, Params]:
    """Splits the module that `make_module` would build, without computing any array.

    Args:
        make_module: Builds the module, for instance `lambda: Bert(config, rngs=nnx.Rngs(0))`.

    Returns:
        `(graphdef, params)` as `split`, with `jax.ShapeDtypeStruct` leaves: the target that
        `ragjax.models.files.key_table.apply_key_table` fills.
    """
    return split(nnx.eval_shape(make_module))


def apply(make_module: Callable[[], nnx.Module], params: Params, inputs: Any) -> Any:
    """Runs the module that `make_module` would build, holding `params`, on some input."""
    return merge(abstract(make_module)[0], params)(inputs)


def stacked(make_layer: Callable[[jax.Array], nnx.Module], key: jax.Array, num_layers: int) -> Any:
    """Builds `num_layers` identical layers as one module whose arrays are stacked on axis 0.

    Args:
        make_layer: Builds one layer from a random key.
        key: Random key; layer i gets the i-th of its splits.
        num_layers: Number of layers, at least 1.

    Returns:
        One module of the layer's class; every array has a leading axis of size `num_layers`.
        Run it with `scan_layers`.
    """
    return nnx.vmap(make_layer, in_axes=0, out_axes=0)(jax.random.split(key, num_layers))


def scan_layers(
    layers: Any,
    step: Callable[..., Any],
    hidden: Any,
    *,
    inputs: Any = None,
    remat: bool = False,
) -> Any:
    """Applies stacked layers one after the other; the layer is traced and compiled once.

    Args:
        layers: Module from `stacked`, or several of them (`merge` makes a list of a tuple of
            stacks). Differentiating with respect to the last only does no backward work for the
            rest.
        step: `(layer, hidden) -> hidden`, given one unstacked layer; with `inputs`,
            `(layer, hidden, input) -> hidden`.
        hidden: Carry, of fixed shape and dtype.
        inputs: Tree of arrays `[N, ...]`, one row for each of the N layers of all stacks together,
            for instance whether a layer attends to everything; None: nothing is passed.
        remat: True: recompute each layer in the backward pass instead of keeping its intermediate
            values (less memory, about a third more work).

    Returns:
        The carry after the last layer.
    """
    first = 0
    for stack in stacks_in(layers):
        graphdef, state = nnx.split(stack)
        size = _size(state)
        rows = jax.tree.map(lambda leaf: leaf[first : first + size], inputs)  # noqa: B023  (called at once)

        def body(carry: Any, xs: Any, graphdef: Any = graphdef) -> tuple[Any, None]:
            layer = nnx.merge(graphdef, xs[0])
            return step(layer, carry, *(() if inputs is None else xs[1:])), None

        hidden = over_layers(body, hidden, (state, rows), remat=remat)[0]
        first += size
    return hidden


def split_last(layers: Any) -> tuple[list[Any], Any]:
    """Takes the last layer off, for one that is run in another way.

    Args:
        layers: As for `scan_layers`.

    Returns:
        The layers below it, as stacks for `scan_layers` (none, if it is the only one), and a stack
        of it alone.
    """
    *below, last = stacks_in(layers)
    graphdef, state = nnx.split(last)
    if (size := _size(state)) == 1:
        return below, last

    def part(start: int, stop: int) -> Any:
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[start:stop], state))

    return [*below, part(0, size - 1)], part(size - 1, size)


def count_layers(layers: Any) -> int:
    """Returns the number of layers of what `scan_layers` takes."""
    return sum(_size(nnx.split(stack)[1]) for stack in stacks_in(layers))


def stacks_in(layers: Any) -> Sequence[Any]:
    """Returns the stacks of a "layers" node, which is one or a tuple of several, in their order."""
    return layers if isinstance(layers, nnx.List | list | tuple) else (layers,)


def over_stacks(
    body: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    layers: Any,
    inputs: Any = None,
    *,
    remat: bool = False,
) -> tuple[Any, Any]:
    """Applies a function to the parameters of one layer after the other, in one stack or several.

    Args:
        body: `(carry, (layer, input)) -> (carry, result)`.
        carry: As for `over_layers`.
        layers: Tree of arrays `[N, ...]`, or a tuple of such trees, run in turn.
        inputs: Tree of arrays `[N, ...]`, one row for each of the N layers of all stacks together.
        remat: As for `over_layers`.

    Returns:
        The carry after the last layer, and the results of all layers stacked on axis 0.
    """
    results, first = [], 0
    for stack in stacks_in(layers):
        size = _size(stack)
        rows = jax.tree.map(lambda leaf: leaf[first : first + size], inputs)  # noqa: B023  (called at once)
        carry, result = over_layers(body, carry, (stack, rows), remat=remat)
        results.append(result)
        first += size
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)


def over_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Any, *, remat: bool = False
) -> tuple[Any, Any]:
    """Applies a function to one layer after the other, as `lax.scan` does.

    A few layers are written out one by one. A scan copies what the backward pass needs of each
    layer into one array for all and back, which took a third of the gradient of two layers of
    width 128 on two CPU cores. But the slices of a scan's parameters come twice as fast, which is
    what a decoding step waits for, so few tokens are scanned in any case.

    Args:
        body: `(carry, layer) -> (carry, result)`.
        carry: Of fixed shape and dtype (any, where there is one layer), such as hidden states
            `[..., D]`.
        layers: Tree of arrays `[N, ...]`, at least one array.
        remat: True: recompute each layer in the backward pass instead of keeping its intermediate
            values.

    Returns:
        The carry after the last layer, and the results stacked on axis 0.
    """
    count = _size(layers)
    if remat:
        # A scan keeps its iterations apart already; the barrier against merging the two passes
        # would only cost.
        return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, layers)
    if count > 1 and (count > LONGEST_WRITTEN_OUT or _vectors(carry) < FEWEST_WRITTEN_OUT):
        return jax.lax.scan(body, carry, layers)
    results = []
    # The gradient of a split is one concatenation; that of indexing is a sum of padded arrays.
    leaves, structure = jax.tree.flatten(layers)
    for parts in zip(*(jax.lax.split(leaf, [1] * count) for leaf in leaves), strict=True):
        layer = jax.tree.unflatten(structure, [part.squeeze(0) for part in parts])
        carry, result = body(carry, layer)
        results.append(result)
    return carry, jax.tree.map(lambda *rows: jnp.stack(rows), *results)


def cast_floats(params: Any, dtype: DTypeLike) -> Any:
    """Converts every floating-point leaf; what already has the dtype is returned as it is.

    Inside a differentiated function this gives mixed precision: the computation runs in `dtype`,
    while the parameters it is differentiated in, their gradients and the optimiser's state stay
    as they are (float32).

    Args:
        params: Tree of arrays.
        dtype: For instance `jnp.bfloat16`.

    Returns:
        The same tree.

    References:
        Micikevicius et al., "Mixed Precision Training", 2018, section 3.1.
    """

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, params)


def _vectors(carry: Any) -> int:
    return max((math.prod(leaf.shape[:-1]) for leaf in jax.tree.leaves(carry)), default=0)


def _size(stack: Any) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


class _Found(NamedTuple):
    """What a plain NNX state has no place for, by path."""

    adapters: dict[tuple[str, ...], Mapping[str, Any]]
    stacks: dict[tuple[str, ...], Sequence[Params]]


def _take_apart(node: Any, path: tuple[str, ...], found: _Found) -> Any:
    """Returns the node as `split` made it; adapters and tuples of stacks go to `found`."""
    if isinstance(node, tuple | list):
        found.stacks[path] = node
        return _take_apart(node[0], path, _Found({}, {}))
    if not isinstance(node, Mapping):
        return node
    if "lora" in node:
        found.adapters[path] = node["lora"]
    return {
        name: _take_apart(child, (*path, name), found)
        for name, child in node.items()
        if name != "lora"
    }


def _descend(module: Any, path: Sequence[str]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module

"""Reads safetensors files and fills a model's parameters from them, strictly.

table = {
    "embeddings.weight": KeyRule("embeddings/embedding"),
    "encoder.layer.{}.dense.weight": KeyRule("layers/dense/kernel", transpose),
}
params = apply_key_table(read_safetensors(folder), table, abstract_params, source=folder)
"""

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ragjax.models.files.placement import (
    Part,
    Placement,
    current_placement,
    fill,
    sharding_of,
    transformed_shape,
)
from ragjax.models.files.safetensors import read_safetensors as read_safetensors

logger = logging.getLogger(__name__)

_MAX_LISTED = 10
_COMPARED_BYTES = 2**24
_KEPT_DTYPES = (np.float32, jnp.bfloat16, np.float16)


def unchanged(tensor: np.ndarray) -> np.ndarray:
    """Returns the tensor itself."""
    return tensor


class KeyRule(NamedTuple):
    """Where one checkpoint tensor goes."""

    path: str  # place in the nested dict, parts joined by "/"
    transform: Callable[[np.ndarray], np.ndarray] = unchanged
    # Undoes `transform`; None: the transform is its own inverse, as a transposition is.
    inverse: Callable[[np.ndarray], np.ndarray] | None = None
    first_layer: int = 0  # number that `{}` stands for at index 0 of the stack


def transpose(tensor: np.ndarray) -> np.ndarray:
    """Turns PyTorch's `[out, in]` weight of a linear layer into the `[in, out]` kernel."""
    return tensor.T


def apply_key_table(
    tensors: Mapping[str, Any],
    table: Mapping[str, KeyRule],
    target: Mapping[str, Any],
    *,
    ignored: Sequence[str] = (),
    buffers: Mapping[str, Callable[[np.ndarray], bool]] = MappingProxyType({}),
    source: str | Path = "checkpoint",
    placement: Placement | None = None,
) -> dict[str, Any]:
    """Fills a model's parameters from named tensors: nothing missing, left over or misshapen.

    A key of `table` names one tensor, or, with one `{}` in the place of the layer number, one
    tensor per layer; those are stacked on axis 0 of the parameter that the rule names. All names
    and shapes are checked before anything is read or allocated; then one parameter at a time is
    filled and placed.

    Args:
        tensors: Tensor name → numpy array, or what has `.shape` and `.dtype` and is read by
            `np.asarray`, such as the `StoredTensor` of `read_safetensors`.
        table: Pattern of tensor names → `KeyRule(path, transform)`. `transform` gets one tensor
            (not the stack) and returns it in the parameter's layout; it is also tried on zeros of
            the tensor's shape, to know the shape that comes out.
        target: Nested dict of what has `.shape` (arrays or `jax.ShapeDtypeStruct`): the
            parameters to fill, for instance from `stacks.abstract`. The size of axis 0 of a
            parameter with a `{}` rule is the number of layers.
        ignored: Patterns of tensor names that may be there and are not used, which a warning then
            says; `{}` stands for a number and `*` for anything.
        buffers: Patterns of tensors that are computed instead → whether a tensor holds just that;
            a warning names one that does not.
        source: File or folder that the tensors came from, for the messages.
        placement: Dtype of the parameters and where they go; None takes what the surrounding
            `ragjax.models.files.placement.loading_as` says: float32 on the default device without
            one.

    Returns:
        Nested dict of jax arrays, of the structure and shapes of `target`.

    Raises:
        ValueError: A tensor that no rule or ignored pattern names, a parameter without its
            tensor, or a shape that differs; the message lists the first ten of them with shapes.
    """
    shapes = {path: tuple(leaf.shape) for path, (leaf,) in _flatten(target)}
    _check_layers(table, shapes, len(tensors), source)
    places = _places(table, shapes)
    problems = _key_problems(tensors, table, places, shapes, (*ignored, *buffers))
    parts: dict[str, list[Part]] = {}
    for name, place in places.items():
        if name in tensors:
            part = Part(tensors[name], place.transform, place.layer)
            parts.setdefault(place.path, []).append(part)
            problems += _shape_problems(name, part, place.path, shapes[place.path])
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:_MAX_LISTED])
        more = len(problems) - _MAX_LISTED
        raise ValueError(
            f"{source}: the tensors do not fit the model that its configuration describes:"
            f"{listed}" + (f"\n  and {more} more" if more > 0 else "")
        )
    _name_unused(
        [name for name in tensors if name not in places], tensors, ignored, buffers, source
    )
    dtype, shardings = current_placement() if placement is None else placement
    sharded = {path: sharding_of(shardings, path, shapes[path]) for path in parts}
    filled = {}
    for path, pieces in parts.items():
        filled[path] = fill(shapes[path], _dtype(dtype, pieces), pieces, sharded[path])
    return _nest(filled)


def counts_up(tensor: np.ndarray) -> bool:
    """Says whether a tensor holds 0, 1, 2, ...: the positions that old checkpoints store."""
    return np.array_equal(np.ravel(tensor), np.arange(np.size(tensor)))


def same_values(one: Any, other: Any) -> bool:
    """Says whether two stored tensors are equal, reading a part of them at a time."""
    if tuple(one.shape) != tuple(other.shape):
        return False
    if one.dtype != other.dtype or not (hasattr(one, "rows") and hasattr(other, "rows")):
        return np.array_equal(np.asarray(one), np.asarray(other))
    parts = zip(one.rows(_COMPARED_BYTES, 1), other.rows(_COMPARED_BYTES, 1), strict=True)
    return all(np.array_equal(left, right) for (_, left), (_, right) in parts)


def named_tensors(params: Mapping[str, Any], table: Mapping[str, KeyRule]) -> Mapping[str, Any]:
    """Names parameters as a checkpoint does: `apply_key_table` backwards.

    Args:
        params: Nested dict of arrays; layers may be a tuple of stacks, each stacked on axis 0.
        table: Pattern of tensor names → `KeyRule`, as for `apply_key_table`.

    Returns:
        Tensor name → C-contiguous array (safetensors writes others wrongly), made at each access
        from its slice of the parameters, so that a model larger than half of the memory can be
        written.

    Raises:
        ValueError: A parameter that no rule names (adapters that were not merged, say), or a rule
            without its parameter.
    """
    pieces: dict[str, Callable[[], np.ndarray]] = {}
    flat = dict(_flatten(params))
    ruled = {rule.path for rule in table.values()}
    if ruled != flat.keys():
        raise ValueError(
            f"these parameters are not the model's own: missing {sorted(ruled - flat.keys())[:5]}, "
            f"left over {sorted(flat.keys() - ruled)[:5]}; give the parameters of one model, with "
            "adapters merged"
        )
    for pattern, rule in table.items():
        stacks = flat[rule.path]
        if "{}" not in pattern:
            pieces[pattern] = _piece(stacks[0], None, rule)
            continue
        slices = ((leaf, layer) for leaf in stacks for layer in range(leaf.shape[0]))
        for number, (leaf, layer) in enumerate(slices, rule.first_layer):
            pieces[pattern.replace("{}", str(number))] = _piece(leaf, layer, rule)
    return _Lazy(pieces)


def renamed(names: Mapping[str, str], tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns tensors under other names, still read one at a time.

    Args:
        names: New name to the name in `tensors`.
        tensors: Those of a file; what `names` leaves out is not in the result.
    """
    return _Lazy({new: functools.partial(tensors.__getitem__, old) for new, old in names.items()})


class _Lazy(Mapping[str, Any]):
    """Values computed at each access."""

    def __init__(self, pieces: Mapping[str, Callable[[], Any]]) -> None:
        self._pieces = pieces

    def __getitem__(self, name: str) -> Any:
        return self._pieces[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def _piece(leaf: Any, layer: int | None, rule: KeyRule) -> Callable[[], np.ndarray]:
    undo = rule.inverse or rule.transform
    return lambda: np.asarray(undo(np.asarray(leaf if layer is None else leaf[layer])), order="C")


class _Place(NamedTuple):
    path: str
    layer: int | None  # index on axis 0 of the stacked parameter, None if not stacked
    transform: Callable[[np.ndarray], np.ndarray]


def _places(
    table: Mapping[str, KeyRule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, _Place]:
    """Returns where each tensor name that the model needs goes."""
    places: dict[str, _Place] = {}
    for pattern, rule in table.items():
        if rule.path not in shapes:
            raise ValueError(f"key table: {pattern!r} fills {rule.path!r}, not a parameter")
        if "{}" not in pattern:
            places[pattern] = _Place(rule.path, None, rule.transform)
            continue
        for layer in range(shapes[rule.path][0]):
            name = pattern.replace("{}", str(layer + rule.first_layer))
            places[name] = _Place(rule.path, layer, rule.transform)
    return places


def _key_problems(
    tensors: Mapping[str, np.ndarray],
    table: Mapping[str, KeyRule],
    places: Mapping[str, _Place],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Sequence[str],
) -> list[str]:
    """Says which tensors are missing, which are unexpected, and which parameters have no rule."""
    skip = [_regex(pattern) for pattern in ignored]
    ruled = {rule.path for rule in table.values()}
    problems = []
    for name, place in places.items():
        if name not in tensors:
            shape = shapes[place.path] if place.layer is None else shapes[place.path][1:]
            problems.append(f"missing tensor {name}, for parameter {place.path} of shape {shape}")
    for path, shape in shapes.items():
        if path not in ruled:
            problems.append(f"no rule fills parameter {path} of shape {shape}")
    for name in tensors:
        if name not in places and not any(regex.fullmatch(name) for regex in skip):
            problems.append(f"unexpected tensor {name} of shape {tuple(tensors[name].shape)}")
    return problems


def _name_unused(
    names: Sequence[str],
    tensors: Mapping[str, Any],
    ignored: Sequence[str],
    buffers: Mapping[str, Callable[[np.ndarray], bool]],
    source: str | Path,
) -> None:
    """Warns of the tensors that are left out, unless they hold what is computed anyway."""
    unused: dict[str, list[str]] = {}
    for name in names:
        pattern = next(each for each in (*buffers, *ignored) if _regex(each).fullmatch(name))
        if pattern not in buffers:
            unused.setdefault(pattern, []).append(name)
        elif not buffers[pattern](np.asarray(tensors[name])):
            logger.warning(
                "%s: tensor %s holds other values than config.json gives, which count", source, name
            )
    if unused:
        listed = (
            found[0] if len(found) == 1 else f"{pattern.replace('{}', '*')} ({len(found)} tensors)"
            for pattern, found in unused.items()
        )
        logger.warning("%s: not read, no part of this model: %s", source, ", ".join(listed))


def _check_layers(
    table: Mapping[str, KeyRule],
    shapes: Mapping[str, tuple[int, ...]],
    count: int,
    source: str | Path,
) -> None:
    """Refuses a number of layers that the checkpoint cannot have, before naming each of them."""
    for pattern, rule in table.items():
        shape = shapes.get(rule.path, ())
        if "{}" in pattern and shape and shape[0] > max(count, _MAX_LISTED):
            raise ValueError(
                f"{source}: the configuration describes {shape[0]} layers, but the checkpoint has "
                f"{count} tensors"
            )


def _shape_problems(name: str, part: Part, path: str, shape: tuple[int, ...]) -> list[str]:
    """Says what does not fit where one tensor would go."""
    expected = shape if part.layer is None else shape[1:]
    if transformed_shape(part) == expected:
        return []
    found = tuple(part.tensor.shape)
    return [f"tensor {name} has shape {found}, parameter {path} needs {expected}"]


def _dtype(asked: Any, parts: Sequence[Part]) -> np.dtype:
    """Returns the dtype of a parameter: as asked, or, for "keep", the one of its tensors."""
    if not isinstance(asked, str) or asked != "keep":
        return jnp.dtype(asked)
    kinds = {np.dtype(part.tensor.dtype) for part in parts}
    kept = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    return kept if kept in _KEPT_DTYPES else np.dtype(np.float32)


def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\{\}", r"\d+").replace(r"\*", ".*")
    return re.compile(escaped)


def _flatten(tree: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields ("a/b", leaves): one leaf, or, below a tuple of stacks, one of each stack in turn."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _flatten(value, f"{path}/{name}" if path else name)
    elif isinstance(tree, tuple | list):
        parts = [dict(_flatten(stack, path)) for stack in tree]
        for name in parts[0]:
            yield name, tuple(leaf for part in parts for leaf in part[name])
    else:
        yield path, (tree,)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree

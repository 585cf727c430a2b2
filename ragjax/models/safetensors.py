"""Reads safetensors files and fills a model's parameters from them, strictly.

table = {
    "embeddings.weight": KeyRule("embeddings/embedding"),
    "encoder.layer.{}.dense.weight": KeyRule("layers/dense/kernel", transpose),
}
params = apply_key_table(read_safetensors(folder), table, abstract_params, source=folder)
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

_QUANTIZED_DTYPES = re.compile(r"(F8|F6|F4|I8|U8|I4|U4).*")
_QUANTIZED_NAMES = re.compile(
    r".*\.(qweight|qzeros|g_idx|weight_scale|weight_scale_inv|SCB|absmax|quant_map|quant_state.*)"
)
_MAX_LISTED = 10


class KeyRule(NamedTuple):
    """Where one checkpoint tensor goes."""

    path: str  # place in the nested dict, parts joined by "/"
    transform: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor


def transpose(tensor: np.ndarray) -> np.ndarray:
    """Turn PyTorch's `[out, in]` weight of a linear layer into the `[in, out]` kernel."""
    return tensor.T


def read_safetensors(folder: Path) -> Mapping[str, np.ndarray]:
    """Open the safetensors file(s) of a Hugging Face folder; tensors are read when asked for.

    Args:
      folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards, or
        exactly one file `*.safetensors`.

    Returns:
      Mapping from tensor name to numpy array (bfloat16 as `ml_dtypes.bfloat16`); each access
      reads that tensor from disk.

    Raises:
      FileNotFoundError: no safetensors file, or a shard is missing. Where only PyTorch files
        (`.bin`, `.pt`) are there, the message says how to convert them.
      ValueError: a file is damaged or holds quantised (int8, fp8, GPTQ, ...) tensors.
    """
    names = _weight_files(Path(folder))
    tensors = _LazyTensors(names)
    for name in tensors:
        dtype = tensors.dtype_of(name)
        if _QUANTIZED_DTYPES.fullmatch(dtype) or _QUANTIZED_NAMES.fullmatch(name):
            raise ValueError(
                f"{tensors.path_of(name)}: tensor {name!r} is quantised ({dtype}), which ragjax "
                "does not read; use the float32, bfloat16 or float16 version of the checkpoint"
            )
    return tensors


def apply_key_table(
    tensors: Mapping[str, np.ndarray],
    table: Mapping[str, KeyRule],
    target: Mapping[str, Any],
    *,
    ignored: Sequence[str] = (),
    source: str | Path = "checkpoint",
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Fill a model's parameters from named tensors: nothing missing, left over or misshapen.

    A key of `table` names one tensor, or, with one `{}` in the place of the layer number, one
    tensor per layer; those are stacked on axis 0 of the parameter that the rule names.

    Args:
      tensors: tensor name → array; read once each, in the order of the names.
      table: pattern of tensor names → `KeyRule(path, transform)`. `transform` gets one tensor
        (not the stack) and returns it in the parameter's layout.
      target: nested dict of what has `.shape` (arrays or `jax.ShapeDtypeStruct`): the
        parameters to fill, for instance from `nnx_trees.abstract`. The size of axis 0 of a
        parameter with a `{}` rule is the number of layers.
      ignored: patterns of tensor names that may be there and are not used; `{}` stands for a
        number and `*` for anything.
      source: file or folder that the tensors came from, for the messages.
      dtype: float dtype of the parameters.

    Returns:
      Nested dict of jax arrays, of the structure and shapes of `target`.

    Raises:
      ValueError: a tensor that no rule or ignored pattern names, a parameter without its
        tensor, or a shape that differs; the message lists the first ten of them with shapes.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in _flatten(target)}
    places = _places(table, shapes)
    problems = _key_problems(tensors, table, places, shapes, ignored)
    filled: dict[str, np.ndarray] = {}
    for name, place in places.items():
        if name in tensors:
            problems += _fill(filled, name, tensors[name], place, shapes[place.path], dtype)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:_MAX_LISTED])
        more = len(problems) - _MAX_LISTED
        raise ValueError(
            f"{source}: the tensors do not fit the model that its configuration describes:"
            f"{listed}" + (f"\n  and {more} more" if more > 0 else "")
        )
    return _nest({path: jnp.asarray(array) for path, array in filled.items()})


class _Place(NamedTuple):
    path: str
    layer: int | None  # index on axis 0 of the stacked parameter, None if not stacked
    transform: Callable[[np.ndarray], np.ndarray]


def _places(
    table: Mapping[str, KeyRule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, _Place]:
    """Return where each tensor name that the model needs goes."""
    places: dict[str, _Place] = {}
    for pattern, rule in table.items():
        if rule.path not in shapes:
            raise ValueError(f"key table: {pattern!r} fills {rule.path!r}, not a parameter")
        if "{}" not in pattern:
            places[pattern] = _Place(rule.path, None, rule.transform)
            continue
        for layer in range(shapes[rule.path][0]):
            name = pattern.replace("{}", str(layer))
            places[name] = _Place(rule.path, layer, rule.transform)
    return places


def _key_problems(
    tensors: Mapping[str, np.ndarray],
    table: Mapping[str, KeyRule],
    places: Mapping[str, _Place],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Sequence[str],
) -> list[str]:
    """Say which tensors are missing, which are unexpected, and which parameters have no rule."""
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


def _fill(
    filled: dict[str, np.ndarray],
    name: str,
    tensor: np.ndarray,
    place: _Place,
    shape: tuple[int, ...],
    dtype: Any,
) -> list[str]:
    """Copy one tensor to its place in `filled`; return the problem, if there is one."""
    expected = shape if place.layer is None else shape[1:]
    found = tuple(tensor.shape)
    if len(found) == len(expected):
        tensor = place.transform(tensor)
    if tuple(tensor.shape) != expected:
        return [f"tensor {name} has shape {found}, parameter {place.path} needs {expected}"]
    if place.path not in filled:
        filled[place.path] = np.empty(shape, dtype)
    filled[place.path][... if place.layer is None else place.layer] = tensor
    return []


def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\{\}", r"\d+").replace(r"\*", ".*")
    return re.compile(escaped)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


class _LazyTensors(Mapping[str, np.ndarray]):
    """Tensors of open safetensors files by name, read at each access."""

    def __init__(self, paths: Sequence[Path]):
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            try:
                opened = safe_open(path, framework="np")
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: not a readable safetensors file ({error}); download it again"
                ) from error
            self._files.update(dict.fromkeys(opened.keys(), (path, opened)))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name][1].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def dtype_of(self, name: str) -> str:
        return self._files[name][1].get_slice(name).get_dtype()

    def path_of(self, name: str) -> Path:
        return self._files[name][0]


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(index)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise FileNotFoundError(
            f"{folder}: {len(others)} files *.safetensors but no model.safetensors.index.json"
        )
    pickled = sorted(
        path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix)
    )
    if pickled:
        raise FileNotFoundError(
            f"{folder}: only PyTorch weights ({pickled[0]}), which ragjax does not read because "
            'loading them runs code; where torch is installed, convert with `python -c "from '
            "transformers import AutoModel as M; M.from_pretrained('FOLDER')"
            ".save_pretrained('NEW')\"`"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{index}: expected a JSON object with a "weight_map" object') from error
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} is not a plain file name")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(
                f"{index.parent / name}: shard named in {index.name} is missing"
            )
    return [index.parent / name for name in names]

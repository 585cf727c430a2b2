"""Reads the JSON files of a model folder and refuses what ragjax cannot load."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from ragjax.storage.processes import host

_MAX_JSON = 100_000_000  # bytes; the index of a model of a trillion parameters has 20 MB
_MAX_LAYERS = 10_000
_MAX_SIZE = 2**31  # beyond it, the product of two sizes does not fit 64 bits
_MAX_INTEGER = 2**31 - 1
_MOST_LAYERS = 1000  # a larger number is a damaged file, and would be looped over


def read_json(path: Path, kind: type = dict) -> Any:
    """Parses a JSON file whose top level is of type `kind`; a missing file gives `kind()`.

    Args:
        path: The file.
        kind: `dict` or `list`.

    Raises:
        ValueError: The file is not strict JSON (see `parse_json`), or its top level is something
            else.
    """
    if not path.is_file():
        return kind()
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, kind):
        name = {dict: "an object", list: "an array"}[kind]
        raise ValueError(f"{path}: expected {name} at the top, got {type(value).__name__}")
    return value


def read_bytes(path: Path) -> bytes:
    """Reads a whole JSON file.

    Raises:
        ValueError: It is larger than any model's JSON file is.
    """
    size = path.stat().st_size
    if size > _MAX_JSON:
        raise ValueError(f"{path}: {size} bytes, more than the {_MAX_JSON} that ragjax reads")
    return path.read_bytes()


def parse_json(data: bytes, where: str) -> Any:
    """Parses strict JSON.

    Args:
        data: UTF-8.
        where: File, for the messages.

    Raises:
        ValueError: Not JSON, or JSON that readers understand differently: a key twice in one
            object, NaN, Infinity, a number out of range, nesting too deep.
    """
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is out of range")
    return value


def read_config(folder: Path, model_types: Sequence[str]) -> dict[str, Any]:
    """Reads a folder's `config.json`, refusing models that ragjax cannot run as they are.

    Args:
        folder: A Hugging Face model folder.
        model_types: The values of `model_type` that the caller can load.

    Returns:
        The parsed file.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: It is not valid, asks for code of its own (`auto_map`), is quantised, or is of
            another model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so this is not a model folder")
    config = read_json(path)
    for field in ("auto_map", "trust_remote_code"):
        if config.get(field):
            raise ValueError(
                f"{path}: the model brings its own Python code ({field}), which ragjax does not "
                f"run; supported model types: {', '.join(model_types)}"
            )
    model_type = config.get("model_type")
    if model_type not in model_types:
        raise ValueError(
            f"{path}: model_type {model_type!r:.100} is not supported here; "
            f"{', '.join(model_types)} is"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        method = str(method)[:100]
        raise ValueError(
            f"{path}: the checkpoint is quantised (quantization_config: {method}), which ragjax "
            "does not read; use its float32, bfloat16 or float16 version"
        )
    return config


def parse_sizes(parse: Callable[[Mapping[str, Any]], Any], raw: dict[str, Any], path: Path) -> Any:
    """Parses the contents of a `config.json`, whatever they are, into a family's configuration.

    Args:
        parse: The family's `parse_config`.
        raw: The parsed file.
        path: The file, for the messages.

    Returns:
        What `parse` returns: a dataclass of sizes.

    Raises:
        ValueError: A field is missing, of the wrong type or of a size that no model has; the
            message names file and field.
    """
    watched = _WatchedFields(raw)
    try:
        config = parse(watched)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        value = raw.get(watched.last)
        raise ValueError(
            f"{path}: {watched.last} = {value!r:.100} cannot be used ({error!s:.200})"
        ) from error
    check_sizes(config, str(path))
    return config


def check_sizes(config: Any, where: str) -> None:
    """Refuses numbers that no model has, before any array of such a size is described.

    Args:
        config: Dataclass of numbers, strings, tuples and other dataclasses.
        where: File, for the messages.

    Raises:
        ValueError: A number is too large or not finite.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            most = _MAX_LAYERS if field.name.endswith("layers") else _MAX_SIZE
            if is_dataclass(item):
                check_sizes(item, where)
            elif isinstance(item, int | float) and not abs(item) <= most:
                raise ValueError(f"{where}: {field.name} = {item!s:.40} is beyond {most}")


class _Local:
    device_set = frozenset[int]()  # of a numpy array


class _WatchedFields(dict[str, Any]):
    """Remembers which field was read last, to name it when its value cannot be used."""

    last = ""

    def __getitem__(self, field: str) -> Any:
        self.last = field
        return super().__getitem__(field)

    def get(self, field: str, default: Any = None) -> Any:
        self.last = field
        return super().get(field, default)


def fingerprint(config: Any, params: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Digests what decides a model's output: its configuration, parameters and tokenizer.

    Args:
        config: Anything whose `repr` is stable, such as a dataclass of numbers and strings.
        params: Nested dict of arrays.
        tokenizer: The tokenizer.

    Returns:
        sha256, 64 hexadecimal digits; equal in every process.
    """
    digest = hashlib.sha256(repr(config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        # A parameter on several devices is gathered one layer at a time.
        shared = leaf.ndim > 1 and len(getattr(leaf, "sharding", _Local).device_set) > 1
        for piece in (leaf[i] for i in range(len(leaf))) if shared else [leaf]:
            digest.update(np.ascontiguousarray(host(piece)).reshape(-1).view(np.uint8).data)
    digest.update(tokenizer.to_str().encode())
    return digest.hexdigest()


def token_id(config: Mapping[str, Any], field: str, default: int | None) -> int | None:
    """Returns a token id, or the default where the field is missing or null.

    Raises:
        ValueError: It is not a whole number of at least 0.
    """
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{field} must be a token id (a whole number from 0), got {value!r}")
    return value


def integer_field(config: Mapping[str, Any], field: str, *, most: int = _MAX_INTEGER) -> int:
    """Returns a size from a `config.json`.

    Raises:
        ValueError: It is not a whole number of 1 … `most`.
    """
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        limit = "" if most == _MAX_INTEGER else f" up to {most}"
        raise ValueError(f"{field} must be a positive whole number{limit}, got {value!r}")
    return value


def number_field(config: Mapping[str, Any], field: str, default: float) -> float:
    """Returns a number from a `config.json`, or the default where the field is missing.

    Raises:
        ValueError: It is not a positive number.
    """
    value = config.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise ValueError(f"{field} must be a positive number, got {value!r}")
    return float(value)


def read_sizes(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns several sizes from a `config.json`.

    Args:
        config: The parsed file.
        names: Name in the result to field of the file; those that end in "layers" are numbers of
            layers.

    Raises:
        ValueError: One is not a positive whole number, or there are too many layers.
    """
    return {
        ours: integer_field(
            config, field, most=_MOST_LAYERS if ours.endswith("layers") else _MAX_INTEGER
        )
        for ours, field in names.items()
    }


def write_fields(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Returns fields of a `config.json`: the inverse of `read_sizes`, from a dataclass."""
    return {field: getattr(config, ours) for ours, field in names.items()}

"""Options to and from TOML, YAML and JSON files."""

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ragjax.storage import nearest_name

Config = TypeVar("Config")
_PARSERS: dict[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".json": json.loads,
}


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as nested plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def load_config_file(path: str | Path, base: Config) -> Config:
    """Returns `base` with the values of a TOML, YAML or JSON file in place of its own.

    Values are coerced by the field's type, because YAML reads `1e-4` as text and `no` as False.

    Args:
        path: File ending in .toml, .yaml, .yml or .json.
        base: Config whose fields the file may name; nested fields are nested tables.

    Raises:
        ValueError: For another ending, a file that cannot be read, an unknown key (the nearest one
            is suggested) or a value of the wrong type; the message names file and key.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    parse = _PARSERS.get(path.suffix)
    if parse is None:
        raise ValueError(f"{path}: a config file ends in {', '.join(_PARSERS)}")
    try:
        values = parse(path.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    return _updated(base, {} if values is None else values, path, "")


def from_dict(base: Config, values: Mapping[str, Any], path: str | Path) -> Config:
    """Returns `base` with nested plain values; ValueError names `path`, their file, and the key."""
    return _updated(base, values, path, "")


def _updated(base: Config, values: Any, path: str | Path, prefix: str) -> Config:
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: {prefix or 'the file'} must hold keys and values")
    # Every Config is a dataclass, which the type variable cannot say; hence the two ignores.
    names = [f.name for f in dataclasses.fields(base)]  # pyrefly: ignore[bad-argument-type]  (a dataclass)
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = nearest_name(name, names)
            hint = f"did you mean {prefix}{near}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"{path}: unknown key {prefix}{key}; {hint}")
        current = getattr(base, name)
        if dataclasses.is_dataclass(current):
            changes[name] = _updated(current, value, path, f"{prefix}{name}.")
        else:
            changes[name] = _coerced(hints[name], value, f"{path}: {prefix}{name}")
    try:
        return dataclasses.replace(base, **changes)  # pyrefly: ignore[bad-specialization]  (a dataclass)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _coerced(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"{where} = {value!r}: expected {_type_name(hint)}")
    if origin is Literal:
        if value in args:
            return value
        raise wrong
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise wrong
        return tuple(_coerced(args[0], item, where) for item in items)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerced(args[0], value, where)
    if hint is str:
        # YAML turns `no`, `007` and `1.0` into other types; what was written is then lost.
        if not isinstance(value, str):
            raise ValueError(f"{where} = {value!r}: expected text; put it in quotes")
        return value
    if isinstance(value, bool) is not (hint is bool):
        raise wrong
    try:
        number = float(value) if hint in (int, float) else value
    except (TypeError, ValueError):
        raise wrong from None
    if hint is int:
        if number != int(number):
            raise wrong
        return int(number)
    return number


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))

"""Options to and from TOML, YAML and JSON files."""

import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ragjax.runs.options.checks import full_message
from ragjax.storage import nearest_name

Config = TypeVar("Config")
# Larger whole numbers have no float of their own, so one written as a float may be another.
_EXACT_FLOATS = 2**53


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which takes the last of equal keys; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that is there twice; one that is merged in (`<<`) may be overridden."""
        _check_unique(key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge")
        return super().construct_mapping(node, deep)


def _parse_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_unique(key for key, _ in pairs)
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _check_unique(keys: Iterable[Any]) -> None:
    seen: set[str] = set()
    for key in map(str, keys):
        if key in seen:
            raise ValueError(f"the key {key} is there twice in one place; leave one of them out")
        seen.add(key)


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from error


def _parse_toml(text: str) -> Any:
    try:
        return tomllib.loads(text + "\n")
    except tomllib.TOMLDecodeError as error:
        # Its message has the line's number but not the key.
        place = re.search(r"at line (\d+)", str(error))
        line = text.splitlines()[int(place.group(1)) - 1].strip() if place else ""
        raise ValueError(f"{error}{line and f': {line}'}") from error


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".toml": _parse_toml,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".json": _parse_json,
}


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as nested plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def load_config_file(path: str | Path, base: Config) -> Config:
    """Returns `base` with the values of a TOML, YAML or JSON file in place of its own.

    Values are coerced by the field's type, because YAML reads `1e-4` as text and `no` as False.

    Args:
        path: File ending in .toml, .yaml, .yml or .json; the config.json of a run is one too.
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
    data = path.read_bytes()
    try:
        values = parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: byte 0x{data[error.start]:02x} in line {line} is not UTF-8; convert the file,"
            " for example with iconv -f latin1 -t utf-8"
        ) from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return _updated(base, _options_of(values, base, path), path, "")


def from_dict(base: Config, values: Mapping[str, Any], path: str | Path) -> Config:
    """Returns `base` with nested plain values; ValueError names `path`, their file, and the key."""
    return _updated(base, values, path, "")


def _options_of(values: Any, base: Any, path: Path) -> Any:
    """Returns the options in a file, which are a part of it where a run wrote it.

    Raises:
        ValueError: A run of another program wrote it.
    """
    if not isinstance(values, Mapping) or "config" not in values or "fingerprint" not in values:
        return {} if values is None else values
    made, wanted = values.get("program"), getattr(base, "program", None)
    if made != wanted:
        raise ValueError(
            f"{path}: options of {_script(made)}, which are not those of {_script(wanted)}"
        )
    return values["config"]


def _script(program: str | None) -> str:
    """Returns the file of a program as config.json names it."""
    return f"experiments/{Path(program or 'adapt').stem}.py"


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
        if name in changes:
            raise ValueError(
                f"{path}: the key {prefix}{name} is there twice, with - and with _; leave one of"
                " them out"
            )
        current = getattr(base, name)
        if dataclasses.is_dataclass(current):
            changes[name] = _updated(current, value, path, f"{prefix}{name}.")
        else:
            changes[name] = _coerced(hints[name], value, f"{path}: {prefix}{name}")
    try:
        return dataclasses.replace(base, **changes)  # pyrefly: ignore[bad-specialization]  (a dataclass)
    except ValueError as error:
        raise ValueError(f"{path}: {full_message(base, error, group=prefix)}") from error


def _coerced(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"{where} = {value!r}: expected {_type_name(hint)}")
    if origin is Literal:
        if value in args:
            return value
        if isinstance(value, bool):
            wrong = ValueError(
                f"{wrong}; YAML reads off, on, yes and no without quotes as true and false: put the"
                " word in quotes"
            )
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
    if hint is bool:
        return value
    try:
        return _whole(value) if hint is int else _finite(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None


def _whole(value: Any) -> int:
    """Returns a whole number, also of text and of a float that is one (`1e3`)."""
    if isinstance(value, int):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
        return int(value)
    number = float(value)
    if number != int(number) or abs(number) >= _EXACT_FLOATS:
        raise ValueError
    return int(number)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    names = {int: "a whole number", float: "a finite number", bool: "true or false"}
    return names.get(hint, str(hint))

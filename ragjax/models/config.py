"""Reads the JSON files of a model folder and refuses what ragjax cannot load."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer


def read_json(path: Path, kind: type = dict) -> Any:
    """Parse a JSON file whose top level is of type `kind`; a missing file gives `kind()`.

    Args:
      path: the file.
      kind: `dict` or `list`.

    Raises:
      ValueError: the file is not JSON, or its top level is something else.
    """
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, kind):
        name = {dict: "an object", list: "an array"}[kind]
        raise ValueError(f"{path}: expected {name} at the top, got {type(value).__name__}")
    return value


def read_config(folder: Path, model_types: Sequence[str]) -> dict[str, Any]:
    """Read a folder's `config.json`, refusing models that ragjax cannot run as they are.

    Args:
      folder: a Hugging Face model folder.
      model_types: the values of `model_type` that the caller can load.

    Returns:
      The parsed file.

    Raises:
      FileNotFoundError: there is no `config.json`.
      ValueError: it is not valid, asks for code of its own (`auto_map`), is quantised, or is of
        another model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so this is not a model folder")
    config = read_json(path)
    if "auto_map" in config:
        raise ValueError(
            f"{path}: the model brings its own Python code (auto_map), which ragjax does not run; "
            f"supported model types: {', '.join(model_types)}"
        )
    model_type = config.get("model_type")
    if model_type not in model_types:
        raise ValueError(
            f"{path}: model_type {model_type!r} is not supported here; {', '.join(model_types)} is"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise ValueError(
            f"{path}: the checkpoint is quantised (quantization_config: {method}), which ragjax "
            "does not read; use its float32, bfloat16 or float16 version"
        )
    return config


def fingerprint(config: Any, params: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Digest what decides a model's output: its configuration, parameters and tokenizer.

    Args:
      config: anything whose `repr` is stable, such as a dataclass of numbers and strings.
      params: nested dict of arrays.
      tokenizer: the tokenizer.

    Returns:
      sha256, 64 hexadecimal digits; equal in every process.
    """
    digest = hashlib.sha256(repr(config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data)
    digest.update(tokenizer.to_str().encode())
    return digest.hexdigest()

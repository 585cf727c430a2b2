"""Parameters as a folder: one safetensors file and a manifest, complete or absent.

digest = write_export(folder, params, step=100, info={"encoder": "..."})
export = read_export(folder, template)    # every byte, name, shape and dtype is checked
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ragjax import storage
from ragjax.refresh.task import params_digest
from ragjax.storage.processes import host
from ragjax.storage.random_keys import key_data, with_keys

_FORMAT = 1
_MANIFEST = "manifest.json"
_PARAMS = "params.safetensors"
_WHAT = "export of parameters"
_NUMBER = re.compile(r"[0-9]+")
_MAX_LISTED = 10


class MismatchError(ValueError):
    """What is here belongs to another model or corpus than what was written elsewhere."""


class Export(NamedTuple):
    """Parameters read from a folder."""

    params: Any  # tree of numpy arrays, shaped as the template
    step: int  # training step of the parameters
    info: dict[str, Any]
    digest: str  # of ragjax.refresh.task.params_digest


def write_export(folder: Path, params: Any, *, step: int, info: Mapping[str, Any]) -> str:
    """Writes parameters beside the folder and renames them to it.

    Args:
        folder: Does not exist yet.
        params: Tree of arrays.
        step: Training step of the parameters.
        info: JSON values for the reader.

    Returns:
        The digest of the parameters.

    Raises:
        FileExistsError: The folder exists.
        DiskFullError: There is no room; nothing is left.
    """
    digest = params_digest(params)
    with storage.new_folder(Path(folder)) as building:
        path = building / _PARAMS
        tensors = _named_leaves(params)
        with storage.named_if_full(path, sum(tensor.nbytes for tensor in tensors.values())):
            save_file(tensors, path)
        manifest = {
            "format": _FORMAT,
            "step": int(step),
            "params_digest": digest,
            "info": dict(info),
            "sha256": {_PARAMS: storage.sha256(path)},
        }
        storage.write_sealed(building / _MANIFEST, manifest)
    return digest


def read_export(folder: Path, template: Any) -> Export:
    """Reads parameters that must fit a template.

    Args:
        folder: Written by `write_export`.
        template: Tree of arrays or `jax.ShapeDtypeStruct`.

    Raises:
        FileNotFoundError: No complete export there.
        ValueError: A file was changed or is a link.
        MismatchError: Names, shapes or dtypes are not those of the template; the message lists what
            differs.
    """
    folder = Path(folder)
    manifest = storage.read_sealed(folder / _MANIFEST, what=_WHAT, version=_FORMAT)
    storage.verify_folder(folder, manifest.get("sha256"), also=(_MANIFEST,))
    tensors = load_file(folder / _PARAMS)
    leaves, structure = jax.tree_util.tree_flatten_with_path(key_data(template))
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    _check_fits(tensors, wanted, folder)
    params = jax.tree_util.tree_unflatten(structure, [tensors[name] for name in wanted])
    digest = params_digest(params)
    if digest != manifest.get("params_digest"):
        raise ValueError(
            f"The parameters in {folder} have the digest {digest}, its manifest says "
            f"{manifest.get('params_digest')}; write them again"
        )
    params = with_keys(params, template)
    return Export(params, int(manifest["step"]), manifest["info"], digest)


def list_exports(root: Path) -> list[tuple[int, Path]]:
    """Returns the numbered folders in `root` with their numbers, in the order of the numbers."""
    root = Path(root)
    if not root.is_dir():
        return []
    return sorted(
        (int(path.name), path)
        for path in root.iterdir()
        if _NUMBER.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    )


def _named_leaves(params: Any) -> dict[str, NDArray[Any]]:
    """Returns the leaves as arrays that safetensors writes correctly."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(key_data(params)):
        array = host(leaf)
        # safetensors writes the memory as it lies, which is not the array where it is transposed.
        named[jax.tree_util.keystr(path)] = np.ascontiguousarray(array).reshape(array.shape)
    return named


def _check_fits(tensors: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuses names, shapes and dtypes other than the template's."""
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in wanted]
    for name in wanted.keys() & tensors.keys():
        found = (tensors[name].shape, tensors[name].dtype.name)
        expected = (tuple(np.shape(wanted[name])), np.dtype(wanted[name].dtype).name)
        if found != expected:
            problems.append(
                f"{name} is {found[0]} {found[1]}, expected {expected[0]} {expected[1]}"
            )
    if problems:
        shown = "; ".join(sorted(problems)[:_MAX_LISTED])
        more = len(problems) - _MAX_LISTED
        raise MismatchError(
            f"The parameters in {folder} are of another model than the one here: {shown}"
            f"{f'; and {more} more' if more > 0 else ''}. Use the encoder they were trained from"
        )


def is_export(folder: Path, params: Any, digest: str) -> bool:
    """Tells whether a folder holds these parameters, whole."""
    try:
        return read_export(folder, params).digest == digest
    except (OSError, ValueError):
        return False

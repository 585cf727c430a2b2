"""Publishes a model folder: written beside its name, read back, only then renamed into place."""

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

from ragjax.models.export.weights import Weights, check_weights, write_weights
from ragjax.storage import write_text

_MARGIN = 1 << 20  # bytes left free, for what the file system itself needs


class ModelFile(Protocol):
    """A whole model in one file of another format."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        ...

    def write(self, path: Path) -> None:
        """Writes the file under a name that nobody reads yet."""
        ...

    def check(self, path: Path) -> int:
        """Reads the file back and returns how many tensors are as they were to be.

        Raises:
            OSError: The file does not hold what it was to hold.
        """
        ...


class ModelFolder(NamedTuple):
    """What a folder is going to hold."""

    files: Mapping[str, str]  # path in the folder -> text
    weights: Mapping[str, Weights]  # path of a subfolder, "" for the folder itself -> its tensors
    models: Mapping[str, ModelFile] = MappingProxyType({})  # path in the folder -> GGUF, ONNX

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of every file, by its path in the folder."""
        sizes = {path: len(text.encode()) for path, text in self.files.items()}
        for place, weights in self.weights.items():
            prefix = f"{place}/" if place else ""
            sizes |= {prefix + shard.file: shard.size for shard in weights.shards}
            if weights.index is not None:
                sizes[f"{prefix}model.safetensors.index.json"] = len(weights.index.encode())
        sizes |= {path: model.size for path, model in self.models.items()}
        return dict(sorted(sizes.items()))


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    sizes: dict[str, int]  # bytes of every file, by its path in the folder
    num_tensors: int  # read back and found equal, bit for bit


def check_destination(folder: Path, *, size: int = 0) -> None:
    """Checks that a folder can be made: nothing is there yet, and the disk has room.

    Args:
        folder: May exist if it is empty.
        size: Bytes that are going to be written.

    Raises:
        ValueError: There is something at that path.
        OSError: Not enough room.
    """
    folder = folder.absolute()
    if folder.is_dir():
        if found := sorted(path.name for path in folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty (it holds {', '.join(found[:3])}); nothing is overwritten, "
                "give another folder"
            )
    elif folder.exists():
        raise ValueError(f"{folder} is a file; give a folder")
    existing = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size + _MARGIN:
        raise OSError(
            f"{folder}: {size / 1e6:,.0f} MB are to be written, {free / 1e6:,.0f} MB are free there"
        )


def publish(contents: ModelFolder, folder: Path) -> Exported:
    """Writes a folder so that it is there whole, or not at all.

    A process that is killed leaves a hidden folder `.NAME.*.partial` beside, and nothing else.

    Args:
        contents: What to write.
        folder: Must not exist, or be empty; parents are made.

    Raises:
        ValueError, OSError: As `check_destination`; also where a file reads back differently.
    """
    folder = folder.absolute()
    sizes = contents.sizes()
    check_destination(folder, size=sum(sizes.values()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    scratch.mkdir()
    try:
        for path, text in contents.files.items():
            write_text(scratch / path, text)
        num_tensors = 0
        for place, weights in contents.weights.items():
            (scratch / place).mkdir(exist_ok=True)
            write_weights(weights, scratch / place)
            num_tensors += check_weights(weights, scratch / place)
        for path, model in contents.models.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            model.write(scratch / path)
            num_tensors += model.check(scratch / path)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Exported(folder, sizes, num_tensors)

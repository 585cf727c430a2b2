"""Folders of a LoRA adapter as PEFT writes them: read into the weights of their base model.

adapter = read_adapter(folder)                       # None: a folder of something else
tensors = adapter.merged(read_safetensors(adapter.base))
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragjax.models.files.config import read_json
from ragjax.models.files.safetensors import read_safetensors
from ragjax.models.files.sources import resolve_source

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<layer>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?"
)
# Settings that change what is computed, and the values that leave it as it is.
_UNSUPPORTED = {
    "use_dora": (False,), "use_qalora": (False,), "lora_bias": (False,), "bias": ("none",),
    "fan_in_fan_out": (False,), "layer_replication": (None,), "trainable_token_indices": (None,),
}  # fmt: skip


class Adapter(NamedTuple):
    """An adapter and the folder of the model that it was trained on."""

    folder: Path
    base: Path
    settings: Mapping[str, Any]  # the contents of adapter_config.json

    def merged(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the base model's tensors with the adapter's in them, each read when asked for.

        Args:
            tensors: Of the base model, named as in its file.

        Raises:
            ValueError: A tensor of the adapter is of no kind that is read, has no place in the base
                model, or does not fit.
        """
        sides: dict[tuple[str, bool], dict[str, Any]] = {}
        found = dict(tensors.items())
        for name, tensor in read_safetensors(self.folder).items():
            stem = name.removeprefix(_PREFIX)
            if match := _LORA.fullmatch(stem):
                key = (match["layer"], bool(match["kind"]))
                sides.setdefault(key, {})[match["side"]] = tensor
            elif "lora_" in stem:
                raise ValueError(f"{self.folder}: tensor {name} is no part of LoRA that is read")
            else:  # a whole table that was trained beside the adapters
                stem = re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", stem)
                found[self._place(stem, tensors) or stem] = tensor
        for (layer, turned), pair in sides.items():
            place = self._place(f"{layer}.weight", tensors)
            if place is None or pair.keys() != {"A", "B"}:
                problem = f"no tensor {layer}.weight" if place is None else "one half alone"
                raise ValueError(f"{self.folder}: adapts {layer}, but there is {problem} to merge")
            found[place] = self._adapted(tensors[place], layer, pair, turned=turned)
        logger.warning(
            "%s: a LoRA adapter (%d layers), merged into %s", self.folder, len(sides), self.base
        )
        return found

    def _adapted(self, base: Any, layer: str, pair: Mapping[str, Any], *, turned: bool) -> Any:
        down, up = pair["A"], pair["B"]
        adapted = _Adapted(base, down, up, self._scale(layer, down.shape[0]), turned)
        change = (up.shape[0], down.shape[-1])
        if down.shape[0] != up.shape[-1] or adapted.shape != (change[::-1] if turned else change):
            raise ValueError(
                f"{self.folder}: {layer} is {tuple(base.shape)} in {self.base}, and the adapter's "
                f"tensors are {tuple(down.shape)} and {tuple(up.shape)}; it is of another model"
            )
        return adapted

    def _scale(self, layer: str, rank: int) -> float:
        """Returns the factor of a layer's change, as PEFT finds it."""
        patterns = self.settings.get("alpha_pattern") or {}
        fitting = (
            alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)
        )
        alpha = next(fitting, self.settings["lora_alpha"])
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _place(self, name: str, tensors: Mapping[str, Any]) -> str | None:
        """Returns the name of a tensor in the base model, whose file may leave out a prefix."""
        if name in tensors:
            return name
        fits = [each for each in tensors if each.endswith(f".{name}") or name.endswith(f".{each}")]
        return fits[0] if len(fits) == 1 else None


def read_adapter(folder: Path) -> Adapter | None:
    """Opens the folder of an adapter; None where it holds anything else.

    Args:
        folder: Of an adapter, or of a model.

    Raises:
        FileNotFoundError: The base model is not there.
        ValueError: It is no LoRA adapter, or of a kind that is not read.
    """
    path = folder / CONFIG
    if not folder.is_dir() or not path.is_file():
        return None
    if (folder / "config.json").is_file():
        logger.warning("%s: the adapter in it is not read, the whole model beside it is", folder)
        return None
    settings = read_json(path)
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{path}: an adapter of type {kind!r:.50}, of which only LORA is read")
    for field, values in _UNSUPPORTED.items():
        if (value := settings.get(field, values[0])) and value not in values:
            raise ValueError(
                f"{path}: {field} = {value!r:.50} is not supported in a LoRA adapter; merge it "
                "into its base model with PEFT (merge_and_unload) and give that folder"
            )
    alpha, name = settings.get("lora_alpha"), settings.get("base_model_name_or_path")
    if not isinstance(alpha, int | float) or not isinstance(name, str) or not name:
        raise ValueError(
            f"{path}: a LoRA adapter needs lora_alpha and base_model_name_or_path, got "
            f"{alpha!r:.50} and {name!r:.100}"
        )
    beside = folder / name  # an absolute path stays itself
    try:
        base = resolve_source(str(beside) if beside.is_dir() else name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{folder} is a LoRA adapter of {name!r}, and that base model cannot be had: {error}. "
            f"Put its folder in base_model_name_or_path of {CONFIG}"
        ) from error
    if not (base / "config.json").is_file() and not (base / "modules.json").is_file():
        raise ValueError(f"{folder} is a LoRA adapter of {base}, which is no folder of a model")
    tokenizers = [place / "tokenizer.json" for place in (folder, base)]
    own, others = (each.read_bytes() if each.is_file() else None for each in tokenizers)
    if own and others and own != others:
        logger.warning("%s is another tokenizer than that of %s, which is used", *tokenizers)
    return Adapter(folder, base, settings)


@dataclass(frozen=True)
class _Adapted:
    """A tensor and its low-rank change, added in float32 when it is read."""

    base: Any
    down: Any  # [rank, in]
    up: Any  # [out, rank]
    scale: float
    turned: bool  # True: an embedding table, [in, out]

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.base.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the sum as a new array."""
        base, down, up = (np.asarray(each, np.float32) for each in (self.base, self.down, self.up))
        change = np.float32(self.scale) * (up @ down)
        array = base + (change.T if self.turned else change)
        return array if dtype is None else array.astype(dtype, copy=False)

"""A causal decoder as one GGUF file, which llama.cpp and the programs around it serve.

The header is packed by the gguf package and read back by the reader of this library, which shares
no code with it; tensors are written one at a time.
"""

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.gguf_writer import GGUFWriter, WriterState
from gguf.quants import dequantize, quantize

from ragjax.models.decoder.checkpoint import params_to_gguf
from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.family import FAMILY
from ragjax.models.export.base import BaseModel
from ragjax.models.export.gguf_tokenizer import tokenizer_fields
from ragjax.models.files.gguf.config import parse_config
from ragjax.models.files.gguf.file import read_gguf_file
from ragjax.models.files.gguf.model import PERMUTED
from ragjax.models.language_model import LanguageModel
from ragjax.models.layers.rotary import LinearScaling, YarnScaling, yarn_attention_factor
from ragjax.models.layers.stacks import Params
from ragjax.storage import whole_file

GgufType = Literal["F16", "Q8_0"]
# llama.cpp's name of an architecture, by `model_type`.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
_ALIGNMENT = 32  # bytes; where a tensor may begin
_USUAL_PATTERN = 6  # of Gemma 3: what a file means that does not say it
_ROPE_FACTORS = "rope_freqs.weight"
# Largest value of each type: the scale of a Q8_0 block is a float16, of whole numbers up to 127.
_LARGEST = {"F32": math.inf, "F16": 65504.0, "Q8_0": 65504.0 * 127}
_VALUES_AT_ONCE = 1 << 22  # that are quantised


class Slot(NamedTuple):
    """How a tensor is stored."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


class GgufModelFile(NamedTuple):
    """What a GGUF file is going to hold."""

    fields: Mapping[str, Any]  # metadata
    tensors: Mapping[str, np.ndarray]  # each access may compute its tensor
    slots: Mapping[str, Slot]  # by tensor name, in the order of the file
    header: bytes  # up to the first tensor
    size: int  # bytes of the file

    def write(self, path: Path) -> None:
        """Writes the file, one tensor in memory at a time.

        Raises:
            DiskFullError: There is no room.
        """
        with whole_file(path, num_bytes=self.size) as file:
            file.write(self.header)
            for name, slot in self.slots.items():
                for part in _stored(self.tensors[name], slot.kind):
                    file.write(part.data)
                file.write(bytes(-file.tell() % _ALIGNMENT))

    def check(self, path: Path) -> int:
        """Reads the file with this library's reader and compares metadata and values.

        Returns:
            The number of tensors, all of them equal to what was to be written.

        Raises:
            OSError: The file does not hold what it was to hold.
        """
        try:
            found = read_gguf_file(path)
        except ValueError as error:
            raise OSError(f"{path}: cannot be read back ({error})") from error
        for name, value in self.fields.items():
            if value != [] and not _equal(found.fields.get(name), value):
                raise OSError(f"{path}: the field {name} reads back differently")
        if list(found.tensors) != list(self.slots):
            raise OSError(f"{path}: other tensors are read back than were written")
        for name, slot in self.slots.items():
            # As integers: 0.0 is not -0.0.
            expected = _values(self.tensors[name], slot.kind).view("u4")
            if not np.array_equal(np.asarray(found.tensors[name]).view("u4"), expected):
                raise OSError(
                    f"{path}: tensor {name} reads back differently; nothing is published, and the"
                    " disk or the gguf package is to be looked at"
                )
        return len(self.slots)


def plan_gguf(
    lm: LanguageModel, base: BaseModel, params: Params, *, kind: GgufType, license: str | None
) -> GgufModelFile:
    """Lays out a GGUF file and proves that what is read back is this model.

    Args:
        lm: Architecture and tokenizer.
        base: What the base model's files say.
        params: Parameters without adapters, the layers in one stack or several.
        kind: Of the matrices: float16, or blocks of 32 numbers of 8 bits with a float16 scale,
            which rows that are no multiple of 32 do not have: they are float16. Vectors are
            float32.
        license: Of the model, None: not known.

    Returns:
        What to write.

    Raises:
        ValueError: GGUF, or llama.cpp, has no such model or tokenizer; a parameter is NaN or
            beyond the range of its type.
    """
    if kind not in get_args(GgufType):
        raise ValueError(f"GGUF type {kind!r} is not one of {', '.join(get_args(GgufType))}")
    config = lm.config
    if lm.family is not FAMILY:
        raise ValueError(
            f"{lm.source}: GGUF files are written of causal decoders"
            f" ({', '.join(_ARCHITECTURES)}), not of encoder-decoders; safetensors are written of"
            " both"
        )
    architecture = _ARCHITECTURES[config.model_type]
    _refuse_unknown_biases(lm.source, config)
    named = params_to_gguf(config, params, permuted=PERMUTED[architecture])
    factors = _rope_factors(config)
    extra = {} if factors is None else {_ROPE_FACTORS: factors}
    tensors = _Joined(named, extra)
    fields = {
        "general.architecture": architecture,
        **_general(base, kind, license),
        **{f"{architecture}.{name}": value for name, value in _sizes(config).items()},
        **tokenizer_fields(lm, base),
    }
    _check_read_back(lm, fields, dict.fromkeys(named, np.zeros(1)) | extra)
    slots = _slots(tensors, kind)
    header = _header(fields, slots)
    padded = [slot.num_bytes + -slot.num_bytes % _ALIGNMENT for slot in slots.values()]
    return GgufModelFile(fields, tensors, slots, header, len(header) + sum(padded))


class _Joined(Mapping[str, np.ndarray]):
    """Tensors of two mappings; asking whether one is there does not compute it."""

    def __init__(self, one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
        self._names = {name: part for part in (one, other) for name in part}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._names[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _general(base: BaseModel, kind: GgufType, license: str | None) -> dict[str, Any]:
    name = base.source.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": name or "model",
        "general.file_type": int(LlamaFileType[f"MOSTLY_{kind}"]),
        "general.quantization_version": 2,
    }
    return fields | ({"general.license": license} if license else {})


def _sizes(config: DecoderConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.sliding_window is not None:
        fields["attention.sliding_window"] = config.sliding_window
        fields |= _pattern(config)
    if config.local_rope_theta is not None:
        fields["rope.freq_base_swa"] = float(config.local_rope_theta)
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    elif isinstance(scaling, YarnScaling):
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": scaling.original_positions,
            "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        }
        usual = yarn_attention_factor(scaling.factor)
        if not math.isclose(scaling.attention_factor, usual, rel_tol=1e-6):
            fields["rope.scaling.attn_factor"] = scaling.attention_factor / usual
    return fields


def _pattern(config: DecoderConfig) -> dict[str, int]:
    """Returns of how many layers in a row one attends to everything, where GGUF can say it."""
    if config.model_type != "gemma3_text":
        return {}
    layers = range(1, config.num_layers + 1)
    for every in (_USUAL_PATTERN, *range(2, config.num_layers + 1)):
        if config.sliding_layers == tuple(layer % every != 0 for layer in layers):
            return {} if every == _USUAL_PATTERN else {"attention.sliding_window_pattern": every}
    return {}


def _rope_factors(config: DecoderConfig) -> np.ndarray | None:
    """Returns what each rotary frequency is divided by, where GGUF has no constants for it."""
    if config.rope_scaling is None or isinstance(config.rope_scaling, LinearScaling | YarnScaling):
        return None
    plain, stretched = _frequencies(config)
    return (plain / stretched).astype(np.float32)


def _frequencies(config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rotary frequencies `[head_dim / 2]` without and with their scaling."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = np.float32(1) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    return plain, plain if scaling is None else scaling.stretch(plain, config.rope_theta)


def _refuse_unknown_biases(source: str, config: DecoderConfig) -> None:
    biased = config.qkv_bias or config.output_bias or config.feed_forward_bias
    if biased and config.model_type in ("qwen3", "gemma3_text"):
        raise ValueError(f"{source}: llama.cpp has no {config.model_type} with biases")


def _check_read_back(
    lm: LanguageModel, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Refuses a model that the metadata of a GGUF file cannot describe."""
    config, where = lm.config, f"{lm.source}: this model cannot be written as GGUF"
    try:
        found = parse_config(Path("GGUF"), fields["general.architecture"], fields, tensors)
        # Names of the same computation: Mistral without a window is a Llama, and so on.
        kept = ("model_type", "query_scalar", "rope_scaling", "rms_norm_eps", "rope_theta")
        same = dataclasses.replace(found, **{name: getattr(config, name) for name in kept})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    names = [field.name for field in dataclasses.fields(config)]
    wrong = [name for name in names if getattr(config, name) != getattr(same, name)]
    if not math.isclose(config.attention_scale, found.attention_scale, rel_tol=1e-6):
        wrong.append("query_scalar")
    if not np.allclose(_frequencies(config)[1], _frequencies(found)[1], rtol=4e-6, atol=0):
        wrong.append("rope_scaling")
    if not math.isclose(config.rms_norm_eps, found.rms_norm_eps, rel_tol=1e-6):
        wrong.append("rms_norm_eps")
    if wrong:
        listed = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        raise ValueError(f"{where}: its metadata cannot say {listed}")


def _slots(tensors: Mapping[str, np.ndarray], kind: GgufType) -> dict[str, Slot]:
    """Looks at every tensor once and chooses how it is stored."""
    slots: dict[str, Slot] = {}
    for name, tensor in tensors.items():
        wanted = "F32" if tensor.ndim == 1 else kind
        if tensor.shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[wanted]][0]:
            wanted = "F16"
        largest = float(np.abs(tensor).max())
        if not largest <= _LARGEST[wanted] or largest == math.inf:
            problem = (
                f"has {largest:g}, beyond the range of {wanted}"
                if math.isfinite(largest)
                else "holds NaN or infinity"
            )
            raise ValueError(f"nothing is written: {name} {problem}")
        slots[name] = Slot(GGMLQuantizationType[wanted], tensor.shape)
    return slots


def _header(fields: Mapping[str, Any], slots: Mapping[str, Slot]) -> bytes:
    """Returns everything before the first tensor, as the gguf package packs it."""
    writer = GGUFWriter(None, fields["general.architecture"])
    for name, value in fields.items():
        if name == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, slot in slots.items():
        writer.add_tensor_info(
            name, slot.shape, np.dtype("f4"), slot.num_bytes, raw_dtype=slot.kind
        )
    # The writer opens a file by itself; this one takes the bytes, whose number is asked for first.
    memory: Any = io.BytesIO()
    writer.fout, writer.state = [memory], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    memory.write(bytes(-memory.tell() % _ALIGNMENT))
    return memory.getvalue()


def _stored(tensor: np.ndarray, kind: GGMLQuantizationType) -> Iterator[np.ndarray]:
    """Yields the bytes of a tensor, a part of it at a time."""
    flat = np.asarray(tensor, np.float32, order="C").reshape(-1)
    for start in range(0, flat.size, _VALUES_AT_ONCE):
        part = flat[start : start + _VALUES_AT_ONCE]
        if kind.name == "Q8_0":
            # As one row of blocks: of many, the package takes 16 at a time in Python.
            yield quantize(part[None], kind)[0]
        else:
            yield part.astype("<f2" if kind.name == "F16" else "<f4").view(np.uint8)


def _values(tensor: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Returns the float32 values that the stored bytes of a tensor stand for."""
    parts = [dequantize(stored[None], kind)[0] for stored in _stored(tensor, kind)]
    return np.concatenate(parts).reshape(tensor.shape)


def _equal(found: Any, value: Any) -> bool:
    """Says whether a field is as it was given, up to the rounding of floats to float32."""
    if isinstance(value, list) and value and isinstance(value[0], float):
        return np.array_equal(np.asarray(found, np.float32), np.asarray(value, np.float32))
    if isinstance(value, float):
        return np.float32(found) == np.float32(value)
    return found == value

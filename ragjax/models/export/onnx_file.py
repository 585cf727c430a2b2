"""A text encoder as ONNX files, for onnxruntime and the programs built on it.

Nothing is written before onnxruntime has computed the embeddings of a few texts as `encode` does.
"""

import copy
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.models.encoder import TextEncoder
from ragjax.models.encoders import bert, roberta
from ragjax.models.export.onnx_graph import EMBEDDING, build_model
from ragjax.models.inputs import Tokens
from ragjax.storage import named_if_full, whole_file

OnnxType = Literal["float32", "int8"]
FILES: dict[OnnxType, str] = {"float32": "onnx/model.onnx", "int8": "onnx/model_qint8.onnx"}
_MOST_BYTES = 2**31 - 1  # of a protocol buffer
_TOLERANCE = 1e-4  # of the largest number of an embedding
_LEAST_COSINE = 0.9  # of int8 and float32; .99 is usual
_PROBES = (
    "Where is it?",
    "A short passage about the weather in the mountains, as a model card could have it.",
    "In 2024, 1234567 people paid $3.50; the rest (12 %) did not.",
    "x",
)
_PROBE_LENGTH = 64


class OnnxModelFile(NamedTuple):
    """An ONNX file."""

    content: bytes
    num_tensors: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.content)

    def write(self, path: Path) -> None:
        """Writes the file.

        Raises:
            DiskFullError: There is no room.
        """
        with whole_file(path, num_bytes=self.size) as file:
            file.write(self.content)

    def check(self, path: Path) -> int:
        """Reads the file back; returns the number of its tensors.

        Raises:
            OSError: The file does not hold what was written.
        """
        if path.read_bytes() != self.content:
            raise OSError(
                f"{path}: reads back differently; nothing is published, and the disk is to be"
                " looked at"
            )
        return self.num_tensors


def plan_onnx(
    encoder: TextEncoder, tensors: Mapping[str, np.ndarray], *, kinds: tuple[OnnxType, ...]
) -> dict[str, OnnxModelFile]:
    """Makes ONNX files of an encoder.

    Args:
        encoder: Of the families of BERT or RoBERTa (a DPR tower: `dpr_as_bert.as_bert`), with its
            parameters.
        tensors: Those of the transformer, as `export.encoder.encoder_weights` names them.
        kinds: "float32", or "int8": weights of 8 bits, with which onnxruntime multiplies inputs
            that it rounds to 8 bits as it runs.

    Returns:
        Path in the folder → file.

    Raises:
        ValueError: Another architecture, a file of more than 2 GB, or onnxruntime does not compute
            the same embeddings.
    """
    if encoder.family not in (bert.FAMILY, roberta.FAMILY):
        raise ValueError(
            f"{encoder.source}: ONNX files are written of BERT, DPR, RoBERTa and their relatives,"
            f" not of {encoder.family.model_types[0]}; safetensors are"
        )
    size = sum(tensor.size for tensor in tensors.values()) * 4
    if size > _MOST_BYTES:
        raise ValueError(
            f"{encoder.source}: an ONNX file holds at most 2 GB, its parameters take"
            f" {size / 1e9:.1f} GB; safetensors have no such limit"
        )
    model = build_model(encoder, tensors)
    count = len(model.graph.initializer)
    contents = {"float32": model.SerializeToString()}
    if "int8" in kinds:
        contents["int8"] = _quantized(model)
    expected = _embed(encoder)
    for kind, content in contents.items():
        _check_same(encoder, kind, content, expected)
    return {FILES[kind]: OnnxModelFile(contents[kind], count) for kind in kinds}


def check_installed() -> None:
    """Raises ImportError, with what to install, where ONNX files cannot be written."""
    if not all(map(find_spec, ("onnx", "onnxruntime"))):
        raise ImportError("ONNX files need two packages: pip install 'ragjax[onnx]'")


def _quantized(model: Any) -> bytes:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = copy.deepcopy(model)
    # Nothing is left to prepare; without this mark the package says so on each call.
    mark = model.metadata_props.add()
    mark.key, mark.value = "onnx.quant.pre_process", "onnxruntime.quant"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with named_if_full(path, 0):
            # Weights of 7 bits: processors without VNNI add two products in 16 bits.
            quantize_dynamic(
                model,
                path,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
                op_types_to_quantize=["MatMul", "Gather"],
            )
        return path.read_bytes()


def _probe_tokens(encoder: TextEncoder) -> tuple[np.ndarray, np.ndarray]:
    length = min(_PROBE_LENGTH, encoder.max_length)
    ids = np.full((len(_PROBES), length), encoder.pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(_PROBES):
        found = encoder.tokenizer.encode(text).ids[:length]
        ids[row, : len(found)], mask[row, : len(found)] = found, 1
    return ids, mask


def _embed(encoder: TextEncoder) -> np.ndarray:
    ids, mask = _probe_tokens(encoder)
    tokens = Tokens(jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), encoder.params)
    return np.asarray(jax.jit(encoder.encode)(params, tokens))


def _check_same(encoder: TextEncoder, kind: str, content: bytes, expected: np.ndarray) -> None:
    """Raises ValueError where onnxruntime computes other embeddings."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    ids, mask = _probe_tokens(encoder)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    wanted = [each.name for each in session.get_inputs()]
    found = np.asarray(session.run([EMBEDDING], {name: given[name] for name in wanted})[0])
    if kind == "float32":
        gap = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))
        if not gap <= _TOLERANCE:
            raise ValueError(
                f"{encoder.source}: onnxruntime computes other embeddings (they differ by {gap:.1e}"
                f" of the largest number, {_TOLERANCE:g} is allowed); nothing is written"
            )
        return
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = float(((found * expected).sum(axis=1) / np.maximum(lengths, 1e-12)).min())
    if not cosine >= _LEAST_COSINE:
        raise ValueError(
            f"{encoder.source}: in int8 an embedding has a cosine of {cosine:.3f} to its own in"
            f" float32, {_LEAST_COSINE} is the least allowed; write ONNX in float32"
        )

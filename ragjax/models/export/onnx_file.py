"""A text encoder as ONNX files, for onnxruntime and the programs built on it.

Nothing is written before onnxruntime has computed the embeddings of a few texts as `encode` does.
"""

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.models.encoder import TextEncoder
from ragjax.models.encoders import bert, roberta
from ragjax.models.export.onnx_graph import EMBEDDING, WORDS, build_model
from ragjax.models.inputs import Tokens
from ragjax.storage import whole_file

OnnxType = Literal["float32", "int8"]
FILES: dict[OnnxType, str] = {"float32": "onnx/model.onnx", "int8": "onnx/model_qint8.onnx"}
_MOST_BYTES = 2**31 - 1  # of a protocol buffer
_TOLERANCE = 1e-4  # of the largest number of an embedding
_LEAST_COSINE = 0.99  # of int8 and float32; .999 is usual
_BLOCK = 32  # weights with one scale
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
        kinds: "float32", or "int8": weights of 8 bits, by which onnxruntime multiplies inputs that
            it rounds to 8 bits as it runs; no other program has the operator for that.

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
    """Returns the model with matrices and table of words in 8 bits.

    onnxruntime's dynamic quantisation rounds all inputs of a product by one scale: recall@5 of
    MiniLM fell by .017. Its operator MatMulNBits has a scale for each 32 numbers, of weights and
    inputs.
    """
    from onnx import helper, numpy_helper

    model = copy.deepcopy(model)
    graph, tensors = model.graph, {each.name: each for each in model.graph.initializer}
    made, nodes = [], []

    def add(name: str, array: np.ndarray) -> str:
        made.append(numpy_helper.from_array(array, name))
        return name

    for node in graph.node:
        (output,), inputs = node.output, list(node.input)
        weight = inputs[1] if node.op_type == "MatMul" else inputs[0] if inputs else ""
        if weight not in tensors or not (node.op_type == "MatMul" or weight == WORDS):
            nodes.append(node)
            continue
        values = numpy_helper.to_array(tensors.pop(weight))
        if weight == WORDS:  # a scale for each token
            scales = _scales(values)
            rounded = np.rint(values / scales).astype(np.int8)
            table, scale = add(f"{weight}.int8", rounded), add(f"{weight}.scale", scales)
            nodes += [
                helper.make_node("Gather", [table, inputs[1]], [f"{output}.int8"]),
                helper.make_node("Gather", [scale, inputs[1]], [f"{output}.scale"]),
                helper.make_node("Cast", [f"{output}.int8"], [f"{output}.whole"], to=1),  # FLOAT
                helper.make_node("Mul", [f"{output}.whole", f"{output}.scale"], [output]),
            ]
            continue
        size, count = values.shape
        blocks = -(-size // _BLOCK)
        values = np.pad(values.T, ((0, 0), (0, blocks * _BLOCK - size)))
        values = values.reshape(count, blocks, _BLOCK)
        scales = _scales(values)
        rounded = (np.rint(values / scales) + 128).astype(np.uint8)  # 128 stands for 0
        given = [inputs[0], add(f"{weight}.int8", rounded)]
        given.append(add(f"{weight}.scale", scales.reshape(-1)))
        sizes = {"K": size, "N": count, "bits": 8, "block_size": _BLOCK, "accuracy_level": 4}
        nodes.append(
            helper.make_node("MatMulNBits", given, [output], domain="com.microsoft", **sizes)
        )
    kept = [*tensors.values(), *made]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model.SerializeToString()


def _scales(values: np.ndarray) -> np.ndarray:
    """Returns what makes whole numbers up to 127 of the last axis, `[..., 1]` float32."""
    largest = np.abs(values).max(axis=-1, keepdims=True)
    return np.where(largest > 0, largest / 127, 1).astype(np.float32)


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

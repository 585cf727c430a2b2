"""A text encoder as sentence-transformers reads it, in the layout that all its versions know."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ragjax.models.encoder import TextEncoder
from ragjax.models.export.base import BaseModel
from ragjax.models.export.card import Card, Use, format_card
from ragjax.models.export.language_model import model_config
from ragjax.models.export.tokenizer import check_tokenizer, to_json, tokenizer_files
from ragjax.models.files.key_table import named_tensors
from ragjax.models.files.sentence_transformers import POOLING_SWITCHES
from ragjax.models.layers.head import Dense, Normalize, Truncate
from ragjax.models.layers.pooling import pooling_modes

_MODES = {mode: key for key, mode in POOLING_SWITCHES.items()}
_ONNX_EXAMPLE = """\
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("FOLDER/tokenizer.json")
tokenizer.enable_truncation({max_length})
tokenizer.enable_padding(pad_id={pad_id})
session = onnxruntime.InferenceSession("FOLDER/{file}")
encoded = tokenizer.encode_batch(texts)
inputs = {{
    "input_ids": [text.ids for text in encoded],
    "attention_mask": [text.attention_mask for text in encoded],{types}
}}
inputs = {{name: np.array(rows, np.int64) for name, rows in inputs.items()}}
(embeddings,) = session.run(["sentence_embedding"], inputs)"""
_TYPES = """
    "token_type_ids": [text.type_ids for text in encoded],"""
_OLD_MODES = 4  # modes that the first versions know; they refuse the names of the others


def encoder_files(
    encoder: TextEncoder,
    base: BaseModel,
    card: Card,
    *,
    dtype: str,
    weights: bool = True,
    models: Sequence[str] = (),
) -> dict[str, str]:
    """Makes every file but the weights.

    Args:
        encoder: Architecture, tokenizer, pooling and prompts.
        base: What the base model's files say.
        card: What the caller knows.
        dtype: Of the weights.
        weights: Whether the folder holds safetensors, for the model card.
        models: ONNX files in it, likewise.

    Returns:
        Path in the folder → contents.
    """
    check_tokenizer(encoder.tokenizer, encoder.config.vocab_size)
    config = model_config(base, encoder.family, encoder.config, dtype=dtype)
    config["pad_token_id"] = encoder.pad_id
    # Texts here are of token type 0; models without token types refuse the argument.
    typed = ("token_type_ids",) if config.get("type_vocab_size", 0) > 1 else ()
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    files = {
        **base.notices,
        "config.json": to_json(config),
        **tokenizer_files(
            encoder.tokenizer,
            base,
            tokens={"pad_token": encoder.tokenizer.id_to_token(encoder.pad_id)},
            max_length=encoder.max_length,
            input_names=("input_ids", *typed, "attention_mask"),
        ),
        "1_Pooling/config.json": to_json(_pooling(encoder)),
        # Lower-casing, where the model has it, is a part of tokenizer.json.
        "sentence_bert_config.json": to_json(
            {"max_seq_length": encoder.max_length, "do_lower_case": False}
        ),
        "config_sentence_transformers.json": to_json(
            {
                "prompts": {"query": encoder.query_prefix, "document": encoder.doc_prefix},
                "default_prompt_name": None,
                "similarity_fn_name": "cosine" if encoder.normalized else "dot",
            }
        ),
        "README.md": format_card(
            card, base, _use(encoder, config, weights, models), kind="a text encoder"
        ),
    }
    for place, step in _places(encoder).items():
        kinds.append((place, "Normalize" if isinstance(step, Normalize) else "Dense"))
        if not isinstance(step, Normalize):
            files[f"{place}/config.json"] = to_json(_dense(step))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    return files | {"modules.json": to_json(modules)}


def encoder_weights(encoder: TextEncoder) -> dict[str, Mapping[str, np.ndarray]]:
    """Names the parameters: the transformer's under "", each dense layer's under its folder."""
    params = encoder.params
    tower = {name: leaf for name, leaf in params.items() if name != "projection"}
    weights = {"": named_tensors(tower, encoder.family.key_table(encoder.config))}
    for place, step in _places(encoder).items():
        if isinstance(step, _Matrix):
            tensors = {"linear.weight": step.kernel(params).T}
            if step.use_bias:
                tensors["linear.bias"] = step.bias(params)
            weights[place] = tensors
    return weights


class _Matrix(NamedTuple):
    """A dense layer of the exported folder: one of the encoder's, truncated, or truncation alone.

    The layout has no truncation of its own, which is a dense layer with a part of the identity.
    """

    number: int | None  # of the encoder's dense layer; None: the identity
    inputs: int
    outputs: int
    use_bias: bool
    activation: str

    def kernel(self, params: Mapping[str, Any]) -> np.ndarray:
        if self.number is None:
            return np.eye(self.inputs, self.outputs, dtype=np.float32)
        return np.asarray(params["projection"][str(self.number)]["kernel"])[:, : self.outputs]

    def bias(self, params: Mapping[str, Any]) -> np.ndarray:
        return np.asarray(params["projection"][str(self.number)]["bias"])[: self.outputs]


def _places(encoder: TextEncoder) -> dict[str, Normalize | _Matrix]:
    """Returns what follows the pooling, by the folder that it gets."""
    found: list[Normalize | _Matrix] = []
    size = encoder.config.hidden_size * len(pooling_modes(encoder.pooling))
    layers = 0
    for step in encoder.steps:
        if isinstance(step, Dense):
            found.append(_Matrix(layers, size, step.outputs, step.use_bias, step.activation))
            layers, size = layers + 1, step.outputs
        elif isinstance(step, Truncate):
            last = found[-1] if found else None
            if isinstance(last, _Matrix):  # activations work on each dimension alone
                found[-1] = last._replace(outputs=step.size)
            else:
                found.append(_Matrix(None, size, step.size, False, "Identity"))
            size = step.size
        else:
            found.append(step)
    kinds = ["Normalize" if isinstance(step, Normalize) else "Dense" for step in found]
    return {f"{i}_{kind}": step for i, (kind, step) in enumerate(zip(kinds, found, strict=True), 2)}


def _pooling(encoder: TextEncoder) -> dict[str, Any]:
    chosen = pooling_modes(encoder.pooling)
    if list(chosen) != [mode for mode in _MODES if mode in chosen]:
        raise ValueError(
            f"pooling {encoder.pooling!r}: sentence-transformers concatenates in the order "
            f"{', '.join(_MODES)}; no folder can say otherwise"
        )
    modes = {
        key: mode in chosen
        for number, (mode, key) in enumerate(_MODES.items())
        if number < _OLD_MODES or mode in chosen
    }
    return {"word_embedding_dimension": encoder.config.hidden_size, **modes}


def _dense(step: _Matrix) -> dict[str, Any]:
    module = "linear" if step.activation == "Identity" else "activation"
    return {
        "in_features": step.inputs,
        "out_features": step.outputs,
        "bias": step.use_bias,
        "activation_function": f"torch.nn.modules.{module}.{step.activation}",
    }


def _use(
    encoder: TextEncoder, config: Mapping[str, Any], weights: bool, models: Sequence[str]
) -> Use:
    onnx = {
        f"onnxruntime, `{file}`": _ONNX_EXAMPLE.format(
            max_length=encoder.max_length,
            pad_id=encoder.pad_id,
            file=file,
            types=_TYPES if config.get("type_vocab_size", 0) > 1 else "",
        )
        for file in models
    }
    return Use(
        library="sentence-transformers",
        pipeline="sentence-similarity",
        tags=(
            *("sentence-transformers", "feature-extraction", "sentence-similarity", "ragjax"),
            *(("onnx",) if models else ()),
        ),
        summary=(
            f"A text encoder of type `{config['model_type']}`: texts of up to {encoder.max_length} "
            f"tokens become {encoder.embedding_size} numbers, compared by "
            + ("cosine." if encoder.normalized else "dot product.")
        ),
        examples={**(_examples(encoder) if weights else {}), **onnx},
    )


def _examples(encoder: TextEncoder) -> dict[str, str]:
    prompted = (
        'queries = model.encode(texts, prompt_name="query")\n'
        'documents = model.encode(texts, prompt_name="document")'
    )
    plain = "embeddings = model.encode(texts)"
    return {
        "sentence-transformers": (
            "from sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("FOLDER")\n'
            + (prompted if encoder.query_prefix or encoder.doc_prefix else plain)
        ),
        "ragjax": 'from ragjax.models import load_encoder\n\nencoder = load_encoder("FOLDER")',
    }

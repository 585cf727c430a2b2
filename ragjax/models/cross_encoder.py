"""Loads a cross-encoder: a text encoder that reads a query and a document at once and scores them.

    model = load_cross_encoder("cross-encoder/ms-marco-MiniLM-L6-v2")
    logits = jax.jit(model.logits)(model.params, tokens)  # [B] float32

Its folder is one of Hugging Face for sequence classification with a single label, as
sentence-transformers' `CrossEncoder` writes it. B pairs, L tokens, D hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from tokenizers import Tokenizer

from ragjax.models.encoder import FAMILIES, fill_params, make_encode
from ragjax.models.encoders import bert
from ragjax.models.families import ClassifierKeys, EncoderFamily
from ragjax.models.files.config import fingerprint, parse_sizes, read_config, read_json
from ragjax.models.files.key_table import (
    KeyRule,
    apply_key_table,
    read_safetensors,
    renamed,
    transpose,
    unchanged,
)
from ragjax.models.files.sentence_transformers import read_settings
from ragjax.models.files.sources import resolve_source
from ragjax.models.files.tokenizers import choose_pad_token, load_tokenizer, lowercased
from ragjax.models.inputs import PairTokens
from ragjax.models.layers.head import ACTIVATIONS
from ragjax.models.layers.pooling import Pool, cls_pool, mean_pool
from ragjax.models.layers.stacks import Params

Score = Callable[[Params, PairTokens], Array]
_FAMILIES = [family for family in FAMILIES if family.classifier is not None]
_POOLINGS: dict[str, Pool] = {"cls": cls_pool, "mean": mean_pool}
_EXAMPLE = "such as cross-encoder/ms-marco-MiniLM-L6-v2"
_SETTINGS = "config_sentence_transformers.json"


@dataclass(frozen=True, kw_only=True)
class CrossEncoder:
    """A scorer of (query, document) pairs: parameters, the pure function, and its tokenizer.

    Attributes:
        params: Nested dict of float32 arrays; those of the head are under "projection".
        logits: `(params, tokens) -> [B]` float32; pure and not jitted.
        activation: Key of `ragjax.models.layers.head.ACTIVATIONS`: what sentence-transformers
            applies to the logits. It keeps their order.
        tokenizer: Of pairs; adds its special tokens, and cuts the longer text of a pair first.
        pad_id: Token that fills up rows.
        typed: True: the tokens of the document have type 1.
        max_length: Tokens of a pair, special tokens included.
        source: Where it comes from, as the user gave it.
        fingerprint: sha256 of configuration, parameters and tokenizer.
    """

    params: Params
    logits: Score
    activation: str
    tokenizer: Tokenizer
    pad_id: int
    typed: bool
    max_length: int
    source: str
    fingerprint: str

    def score(self, params: Params, tokens: PairTokens) -> Array:
        """Returns the scores `[B]` that sentence-transformers' `CrossEncoder.predict` returns."""
        return ACTIVATIONS[self.activation](self.logits(params, tokens))


def load_cross_encoder(source: str, *, max_length: int | None = None) -> CrossEncoder:
    """Loads a cross-encoder of the families of BERT, RoBERTa or ModernBERT.

    Args:
        source: Any source of `ragjax.models.resolve_source`.
        max_length: Tokens of a pair, special tokens included; None takes what the folder says.

    Returns:
        The cross-encoder.

    Raises:
        OSError: The source is not there or cannot be fetched.
        ValueError: What is there is not a cross-encoder that ragjax supports; says which file and
            field.
    """
    folder = resolve_source(source)
    if folder.is_file():
        raise ValueError(f"{folder}: cross-encoders load from folders, not from GGUF files")
    path = folder / "config.json"
    raw = read_config(folder, [name for family in _FAMILIES for name in family.model_types])
    _check_labels(path, raw)
    activation = _activation(folder, raw)
    family = next(family for family in _FAMILIES if raw["model_type"] in family.model_types)
    keys = family.classifier
    assert keys is not None, "families without one were left out"
    config = parse_sizes(family.parse_config, raw, path)
    tokenizer = load_tokenizer(folder, vocab_size=config.vocab_size)
    settings = read_settings(folder)
    if settings.get("do_lower_case"):
        tokenizer = lowercased(tokenizer)
    limit = config.max_positions
    length = int(
        min(settings["max_seq_length"] or limit, limit) if max_length is None else max_length
    )
    if not 5 <= length <= limit:
        raise ValueError(
            f"{folder}: max_length {length} is not between 5 (a pair of one token each with its"
            f" three special tokens) and {limit}, the positions of the model"
        )
    tokenizer.enable_truncation(length, strategy="longest_first")
    head = _Head(path, raw, config)
    params = _params(family, keys, config, folder)
    return CrossEncoder(
        params=params,
        logits=_make_logits(family, config, head),
        activation=activation,
        tokenizer=tokenizer,
        pad_id=choose_pad_token(tokenizer, folder, raw).id,
        typed=keys.typed and config.type_vocab_size > 1 and _feeds_types(folder),
        max_length=length,
        source=source,
        fingerprint=fingerprint((config, head.identity), params, tokenizer),
    )


class _Head:
    """What a head computes beside its parameters."""

    def __init__(self, path: Path, raw: Mapping[str, Any], config: Any) -> None:
        """Reads it from a `config.json`; only ModernBERT's says anything."""
        modern = raw["model_type"] == "modernbert"
        pooling = raw.get("classifier_pooling", "cls") if modern else "cls"
        activation = raw.get("classifier_activation", "gelu") if modern else "tanh"
        known: dict[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, **bert.ACTIVATIONS}
        for field, value, table in (
            ("classifier_pooling", pooling, _POOLINGS),
            ("classifier_activation", activation, known),
        ):
            if value not in table:
                raise ValueError(
                    f"{path}: {field} {value!r} is not supported, one of {sorted(table)} is"
                )
        self.pool, self.activation = _POOLINGS[pooling], known[activation]
        self.epsilon = getattr(config, "norm_eps", 0.0)
        self.identity = (pooling, activation)

    def apply(self, params: Params, pooled: Array) -> Array:
        """Returns logits `[B, 1]` of pooled hidden states `[B, D]`."""
        hidden = self.activation(_linear(params["dense"], pooled))
        if "norm" in params:
            centred = hidden - hidden.mean(axis=-1, keepdims=True)
            variance = (centred**2).mean(axis=-1, keepdims=True)
            hidden = centred / jnp.sqrt(variance + self.epsilon) * params["norm"]["scale"][None]
            if "bias" in params["norm"]:
                hidden = hidden + params["norm"]["bias"][None]
        return _linear(params["output"], hidden)


def _linear(layer: Params, inputs: Array) -> Array:
    outputs = inputs @ layer["kernel"]
    return outputs + layer["bias"][None] if "bias" in layer else outputs


def _make_logits(family: EncoderFamily, config: Any, head: _Head) -> Score:
    encode: Any = make_encode(family, config, head.pool, head.apply)
    return lambda params, tokens: encode(params, tokens)[:, 0]


def _params(family: EncoderFamily, keys: ClassifierKeys, config: Any, folder: Path) -> Params:
    """Fills the parameters of the encoder and, under "projection", of its head."""
    tensors = read_safetensors(folder)
    canonical = {family.canonical_key(name): name for name in tensors}
    for name in (f"{keys.dense}.weight", f"{keys.output}.weight"):
        if name not in canonical:
            raise ValueError(
                f"{folder}: no tensor {name}, so no classification head that was trained to score"
                f" pairs, and a text encoder alone scores none; give a cross-encoder, {_EXAMPLE}"
            )
    table, target = head_table(keys, config.hidden_size, canonical)
    tops = tuple({name.partition(".")[0] + "." for name in table})
    top = {name: old for name, old in canonical.items() if name.startswith(tops)}
    tower = {old: old for name, old in canonical.items() if name not in top}
    params = fill_params(family, config, renamed(tower, tensors), folder)
    head = apply_key_table(renamed(top, tensors), table, target, source=folder)
    return params | {"projection": head}


def head_table(
    keys: ClassifierKeys, size: int, names: Sequence[str] | Mapping[str, Any]
) -> tuple[dict[str, KeyRule], Params]:
    """Returns where the tensors of a head go, and the shapes of its parameters.

    Args:
        keys: Names of the family.
        size: D.
        names: Canonical names of the tensors there are: biases may be missing.
    """
    table: dict[str, KeyRule] = {}
    target: Params = {}
    layers = (("dense", keys.dense, size), ("output", keys.output, 1), ("norm", keys.norm, 0))
    for part, name, outputs in layers:
        if not name:
            continue
        weight = "kernel" if outputs else "scale"
        shapes = {weight: (size, outputs) if outputs else (size,)}
        table[f"{name}.weight"] = KeyRule(f"{part}/{weight}", transpose if outputs else unchanged)
        if f"{name}.bias" in names:
            table[f"{name}.bias"] = KeyRule(f"{part}/bias")
            shapes["bias"] = (outputs or size,)
        target[part] = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}
    return table, target


def _feeds_types(folder: Path) -> bool:
    """Says whether the tokenizer of a folder hands its model the types of the tokens."""
    names = read_json(folder / "tokenizer_config.json").get("model_input_names")
    return names is None or "token_type_ids" in names


def _check_labels(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuses a head with another number of outputs than one."""
    labels = raw.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else raw.get("num_labels", 2)
    if count != 1:
        raise ValueError(
            f"{path}: the head has {count} labels (id2label, num_labels), and a score is one"
            f" number; give a cross-encoder with one label, {_EXAMPLE}"
        )


def _activation(folder: Path, raw: Mapping[str, Any]) -> str:
    """Returns what sentence-transformers applies to the logits: as declared, else a sigmoid."""
    path = folder / _SETTINGS
    declared = read_json(path)
    if name := declared.get("default_prompt_name"):
        raise ValueError(f"{path}: default_prompt_name {name!r}: prompts are not supported here")
    kinds = [
        str(module.get("type", "")) if isinstance(module, Mapping) else repr(module)
        for module in read_json(folder / "modules.json", list)
    ]
    if kinds and [kind.rpartition(".")[2] for kind in kinds] != ["Transformer"]:
        raise ValueError(
            f"{folder / 'modules.json'}: modules {kinds} are not supported; a single Transformer"
            " for sequence classification is"
        )
    nested = raw.get("sentence_transformers")
    nested = nested.get("activation_fn") if isinstance(nested, Mapping) else None
    for file, value in (
        (path, declared.get("activation_fn")),
        (folder / "config.json", nested or raw.get("sbert_ce_default_activation_function")),
    ):
        if value is None:
            continue
        name = str(value).rpartition(".")[2]
        if not str(value).startswith("torch.nn.") or name not in ACTIVATIONS:
            raise ValueError(
                f"{file}: activation {value!r} is not supported; those of torch.nn named"
                f" {', '.join(ACTIVATIONS)} are"
            )
        return name
    return "Sigmoid"

"""Imports a published RAG checkpoint: a DPR question encoder and a generator in one file.

    rag = load_rag("path/to/rag-sequence-nq")
    query_embeddings = rag.query_encoder.encode(rag.query_encoder.params, tokens)  # [B, D]
    text = rag.config.context(title, passage, question)  # what the generator was trained to read

References:
    Lewis et al., 2020, "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks",
    section 2.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragjax.models.encoder import EncoderOptions, TextEncoder, build_encoder, fill_params
from ragjax.models.encoders import dpr
from ragjax.models.files.config import parse_sizes, read_config, read_json
from ragjax.models.files.key_table import read_safetensors, renamed
from ragjax.models.files.sources import resolve_source
from ragjax.models.files.tokenizers import choose_pad_token, load_tokenizer
from ragjax.models.language_model import (
    LanguageModel,
    PromptText,
    added_ids,
    build_language_model,
)
from ragjax.models.seq2seq import bart, t5

_QUESTION_ENCODER, _GENERATOR = "question_encoder.", "generator."
# A context encoder is there only in a file saved in the middle of training one.
_CONTEXT_ENCODER = "ctx_encoder."
_FAMILIES = (bart.FAMILY, t5.FAMILY)


@dataclass(frozen=True, kw_only=True)
class RagCheckpointConfig:
    """How the two models were trained together.

    Attributes:
        num_documents: Documents a question, K.
        title_separator: Between a document's title and its text.
        document_separator: Between the document and the question.
        prefix: Before every context, for a generator that expects one (T5).
        max_context_length: Tokens that contexts were truncated to.
        architecture: Class of the file, such as "RagSequenceForGeneration" (train it with
            `ragjax.losses.rag_sequence_loss`) or "RagTokenForGeneration" (`rag_token_loss`).
    """

    num_documents: int = 5
    title_separator: str = " / "
    document_separator: str = " // "
    prefix: str = ""
    max_context_length: int = 300
    architecture: str = ""

    def context(self, title: str, text: str, question: str) -> str:
        """Joins a document and a question as the generator was trained to read them."""
        title = title.removeprefix('"').removesuffix('"')
        joined = f"{self.prefix}{title}{self.title_separator}{text}{self.document_separator}"
        return (joined + question).replace("  ", " ")

    @property
    def prompt(self) -> PromptText:
        """The same as a template."""
        question = f"{self.prefix}{{question}}"
        context = f"{self.prefix}{{document}}{self.document_separator}{{question}}"
        return PromptText(context, question, "{answer}", f"{{title}}{self.title_separator}{{text}}")


@dataclass(frozen=True, kw_only=True)
class RagModel:
    """The two models of a RAG checkpoint.

    Attributes:
        query_encoder: Embeds questions; documents are embedded by the DPR context encoder that it
            was trained with, which is published apart.
        language_model: BART or T5.
        config: How they were trained together.
    """

    query_encoder: TextEncoder
    language_model: LanguageModel
    config: RagCheckpointConfig


def load_rag(source: str) -> RagModel:
    """Loads a RAG checkpoint as Hugging Face writes it.

    Args:
        source: Any source of `ragjax.models.resolve_source`: a folder with `config.json` of model
            type `rag`, safetensors, and the tokenizers in `question_encoder_tokenizer` and
            `generator_tokenizer`.

    Returns:
        Both models, in float32.

    Raises:
        FileNotFoundError: The source or a file in it is missing.
        ValueError: One of the two models is not supported, or a tensor is missing, left over or
            of another shape.
    """
    file = _open(source)
    return RagModel(
        query_encoder=_load_query_encoder(file),
        language_model=_load_generator(file),
        config=_read_config(file.settings, file.folder / "config.json"),
    )


def is_rag(source: str) -> bool:
    """Returns whether a source is a RAG checkpoint: two models in one file."""
    folder = resolve_source(source)
    return folder.is_dir() and read_json(folder / "config.json").get("model_type") == "rag"


def load_rag_query_encoder(source: str) -> TextEncoder:
    """Loads the question encoder of a RAG checkpoint alone; see `load_rag`."""
    return _load_query_encoder(_open(source))


def load_rag_language_model(source: str) -> LanguageModel:
    """Loads the generator of a RAG checkpoint alone; see `load_rag`."""
    return _load_generator(_open(source))


class _File(NamedTuple):
    """A RAG checkpoint, its tensors not read yet."""

    source: str
    folder: Path
    settings: dict[str, Any]
    tensors: Mapping[str, np.ndarray]
    names: dict[str, dict[str, str]]  # of each part: own names and names in the file

    def part(self, name: str) -> Mapping[str, np.ndarray]:
        """Returns the tensors of a part by their own names."""
        return renamed(self.names[name], self.tensors)


def _open(source: str) -> _File:
    folder = resolve_source(source)
    if folder.is_file():
        raise ValueError(f"{folder}: RAG checkpoints load from folders, not from GGUF files")
    settings = read_config(folder, ["rag"])
    tensors = read_safetensors(folder)
    return _File(source, folder, settings, tensors, _split_names(tensors, folder))


def _split_names(tensors: Iterable[str], folder: Path) -> dict[str, dict[str, str]]:
    """Returns, for each part, its own names of its tensors and the names in the file."""
    names: dict[str, dict[str, str]] = {_QUESTION_ENCODER: {}, _GENERATOR: {}, _CONTEXT_ENCODER: {}}
    for name in tensors:
        plain = name.removeprefix("rag.")
        part = next((part for part in names if plain.startswith(part)), None)
        if part is None:
            raise ValueError(
                f"{folder}: unexpected tensor {name}; the names of a RAG checkpoint begin with "
                "rag.question_encoder. or rag.generator."
            )
        other = names[part].setdefault(plain.removeprefix(part), name)
        if other != name:
            raise ValueError(f"{folder}: tensors {other} and {name} are the same parameter twice")
    return names


def _part(settings: Mapping[str, Any], field: str, path: Path) -> dict[str, Any]:
    part = settings.get(field)
    if not isinstance(part, dict):
        raise ValueError(
            f"{path}: {field} must be the configuration of a model (an object), got {part!r}"
        )
    return part


def _load_query_encoder(file: _File) -> TextEncoder:
    folder, path = file.folder, file.folder / "config.json"
    # Read here, as transformers does, where a sub-configuration leaves it out.
    settings = {"model_type": "dpr"} | _part(file.settings, "question_encoder", path)
    family, place = dpr.FAMILY, folder / "question_encoder_tokenizer"
    _check_kind(settings, "question_encoder", family.model_types, folder)
    # Some files name the class that they were made from.
    settings = settings | {"architectures": ["DPRQuestionEncoder"]}
    config = parse_sizes(family.parse_config, settings, path)
    tokenizer = load_tokenizer(
        place, vocab_size=config.vocab_size, converter="DPRQuestionEncoderTokenizer"
    )
    options = EncoderOptions(
        pad_id=choose_pad_token(tokenizer, place, settings).id,
        pooling=family.default_pooling,
        max_length=config.max_positions,
        source=file.source,
    )
    params = fill_params(family, config, file.part(_QUESTION_ENCODER), folder)
    return build_encoder(family, config, params, tokenizer, options)


def _load_generator(file: _File) -> LanguageModel:
    folder, path = file.folder, file.folder / "config.json"
    settings = {"model_type": "bart"} | _part(file.settings, "generator", path)
    kinds = [kind for family in _FAMILIES for kind in family.model_types]
    _check_kind(settings, "generator", kinds, folder)
    family = next(family for family in _FAMILIES if settings["model_type"] in family.model_types)
    config = parse_sizes(family.parse_config, settings, path)
    place = folder / "generator_tokenizer"
    converter = {"bart": "BartTokenizer", "t5": "T5Tokenizer"}[settings["model_type"]]
    tokenizer = load_tokenizer(place, vocab_size=config.vocab_size, converter=converter)
    first, last = added_ids(tokenizer)
    end = settings.get("eos_token_id")
    model = build_language_model(
        family,
        config,
        family.load_params(config, file.part(_GENERATOR), source=folder),
        tokenizer,
        bos_id=first[0] if first else None,
        eos_ids=last if end is None else (int(end),),
        pad_id=choose_pad_token(tokenizer, place, settings).id,
        source=file.source,
    )
    return dataclasses.replace(model, prompt=_read_config(file.settings, path).prompt)


def _check_kind(settings: Mapping[str, Any], field: str, kinds: Any, folder: Path) -> None:
    if settings["model_type"] not in kinds:
        raise ValueError(
            f"{folder / 'config.json'}: {field} is of model_type {settings['model_type']!r}, which "
            f"is not supported there; {', '.join(kinds)} is"
        )


def _read_config(settings: Mapping[str, Any], path: Path) -> RagCheckpointConfig:
    kinds: dict[str, type] = {
        "n_docs": int, "title_sep": str, "doc_sep": str, "prefix": str, "max_combined_length": int,
    }  # fmt: skip
    given = {name: settings[name] for name in kinds if settings.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise ValueError(
                f"{path}: {name} must be of type {kinds[name].__name__}, got {value!r}"
            )
    default = RagCheckpointConfig()
    architectures = settings.get("architectures") or [""]
    return RagCheckpointConfig(
        num_documents=given.get("n_docs", default.num_documents),
        title_separator=given.get("title_sep", default.title_separator),
        document_separator=given.get("doc_sep", default.document_separator),
        prefix=given.get("prefix", default.prefix),
        max_context_length=given.get("max_combined_length", default.max_context_length),
        architecture=str(architectures[0]),
    )

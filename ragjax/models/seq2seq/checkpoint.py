"""Fills the parameters of an encoder-decoder model from a Hugging Face folder, and names them."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ragjax.models.families import LMFamily
from ragjax.models.files.key_table import (
    KeyRule,
    apply_key_table,
    named_tensors,
    renamed,
    transpose,
)
from ragjax.models.seq2seq.cache import CachedSeq2Seq
from ragjax.models.seq2seq.model import Params, Seq2SeqConfig, init_params, token_log_probs
from ragjax.models.trainable import SEQ2SEQ

# One table under several names: which of them a file keeps depends on what wrote it.
_EMBEDDING = "shared.weight"
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNEMBEDDING = "lm_head.weight"
_FINAL_BIAS = "final_logits_bias"
_BIAS_RULE = KeyRule("final_bias/bias")


class Names(NamedTuple):
    """What a family of encoder-decoders calls its tensors."""

    # config -> where each tensor goes, but the embeddings and the final bias
    table: Callable[[Any], dict[str, KeyRule]]
    ignored: tuple[str, ...] = ()  # patterns of tensors that may be there and are not used
    prefix: str = ""  # before each name, in files of the model with its unembedding
    has_final_bias: bool = False  # files hold it even where it is zero


def make_family(
    model_types: tuple[str, ...],
    parse_config: Callable[[Mapping[str, Any]], Any],
    format_config: Callable[[Any], dict[str, Any]],
    names: Names,
) -> LMFamily:
    """Returns the family of encoder-decoders that share all but their sizes and tensor names."""
    return LMFamily(
        model_types=model_types,
        parse_config=parse_config,
        format_config=format_config,
        load_params=functools.partial(load_params, names),
        save_params=functools.partial(save_params, names),
        token_log_probs=token_log_probs,
        make_decoder=CachedSeq2Seq,
        layout=SEQ2SEQ,
        has_encoder=True,
    )


def load_params(
    names: Names, config: Seq2SeqConfig, tensors: Mapping[str, np.ndarray], *, source: str | Path
) -> Params:
    """Fills the parameters from tensors named as in a Hugging Face folder.

    Args:
        names: What the family calls its tensors.
        config: Sizes.
        tensors: Tensor name to array, with or without the prefix.
        source: Folder they came from, for the messages.

    Returns:
        Parameters as `ragjax.models.seq2seq.model` describes them, float32.

    Raises:
        ValueError: A tensor is missing, left over or of another shape, or two copies of the
            embedding table differ.
    """
    stored: dict[str, str] = {}
    for name in tensors:
        if (other := stored.setdefault(name.removeprefix(names.prefix), name)) != name:
            raise ValueError(f"{source}: tensors {other} and {name} are the same parameter twice")
    table = {**_outer_table(config), **names.table(config)}
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    _choose_embedding(config, tensors, stored, source)
    if _FINAL_BIAS in stored and np.any(np.asarray(tensors[stored[_FINAL_BIAS]])):
        table[_FINAL_BIAS] = _BIAS_RULE
        bias = jax.ShapeDtypeStruct((1, config.vocab_size), np.float32)
        shapes = {**shapes, "final_bias": {"bias": bias}}
    else:
        stored.pop(_FINAL_BIAS, None)
    tensors = renamed(stored, tensors)
    return apply_key_table(tensors, table, shapes, ignored=names.ignored, source=source)


def save_params(names: Names, config: Seq2SeqConfig, params: Params) -> Mapping[str, np.ndarray]:
    """Names the parameters as a Hugging Face folder does: the inverse of `load_params`.

    Args:
        names: What the family calls its tensors.
        config: Sizes.
        params: Parameters; the layers in one stack or several.

    Returns:
        Tensor name to contiguous array, see `named_tensors`.
    """
    table = {**_outer_table(config), **names.table(config)}
    if names.has_final_bias and "final_bias" not in params:
        zero = np.zeros((1, config.vocab_size), np.float32)
        params = {**params, "final_bias": {"bias": zero}}
    if "final_bias" in params:
        table = {_FINAL_BIAS: _BIAS_RULE, **table}
    tensors = named_tensors(params, table)
    return renamed(
        {name if name == _FINAL_BIAS else names.prefix + name: name for name in tensors}, tensors
    )


def _outer_table(config: Seq2SeqConfig) -> dict[str, KeyRule]:
    table = {_EMBEDDING: KeyRule("embed/embedding")}
    if not config.tie_embeddings:
        table[_UNEMBEDDING] = KeyRule("unembed/kernel", transpose)
    return table


def _choose_embedding(
    config: Seq2SeqConfig,
    tensors: Mapping[str, np.ndarray],
    names: dict[str, str],
    source: str | Path,
) -> None:
    """Leaves one name of the embedding table in `names`, and one of the unembedding if untied."""
    copies = [_EMBEDDING, *_EMBEDDING_COPIES, *([_UNEMBEDDING] if config.tie_embeddings else [])]
    present = [copy for copy in copies if copy in names]
    found = [names.pop(copy) for copy in present]
    for other in found[1:]:
        if not np.array_equal(tensors[found[0]], tensors[other]):
            hint = ""
            if other.endswith(_UNEMBEDDING):
                hint = "; if the unembedding is meant to be apart, say tie_word_embeddings: false"
            raise ValueError(
                f"{source}: tensors {found[0]} and {other} differ, but config.json describes a "
                f"model in which they are one table{hint}"
            )
    if found:
        names[_EMBEDDING] = found[0]
        if getattr(config, "unembedding_may_be_shared", False):
            names.setdefault(_UNEMBEDDING, found[0])

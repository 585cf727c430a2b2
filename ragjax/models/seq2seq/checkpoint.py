"""Fills the parameters of an encoder-decoder model from a Hugging Face folder, and names them."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from ragjax.models.files.key_table import (
    KeyRule,
    apply_key_table,
    named_tensors,
    renamed,
    transpose,
)
from ragjax.models.seq2seq.model import Params, Seq2SeqConfig, init_params
from ragjax.models.trainable import join_layers

# One table under several names: which of them a file keeps depends on what wrote it.
_EMBEDDING = "shared.weight"
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNEMBEDDING = "lm_head.weight"
_FINAL_BIAS = "final_logits_bias"
_BIAS_RULE = KeyRule("final_bias/bias")


def load_params(
    config: Seq2SeqConfig,
    tensors: Mapping[str, np.ndarray],
    layer_table: Mapping[str, KeyRule],
    *,
    ignored: tuple[str, ...] = (),
    canonical_key: Callable[[str], str] = lambda name: name,
    source: str | Path,
) -> Params:
    """Fills the parameters from tensors named as in a Hugging Face folder.

    Args:
        config: Sizes.
        tensors: Tensor name to array.
        layer_table: Rules of all but the embeddings and the final bias.
        ignored: Patterns of tensors that may be there and are not used.
        canonical_key: Name in a file to name in the table.
        source: Folder they came from, for the messages.

    Returns:
        Parameters as `ragjax.models.seq2seq.model` describes them, float32.

    Raises:
        ValueError: A tensor is missing, left over or of another shape, or two copies of the
            embedding table differ.
    """
    names = {canonical_key(name): name for name in tensors}
    table = {**_outer_table(config), **layer_table}
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    _choose_embedding(config, tensors, names, source)
    if _FINAL_BIAS in names and np.any(np.asarray(tensors[names[_FINAL_BIAS]])):
        table[_FINAL_BIAS] = _BIAS_RULE
        bias = jax.ShapeDtypeStruct((1, config.vocab_size), np.float32)
        shapes = {**shapes, "final_bias": {"bias": bias}}
    else:
        names.pop(_FINAL_BIAS, None)
    return apply_key_table(renamed(names, tensors), table, shapes, ignored=ignored, source=source)


def save_params(
    config: Seq2SeqConfig, params: Params, layer_table: Mapping[str, KeyRule]
) -> dict[str, np.ndarray]:
    """Names the parameters as a Hugging Face folder does: the inverse of `load_params`.

    Args:
        config: Sizes.
        params: Parameters; the layers in one stack or several.
        layer_table: As `load_params` takes it.

    Returns:
        Tensor name to contiguous array.
    """
    table = {**_outer_table(config), **layer_table}
    if "final_bias" in params:
        table[_FINAL_BIAS] = _BIAS_RULE
    return named_tensors(join_layers(params), table)


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

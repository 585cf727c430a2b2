"""Which checkpoint tensor fills which parameter of a causal decoder."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.model import init_params
from ragjax.models.files.key_table import (
    KeyRule,
    apply_key_table,
    named_tensors,
    renamed,
    same_values,
    transpose,
    unchanged,
)

logger = logging.getLogger(__name__)

# Parameter of the layer: (name in a Hugging Face folder, name in a GGUF file).
_LINEAR = {
    "query": ("self_attn.q_proj", "attn_q"),
    "key": ("self_attn.k_proj", "attn_k"),
    "value": ("self_attn.v_proj", "attn_v"),
    "output": ("self_attn.o_proj", "attn_output"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
_NORMS = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "feed_forward_norm": ("post_attention_layernorm", "ffn_norm"),
}
_HEAD_NORMS = {
    "query_norm": ("self_attn.q_norm", "attn_q_norm"),
    "key_norm": ("self_attn.k_norm", "attn_k_norm"),
}
_SANDWICH_NORMS = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention_output_norm": ("post_attention_layernorm", "post_attention_norm"),
    "feed_forward_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "feed_forward_output_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}
# Where a Hugging Face folder keeps the text model, and its unembedding: alone, or beside a vision
# tower as the hub's Gemma 3 files have it and as transformers 5 names it in memory.
_PREFIXES = {
    "model.": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
    "model.language_model.": "lm_head.weight",
}
_VISION = ("vision_tower.*", "multi_modal_projector.*")


class _Names(NamedTuple):
    """What the tensors of one kind of file are called."""

    column: int  # of the tables above
    layer: str  # prefix of the layers, {} in the place of the number
    embedding: str
    final_norm: str
    unembedding: str


_GGUF = _Names(1, "blk.{}.", "token_embd.weight", "output_norm.weight", "output.weight")


def params_from_huggingface(
    config: DecoderConfig, tensors: Mapping[str, np.ndarray], *, source: str | Path
) -> dict[str, Any]:
    """Fills the parameters from tensors named as in a Hugging Face folder.

    Args:
        config: Sizes.
        tensors: Tensor name to array.
        source: Folder they came from, for the messages.

    Returns:
        Parameters as `ragjax.models.decoder.model` describes them, float32.

    Raises:
        ValueError: A tensor is missing, left over or of another shape, or the unembedding of a tied
            model is another table (`untied_by_file` says so before).
    """
    names = _names_in(tensors)
    if config.tie_embeddings and names.unembedding in tensors:
        # A tied head may be stored twice.
        if not same_values(tensors[names.unembedding], tensors[names.embedding]):
            raise ValueError(
                f"{source}: {names.unembedding} is not {names.embedding}, so the model is not tied"
            )
        tensors = renamed({name: name for name in tensors if name != names.unembedding}, tensors)
    ignored = []
    if names.embedding != "model.embed_tokens.weight":
        ignored += [*_VISION, *(f"model.{pattern}" for pattern in _VISION)]
    return apply_key_table(
        tensors,
        _key_table(config, names, permuted=False),
        _shapes(config),
        ignored=ignored,
        buffers=rotary_buffers(config, names.layer),
        source=source,
    )


def untied_by_file(
    config: DecoderConfig, tensors: Mapping[str, Any], *, source: str | Path
) -> DecoderConfig:
    """Returns the sizes with an unembedding of its own where the file has another one.

    `tie_word_embeddings: true` beside two different tables is what merging an adapter leaves; as in
    transformers 5, what was stored counts.

    Args:
        config: Sizes, as `config.json` has them.
        tensors: Tensors named as in a Hugging Face folder.
        source: Folder they came from, for the message.
    """
    names = _names_in(tensors)
    tables = [name for name in (names.embedding, names.unembedding) if name in tensors]
    if not config.tie_embeddings or len(tables) < 2 or same_values(*map(tensors.get, tables)):
        return config
    logger.warning(
        "%s: tie_word_embeddings is true, but %s is another table than %s; both count",
        source, names.unembedding, names.embedding,
    )  # fmt: skip
    return dataclasses.replace(config, tie_embeddings=False)


def rotary_buffers(config: DecoderConfig, layer: str) -> dict[str, Callable[[np.ndarray], bool]]:
    """Returns the rotary frequencies that transformers before 4.31 stored, for `apply_key_table`.

    Args:
        config: Sizes.
        layer: Prefix of the layers, {} in the place of the number.
    """

    def holds(tensor: np.ndarray) -> bool:
        exponents = np.arange(0, config.head_dim, 2) / config.head_dim
        expected = [config.rope_theta**-exponents]
        if config.rope_scaling is not None:
            expected.append(config.rope_scaling.stretch(expected[0], config.rope_theta))
        coarse = 1e-2 if tensor.dtype.itemsize < 4 else 1e-4
        found = np.asarray(tensor, np.float64)
        return any(
            found.shape == each.shape and np.allclose(found, each, rtol=coarse, atol=0)
            for each in expected
        )

    return {f"{layer}self_attn.rotary_emb.inv_freq": holds}


def params_from_gguf(
    config: DecoderConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    permuted: bool,
    source: str | Path,
) -> dict[str, Any]:
    """Fills the parameters from dequantised tensors named as in a GGUF file.

    Args:
        config: Sizes.
        tensors: Tensor name to float array.
        permuted: True: the rows of q and k pair neighbouring entries (llama.cpp's `llama`
            architecture) and are put back into the order that half-rotation needs.
        source: File they came from, for the messages.

    Returns:
        Parameters as `ragjax.models.decoder.model` describes them, float32.

    Raises:
        ValueError: A tensor is missing, left over or of another shape.
    """
    table = _key_table(config, _GGUF, permuted=permuted)
    # The factors of the rotary frequencies were read into the configuration.
    read = {"rope_freqs.weight": lambda tensor: True}
    return apply_key_table(tensors, table, _shapes(config), buffers=read, source=source)


def params_to_huggingface(
    config: DecoderConfig, params: dict[str, Any]
) -> Mapping[str, np.ndarray]:
    """Names the parameters as a Hugging Face folder does: the inverse of the loader.

    Args:
        config: Sizes.
        params: Parameters; the layers in one stack or several.

    Returns:
        Tensor name to contiguous float array, see `named_tensors`.
    """
    return named_tensors(params, huggingface_key_table(config))


def params_to_gguf(
    config: DecoderConfig, params: dict[str, Any], *, permuted: bool
) -> Mapping[str, np.ndarray]:
    """Names the parameters as a GGUF file does: the inverse of `params_from_gguf`.

    Args:
        config: Sizes.
        params: Parameters; the layers in one stack or several.
        permuted: True: the rows of q and k pair neighbouring entries.

    Returns:
        Tensor name to contiguous float array, see `named_tensors`.
    """
    return named_tensors(params, _key_table(config, _GGUF, permuted=permuted))


def huggingface_key_table(config: DecoderConfig) -> dict[str, KeyRule]:
    """Returns where each tensor of a Hugging Face folder goes."""
    return _key_table(config, _huggingface_names("model."), permuted=False)


def _names_in(tensors: Mapping[str, Any]) -> _Names:
    """Returns what the tensors of a Hugging Face folder are called."""
    found = (prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in tensors)
    return _huggingface_names(next(found, "model."))


def _huggingface_names(prefix: str) -> _Names:
    return _Names(
        0,
        f"{prefix}layers.{{}}.",
        f"{prefix}embed_tokens.weight",
        f"{prefix}norm.weight",
        _PREFIXES[prefix],
    )


def _shapes(config: DecoderConfig) -> dict[str, Any]:
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def _key_table(config: DecoderConfig, names: _Names, *, permuted: bool) -> dict[str, KeyRule]:
    heads = {"query": config.num_heads, "key": config.num_kv_heads}
    biased = dict.fromkeys(("query", "key", "value"), config.qkv_bias)
    biased |= dict.fromkeys(("gate", "up", "down"), config.feed_forward_bias)
    biased["output"] = config.output_bias
    # GGUF files store the finished scales.
    offset = config.family.norm_offset if names is _GGUF else 0.0
    norm, scale = unchanged, unchanged
    if offset:
        norm, scale = _plus(-offset), _plus(offset)
    table = {
        names.embedding: KeyRule("embed/embedding"),
        names.final_norm: KeyRule("final_norm/scale", norm, scale),
    }
    for name, columns in _LINEAR.items():
        restore, permute = unchanged, unchanged
        if permuted and name in heads:
            restore, permute = _unpermute(heads[name]), _permute(heads[name])
        stem = names.layer + columns[names.column]
        table[f"{stem}.weight"] = KeyRule(
            f"layers/{name}/kernel",
            lambda tensor, restore=restore: restore(tensor).T,
            lambda kernel, permute=permute: permute(kernel.T),
        )
        if biased[name]:
            table[f"{stem}.bias"] = KeyRule(f"layers/{name}/bias", restore, permute)
    norms = _SANDWICH_NORMS if config.family.sandwich_norms else _NORMS
    for name, columns in (norms | (_HEAD_NORMS if config.family.query_key_norm else {})).items():
        stem = names.layer + columns[names.column]
        table[f"{stem}.weight"] = KeyRule(f"layers/{name}/scale", norm, scale)
    if not config.tie_embeddings:
        table[names.unembedding] = KeyRule("unembed/kernel", transpose)
    return table


def _plus(offset: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda tensor: tensor + np.float32(offset)


def _unpermute(num_heads: int) -> Callable[[np.ndarray], np.ndarray]:
    def restore(tensor: np.ndarray) -> np.ndarray:
        pairs = tensor.reshape(num_heads, tensor.shape[0] // num_heads // 2, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)

    return restore


def _permute(num_heads: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(tensor: np.ndarray) -> np.ndarray:
        halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    return change

"""Which checkpoint tensor fills which parameter of a Llama-family decoder."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ragjax.models.decoder import init_params
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.decoder_training import join_layers
from ragjax.models.safetensors import KeyRule, apply_key_table, transpose

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
_BIASED = ("query", "key", "value")
_OUTER = {
    "embed/embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm/scale": ("model.norm.weight", "output_norm.weight"),
    "unembed/kernel": ("lm_head.weight", "output.weight"),
}


def params_from_huggingface(
    config: DecoderConfig, tensors: Mapping[str, np.ndarray], *, source: str | Path
) -> dict[str, Any]:
    """Fills the parameters from tensors named as in a Hugging Face folder.

    Args:
        config: Sizes.
        tensors: Tensor name to array.
        source: Folder they came from, for the messages.

    Returns:
        Parameters as `ragjax.models.decoder` describes them, float32.

    Raises:
        ValueError: A tensor is missing, left over or of another shape.
    """
    # transformers before 4.31 stored the rotary frequencies; a tied head may be stored twice.
    ignored = ["model.layers.{}.self_attn.rotary_emb.inv_freq"]
    ignored += ["lm_head.weight"] if config.tie_embeddings else []
    table = _key_table(config, 0, "model.layers.{}.", permuted=False)
    return apply_key_table(tensors, table, _shapes(config), ignored=ignored, source=source)


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
        Parameters as `ragjax.models.decoder` describes them, float32.

    Raises:
        ValueError: A tensor is missing, left over or of another shape.
    """
    table = _key_table(config, 1, "blk.{}.", permuted=permuted)
    return apply_key_table(tensors, table, _shapes(config), source=source)


def params_to_huggingface(config: DecoderConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Names the parameters as a Hugging Face folder does: the inverse of the loader.

    Args:
        config: Sizes.
        params: Parameters; the layers in one stack or several.

    Returns:
        Tensor name to contiguous float array, ready for `safetensors.numpy.save_file`.
    """
    flat = {"/".join(path): leaf for path, leaf in _leaves(join_layers(params))}
    tensors: dict[str, np.ndarray] = {}
    for pattern, rule in _key_table(config, 0, "model.layers.{}.", permuted=False).items():
        leaf = np.asarray(flat[rule.path])
        turned = rule.path.endswith("kernel")
        if "{}" not in pattern:
            tensors[pattern] = np.ascontiguousarray(leaf.T if turned else leaf)
            continue
        for layer, part in enumerate(leaf):
            name = pattern.replace("{}", str(layer))
            tensors[name] = np.ascontiguousarray(part.T if turned else part)
    return tensors


def _leaves(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _shapes(config: DecoderConfig) -> dict[str, Any]:
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def _key_table(
    config: DecoderConfig, column: int, prefix: str, *, permuted: bool
) -> dict[str, KeyRule]:
    heads = {"query": config.num_heads, "key": config.num_kv_heads}
    table = {}
    for name, names in _LINEAR.items():
        restore = _unpermute(heads[name]) if permuted and name in heads else _unchanged
        stem = prefix + names[column]
        table[f"{stem}.weight"] = KeyRule(f"layers/{name}/kernel", _then(restore, transpose))
        if config.qkv_bias and name in _BIASED:
            table[f"{stem}.bias"] = KeyRule(f"layers/{name}/bias", restore)
    for name, names in _NORMS.items():
        table[f"{prefix}{names[column]}.weight"] = KeyRule(f"layers/{name}/scale")
    for path, names in _OUTER.items():
        if path != "unembed/kernel":
            table[names[column]] = KeyRule(path)
        elif not config.tie_embeddings:
            table[names[column]] = KeyRule(path, transpose)
    return table


def _unchanged(tensor: np.ndarray) -> np.ndarray:
    return tensor


def _then(
    first: Callable[[np.ndarray], np.ndarray], second: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    return lambda tensor: second(first(tensor))


def _unpermute(num_heads: int) -> Callable[[np.ndarray], np.ndarray]:
    def restore(tensor: np.ndarray) -> np.ndarray:
        pairs = tensor.reshape(num_heads, tensor.shape[0] // num_heads // 2, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)

    return restore

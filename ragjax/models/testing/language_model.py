"""A tiny random language model with a tokenizer built in memory: for tests, without files."""

import json
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.family import FAMILY
from ragjax.models.decoder.model import init_params
from ragjax.models.language_model import LanguageModel, build_language_model
from ragjax.models.layers.rotary import LinearScaling
from ragjax.storage import write_bytes, write_text

# The tokenizer has the 256 bytes first, then these two.
_END, _PAD = "<|end|>", "<|pad|>"
_END_ID, _PAD_ID = 256, 257
# Where each family differs from the tiny Llama. Windows are shorter than what tests feed in.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "model_type": "mistral",
        "sliding_window": 6,
        "sliding_layers": (True, True, True),
    },
    "qwen2": {"model_type": "qwen2", "qkv_bias": True},
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {
        "model_type": "gemma3_text",
        "activation": "gelu_pytorch_tanh",
        "query_scalar": 16.0,
        "rope_theta": 1e6,
        "rope_scaling": LinearScaling(factor=8.0),
        "local_rope_theta": 10000.0,
        "sliding_window": 6,
        "sliding_layers": (True, False, True),
    },
}
_SEQ2SEQ = ("t5", "flan-t5", "bart")


def tiny_tokenizer(*special: str) -> Tokenizer:
    """Builds a byte-level tokenizer without merges: one token per byte, then the special tokens.

    Args:
        *special: Special tokens; without any, an end and a pad token.

    Returns:
        Tokenizer that adds none of them; decoding gives the text back.
    """
    special = special or (_END, _PAD)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def tiny_decoder_config(**changes: object) -> DecoderConfig:
    """Returns sizes that run in milliseconds and still exercise grouped-query attention.

    Args:
        **changes: Fields of `DecoderConfig` to replace.

    Returns:
        The sizes: 3 layers, 4 query heads on 2 key heads, width 32, 258 tokens.
    """
    sizes: dict[str, object] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_positions": 512,
    }
    return DecoderConfig(**{**sizes, **changes})  # type: ignore[bad-argument-type]  (tests)


def tiny_language_model(seed: int = 0, family: str = "llama") -> LanguageModel:
    """Builds a random language model of the tiny sizes.

    Args:
        seed: Of the parameters.
        family: "llama", "mistral" (a window of 6 tokens), "qwen2", "qwen3", "gemma3" (a window of
            6 tokens in two of three layers), "t5", "flan-t5" or "bart".

    Returns:
        A language model in float32 that no file or network is needed for.

    Raises:
        ValueError: There is no such family.
    """
    if family in _SEQ2SEQ:
        # Only here: the module needs this one's tokenizer.
        from ragjax.models.testing.seq2seq import tiny_seq2seq

        return tiny_seq2seq(seed, family)
    if family not in _FAMILIES:
        known = ", ".join([*_FAMILIES, *_SEQ2SEQ])
        raise ValueError(f"no tiny language model of family {family!r}; there are {known}")
    config, tokenizer = tiny_decoder_config(**_FAMILIES[family]), tiny_tokenizer()
    return build_language_model(
        FAMILY,
        config,
        _random_params(config, seed),
        tokenizer,
        bos_id=None,
        eos_ids=(_END_ID,),
        pad_id=_PAD_ID,
        source=f"tiny {family} language model, seed {seed}",
    )


def write_tiny_language_model(folder: Path, seed: int = 0, family: str = "llama") -> None:
    """Writes `tiny_language_model(seed, family)` as a Hugging Face folder.

    Args:
        folder: Created if needed; gets config.json, model.safetensors and tokenizer.json.
        seed: Of the parameters.
        family: As `tiny_language_model` takes it.
    """
    model, folder = tiny_language_model(seed, family), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.family.save_params(model.config, model.params))
    write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_text(folder / "tokenizer.json", model.tokenizer.to_str(pretty=True))
    settings = model.family.format_config(model.config)
    settings |= {"eos_token_id": model.eos_ids[0], "pad_token_id": model.pad_id}
    if model.family.has_encoder:
        settings["bos_token_id"] = model.bos_id
    write_text(folder / "config.json", json.dumps(settings, indent=2))


def _random_params(config: DecoderConfig, seed: int) -> dict[str, Any]:
    # A fresh model's logits are almost flat, and tied embeddings make it repeat its last token:
    # larger embeddings and residual branches give tests distributions with clear winners.
    params = init_params(config, jax.random.key(seed))
    embed, layers = params["embed"], params["layers"]
    factor = 20 / config.embedding_scale
    branches = {
        name: {**layers[name], "kernel": 4 * layers[name]["kernel"]} for name in ("output", "down")
    }
    layers = {**layers, **branches}
    params = {**params, "embed": {"embedding": factor * embed["embedding"]}, "layers": layers}
    if config.model_type == "llama" and not config.qkv_bias:
        return params
    return {**params, "layers": _randomised(layers, jax.random.key(seed + 1))}


def _randomised(layers: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    # Biases of zero and norms of one would hide that they are left out.
    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "kernel":
            return leaf
        number = sum(map(ord, jax.tree_util.keystr(path)))
        return leaf + 0.2 * jax.random.normal(jax.random.fold_in(key, number), leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, layers)

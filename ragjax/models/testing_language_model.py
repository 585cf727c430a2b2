"""A tiny random language model with a tokenizer built in memory: for tests, without files."""

import json
from pathlib import Path

import jax
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ragjax.models import decoder
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.decoder_family import FAMILY
from ragjax.models.language_model import LanguageModel, build_language_model

# The tokenizer has the 256 bytes first, then these two.
_END, _PAD = "<|end|>", "<|pad|>"
_END_ID, _PAD_ID = 256, 257


def tiny_tokenizer() -> Tokenizer:
    """Builds a byte-level tokenizer without merges: one token per byte, an end and a pad token.

    Returns:
        Tokenizer of 258 tokens; decoding gives the text back.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, _END, _PAD])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END, _PAD])
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


def tiny_language_model(seed: int = 0) -> LanguageModel:
    """Builds a random decoder of the tiny sizes.

    Args:
        seed: Of the parameters.

    Returns:
        A language model in float32 that no file or network is needed for.
    """
    config, tokenizer = tiny_decoder_config(), tiny_tokenizer()
    return build_language_model(
        FAMILY,
        config,
        _random_params(config, seed),
        tokenizer,
        bos_id=None,
        eos_ids=(_END_ID,),
        pad_id=_PAD_ID,
        source=f"tiny language model, seed {seed}",
    )


def write_tiny_language_model(folder: Path, seed: int = 0) -> None:
    """Writes `tiny_language_model(seed)` as a Hugging Face folder.

    Args:
        folder: Created if needed; gets config.json, model.safetensors and tokenizer.json.
        seed: Of the parameters.
    """
    model, folder = tiny_language_model(seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.family.save_params(model.config, model.params)
    save_file(tensors, folder / "model.safetensors")
    model.tokenizer.save(str(folder / "tokenizer.json"))
    settings = model.family.format_config(model.config)
    settings |= {"eos_token_id": model.eos_ids[0], "pad_token_id": model.pad_id}
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _random_params(config: DecoderConfig, seed: int) -> dict:
    # A fresh model's logits are almost flat, and tied embeddings make it repeat its last token:
    # larger embeddings and residual branches give tests distributions with clear winners.
    params = decoder.init_params(config, jax.random.key(seed))
    embed, layers = params["embed"], params["layers"]
    branches = {name: {"kernel": 4 * layers[name]["kernel"]} for name in ("output", "down")}
    return {
        **params,
        "embed": {"embedding": 20 * embed["embedding"]},
        "layers": {**layers, **branches},
    }

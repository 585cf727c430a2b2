"""A tiny random language model with a tokenizer built in memory: for tests, without files."""

import json
from pathlib import Path

import jax
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ragjax.models import llama
from ragjax.models.language_model import LanguageModel, build_language_model
from ragjax.models.llama_checkpoint import params_to_huggingface
from ragjax.models.llama_config import LlamaConfig

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


def tiny_llama_config(**changes: object) -> LlamaConfig:
    """Returns sizes that run in milliseconds and still exercise grouped-query attention.

    Args:
        **changes: Fields of `LlamaConfig` to replace.

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
    return LlamaConfig(**{**sizes, **changes})  # type: ignore[bad-argument-type]  (tests)


def tiny_language_model(seed: int = 0) -> LanguageModel:
    """Builds a random decoder of the tiny sizes.

    Args:
        seed: Of the parameters.

    Returns:
        A language model in float32 that no file or network is needed for.
    """
    config, tokenizer = tiny_llama_config(), tiny_tokenizer()
    return build_language_model(
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
    save_file(params_to_huggingface(model.config, model.params), folder / "model.safetensors")
    model.tokenizer.save(str(folder / "tokenizer.json"))
    config = model.config
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "eos_token_id": model.eos_ids[0],
        "pad_token_id": model.pad_id,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _random_params(config: LlamaConfig, seed: int) -> dict:
    # A fresh model's logits are almost flat, and tied embeddings make it repeat its last token:
    # larger embeddings and residual branches give tests distributions with clear winners.
    params = llama.init_params(config, jax.random.key(seed))
    embed, layers = params["embed"], params["layers"]
    branches = {name: {"kernel": 4 * layers[name]["kernel"]} for name in ("output", "down")}
    return {
        **params,
        "embed": {"embedding": 20 * embed["embedding"]},
        "layers": {**layers, **branches},
    }

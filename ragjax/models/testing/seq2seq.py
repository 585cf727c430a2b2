"""A tiny random encoder-decoder with a tokenizer built in memory: for tests, without files."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from ragjax.models.language_model import LanguageModel, build_encoder_decoder
from ragjax.models.seq2seq import bart, t5
from ragjax.models.seq2seq import model as seq2seq
from ragjax.models.seq2seq.bart import BartConfig
from ragjax.models.seq2seq.model import DECODER, ENCODER, Params, Seq2SeqConfig
from ragjax.models.seq2seq.t5 import T5Config

# The tokenizer has the 256 bytes first, then these three.
_START, _END, _PAD = "<s>", "</s>", "<pad>"
_START_ID, _END_ID, _PAD_ID = 256, 257, 258
_SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_encoder_layers": 2,
    "num_heads": 4,
    "max_positions": 512,
}


def tiny_seq2seq(seed: int = 0, family: str = "t5") -> LanguageModel:
    """Builds a random encoder-decoder of tiny sizes.

    Args:
        seed: Of the parameters.
        family: "t5" (tied, relu), "flan-t5" (untied, gated gelu) or "bart".

    Returns:
        A language model in float32 that no file or network is needed for.

    Raises:
        ValueError: The family is none of these.
    """
    tokenizer = tiny_seq2seq_tokenizer(with_start=family == "bart")
    config = tiny_seq2seq_config(family)
    return build_encoder_decoder(
        bart.FAMILY if isinstance(config, BartConfig) else t5.FAMILY,
        config,
        _random_params(config, seed),
        tokenizer,
        eos_ids=(_END_ID,),
        pad_id=_PAD_ID,
        source=f"tiny {family}, seed {seed}",
    )


def tiny_seq2seq_config(family: str = "t5", **changes: Any) -> Seq2SeqConfig:
    """Returns sizes that run in milliseconds: 2 encoder and 3 decoder layers of width 32.

    Args:
        family: As in `tiny_seq2seq`.
        **changes: Fields to replace.

    Returns:
        A `T5Config` or a `BartConfig`.

    Raises:
        ValueError: The family is not known.
    """
    if family == "bart":
        own: dict[str, Any] = {
            "decoder_start_id": _END_ID,
            "forced_first_id": _START_ID,
            "num_encoder_heads": 2,
            "encoder_intermediate_size": 40,
        }
        return BartConfig(**{**_SIZES, **own, **changes})
    if family not in ("t5", "flan-t5"):
        raise ValueError(f"family must be t5, flan-t5 or bart, got {family!r}")
    flan = family == "flan-t5"
    own = {
        "decoder_start_id": _PAD_ID,
        "head_dim": 10,  # heads need not add up to the width
        "num_buckets": 8,
        "max_distance": 20,
        "tie_embeddings": not flan,
        "gated": flan,
        "activation": "gelu_new" if flan else "relu",
    }
    return T5Config(**{**_SIZES, **own, **changes})


def tiny_seq2seq_tokenizer(*, with_start: bool) -> Tokenizer:
    """Builds a byte-level tokenizer without merges: one token per byte, and three special ones.

    Args:
        with_start: True: texts become `<s> … </s>`, as in BART; False: `… </s>`, as in T5.

    Returns:
        Tokenizer of 259 tokens; decoding gives the text back.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, _START, _END, _PAD])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_START, _END, _PAD])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}" if with_start else f"$A {_END}",
        special_tokens=[(_START, _START_ID), (_END, _END_ID)],
    )
    return tokenizer


def write_tiny_seq2seq(folder: Path, seed: int = 0, family: str = "t5") -> None:
    """Writes `tiny_seq2seq(seed, family)` as a Hugging Face folder.

    Args:
        folder: Created if needed; gets config.json, model.safetensors and tokenizer.json.
        seed: Of the parameters.
        family: As in `tiny_seq2seq`.
    """
    model, folder = tiny_seq2seq(seed, family), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.family.save_params(model.config, model.params)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.tokenizer.save(str(folder / "tokenizer.json"))
    settings = model.family.format_config(model.config)
    settings |= {"eos_token_id": _END_ID, "pad_token_id": _PAD_ID, "bos_token_id": model.bos_id}
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


@functools.partial(jax.jit, static_argnums=0)
def _random_params(config: Seq2SeqConfig, seed: int) -> Params:
    # A fresh model's logits are almost flat: larger embeddings and residual branches give tests
    # distributions with clear winners that depend on the context.
    params = seq2seq.init_params(config, jax.random.key(seed))
    params["embed"] = {"embedding": 20 * params["embed"]["embedding"]}
    if "unembed" in params:
        params["unembed"] = {"kernel": 20 * params["unembed"]["kernel"]}
    for side in (ENCODER, DECODER):
        layers = dict(params[side]["layers"])
        for name, linear in (("attention", "output"), ("cross_attention", "output")):
            if name in layers:
                kernel = layers[name][linear]["kernel"]
                scaled = {**layers[name][linear], "kernel": 4 * kernel}
                layers[name] = {**layers[name], linear: scaled}
        params[side] = {**params[side], "layers": layers}
    return params

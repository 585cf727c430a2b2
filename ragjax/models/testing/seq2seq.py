"""A tiny random encoder-decoder with a tokenizer built in memory: for tests, without files."""

import functools
from typing import Any

import jax
from tokenizers import Tokenizer, processors

from ragjax.models.language_model import LanguageModel, build_language_model
from ragjax.models.seq2seq import bart, t5
from ragjax.models.seq2seq.bart import BartConfig
from ragjax.models.seq2seq.model import DECODER, ENCODER, Params, Seq2SeqConfig, init_params
from ragjax.models.seq2seq.t5 import T5Config
from ragjax.models.testing.language_model import tiny_tokenizer

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
    return build_language_model(
        bart.FAMILY if isinstance(config, BartConfig) else t5.FAMILY,
        config,
        _random_params(config, seed),
        tokenizer,
        bos_id=_START_ID if family == "bart" else None,
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
    tokenizer = tiny_tokenizer(_START, _END, _PAD)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}" if with_start else f"$A {_END}",
        special_tokens=[(_START, _START_ID), (_END, _END_ID)],
    )
    return tokenizer


@functools.partial(jax.jit, static_argnums=0)
def _random_params(config: Seq2SeqConfig, seed: int) -> Params:
    # A fresh model's logits are almost flat: larger embeddings and residual branches give tests
    # distributions with clear winners that depend on the context.
    params = init_params(config, jax.random.key(seed))
    params["embed"] = {"embedding": 20 * params["embed"]["embedding"]}
    if "unembed" in params:
        params["unembed"] = {"kernel": 20 * params["unembed"]["kernel"]}
    for side in (ENCODER, DECODER):
        layers = dict(params[side]["layers"])
        for name in layers.keys() & {"attention", "cross_attention"}:
            output = layers[name]["output"]
            scaled = {**output, "kernel": 4 * output["kernel"]}
            layers[name] = {**layers[name], "output": scaled}
        params[side] = {**params[side], "layers": layers}
    return params

"""The sizes of a T5 model, read from and written as a Hugging Face configuration."""

from collections.abc import Mapping
from typing import Any

from ragjax.models.bert import MAX_LAYERS, integer_field, number_field
from ragjax.models.seq2seq_fields import optional_integer, token_id
from ragjax.models.t5_model import ACTIVATIONS, T5Config

MODEL_TYPES = ("t5",)
_FARTHEST = 10**6  # tokens; a larger number is a damaged file, and would be counted up to


def parse_config(config: Mapping[str, Any]) -> T5Config:
    """Reads the fields of a `config.json` of model type `t5`.

    Args:
        config: The parsed file.

    Returns:
        The sizes.

    Raises:
        ValueError: A field is missing, is not of its type, or asks for what is not supported.
    """
    gated, activation = _feed_forward(str(config.get("feed_forward_proj", "relu")))
    # transformers 5 stores the scaling apart, and says that every model is tied: then the file of
    # one that is not scaled has an unembedding only where it differs from the embedding table.
    tied_table = config.get("tie_word_embeddings") is not False
    tied = bool(config.get("scale_decoder_outputs", tied_table))
    layers = integer_field(config, "num_layers", most=MAX_LAYERS)
    pad = token_id(config, "pad_token_id", 0)
    return T5Config(
        vocab_size=integer_field(config, "vocab_size"),
        hidden_size=integer_field(config, "d_model"),
        head_dim=integer_field(config, "d_kv"),
        intermediate_size=integer_field(config, "d_ff"),
        num_encoder_layers=layers,
        num_layers=optional_integer(config, "num_decoder_layers", layers, most=MAX_LAYERS),
        num_heads=integer_field(config, "num_heads"),
        num_buckets=optional_integer(config, "relative_attention_num_buckets", 32),
        max_distance=optional_integer(
            config, "relative_attention_max_distance", 128, most=_FARTHEST
        ),
        layer_norm_eps=number_field(config, "layer_norm_epsilon", 1e-6),
        # Relative positions have no end; this is the length of the pre-training texts.
        max_positions=optional_integer(config, "n_positions", 512),
        decoder_start_id=token_id(config, "decoder_start_token_id", pad) or 0,
        gated=gated,
        activation=activation,
        tie_embeddings=tied,
        unembedding_may_be_shared=tied_table and not tied,
    )


def format_config(config: T5Config) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `parse_config` reads as `config`."""
    activation = config.activation
    if config.gated:
        activation = "gelu" if activation == "gelu_new" else activation
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.layer_norm_eps,
        "n_positions": config.max_positions,
        "decoder_start_token_id": config.decoder_start_id,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _feed_forward(name: str) -> tuple[bool, str]:
    """Returns whether the feed-forward block is gated, and its activation."""
    gated, activation = name.startswith("gated-"), name.removeprefix("gated-")
    if name == "gated-gelu":
        activation = "gelu_new"  # what T5 1.1 was trained with
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"feed_forward_proj = {name!r} is not supported; one of {', '.join(ACTIVATIONS)} is, "
            "or gated- and one of them"
        )
    return gated, activation

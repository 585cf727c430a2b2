"""Causal decoders as text encoders: Qwen3-Embedding, E5-Mistral and others of their kind.

References:
    Wang et al., "Improving Text Embeddings with Large Language Models", 2024.
    Zhang et al., "Qwen3 Embedding: Advancing Text Embedding and Reranking Through Foundation
    Models", 2025.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array

from ragjax.models.decoder.checkpoint import huggingface_key_table, rotary_buffers
from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.huggingface import (
    MODEL_TYPES,
    format_huggingface_config,
    parse_huggingface_config,
)
from ragjax.models.decoder.model import causal, init_params, mask_positions, run_layers
from ragjax.models.families import EncoderFamily
from ragjax.models.inputs import Tokens
from ragjax.models.layers.stacks import Params, split


class DecoderEncoder(nnx.Module):
    """A decoder without its unembedding, as `EncoderFamily.make_module` wants it."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Makes random parameters, laid out as `ragjax.models.decoder.model` has them.

        Args:
            config: Sizes.
            rngs: Source of the random keys.
        """
        self.config = config
        for name, node in init_params(config, rngs.params()).items():
            setattr(self, name, _Node(node))

    def __call__(self, tokens: Tokens, *, remat: bool = False) -> Array:
        """Computes the hidden states `[B, L, D]` of right-padded tokens."""
        return hidden_states(self.config, split(self)[1], tokens, remat=remat)


class _Node(nnx.Module):
    """A nested dict of arrays as a module."""

    def __init__(self, tree: Mapping[str, Any]):
        for name, node in tree.items():
            setattr(self, name, _Node(node) if isinstance(node, Mapping) else nnx.Param(node))


def hidden_states(
    config: DecoderConfig, params: Params, tokens: Tokens, *, remat: bool = False
) -> Array:
    """Computes the normalised hidden states of the last layer.

    Args:
        config: Sizes.
        params: As `ragjax.models.decoder.model` describes them, adapters and stacks included.
        tokens: Ids and mask `[B, L]`; L at most `max_positions`.
        remat: True = recompute each layer in the backward pass.

    Returns:
        `[B, L, D]`, in the dtype of the parameters; a token has read those before it and itself.
    """
    length = tokens.ids.shape[1]
    if length > config.max_positions:
        raise ValueError(
            f"{length} tokens per text, but the model has {config.max_positions} positions"
        )
    hidden, _ = run_layers(
        config,
        params,
        tokens.ids,
        positions=mask_positions(tokens.mask),
        allowed=causal(tokens.mask),
        remat=remat,
    )
    return hidden


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the fields of a Hugging Face `config.json` of a decoder; it has no unembedding here.

    Raises:
        ValueError: A field is missing or asks for what is not supported.
    """
    return dataclasses.replace(parse_huggingface_config(config), tie_embeddings=True)


def canonical_key(name: str) -> str:
    """Returns the name that `key_table` uses for a tensor of a published checkpoint.

    Args:
        name: Tensor name; those saved from the model without its head lack the "model.".
    """
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


FAMILY = EncoderFamily(
    model_types=MODEL_TYPES,
    parse_config=parse_config,
    format_config=format_huggingface_config,
    make_module=DecoderEncoder,
    key_table=huggingface_key_table,
    canonical_key=canonical_key,
    ignored_keys=("lm_head.weight",),
    buffers=lambda config: rotary_buffers(config, "model.layers.{}."),
    default_pooling="lasttoken",
    hidden_states=hidden_states,
)

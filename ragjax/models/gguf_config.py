"""Reads the sizes of a decoder from the metadata of a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.models.decoder_config import DecoderConfig


def parse_config(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> DecoderConfig:
    """Reads the sizes; `tensors` say whether the unembedding is tied and biases are there.

    Raises:
        ValueError: A field is missing, or asks for what the decoder does not compute.
    """
    if scaling := fields.get(f"{architecture}.rope.scaling.type"):
        if scaling != "none":
            raise ValueError(f"{path}: rotary scaling {scaling!r} is not supported in GGUF files")
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{path}: holds rotary frequency factors (Llama 3.1 and later), which are read from a "
            "Hugging Face folder only"
        )

    def field(name: str) -> Any:
        try:
            return fields[f"{architecture}.{name}"]
        except KeyError as error:
            raise ValueError(f"{path}: the metadata has no {architecture}.{name}") from error

    hidden_size, num_heads = int(field("embedding_length")), int(field("attention.head_count"))
    prefix = f"{architecture}.attention"
    return DecoderConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden_size,
        intermediate_size=int(field("feed_forward_length")),
        num_layers=int(field("block_count")),
        num_heads=num_heads,
        num_kv_heads=int(fields.get(f"{prefix}.head_count_kv", num_heads)),
        head_dim=int(fields.get(f"{prefix}.key_length", hidden_size // num_heads)),
        rope_theta=_shortest(fields.get(f"{architecture}.rope.freq_base", 10000.0)),
        rms_norm_eps=_shortest(field("attention.layer_norm_rms_epsilon")),
        max_positions=int(field("context_length")),
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
    )


def _shortest(value: Any) -> float:
    # The file stores float32: 1e-05, not 9.999999747378752e-06, is what was meant.
    return float(str(np.float32(value)))

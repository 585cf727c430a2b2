"""Reads a GGUF file: the configuration, the dequantised tensors and the tokenizer inside it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ragjax.models.llama_config import LlamaConfig

# Architecture in the file: whether llama.cpp reordered the rows of q and k when it was written.
_PERMUTED = {"llama": True, "qwen2": False}
_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4
# Control tokens that end an answer or a turn, by the names that checkpoints give them.
_END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class GgufModel(NamedTuple):
    """Everything a language model needs, as the file holds it."""

    config: LlamaConfig
    tensors: Mapping[str, np.ndarray]  # float32, dequantised at each access
    permuted: bool  # True: rows of q and k pair neighbouring entries
    tokenizer: Tokenizer
    bos_id: int | None  # None: texts start without one
    eos_ids: tuple[int, ...]
    pad_id: int | None


def read_gguf(path: Path) -> GgufModel:
    """Opens a GGUF file of a Llama-family decoder.

    Args:
        path: The file.

    Returns:
        Configuration, tensors and tokenizer.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its architecture, tokenizer or quantisation is not
            supported.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged or not a GGUF file ({error})") from error
    architecture = fields.get("general.architecture")
    if architecture not in _PERMUTED:
        raise ValueError(
            f"{path}: architecture {architecture!r}; supported GGUF architectures: "
            f"{', '.join(_PERMUTED)}"
        )
    tensors = _GgufTensors(path, {tensor.name: tensor for tensor in reader.tensors})
    tokenizer = _build_tokenizer(path, fields)
    pad_id = fields.get("tokenizer.ggml.padding_token_id")
    return GgufModel(
        config=_parse_config(path, architecture, fields, tensors),
        tensors=tensors,
        permuted=_PERMUTED[architecture],
        tokenizer=tokenizer,
        bos_id=_bos_id(fields),
        eos_ids=_eos_ids(tokenizer, fields),
        pad_id=None if pad_id is None else int(pad_id),
    )


class _GgufTensors(Mapping[str, np.ndarray]):
    """Tensors by name; dequantised to float32 when asked for, so one at a time is in memory."""

    def __init__(self, path: Path, tensors: dict[str, Any]) -> None:
        self._path, self._tensors = path, tensors

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, KeyError) as error:
            raise ValueError(
                f"{self._path}: tensor {name!r} is quantised as {tensor.tensor_type.name}, which "
                "the gguf package cannot read; use a F32, F16, BF16, Q8_0, Q4_0 or Q4_1 file"
            ) from error
        return np.asarray(values, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _parse_config(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> LlamaConfig:
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
    return LlamaConfig(
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


def _build_tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    kind = fields.get("tokenizer.ggml.model")
    pre = fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r}; supported: 'gpt2' with "
            f"{', '.join(sorted(_PRE_TOKENIZERS))}. Use a Hugging Face folder (tokenizer.json)"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    # Llama 3 takes a word that is in the vocabulary whole, whatever its merges are.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    added = [
        AddedToken(token, special=token_kind == _CONTROL_TOKEN, normalized=False)
        for token, token_kind in zip(tokens, kinds, strict=True)
        if token_kind in (_CONTROL_TOKEN, _USER_DEFINED_TOKEN)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    return tokenizer


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _llama3() -> Any:
    return _split_by(_LLAMA3_SPLIT)


def _qwen2() -> Any:
    return _split_by(_LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"))


_PRE_TOKENIZERS = {"gpt-2": _gpt2, "smollm": _smollm, "llama-bpe": _llama3, "qwen2": _qwen2}


def _bos_id(fields: Mapping[str, Any]) -> int | None:
    # Files of the `llama-bpe` kind leave the flag out and mean True.
    adds = fields.get("tokenizer.ggml.add_bos_token")
    adds = fields.get("tokenizer.ggml.pre") == "llama-bpe" if adds is None else adds
    bos_id = fields.get("tokenizer.ggml.bos_token_id")
    return int(bos_id) if adds and bos_id is not None else None


def _eos_ids(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> tuple[int, ...]:
    ids = [fields.get("tokenizer.ggml.eos_token_id")]
    ids += [tokenizer.token_to_id(token) for token in _END_TOKENS]
    return tuple(dict.fromkeys(int(index) for index in ids if index is not None))

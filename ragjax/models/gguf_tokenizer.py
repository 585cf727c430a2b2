"""Rebuilds the tokenizer that a GGUF file holds in its metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4
# Control tokens that end an answer or a turn, by the names that checkpoints give them.
_END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer of the vocabulary and merges in the metadata.

    Raises:
        ValueError: Its kind is not supported.
    """
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


def bos_id(fields: Mapping[str, Any]) -> int | None:
    """Returns the token that starts every text, None where the file says none does."""
    # Files of the `llama-bpe` kind leave the flag out and mean True.
    adds = fields.get("tokenizer.ggml.add_bos_token")
    adds = fields.get("tokenizer.ggml.pre") == "llama-bpe" if adds is None else adds
    found = fields.get("tokenizer.ggml.bos_token_id")
    return int(found) if adds and found is not None else None


def eos_ids(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the tokens that end a text or a turn."""
    ids = [fields.get("tokenizer.ggml.eos_token_id")]
    ids += [tokenizer.token_to_id(token) for token in _END_TOKENS]
    return tuple(dict.fromkeys(int(index) for index in ids if index is not None))

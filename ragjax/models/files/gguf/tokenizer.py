"""Rebuilds the tokenizer that a GGUF file holds in its metadata."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ragjax.models.files.chat import ROLES, ChatTemplate

NORMAL_TOKEN, UNKNOWN_TOKEN, CONTROL_TOKEN, USER_DEFINED_TOKEN = 1, 2, 3, 4
UNUSED_TOKEN, BYTE_TOKEN = 5, 6
_MERGED_KINDS = (NORMAL_TOKEN, USER_DEFINED_TOKEN)  # never a control, unknown or byte token
# Control tokens that end an answer or a turn, by the names that checkpoints give them.
_END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>")
_END_TOKENS += ("<end_of_turn>", "<eos>")
_SPACE = "▁"  # how SentencePiece writes a space
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _ByteLevel(NamedTuple):
    """How one kind of byte-level BPE cuts a text before it merges."""

    pre_tokenizer: Callable[[], Any]
    whole_words: bool = False  # a word that is in the vocabulary stays whole, whatever the merges
    composes: bool = False  # normalises to NFC
    adds_bos: bool = False  # what a file that does not say it means


def build_tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer of the vocabulary in the metadata.

    Args:
        path: The file, for the messages.
        fields: The metadata.

    Returns:
        A byte-level BPE ("gpt2") or a SentencePiece BPE ("llama"). It adds no special tokens.

    Raises:
        ValueError: Its kind is not supported, or its parts do not fit together.
    """
    kind = fields.get("tokenizer.ggml.model")
    pre = fields.get("tokenizer.ggml.pre")
    known = isinstance(pre, str) and pre in BYTE_LEVEL
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and not known):
        raise ValueError(
            f"{path}: tokenizer {kind!r:.100} with pre-tokenizer {pre!r:.100}; supported: 'llama', "
            f"and 'gpt2' with {', '.join(sorted(BYTE_LEVEL))}. Use a Hugging Face folder "
            "(tokenizer.json)"
        )
    tokens = _list(path, fields, "tokens", str)
    kinds = _list(path, fields, "token_type", int, len(tokens), default=[1] * len(tokens))
    try:
        if kind == "gpt2":
            # No program writes an empty list, which is that of a vocabulary of single bytes.
            bare = all(
                len(token) == 1
                for token, token_kind in zip(tokens, kinds, strict=True)
                if token_kind == NORMAL_TOKEN
            )
            merges = _list(path, fields, "merges", str, default=[] if bare else None)
            tokenizer = _byte_level(tokens, merges, BYTE_LEVEL[str(pre)])
        else:
            scores = _list(path, fields, "scores", float, len(tokens))
            unknown = token_id(path, fields, "unknown_token_id", 0)
            prefixed = fields.get("tokenizer.ggml.add_space_prefix", True)
            tokenizer = _sentence_piece(tokens, scores, kinds, unknown, prefixed=bool(prefixed))
        for special in (True, False):
            wanted = CONTROL_TOKEN if special else USER_DEFINED_TOKEN
            added = [
                AddedToken(token, special=special, normalized=False)
                for token, token_kind in zip(tokens, kinds, strict=True)
                if token_kind == wanted and token
            ]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise ValueError(f"{path}: the tokenizer cannot be built ({error!s:.200})") from error
    return tokenizer


def bos_id(path: Path, fields: Mapping[str, Any]) -> int | None:
    """Returns the token that starts every text, None where the file says none does."""
    sentence_piece = fields.get("tokenizer.ggml.model") == "llama"
    adds = fields.get("tokenizer.ggml.add_bos_token")
    if adds is None:
        kind = BYTE_LEVEL.get(str(fields.get("tokenizer.ggml.pre")))
        adds = sentence_piece or (kind is not None and kind.adds_bos)
    found = token_id(path, fields, "bos_token_id", 1 if sentence_piece else None)
    return found if adds else None


def eos_ids(path: Path, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the tokens that end a text or a turn."""
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    sentence_piece = fields.get("tokenizer.ggml.model") == "llama"
    ids = [
        token_id(path, fields, "eos_token_id", 2 if sentence_piece else None),
        token_id(path, fields, "eot_token_id"),
        token_id(path, fields, "eom_token_id"),
    ]
    # Only control tokens: "</s>" is an HTML tag in the vocabulary of Gemma.
    places = {tokens[index]: index for index, kind in enumerate(kinds) if kind == CONTROL_TOKEN}
    ids += [places.get(token) for token in _END_TOKENS]
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def token_id(
    path: Path, fields: Mapping[str, Any], name: str, default: int | None = None
) -> int | None:
    """Returns the token id in a field of the metadata.

    Args:
        path: The file, for the messages.
        fields: The metadata.
        name: Of the field, without "tokenizer.ggml.".
        default: Used where the field is missing, if the vocabulary is large enough.

    Raises:
        ValueError: It is not an id of the vocabulary.
    """
    found, count = fields.get(f"tokenizer.ggml.{name}"), len(fields["tokenizer.ggml.tokens"])
    if found is None:
        return default if default is not None and default < count else None
    if type(found) is not int or not 0 <= found < count:
        raise ValueError(
            f"{path}: tokenizer.ggml.{name} is {found!r:.100}, not an id of {count} tokens"
        )
    return found


def chat_template(path: Path, fields: Mapping[str, Any]) -> ChatTemplate | None:
    """Returns the chat template in the metadata, None where there is none."""
    source, tokens = fields.get("tokenizer.chat_template"), fields["tokenizer.ggml.tokens"]
    if not isinstance(source, str) or not source:
        return None
    names = ("bos", "eos", "unknown", "padding")
    ids = [token_id(path, fields, f"{name}_token_id") for name in names]
    known = [(role, n) for role, n in zip(ROLES, ids, strict=True) if n is not None]
    return ChatTemplate(source, tuple((role, tokens[n]) for role, n in known))


def _list(
    path: Path,
    fields: Mapping[str, Any],
    name: str,
    kind: type,
    length: int | None = None,
    default: Sequence[Any] | None = None,
) -> list[Any]:
    """Returns an array of the metadata after checking its length and the type of its entries."""
    found = fields.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(found, list) or not all(type(item) is kind for item in found):
        raise ValueError(f"{path}: tokenizer.ggml.{name} is not an array of {kind.__name__}")
    if not found and length != 0 and name != "merges":
        raise ValueError(f"{path}: tokenizer.ggml.{name} is empty")
    if length is not None and len(found) != length:
        raise ValueError(
            f"{path}: tokenizer.ggml.{name} has {len(found)} entries for {length} tokens"
        )
    return found


def _byte_level(tokens: Sequence[str], merges: Sequence[str], kind: _ByteLevel) -> Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    if any(not left or not right or " " in right for left, right in pairs):
        raise ValueError("a merge is not two tokens with a space between")
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=kind.whole_words))
    tokenizer.pre_tokenizer = kind.pre_tokenizer()
    if kind.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    unknown: int | None,
    *,
    prefixed: bool,
) -> Tokenizer:
    """Builds a SentencePiece BPE: of all neighbours, the pair with the best score joins first."""
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(vocab, scores, kinds),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    restored: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        restored.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(restored)
    return tokenizer


def _merges(
    vocab: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Returns every way to cut a token into two others, the best token first."""
    found = [
        (-scores[index], cut, token)
        for token, index in vocab.items()
        if kinds[index] in _MERGED_KINDS
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    found.sort(key=lambda merge: (merge[0], merge[1], len(merge[2])))
    return [(token[:cut], token[cut:]) for _, cut, token in found]


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _falcon() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            _gpt2(),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )


def _split_by(pattern: str) -> Callable[[], Any]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3 = _ByteLevel(_split_by(_LLAMA3_SPLIT), whole_words=True, adds_bos=True)
_QWEN2 = _ByteLevel(_split_by(_LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")), composes=True)
BYTE_LEVEL = {
    "gpt-2": _ByteLevel(_gpt2),
    "mpt": _ByteLevel(_gpt2),
    "smollm": _ByteLevel(_digits),
    "starcoder": _ByteLevel(_digits),
    "refact": _ByteLevel(_digits),
    "falcon": _ByteLevel(_falcon),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _ByteLevel(_split_by(_TEKKEN_SPLIT), whole_words=True, adds_bos=True),
}

"""Loads tokenizers as plain `tokenizers.Tokenizer`, with truncation and padding switched off."""

import codecs
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, normalizers, processors

from ragjax.models.files.config import read_json

logger = logging.getLogger(__name__)

_OLD_VOCABULARIES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


class PadToken(NamedTuple):
    """The token that fills up a row."""

    id: int
    token: str
    declared: bool  # False = ragjax chose it, as the model declares none


def load_tokenizer(folder: Path, *, vocab_size: int, converter: str = "AutoTokenizer") -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder.

    Args:
        folder: Holds `tokenizer.json`, or another tokenizer that `transformers` can convert.
        vocab_size: Rows of the model's embedding table.
        converter: Class of `transformers` that reads the other tokenizer.

    Returns:
        The tokenizer; it neither truncates nor pads. Tokens that were added to its vocabulary and
        that the model has no embedding for are left out; a log line names them.

    Raises:
        FileNotFoundError: No tokenizer in the folder.
        ValueError: It cannot be read, its vocabulary has ids that the model has no embedding for,
            or it puts a token without an embedding around each text.
    """
    path = folder / "tokenizer.json"
    tokenizer = _read_tokenizer(path) if path.is_file() else _convert_tokenizer(folder, converter)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {largest}, but the model has embeddings for "
            f"{vocab_size} tokens (ids below {vocab_size}); the two do not belong together"
        )
    return _without_added_tokens(tokenizer, vocab_size, folder)


def _without_added_tokens(tokenizer: Tokenizer, vocab_size: int, folder: Path) -> Tokenizer:
    """Leaves out the added tokens with ids from `vocab_size` on, so that no text produces one."""
    added = tokenizer.get_added_tokens_decoder()
    dropped = {index: str(token) for index, token in added.items() if index >= vocab_size}
    if not dropped:
        return tokenizer
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < vocab_size]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    # What is put around a text names its tokens by id, which need not exist.
    for second in (None, "a"):
        for index in tokenizer.encode("a", second).ids:
            if index >= vocab_size:
                raise ValueError(
                    f"{folder}: the tokenizer puts {dropped.get(index, '')!r} (id {index}) around "
                    f"each text, but the model has embeddings for {vocab_size} tokens (ids below "
                    f"{vocab_size}); the two do not belong together"
                )
    listed = ", ".join(f"{token!r} ({index})" for index, token in sorted(dropped.items())[:5])
    logger.warning(
        "%s: added tokens without an embedding in the model are left out of the tokenizer: %s%s",
        folder,
        listed,
        f" and {len(dropped) - 5} more" if len(dropped) > 5 else "",
    )
    return tokenizer


def lowercased(tokenizer: Tokenizer) -> Tokenizer:
    """Makes a tokenizer lower-case its input first; changes it in place and returns it."""
    first = normalizers.Lowercase()
    rest = tokenizer.normalizer
    tokenizer.normalizer = normalizers.Sequence([first, rest]) if rest else first
    return tokenizer


def choose_pad_token(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> PadToken:
    """Chooses the token that fills up rows.

    Args:
        tokenizer: The model's tokenizer.
        folder: The model folder, for `tokenizer_config.json` and `special_tokens_map.json`.
        config: The model's parsed `config.json`.

    Returns:
        The declared pad token; without one, the end-of-text or first token. Any token will do:
        padding is always masked.
    """
    files = ("tokenizer_config.json", "special_tokens_map.json")
    names = [token_text(read_json(folder / file).get("pad_token")) for file in files]
    for name in [*names, "[PAD]", "<pad>"]:
        if name is not None and (pad_id := tokenizer.token_to_id(name)) is not None:
            return PadToken(pad_id, name, declared=True)
    for field in ("pad_token_id", "eos_token_id"):
        pad_id = config.get(field)
        if not isinstance(pad_id, int) or pad_id < 0:  # some Llama models say -1 for none
            continue
        if (name := tokenizer.id_to_token(pad_id)) is not None:
            return PadToken(pad_id, name, declared=field == "pad_token_id")
    return PadToken(0, tokenizer.id_to_token(0) or "", declared=False)


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from error


def _convert_tokenizer(folder: Path, converter: str) -> Tokenizer:
    """Lets transformers read an older tokenizer format."""
    # Checked here, as transformers makes a tokenizer without a vocabulary out of nothing.
    if not any((folder / name).is_file() for name in _OLD_VOCABULARIES):
        raise FileNotFoundError(
            f"{folder}: no tokenizer.json, and none of {', '.join(_OLD_VOCABULARIES)} to make it of"
        )
    if read_json(folder / "tokenizer_config.json").get("auto_map"):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: the tokenizer brings its own Python code "
            "(auto_map), which ragjax does not run; a tokenizer.json is read"
        )
    import transformers  # lazily: it takes seconds to import

    try:
        loaded = getattr(transformers, converter).from_pretrained(
            str(folder), use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{folder}: transformers cannot read the tokenizer ({error})") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"{folder}: the tokenizer {type(loaded).__name__} has no tokenizer.json form"
        )
    return backend


def token_text(token: Any) -> str | None:
    """Returns the text of a token given as a string or as `{"content": ...}`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


# Post-processors beside which a template can stand; the others add an end of their own.
_NEUTRAL = ("ByteLevel",)


def with_end_token(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Returns a tokenizer whose texts end with the token that `add_eos_token` asks for.

    transformers adds it when it loads such a tokenizer, and last-token pooling (E5-Mistral) reads
    it.

    Args:
        tokenizer: That of the folder; may be changed.
        folder: For `tokenizer_config.json`.

    Returns:
        The tokenizer as it is where nothing is asked for, or its texts end so already.
    """
    settings = read_json(folder / "tokenizer_config.json")
    token = token_text(settings.get("eos_token"))
    number = None if token is None else tokenizer.token_to_id(token)
    if settings.get("add_eos_token") is not True or token is None or number is None:
        return tokenizer
    if tokenizer.encode("a").ids[-1:] == [number]:
        return tokenizer
    spec = json.loads(tokenizer.to_str())
    present = spec["post_processor"]
    parts = [present] if present else []
    if present and present["type"] == "Sequence":
        parts = present["processors"]
    for part in parts:
        # Two templates in a row are more than the package can do, so the one there is extended.
        if part["type"] == "TemplateProcessing":
            part["single"].append({"SpecialToken": {"id": token, "type_id": 0}})
            part["special_tokens"][token] = {"id": token, "ids": [number], "tokens": [token]}
            return Tokenizer.from_str(json.dumps(spec))
    if all(part["type"] in _NEUTRAL for part in parts):
        end = processors.TemplateProcessing(single=f"$A {token}", special_tokens=[(token, number)])
        old = tokenizer.post_processor
        tokenizer.post_processor = processors.Sequence([old, end]) if parts else end
    return tokenizer

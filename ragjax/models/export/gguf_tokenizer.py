"""The tokenizer of a language model as the metadata of a GGUF file."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from ragjax.models.export.base import BaseModel
from ragjax.models.export.language_model import token_ids
from ragjax.models.files.chat import default_template
from ragjax.models.files.gguf.tokenizer import (
    BYTE_LEVEL,
    BYTE_TOKEN,
    CONTROL_TOKEN,
    NORMAL_TOKEN,
    UNKNOWN_TOKEN,
    UNUSED_TOKEN,
    USER_DEFINED_TOKEN,
    bos_id,
    build_tokenizer,
    eos_ids,
)
from ragjax.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."
_PATH = Path("GGUF")  # in messages of the reader, which has no file yet
# Where the ways to cut a text before its tokens are joined differ: numbers of one to five digits,
# numerals that are no digits, contractions, capitals inside words, marks, spaces and line ends.
_PROBES = (
    "In 2024, 1234567 people paid $3.50 for v1.2.3 of 7 or 12 or 123 or 12345.",
    "don't WE'LL I'M they've helloWorld HTTPServer iPhone",
    "  two spaces,\ttab\nand lines \n\n end  ",
    "naïve café, e\u0301 combining, ½ ² ٣٤٥, ﬁ ligature",
    "日本語のテキスト и русский, العربية, हिन्दी",
    "emoji 😀👩‍👩‍👧!!?? (a/b/c) ...\r\n//x",
)
_MAX_ADDED = 8  # added tokens that are tried inside a text


def tokenizer_fields(lm: LanguageModel, base: BaseModel) -> dict[str, Any]:
    """Makes the fields of the tokenizer and proves that they mean the same tokenizer.

    Args:
        lm: The model; where it came from a GGUF file, that file's own fields are taken.
        base: What the base model's files say.

    Returns:
        Names that begin with "tokenizer." → values.

    Raises:
        ValueError: GGUF files know no such tokenizer.
    """
    fields = dict(base.gguf_tokenizer) or _from_tokenizer(lm)
    fields |= _special(lm, base)
    if template := default_template(base.chat_template):
        fields["tokenizer.chat_template"] = template
    _check(lm, fields)
    return fields


def _from_tokenizer(lm: LanguageModel) -> dict[str, Any]:
    state = json.loads(lm.tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"{lm.source}: a tokenizer of kind {model['type']} is not written to GGUF; BPE of bytes"
            " and of SentencePiece are"
        )
    tokens, kinds = _tokens(lm.tokenizer, state, lm.config.vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    for fields in _candidates(model, tokens, merges, kinds):
        fields = {_PREFIX + name: value for name, value in fields.items()}
        if _same(lm.tokenizer, build_tokenizer(_PATH, fields)):
            return fields
    raise ValueError(
        f"{lm.source}: its tokenizer cuts texts in a way that GGUF files have no name for; known"
        f" are those of SentencePiece and {', '.join(sorted(BYTE_LEVEL))}"
    )


def _tokens(
    tokenizer: Tokenizer, state: Mapping[str, Any], size: int
) -> tuple[list[str], list[int]]:
    """Returns the token of each id and its kind."""
    # The embeddings of ids without a token are in the file, too.
    tokens, kinds = [f"[PAD{index}]" for index in range(size)], [UNUSED_TOKEN] * size
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        is_byte = state["model"].get("byte_fallback") and _is_byte(token)
        tokens[index], kinds[index] = token, BYTE_TOKEN if is_byte else NORMAL_TOKEN
    for added in state["added_tokens"]:
        kinds[added["id"]] = CONTROL_TOKEN if added["special"] else USER_DEFINED_TOKEN
    if (unknown := state["model"].get("unk_token")) in tokens:
        kinds[tokens.index(unknown)] = UNKNOWN_TOKEN
    return tokens, kinds


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _candidates(
    model: Mapping[str, Any], tokens: list[str], merges: list[str], kinds: list[int]
) -> Iterator[dict[str, Any]]:
    """Yields the fields of each kind of tokenizer that this one may be."""
    common = {"tokens": tokens, "token_type": kinds}
    if not model.get("byte_fallback"):
        whole_words = bool(model.get("ignore_merges"))
        for name, kind in BYTE_LEVEL.items():
            if kind.whole_words == whole_words:
                yield {"model": "gpt2", "pre": name, **common, "merges": merges}
        return
    # What is joined first scores best; single characters, which nothing is joined to, score least.
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    for prefixed in (True, False):
        yield {
            "model": "llama",
            "pre": "default",
            **common,
            "scores": scores,
            "add_space_prefix": prefixed,
            **({"unknown_token_id": kinds.index(UNKNOWN_TOKEN)} if UNKNOWN_TOKEN in kinds else {}),
        }


def _special(lm: LanguageModel, base: BaseModel) -> dict[str, Any]:
    """Returns the ids of the special tokens, and whether texts begin with one."""
    ids = token_ids(lm, base)
    found: dict[str, Any] = {"add_bos_token": lm.bos_id is not None, "padding_token_id": lm.pad_id}
    if "bos" in ids:
        found["bos_token_id"] = ids["bos"]
    # Three ends have a field: of a text, a turn and a message; the reader knows others by name.
    for name, index in zip(("eos", "eot", "eom"), lm.eos_ids, strict=False):
        found[f"{name}_token_id"] = index
    if base.gguf_tokenizer:  # which names what else it means by them
        found = {name: value for name, value in found.items() if name == "add_bos_token"}
    return {_PREFIX + name: value for name, value in found.items()}


def _check(lm: LanguageModel, fields: Mapping[str, Any]) -> None:
    """Refuses fields that do not mean the same tokenizer and special tokens."""
    if not _same(lm.tokenizer, build_tokenizer(_PATH, fields)):
        raise ValueError(
            f"{lm.source}: its tokenizer is another one than its GGUF file has; export the base"
            " model it is of"
        )
    if (found := bos_id(_PATH, fields)) != lm.bos_id:
        raise ValueError(
            f"{lm.source}: texts begin with token {lm.bos_id}, a GGUF file would say {found}"
        )
    if missing := set(lm.eos_ids) - set(eos_ids(_PATH, fields)):
        named = ", ".join(repr(lm.tokenizer.id_to_token(index)) for index in sorted(missing))
        logger.warning(
            "%s: GGUF has no field for these tokens that end an answer, too: %s", lm.source, named
        )


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    """Says whether two tokenizers make the same tokens of the probes."""
    added = [token.content for token in one.get_added_tokens_decoder().values()]
    # What stands for unknown characters is no token of a text in llama.cpp.
    added = [token for token in added if token != getattr(one.model, "unk_token", None)]
    texts = [*_PROBES, *(f"a{token}b" for token in added[:_MAX_ADDED])]
    same = all(
        one.encode(text, add_special_tokens=False).ids
        == other.encode(text, add_special_tokens=False).ids
        for text in texts
    )
    # Whatever its merges make of them; SentencePiece has several ways to write the same cut.
    if same and isinstance(other.decoder, decoders.ByteLevel):
        same = all(_pieces(one, text) == _pieces(other, text) for text in _PROBES)
    return same


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """Returns the parts that a text is cut into before tokens are joined."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

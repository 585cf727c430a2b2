"""The tokenizer files of an exported model, for transformers and everything built on it."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, processors

from ragjax.models.export.base import BaseModel
from ragjax.models.files.chat import default_template
from ragjax.models.files.tokenizers import token_text

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_ROLES += ("mask_token",)
# Fields of a tokenizer_config.json that do not say how text is cut: tokenizer.json alone does.
_KEPT = ("additional_special_tokens", "clean_up_tokenization_spaces", "padding_side")
_KEPT += ("truncation_side",)


def tokenizer_files(
    tokenizer: Tokenizer,
    base: BaseModel,
    *,
    tokens: Mapping[str, str | None],
    max_length: int,
    input_names: tuple[str, ...] = ("input_ids", "attention_mask"),
) -> dict[str, str]:
    """Makes tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template.

    Args:
        tokenizer: Neither truncates nor pads.
        base: What the base model's files say.
        tokens: Role, such as "eos_token" → token; over what the base model declares.
        max_length: Tokens that the model takes.
        input_names: Arguments of the model that the tokenizer makes.

    Returns:
        File name → contents. The class is `PreTrainedTokenizerFast`, which takes tokenizer.json as
        it is; the classes of the model families build parts of it anew.
    """
    declared = {role: token_text(base.tokenizer_config.get(role)) for role in _ROLES}
    declared |= {role: token_text(token) for role, token in base.special_tokens.items()}
    wanted = declared | {role: token for role, token in tokens.items() if token is not None}
    special = {
        role: token
        for role in _ROLES
        if (token := wanted.get(role)) is not None and tokenizer.token_to_id(token) is not None
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": list(input_names),
        "clean_up_tokenization_spaces": False,
    }
    config |= {name: base.tokenizer_config[name] for name in _KEPT if name in base.tokenizer_config}
    if more := config.get("additional_special_tokens"):
        # transformers would add those that the tokenizer lacks, without an embedding for them.
        known = [
            token for token in more if tokenizer.token_to_id(token_text(token) or "") is not None
        ]
        config["additional_special_tokens"] = known
    config |= special
    files = {}
    if base.chat_template:
        # transformers 5 reads the file, earlier versions the field.
        config["chat_template"] = base.chat_template
        if template := default_template(base.chat_template):
            files["chat_template.jinja"] = template
    return files | {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": to_json(config),
        "special_tokens_map.json": to_json(special),
    }


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that the model has an embedding for each token.

    Raises:
        ValueError: It has not; such a folder would fail, or answer nonsense, elsewhere.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, but the model has embeddings for {vocab_size} "
            "tokens; the two do not belong together"
        )


def with_first_token(tokenizer: Tokenizer, first_id: int | None) -> Tokenizer:
    """Makes a tokenizer put a token before every text, where it does not do so yet.

    Args:
        tokenizer: Left as it is.
        first_id: The token; None: none is added.

    Returns:
        The tokenizer, or a copy that adds the token.
    """
    if first_id is None or tokenizer.encode("a").ids[:1] == [first_id]:
        return tokenizer
    token = tokenizer.id_to_token(first_id)
    changed = Tokenizer.from_str(tokenizer.to_str())
    added = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, first_id)]
    )
    earlier = changed.post_processor
    changed.post_processor = processors.Sequence([earlier, added]) if earlier else added
    return changed


def to_json(value: Any) -> str:
    """Formats a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

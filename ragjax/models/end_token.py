"""Makes a tokenizer add the end token that its settings ask for and its file leaves out."""

import json
from pathlib import Path

from tokenizers import Tokenizer, processors

from ragjax.models.config import read_json

# Post-processors beside which a template can stand; the others add an end of their own.
_NEUTRAL = ("ByteLevel",)


def with_end_token(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Return a tokenizer whose texts end with the token that `add_eos_token` asks for.

    transformers adds it when it loads such a tokenizer, and last-token pooling (E5-Mistral) reads
    it.

    Args:
      tokenizer: that of the folder; may be changed.
      folder: for `tokenizer_config.json`.

    Returns:
      The tokenizer as it is where nothing is asked for, or its texts end so already.
    """
    settings = read_json(folder / "tokenizer_config.json")
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    number = tokenizer.token_to_id(token) if isinstance(token, str) else None
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

"""What the files of a base model say beyond what was loaded: an export hands it on."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from ragjax.models.files.adapter import read_adapter
from ragjax.models.files.chat import declared_template
from ragjax.models.files.config import read_json
from ragjax.models.files.gguf.file import read_gguf_file
from ragjax.models.files.sources import resolve_source

_HUB_ID = re.compile(r"(hf:)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/[^@]+\.gguf)?(@.+)?")
_NOTICES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_MAX_NOTICE = 1 << 20  # bytes


class BaseModel(NamedTuple):
    """Files of the model that an export comes from; empty where it has none."""

    source: str  # as the user gave it
    hub_id: str | None  # of the source, where it is on the Hugging Face hub
    license: str | None  # as its card or its GGUF metadata declares it
    config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    special_tokens: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    chat_template: Any  # text, or a list of {"name": ..., "template": ...}; None: it has none
    notices: Mapping[str, str]  # licence texts by file name
    gguf_tokenizer: Mapping[str, Any] = MappingProxyType({})  # fields of a GGUF file's tokenizer


def read_base(source: str) -> BaseModel:
    """Reads what a model's folder or GGUF file says about its use.

    Args:
        source: `source` of a `TextEncoder` or `LanguageModel`; one that no longer resolves to files
            (a model built in memory) gives empty fields.
    """
    try:
        path = resolve_source(source)
        if adapter := read_adapter(path):
            path = adapter.base
    except (OSError, ValueError):
        return BaseModel(source, None, None, {}, {}, {}, {}, None, {})
    if path.is_file():
        return _from_gguf(source, path)
    folder = _transformer_folder(path)
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    return BaseModel(
        source=source,
        hub_id=_hub_id(source),
        license=_card_license(path / "README.md"),
        config=read_json(folder / "config.json"),
        tokenizer_config=tokenizer_config,
        special_tokens=read_json(folder / "special_tokens_map.json"),
        generation_config=read_json(folder / "generation_config.json"),
        chat_template=declared_template(folder, tokenizer_config),
        notices=_notices(path),
    )


def _hub_id(source: str) -> str | None:
    if Path(source).expanduser().exists():
        return None
    match = _HUB_ID.fullmatch(source)
    return match["repo"] if match else None


def _transformer_folder(folder: Path) -> Path:
    """Returns where a sentence-transformers folder keeps its transformer: itself, or below."""
    for module in read_json(folder / "modules.json", list):
        if str(module.get("type", "")).endswith(".Transformer"):
            return folder / str(module.get("path", ""))
    return folder


def _card_license(card: Path) -> str | None:
    """Returns the licence in the YAML header of a model card."""
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        fields = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return None
    found = fields.get("license") if isinstance(fields, dict) else None
    return found if isinstance(found, str) and found else None


def _notices(folder: Path) -> dict[str, str]:
    paths = [folder / name for name in _NOTICES]
    return {
        path.name: path.read_text(encoding="utf-8-sig", errors="replace")
        for path in paths
        if path.is_file() and path.stat().st_size <= _MAX_NOTICE
    }


def _from_gguf(source: str, path: Path) -> BaseModel:
    fields = read_gguf_file(path).fields
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "unknown")}
    tokens = fields.get("tokenizer.ggml.tokens", [])
    names = {name: tokens[index] for name, index in ids.items() if index is not None}
    special = {"bos_token": names.get("bos"), "unk_token": names.get("unknown")}
    return BaseModel(
        source=source,
        hub_id=_hub_id(source),
        license=fields.get("general.license"),
        config={},
        tokenizer_config={name: token for name, token in special.items() if token},
        special_tokens={},
        generation_config={} if ids["bos"] is None else {"bos_token_id": int(ids["bos"])},
        chat_template=fields.get("tokenizer.chat_template"),
        notices={},
        gguf_tokenizer={
            name: value for name, value in fields.items() if name.startswith("tokenizer.")
        },
    )

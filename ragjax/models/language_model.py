"""A causal language model with its tokenizer, loaded from a folder, a GGUF file, a hub or pip."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax import Array
from tokenizers import Tokenizer

from ragjax.models import llama
from ragjax.models.gguf import read_gguf
from ragjax.models.hub import resolve_source
from ragjax.models.inputs import LMBatch
from ragjax.models.llama_checkpoint import params_from_gguf, params_from_huggingface
from ragjax.models.llama_config import LlamaConfig, parse_huggingface_config
from ragjax.models.llama_decoding import LlamaDecoder
from ragjax.models.safetensors import read_safetensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Parameters, sizes and tokenizer of a decoder, and its scoring function.

    Attributes:
        params: Nested dict of float32 arrays, see `ragjax.models.llama`.
        config: Sizes; hashable.
        tokenizer: Adds no special tokens, neither truncates nor pads.
        bos_id: Token that this model expects in front of every text, or None.
        eos_ids: Tokens that end a text.
        pad_id: Token of padded slots. All computations mask them: any id gives the same numbers.
        max_length: Longest sequence in tokens.
        source: As the user gave it.
        fingerprint: Hexadecimal sha256 over the files the model was read from.
        token_log_probs: `(params, LMBatch) -> [R, T]` float32 log-probabilities of the targets in
            nats, 0 where masked; pure and not jitted.
        decoder: Reads prompts once and appends tokens, for `ragjax.generation`.
    """

    params: dict[str, Any]
    config: LlamaConfig
    tokenizer: Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    max_length: int
    source: str
    fingerprint: str
    token_log_probs: Callable[[dict[str, Any], LMBatch], Array]
    decoder: LlamaDecoder


def load_language_model(source: str) -> LanguageModel:
    """Loads a decoder and its tokenizer.

    Args:
        source: A folder as Hugging Face writes it (`config.json`, safetensors, `tokenizer.json`),
            a `*.gguf` file, a hub id `org/name[@revision]`, or `pip:NAME==VERSION`.

    Returns:
        The language model, its parameters in float32.

    Raises:
        FileNotFoundError: The source or a file in it is missing.
        ValueError: The architecture, quantisation or tokenizer is not supported, or a tensor is
            missing, left over or of another shape.
    """
    path = resolve_source(source)
    return _load_gguf(path, source) if path.is_file() else _load_folder(path, source)


def _load_gguf(path: Path, source: str) -> LanguageModel:
    model = read_gguf(path)
    params = params_from_gguf(model.config, model.tensors, permuted=model.permuted, source=path)
    return _assemble(
        params=params,
        config=model.config,
        tokenizer=model.tokenizer,
        bos_id=model.bos_id,
        eos_ids=model.eos_ids,
        pad_id=model.pad_id,
        source=source,
        files=[path],
    )


def _load_folder(folder: Path, source: str) -> LanguageModel:
    settings = _read_json(folder / "config.json")
    try:
        config = parse_huggingface_config(settings)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    tokenizer_path = folder / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise FileNotFoundError(
            f"{folder}: no tokenizer.json; where transformers is installed, `AutoTokenizer."
            "from_pretrained(FOLDER).save_pretrained(FOLDER)` writes it"
        )
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    bos_id = _added_first_id(tokenizer)
    params = params_from_huggingface(config, read_safetensors(folder), source=folder)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), tokenizer_path]
    return _assemble(
        params=params,
        config=config,
        tokenizer=tokenizer,
        bos_id=bos_id,
        eos_ids=_eos_ids(folder, settings),
        pad_id=settings.get("pad_token_id"),
        source=source,
        files=files,
    )


def _assemble(
    *,
    params: dict[str, Any],
    config: LlamaConfig,
    tokenizer: Tokenizer,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
    pad_id: int | None,
    source: str,
    files: list[Path],
) -> LanguageModel:
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= config.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has token ids up to {highest}, the model's embedding table "
            f"only {config.vocab_size} rows: they do not belong together"
        )
    if pad_id is None or not 0 <= pad_id < config.vocab_size:
        pad_id = eos_ids[0] if eos_ids else 0
        logger.info("%s: no padding token; padded slots (all masked) hold %d", source, pad_id)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return LanguageModel(
        params=params,
        config=config,
        tokenizer=tokenizer,
        bos_id=bos_id,
        eos_ids=eos_ids,
        pad_id=int(pad_id),
        max_length=config.max_positions,
        source=source,
        fingerprint=_fingerprint(files),
        token_log_probs=functools.partial(llama.token_log_probs, config),
        decoder=LlamaDecoder(config),
    )


def _added_first_id(tokenizer: Tokenizer) -> int | None:
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    marked = tokenizer.encode("a", add_special_tokens=True).ids
    return marked[0] if marked[: len(plain)] != plain else None


def _eos_ids(folder: Path, settings: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    found = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    found = settings.get("eos_token_id") if found is None else found
    if found is None:
        return ()
    return tuple(int(index) for index in (found if isinstance(found, list) else [found]))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model folder needs it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()

"""A causal language model with its tokenizer, loaded from a folder, a GGUF file, a hub or pip."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax import Array
from tokenizers import Tokenizer

from ragjax.models import decoder_family
from ragjax.models.config import fingerprint, read_config, read_json
from ragjax.models.decoder_checkpoint import params_from_gguf
from ragjax.models.families import LMFamily
from ragjax.models.gguf import read_gguf
from ragjax.models.hub import resolve_source
from ragjax.models.inputs import LMBatch
from ragjax.models.safetensors import read_safetensors
from ragjax.models.tokenizers import choose_pad_token, load_tokenizer

logger = logging.getLogger(__name__)

FAMILIES: tuple[LMFamily, ...] = (decoder_family.FAMILY,)


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Parameters, sizes and tokenizer of a decoder, and its scoring function.

    Attributes:
        params: Nested dict of float32 arrays, see `ragjax.models.decoder`.
        family: Architecture.
        config: Sizes, as `family.parse_config` returns them; hashable.
        tokenizer: Neither truncates nor pads; encode with `add_special_tokens=False`.
        bos_id: Token that the tokenizer would put in front of every text, or None.
        eos_ids: Tokens that end a text.
        pad_id: Token of padded slots. All computations mask them: any id gives the same numbers.
        max_length: Longest sequence in tokens.
        source: As the user gave it.
        fingerprint: sha256 over sizes, parameters and tokenizer, 64 hexadecimal digits.
        token_log_probs: `(params, LMBatch) -> [R, T]` float32 log-probabilities of the targets in
            nats, 0 where masked; pure and not jitted.
        decoder: Reads prompts once and appends tokens, for `ragjax.generation`.
    """

    params: dict[str, Any]
    family: LMFamily
    config: Any
    tokenizer: Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    max_length: int
    source: str
    fingerprint: str
    token_log_probs: Callable[[dict[str, Any], LMBatch], Array]
    decoder: Any


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


def build_language_model(
    family: LMFamily,
    config: Any,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
    pad_id: int,
    source: str,
) -> LanguageModel:
    """Puts a `LanguageModel` together from its parts; the arguments are its fields."""
    return LanguageModel(
        params=params,
        family=family,
        config=config,
        tokenizer=tokenizer,
        bos_id=bos_id,
        eos_ids=eos_ids,
        pad_id=pad_id,
        max_length=config.max_positions,
        source=source,
        fingerprint=fingerprint(config, params, tokenizer),
        token_log_probs=functools.partial(family.token_log_probs, config),
        decoder=family.make_decoder(config),
    )


def _load_gguf(path: Path, source: str) -> LanguageModel:
    model = read_gguf(path)
    params = params_from_gguf(model.config, model.tensors, permuted=model.permuted, source=path)
    pad_id = model.pad_id
    if pad_id is None:
        pad_id = model.eos_ids[0] if model.eos_ids else 0
        _warn_of_chosen_pad(source, model.tokenizer.id_to_token(pad_id))
    return build_language_model(
        decoder_family.FAMILY,
        model.config,
        params,
        model.tokenizer,
        bos_id=model.bos_id,
        eos_ids=model.eos_ids,
        pad_id=pad_id,
        source=source,
    )


def _load_folder(folder: Path, source: str) -> LanguageModel:
    settings = read_config(folder, [name for family in FAMILIES for name in family.model_types])
    family = next(family for family in FAMILIES if settings["model_type"] in family.model_types)
    try:
        config = family.parse_config(settings)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    tokenizer = load_tokenizer(folder, vocab_size=config.vocab_size)
    pad = choose_pad_token(tokenizer, folder, settings)
    if not pad.declared:
        _warn_of_chosen_pad(source, pad.token)
    params = family.load_params(config, read_safetensors(folder), source=folder)
    return build_language_model(
        family,
        config,
        params,
        tokenizer,
        bos_id=_added_first_id(tokenizer),
        eos_ids=_eos_ids(folder, settings),
        pad_id=pad.id,
        source=source,
    )


def _warn_of_chosen_pad(source: str, token: str | None) -> None:
    logger.warning("%s: no pad token declared; rows are filled with %r (masked)", source, token)


def _added_first_id(tokenizer: Tokenizer) -> int | None:
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    marked = tokenizer.encode("a", add_special_tokens=True).ids
    return marked[0] if marked[: len(plain)] != plain else None


def _eos_ids(folder: Path, settings: dict[str, Any]) -> tuple[int, ...]:
    found = read_json(folder / "generation_config.json").get("eos_token_id")
    found = settings.get("eos_token_id") if found is None else found
    if found is None:
        return ()
    return tuple(int(index) for index in (found if isinstance(found, list) else [found]))

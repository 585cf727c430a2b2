"""A language model with its tokenizer, loaded from a folder, a GGUF file, a hub or pip."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jax import Array
from tokenizers import Tokenizer

from ragjax.models.decoder.checkpoint import params_from_gguf
from ragjax.models.decoder.family import FAMILY as DECODER_FAMILY
from ragjax.models.families import LMFamily
from ragjax.models.files.adapter import read_adapter
from ragjax.models.files.chat import ChatTemplate, read_chat_template
from ragjax.models.files.config import fingerprint, parse_sizes, read_config, read_json
from ragjax.models.files.gguf.model import read_gguf
from ragjax.models.files.key_table import read_safetensors
from ragjax.models.files.placement import loading_as
from ragjax.models.files.sources import resolve_source
from ragjax.models.files.tokenizers import choose_pad_token, load_tokenizer
from ragjax.models.inputs import LMBatch
from ragjax.models.seq2seq import bart, t5

logger = logging.getLogger(__name__)

FAMILIES: tuple[LMFamily, ...] = (DECODER_FAMILY, t5.FAMILY, bart.FAMILY)
# Fields of config.json that transformers 5 moves to generation_config.json.
_MOVED_FIELDS = ("decoder_start_token_id", "forced_bos_token_id")


class TextFormat(NamedTuple):
    """The special tokens around contexts and targets that a model was trained with.

    All empty for a causal decoder, whose target goes on where the context ends. What stands before
    each context is `LanguageModel.bos_id`.
    """

    context_end_ids: tuple[int, ...] = ()  # after each context: </s> of T5 and BART
    target_start_ids: tuple[int, ...] = ()  # before each target: <s> of BART
    target_end_id: int | None = None  # after each whole target: </s>; None: no such convention


PLAIN_TEXT = TextFormat()


class PromptText(NamedTuple):
    """How a model was trained to read a document and a question, as `PromptTemplate` has them."""

    context: str  # of {document} and {question}
    closed_book: str  # of {question}
    answer: str  # of {answer}
    passage: str  # of {title} and {text}
    end: str = ""  # token that ends an answer; empty: that of the model's texts, or a line break
    whole: bool = False  # a context writes its first token itself


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Parameters, sizes and tokenizer of a language model, and its scoring function.

    Attributes:
        params: Nested dict of float32 arrays, see `ragjax.models.decoder.model` and
            `ragjax.models.seq2seq.model`.
        family: Architecture.
        config: Sizes, as `family.parse_config` returns them; hashable.
        tokenizer: Neither truncates nor pads; encode with `add_special_tokens=False`.
        bos_id: Token that the tokenizer would put in front of every text, or None.
        eos_ids: Tokens that end a text.
        pad_id: Token of padded slots. All computations mask them: any id gives the same numbers.
        max_length: Longest sequence in tokens.
        source: As the user gave it.
        fingerprint: sha256 over sizes, parameters, tokenizer and special tokens, in hex.
        token_log_probs: `(params, LMBatch) -> [R, T]` float32 log-probabilities of the targets in
            nats, 0 where masked; pure and not jitted.
        decoder: Reads prompts once and appends tokens, for `ragjax.generation`.
        text_format: Special tokens around contexts and targets; `token_log_probs` scores exactly
            the target ids it is given, so whoever tokenises puts them there.
        prompt: The text of contexts that the model was trained on; None: any may be taken.
        chat: The chat template of its files, None where they have none.
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
    text_format: TextFormat = PLAIN_TEXT
    prompt: PromptText | None = None
    chat: ChatTemplate | None = None


def load_language_model(
    source: str, *, dtype: Any = "float32", shardings: Any = None
) -> LanguageModel:
    """Loads a causal decoder or an encoder-decoder, and its tokenizer.

    Args:
        source: A folder as Hugging Face writes it (`config.json`, safetensors, `tokenizer.json`),
            a `*.gguf` file, a hub id `org/name[@revision]`, `pip:NAME==VERSION`, or the folder of a
            LoRA adapter (PEFT), which is merged into its base model.
        dtype: Of the parameters; "keep" leaves float32, bfloat16 and float16 tensors as they are.
        shardings: Where the parameters go, see `sharding_of`; None: the default device.

    Returns:
        The language model.

    Raises:
        FileNotFoundError: The source or a file in it is missing.
        ValueError: The architecture, quantisation or tokenizer is not supported, or a tensor is
            missing, left over or of another shape.
    """
    with loading_as(dtype=dtype, shardings=shardings):
        return _load(source, lambda read: read())


def describe_language_model(source: str) -> LanguageModel:
    """Reads what `load_language_model` reads but the weights: tokenizer, limits and sizes.

    Args:
        source: As for `load_language_model`.

    Returns:
        A language model whose `params` are empty, which cannot score.

    Raises:
        FileNotFoundError, ValueError: As `load_language_model`, for anything but the weights.
    """
    return _load(source, lambda read: {})


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
    """Puts a `LanguageModel` together from its parts; the arguments are its fields.

    The special tokens of an encoder-decoder are those that its tokenizer adds; where it adds none,
    texts end with the first of `eos_ids`.
    """
    text_format = PLAIN_TEXT
    if family.has_encoder:
        first, last = added_ids(tokenizer)
        last = last or eos_ids[:1]
        text_format = TextFormat(last, first, last[0] if last else None)
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
        fingerprint=fingerprint((config, bos_id, eos_ids, text_format), params, tokenizer),
        token_log_probs=functools.partial(family.token_log_probs, config),
        decoder=family.make_decoder(config),
        text_format=text_format,
    )


def added_ids(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the special tokens that the tokenizer puts before and after a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    marked = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return tuple(marked[:start]), tuple(marked[start + len(plain) :])
    return (), ()


_Params = Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]  # of what reads them


def _load(source: str, params: _Params) -> LanguageModel:
    path = resolve_source(source)
    return (_load_gguf if path.is_file() else _load_folder)(path, source, params)


def _load_gguf(path: Path, source: str, params: _Params) -> LanguageModel:
    model = read_gguf(path)
    pad_id = model.pad_id
    if pad_id is None:
        pad_id = model.eos_ids[0] if model.eos_ids else 0
        _warn_of_chosen_pad(source, model.tokenizer.id_to_token(pad_id))
    lm = build_language_model(
        DECODER_FAMILY,
        model.config,
        params(
            lambda: params_from_gguf(
                model.config, model.tensors, permuted=model.permuted, source=path
            )
        ),
        model.tokenizer,
        bos_id=model.bos_id,
        eos_ids=model.eos_ids,
        pad_id=pad_id,
        source=source,
    )
    return dataclasses.replace(lm, chat=model.chat)


def _load_folder(given: Path, source: str, params: _Params) -> LanguageModel:
    adapter = read_adapter(given)
    folder = given if adapter is None else adapter.base
    settings = read_config(folder, [name for family in FAMILIES for name in family.model_types])
    family = next(family for family in FAMILIES if settings["model_type"] in family.model_types)
    generation = read_json(folder / "generation_config.json")
    missing = [name for name in _MOVED_FIELDS if settings.get(name) is None]
    settings |= {name: generation[name] for name in missing if name in generation}
    tensors = read_safetensors(folder)
    if adapter is not None:
        tensors = adapter.merged(tensors)
    config = parse_sizes(family.parse_config, settings, folder / "config.json")
    config = family.fit_config(config, tensors, source=folder)
    tokenizer = load_tokenizer(folder, vocab_size=config.vocab_size)
    pad = choose_pad_token(tokenizer, folder, settings)
    if not pad.declared:
        _warn_of_chosen_pad(source, pad.token)
    first, _ = added_ids(tokenizer)
    lm = build_language_model(
        family,
        config,
        params(lambda: family.load_params(config, tensors, source=folder)),
        tokenizer,
        bos_id=first[0] if first else None,
        eos_ids=_eos_ids(folder, settings),
        pad_id=pad.id,
        source=source,
    )
    return dataclasses.replace(lm, chat=read_chat_template(folder))


def _warn_of_chosen_pad(source: str, token: str | None) -> None:
    logger.warning("%s: no pad token declared; rows are filled with %r (masked)", source, token)


def _eos_ids(folder: Path, settings: dict[str, Any]) -> tuple[int, ...]:
    found = read_json(folder / "generation_config.json").get("eos_token_id")
    found = settings.get("eos_token_id") if found is None else found
    if found is None:
        return ()
    return tuple(int(index) for index in (found if isinstance(found, list) else [found]))

"""What an architecture brings, so that loading, training, generation and export know no other.

A family is a file of this package that ends in one `FAMILY`; `encoder.py` and `language_model.py`
list them. B texts, R rows, L and T tokens, D embedding size.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax import nnx
from jax import Array

from ragjax.models.files.key_table import KeyRule
from ragjax.models.inputs import LMBatch
from ragjax.models.layers.stacks import Params, abstract
from ragjax.models.trainable import Layout


class ClassifierKeys(NamedTuple):
    """Tensors of the head for sequence classification: a dense layer, perhaps a norm, the output.

    Names as `EncoderFamily.canonical_key` returns them, without ".weight" and ".bias".
    """

    dense: str
    output: str
    norm: str = ""  # "": there is none
    typed: bool = False  # True: the second text of a pair has token type 1


class EncoderFamily(NamedTuple):
    """A family of text encoders."""

    model_types: tuple[str, ...]  # values of `model_type` in config.json
    parse_config: Callable[[Mapping[str, Any]], Any]  # config.json -> frozen dataclass, ValueError
    format_config: Callable[[Any], dict[str, Any]]  # its inverse: the contents of a config.json
    # (config, *, rngs) -> module: (right-padded tokens, *, remat) -> hidden states [B, L, D]
    make_module: Callable[..., Any]
    key_table: Callable[[Any], dict[str, KeyRule]]  # config -> where each tensor goes
    canonical_key: Callable[[str], str]  # tensor name in any published file -> name in the table
    ignored_keys: tuple[str, ...]  # tensors that may be there and are no part of the encoder
    # config -> tensors that are computed instead, see `apply_key_table`
    buffers: Callable[[Any], Mapping[str, Callable[[np.ndarray], bool]]] = lambda config: {}
    default_pooling: str = "mean"  # a pooling, where the folder names none: what it is trained with
    # (config, params, tokens, *, remat) -> hidden states, for models that run from their parameters
    # as they are; None: the module of `make_module` does.
    hidden_states: Callable[..., Array] | None = None
    classifier: ClassifierKeys | None = None  # None: no cross-encoders of it are loaded

    def abstract(self, config: Any) -> tuple[Any, Params]:
        """Returns structure and parameters of the module, as `stacks.abstract` does."""
        return abstract(lambda: self.make_module(config, rngs=nnx.Rngs(0)))


class LMFamily(NamedTuple):
    """A family of language models."""

    model_types: tuple[str, ...]  # values of `model_type` in config.json
    parse_config: Callable[[Mapping[str, Any]], Any]  # config.json -> frozen dataclass, ValueError
    format_config: Callable[[Any], dict[str, Any]]  # its inverse: the contents of a config.json
    load_params: "LoadParams"
    # config, params (layers in one stack or several) -> tensors named as in a Hugging Face folder,
    # each made when it is read
    save_params: Callable[[Any, Params], Mapping[str, np.ndarray]]
    token_log_probs: "TokenLogProbs"
    make_decoder: Callable[[Any], Any]  # config -> what `ragjax.generation` calls a Decoder
    layout: Layout  # for `ragjax.models.trainable.split_trainable`
    # Scores several answers behind one reading of a document; None where the family cannot.
    packed_token_log_probs: Callable[..., Array] | None = None
    # (config, params, packed rows) -> what the lowest of several stacks of layers makes of them,
    # which `packed_token_log_probs(..., below=...)` takes; None where the family cannot
    packed_states: Callable[..., Array] | None = None
    # True: an encoder reads contexts, and a target begins on its own (T5, BART).
    has_encoder: bool = False
    # (config, tensors, *, source) -> config, where the tensors of a folder say more than its sizes
    fit_config: Callable[..., Any] = lambda config, tensors, *, source: config


class LoadParams(Protocol):
    """Fills the parameters from the tensors of a Hugging Face folder."""

    def __call__(
        self, config: Any, tensors: Mapping[str, np.ndarray], *, source: str | Path
    ) -> Params:
        """Returns nested dicts of float32 arrays; ValueError where the tensors do not fit."""
        ...


class TokenLogProbs(Protocol):
    """Scores the target tokens given their context."""

    def __call__(
        self, config: Any, params: Params, batch: LMBatch, *, remat: bool = False
    ) -> Array:
        """Returns `[R, T]` float32 in nats, exactly 0 where `target_mask` is False."""
        ...

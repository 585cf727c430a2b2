"""The interface that generation needs; `LanguageModel.decoder` implements it."""

from typing import Any, Protocol

from jax import Array


class Prefilled(Protocol):
    """Logits and cache after some tokens: a pytree with these two fields."""

    @property
    def logits(self) -> Array:
        """`[R, V]` float32, of the next token."""
        ...

    @property
    def cache(self) -> Any:
        """A pytree of arrays of fixed shapes."""
        ...


class Decoder(Protocol):
    """Pure functions of a causal language model; hashable, as jitted functions take it static."""

    def prefill(self, params: Any, ids: Array, mask: Array, *, cache_length: int) -> Prefilled:
        """Reads left-padded prompts `[R, L]`, leaving room for `cache_length - L` tokens."""
        ...

    def decode_step(self, params: Any, cache: Any, token_ids: Array) -> Prefilled:
        """Appends one token `[R]` to each row."""
        ...

    def score(self, params: Any, prefilled: Any, target_ids: Array, target_mask: Array) -> Array:
        """Returns the log-probabilities `[R, T]` of right-padded targets after the prompts."""
        ...

    def repeat(self, cache: Any, times: int) -> Any:
        """Copies each row: row r becomes the rows from r * times to (r + 1) * times - 1."""
        ...

    def reorder(self, cache: Any, rows: Array, *, prompt_slots: int) -> Any:
        """Lets row r go on from the answer of row `rows[r]` `[R]`, which has the same prompt."""
        ...

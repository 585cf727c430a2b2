"""Reads fields of an encoder-decoder's `config.json` that are token ids or may be left out."""

from collections.abc import Mapping
from typing import Any

from ragjax.models.bert import integer_field


def optional_integer(
    config: Mapping[str, Any], field: str, default: int, *, most: int = 2**31 - 1
) -> int:
    """Returns a size, or the default where the field is missing or null.

    Raises:
        ValueError: It is not a whole number of 1 … `most`.
    """
    return default if config.get(field) is None else integer_field(config, field, most=most)


def token_id(config: Mapping[str, Any], field: str, default: int | None) -> int | None:
    """Returns a token id, or the default where the field is missing or null.

    Raises:
        ValueError: It is not a whole number of at least 0.
    """
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{field} must be a token id (a whole number from 0), got {value!r}")
    return value

"""Range checks that options share, and when they are made.

Options check themselves as they are made. A program makes them of its flags one group at a time, so
it checks them afterwards, when it can name an option as its users do: `--retriever.temperature`.
"""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

# Whole numbers are compared and counted in 32 bits on devices; a seed has 64, one for the sign.
_COUNTS, _SEEDS = 2**31, 2**63
_SMALLEST, _LARGEST = 1e-37, 3e38  # of float32, in which the models compute
_later: ContextVar[bool] = ContextVar("later", default=False)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that check themselves when they are made."""

    def __post_init__(self) -> None:
        """Checks, unless `checked_later` holds it back."""
        if not _later.get():
            _check_kinds(self)
            self.check()

    def check(self) -> None:
        """Raises ValueError whose message begins with the field that is out of range or at odds."""
        check_numbers(self)


@contextmanager
def checked_later() -> Iterator[None]:
    """Options made in this context are not checked; `check_all` does it."""
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


def check_all(options: Options, *, mark: str = "", group: str = "") -> None:
    """Checks options and those of their groups.

    Args:
        options: The options.
        mark: What stands before a name in a message: "--" for flags.
        group: Of these options, with a dot behind it; "" for those of no group.

    Raises:
        ValueError: An option is out of range or at odds with another; the message names it.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Options):
            check_all(value, mark=mark, group=f"{group}{field.name}.")
    try:
        options.check()
    except ValueError as error:
        raise ValueError(full_message(options, error, mark=mark, group=group)) from error


def full_message(options: Any, error: ValueError, *, mark: str = "", group: str = "") -> str:
    """Returns the message of a check with the full name of the option that it begins with."""
    message = str(error)
    first = re.match(r"\w*", message)
    if first and first.group() in {field.name for field in dataclasses.fields(options)}:
        return f"{mark}{group}{message}"
    return f"{mark}{group.removesuffix('.')}: {message}" if group else message


def check_numbers(config: Any, *, mark: str = "") -> None:
    """Raises ValueError naming a number that nothing can compute with, or a seed out of range.

    Args:
        config: Options.
        mark: What stands before a name in the message: "--" for flags.
    """
    for field in dataclasses.fields(config):
        name, value = f"{mark}{field.name}", getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if field.name == "seed":
            if not 0 <= value < _SEEDS:
                raise ValueError(f"{name} must be from 0 to 2^63 - 1, got {value}")
        elif isinstance(value, int):
            if abs(value) >= _COUNTS:
                raise ValueError(f"{name} must be less than 2^31 = {_COUNTS:,}, got {value:,}")
        elif value and not _SMALLEST <= abs(value) <= _LARGEST:
            raise ValueError(f"{name} must be a finite number that float32 can hold, got {value:g}")


def _check_kinds(options: Options) -> None:
    """Raises ValueError naming a group that is no options, or a text that is a path or a number."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        kind = type(default)
        if isinstance(default, Options) and not isinstance(value, kind):
            raise ValueError(f"{field.name} must be {kind.__name__}(...), got {value!r}")
        if isinstance(default, str) and not isinstance(value, str):
            raise ValueError(f"{field.name} must be a string, got {value!r}")


def at_least(config: Any, low: float, *names: str) -> None:
    """Raises ValueError naming a field that is below `low`, or NaN; None is left out."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= low:
            raise ValueError(f"{name} must be at least {low}, got {value}")


def positive(config: Any, *names: str) -> None:
    """Raises ValueError naming a field that is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be greater than 0, got {getattr(config, name)}")


def fraction(config: Any, *names: str) -> None:
    """Raises ValueError naming a field that is not in [0, 1]."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(config, name)}")


def check_accumulate(batch_size: int, accumulate: int) -> None:
    """Raises ValueError where a batch does not split into equal microbatches."""
    if batch_size % accumulate:
        raise ValueError(
            f"accumulate={accumulate} does not divide batch_size={batch_size}; microbatches have"
            " equal size"
        )

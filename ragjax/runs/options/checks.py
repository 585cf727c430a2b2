"""Range checks that the options of a run share."""

from typing import Any


def at_least(config: Any, low: float, *names: str) -> None:
    """Raises ValueError naming a field that is below `low`, or NaN."""
    for name in names:
        if not getattr(config, name) >= low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(config, name)}")


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

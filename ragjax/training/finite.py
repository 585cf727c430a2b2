"""Updates that were not finite: how many, why, and what helps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


class NonFiniteError(ValueError):
    """Too many updates had a loss or gradient that is not finite."""


def say_what_was_lost(
    stage: str,
    rows: Sequence[Mapping[str, Any]],
    params: Any,
    frozen: Any,
    describe_batch: Callable[[int], str] | None,
) -> None:
    """Prints how many updates were skipped and answers left out.

    Args:
        stage: Name of the stage.
        rows: Its metrics, a mapping for each step.
        params: Trainable parameters after the last step.
        frozen: The others.
        describe_batch: Step to a sentence on its batch.

    Raises:
        NonFiniteError: Fewer than half of the updates were applied.
    """

    def where(row: Mapping[str, Any]) -> str:
        batch = f" ({describe_batch(row['step'])})" if describe_batch else ""
        return f"step {row['step']}{batch}"

    if impossible := [row for row in rows if row.get("impossible_answers")]:
        print(
            f"note: {stage}: {sum(int(row['impossible_answers']) for row in impossible):,}"
            " answers had probability 0 whatever was read, and taught nothing; the first at"
            f" {where(impossible[0])}",
            flush=True,
        )
    skipped = [row for row in rows if row.get("skipped")]
    if not skipped:
        return
    said = (
        f"{stage}: {len(skipped):,} of {len(rows):,} updates were skipped because their loss"
        f" or gradient was not finite, the first at {where(skipped[0])}"
    )
    if 2 * len(skipped) > len(rows):
        raise NonFiniteError(f"{said}. {advice(rows, params, frozen)}")
    print(f"note: {said}", flush=True)


def advice(rows: Sequence[Mapping[str, Any]], params: Any, frozen: Any) -> str:
    """Returns what helps against updates that are not finite, by their cause."""
    if bad := not_finite((params, frozen)):
        return (
            f"{len(bad)} arrays of the parameters hold NaN or infinity, the first {bad[0]}: no"
            " learning rate mends that; load the model from a file that is whole"
        )
    skipped = [row for row in rows if row.get("skipped")]
    if len(skipped) < len(rows):
        return "Lower the learning rate or look at that batch"
    # No update was ever applied: the learning rate has had no part in it.
    if any(row.get("loss") is None for row in skipped):
        return (
            "The loss itself is not finite from the first step on, though all weights are: look at"
            " what it is computed from (the scale of the scores, temperatures, targets), not at the"
            " learning rate"
        )
    return (
        "The gradient overflows from the first step on, and the learning rate has no part in that:"
        " lower the scale of the scores, or compute in float32"
    )


def not_finite(params: Any) -> list[str]:
    """Returns the paths of the arrays that hold NaN or infinity."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, finite in jax.tree_util.tree_leaves_with_path(jax.device_get(_finite(params)))
        if not finite
    ]


@jax.jit
def _finite(params: Any) -> Any:
    """Returns for each array whether all of it is finite, in one program."""
    return jax.tree.map(
        lambda leaf: not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.isfinite(leaf).all(),
        params,
    )

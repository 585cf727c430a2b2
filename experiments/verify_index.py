"""Verify the index generations of a run, every file against its checksum.

    python experiments/verify_index.py --root runs/mine/refresh

Prints a line for each generation and ends with 0, or with 1 where one is damaged. Takes as long as
reading the files; nothing is changed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ragjax.refresh import GenerationStore

DAMAGED, BAD_INPUT = 1, 2


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Verifies index generations.

    Attributes:
        root: Folder of a refresher: the one with the sub-folder `generations`.
    """

    root: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code: 0, 1 for damage, 2 for bad input."""
    root = tyro.cli(Flags, args=arguments, description=__doc__, use_underscores=True).root
    store = GenerationStore(root, report=lambda sentence: print(f"note: {sentence}"))
    numbers = store.numbers()
    if not numbers:
        print(f"error: {root} holds no generations; give a run's folder `refresh`", file=sys.stderr)
        return BAD_INPUT
    damaged = 0
    for number in numbers:
        try:
            with store.open(number) as generation:
                what = generation.description
                print(
                    f"generation {number}: good, {what.size:,} documents of step"
                    f" {what.encoder_step}, {what.kind} index, recall {what.recall:.3f}"
                )
        except (ValueError, OSError) as error:
            damaged += 1
            print(f"generation {number}: DAMAGED, {error}")
    print(f"{len(numbers)} generations, {damaged} damaged")
    return DAMAGED if damaged else 0


if __name__ == "__main__":
    sys.exit(main())

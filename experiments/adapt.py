"""Adapt a retriever and a language model to documents and questions, and show what it gained.

    python experiments/adapt.py
    python experiments/adapt.py --data FOLDER --output runs/mine
    python experiments/adapt.py --config experiments/recipes/ra_dit.toml --data FOLDER

Without flags it adapts MiniLM-L6-v2 and SmolLM2-135M-Instruct to the API documentation of the
installed Python packages, in eight minutes on two CPU cores. It prints a time estimate first;
re-run the same command to resume an interrupted run.
"""

import sys
from collections.abc import Sequence

from ragjax.runs import AdaptConfig, adapt
from ragjax.runs.program import run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code; see `run_program`."""
    return run_program(adapt, AdaptConfig(), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Train a retriever and a language model end to end, and show what it gained.

    python experiments/train_rag.py --data FOLDER --output runs/rag
    python experiments/train_rag.py --data FOLDER --objective.marginal token --refresh.mode sync
    python experiments/train_rag.py --config experiments/recipes/end_to_end/rag.toml --data FOLDER

Both models are trained on the likelihood of the answer given the retrieved documents, while the
index is rebuilt in the background. Without flags it trains MiniLM-L6-v2 and SmolLM2-135M-Instruct
on the API documentation of the installed Python packages. It prints a time estimate first; re-run
the same command to resume an interrupted run.
"""

import sys
from collections.abc import Sequence

from ragjax.runs import RagConfig, train_rag
from ragjax.runs.program import run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code; see `run_program`."""
    return run_program(train_rag, RagConfig(), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())

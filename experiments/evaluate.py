"""Evaluate a finished run, or base models, on questions of any split.

    python experiments/evaluate.py --run runs/adapt --output runs/adapt-test
    python experiments/evaluate.py --data FOLDER --split dev --output runs/base-dev

Compares retrieval and answers without documents, with BM25, with the encoder and with both, before
and after training; calibration of the answer's probability; answers supported by a retrieved
passage; and robustness to distractors. Takes minutes for 20 questions and the default models on two
cores. Re-run the same command to resume an interrupted evaluation.
"""

import sys
from collections.abc import Sequence

from ragjax.runs import EvaluateConfig, evaluate
from ragjax.runs.program import run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code; see `run_program`."""
    return run_program(evaluate, EvaluateConfig(), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())

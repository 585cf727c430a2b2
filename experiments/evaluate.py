"""Evaluate a finished run, or base models, on questions of any split.

    python experiments/evaluate.py --run runs/adapt --output runs/adapt-test
    python experiments/evaluate.py --data FOLDER --split dev --output runs/base-dev
    python experiments/evaluate.py --compare RUN_A RUN_B --metric recall@5 f1 --max_loss .01

Compares retrieval and answers without documents, with BM25, with the encoder and with both, before
and after training; calibration of the answer's probability; answers supported by a retrieved
passage; and robustness to distractors. Takes minutes for 20 questions and the default models on two
cores. Re-run the same command to resume an interrupted evaluation.

With --compare, and flags of its own (--compare --help), the results of two finished runs or
evaluations are set side by side on the questions that both were asked: paired differences and the
questions that flipped, in seconds and without a model. The exit code is 1 where B is worse than A
by more than --max_loss in one of the metrics.
"""

import sys
from collections.abc import Sequence

from ragjax.runs import CompareConfig, EvaluateConfig, compare_runs, evaluate
from ragjax.runs.program import run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code; see `run_program`."""
    given = sys.argv[1:] if arguments is None else arguments
    if any(flag.partition("=")[0] == "--compare" for flag in given):
        return run_program(
            compare_runs, CompareConfig(compare=("RUN_A", "RUN_B")), __doc__, arguments
        )
    return run_program(evaluate, EvaluateConfig(), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())

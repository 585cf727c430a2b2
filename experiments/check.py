"""Check data and models before a run: read everything, train nothing.

    python experiments/check.py --data FOLDER
    python experiments/check.py --data FOLDER --queries questions.csv --json --no_cost

Takes the flags of adapt.py. Prints counts and kinds of supervision, lengths against what both
models read, languages, the cost of each stage here, and every problem with file, line and remedy;
nothing is written. Ends with 0 where nothing is wrong, 1 where a run would go on all the same, 2
where it would be refused. Takes seconds for some thousand passages, of which about half a minute
measures the cost.
"""

import sys
from collections.abc import Sequence

from ragjax.runs.check.program import run_check_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code; see `run_check_program`."""
    return run_check_program(__doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())

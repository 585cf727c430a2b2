"""Evaluate a finished run, or models as they were published, on questions of any split.

    python experiments/evaluate.py --run runs/adapt --output runs/adapt-test
    python experiments/evaluate.py --data FOLDER --split dev --output runs/base-dev

Shows retrieval and answers without documents, with BM25, with the encoder and with both, before
and after adaptation; how far the answer's probability can be trusted; how many answers stand in a
passage that was read; and what distractors cost. Takes minutes for 20 questions and the default
models on two cores. The same command continues an evaluation that was cut.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The Rust tokenizers use their own threads; transformers talks about a missing PyTorch.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import tyro

from ragjax.runs.evaluate import check_output, describe_cost, evaluate, open_evaluation
from ragjax.runs.options.evaluate import EvaluateConfig
from ragjax.runs.options.files import load_config_file, to_dict
from ragjax.storage import RunLock
from ragjax.training.loop import Interrupted, graceful_stop

BAD_INPUT = 2


@dataclass(frozen=True, kw_only=True)
class Flags(EvaluateConfig):
    """Compare systems on one split: retrieval, answers, confidence, support, robustness.

    Attributes:
        config: TOML, YAML or JSON file of options; flags override it.
        dry_run: Read the data, load the models, print the forecast and stop.
        debug: Show tracebacks.
    """

    config: str = ""
    dry_run: bool = False
    debug: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code.

    Returns:
        0; 2 for bad input; 128 + signal if stopped.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        flags = parse_flags(arguments)
        config = EvaluateConfig(
            **{f.name: getattr(flags, f.name) for f in dataclasses.fields(EvaluateConfig)}
        )
        _run(config, only_forecast=flags.dry_run)
        return 0
    except Interrupted as stopped:
        print(f"{stopped}; the same command continues this evaluation", file=sys.stderr)
        return 128 + stopped.signum
    except (ValueError, OSError) as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def parse_flags(arguments: Sequence[str]) -> Flags:
    """Returns the flags over the values of the `--config` file over the defaults.

    Raises:
        ValueError: For values out of range; a misspelt flag ends the program with code 2.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default="")
    path = early.parse_known_args(arguments)[0].config
    base = load_config_file(path, EvaluateConfig()) if path else EvaluateConfig()
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(EvaluateConfig)}
    return tyro.cli(
        Flags,
        args=list(arguments),
        default=Flags(**values, config=path),
        description=__doc__,
    )


def _run(config: EvaluateConfig, *, only_forecast: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    print("options:", json.dumps(to_dict(config), indent=2), flush=True)
    output = Path(config.output)
    with graceful_stop() as stop:
        if only_forecast:
            with tempfile.TemporaryDirectory() as folder:
                opened = open_evaluation(config, Path(folder), stop=stop, report=print)
                print(describe_cost(opened, config))
            return
        with RunLock(output):
            check_output(config, output)
            evaluate(config, stop=stop)
    print(f"\nresults: {output / 'metrics.json'}, {output / 'predictions.jsonl'}")


if __name__ == "__main__":
    sys.exit(main())

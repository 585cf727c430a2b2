"""Adapt a retriever and a language model to documents and questions, and show what it gained.

    python experiments/adapt.py
    python experiments/adapt.py --data FOLDER --output runs/mine
    python experiments/adapt.py --config experiments/recipes/ra_dit.toml --data FOLDER

Without flags it adapts MiniLM-L6-v2 and SmolLM2-135M-Instruct to the API documentation of the
Python packages installed beside it. The same command continues a run that was cut.
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

from ragjax.refresh import IndexTooStaleError, RefreshError, ResumeError
from ragjax.runs.adapt import adapt, dry_run
from ragjax.runs.folder import check_output
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.files import load_config_file, to_dict
from ragjax.storage import RunLock
from ragjax.training.loop import Interrupted, NonFiniteError, graceful_stop

BAD_INPUT, DIVERGED, NO_FRESH_INDEX = 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class Flags(AdaptConfig):
    """Adapt a retriever and a language model to documents and questions.

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
        0; 2 for bad input; 3 where training diverged; 4 where the index could not be kept fresh;
        128 + signal if stopped.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        flags = parse_flags(arguments)
        config = AdaptConfig(
            **{f.name: getattr(flags, f.name) for f in dataclasses.fields(AdaptConfig)}
        )
        _run(config, only_forecast=flags.dry_run)
        return 0
    except Interrupted as stopped:
        print(f"{stopped}; the same command continues this run", file=sys.stderr)
        return 128 + stopped.signum
    except (ValueError, OSError, RefreshError, IndexTooStaleError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, RefreshError | IndexTooStaleError):
            if not isinstance(error, ResumeError):
                print("the same command continues this run", file=sys.stderr)
            return NO_FRESH_INDEX
        return DIVERGED if isinstance(error, NonFiniteError) else BAD_INPUT


def parse_flags(arguments: Sequence[str]) -> Flags:
    """Returns the flags over the values of the `--config` file over the defaults.

    Raises:
        ValueError: For values out of range; a misspelt flag ends the program with code 2.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default="")
    path = early.parse_known_args(arguments)[0].config
    base = load_config_file(path, AdaptConfig()) if path else AdaptConfig()
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(AdaptConfig)}
    return tyro.cli(
        Flags,
        args=list(arguments),
        default=Flags(**values, config=path),
        description=__doc__,
    )


def _run(config: AdaptConfig, *, only_forecast: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    print("options:", json.dumps(to_dict(config), indent=2), flush=True)
    output = Path(config.output)
    with graceful_stop() as stop:
        if only_forecast:
            with tempfile.TemporaryDirectory() as folder:
                dry_run(config, folder=Path(folder), stop=stop)
            return
        with RunLock(output):
            check_output(config, output)
            adapt(config, stop=stop)
    print(f"\nresults: {output / 'report.html'}, {output / 'metrics.json'}")


if __name__ == "__main__":
    sys.exit(main())

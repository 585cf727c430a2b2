"""What the scripts share: flags, one line for an error, exit codes."""

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

# The Rust tokenizers use their own threads; transformers talks about a missing PyTorch.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import tyro

from ragjax.refresh import IndexTooStaleError, RefreshError, ResumeError
from ragjax.runs import AdaptConfig, EvaluateConfig, RagConfig, dry_run
from ragjax.runs.options.files import load_config_file, to_dict
from ragjax.runs.saved import Results
from ragjax.training.loop import Interrupted, NonFiniteError, graceful_stop

BAD_INPUT, DIVERGED, NO_FRESH_INDEX = 2, 3, 4
Config = TypeVar("Config", AdaptConfig, RagConfig, EvaluateConfig)


@dataclass(frozen=True, kw_only=True)
class Flags(Generic[Config]):
    """Options of a program, and the flags that every program has.

    Attributes:
        options: Options of the program.
        config: TOML, YAML or JSON file of options; flags override it.
        dry_run: Read the data, load the models, print the forecast and stop.
        debug: Show tracebacks.
    """

    options: Annotated[Config, tyro.conf.arg(name="")]
    config: str = ""
    dry_run: bool = False
    debug: bool = False


def run_program(
    program: Callable[..., Results],
    default: Config,
    description: str | None,
    arguments: Sequence[str] | None,
) -> int:
    """Runs `adapt`, `train_rag` or `evaluate` with its flags.

    Args:
        program: Takes a config and a stop flag.
        default: Its options where neither a flag nor the config file says otherwise.
        description: Help text of the script.
        arguments: Flags; None: those of the command line.

    Returns:
        Exit code: 0; 2 for bad input; 3 where training diverged; 4 where the index could not be
        kept fresh; 128 + signal if stopped.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    escape_what_is_no_utf8()
    again = f"the same command continues this {default.kind}"
    try:
        flags = parse_flags(default, description, arguments)
        logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
        print("options:", json.dumps(to_dict(flags.options), indent=2), flush=True)
        with graceful_stop() as stop:
            if flags.dry_run:
                dry_run(flags.options, stop=stop)
                return 0
            results = program(flags.options, stop=stop)
        print(f"\nresults: {results.report}, {results.folder / 'metrics.json'}")
        return 0
    except Interrupted as stopped:
        print(f"{stopped}; {again}", file=sys.stderr)
        return 128 + stopped.signum
    except (RefreshError, IndexTooStaleError) as error:
        show_error(error, arguments)
        if not isinstance(error, ResumeError):
            print(again, file=sys.stderr)
        return NO_FRESH_INDEX
    except (ValueError, OSError) as error:
        show_error(error, arguments)
        return DIVERGED if isinstance(error, NonFiniteError) else BAD_INPUT


def parse_flags(
    default: Config, description: str | None, arguments: Sequence[str]
) -> Flags[Config]:
    """Returns the flags over the values of the `--config` file over the defaults.

    Raises:
        ValueError: For values out of range; a misspelt flag ends the program with code 2.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default="")
    path = early.parse_known_args(arguments)[0].config
    options = load_config_file(path, default) if path else default
    kind: Any = type(default)
    return tyro.cli(
        Flags[kind],
        args=list(arguments),
        default=Flags(options=options, config=path),
        description=description,
    )


def escape_what_is_no_utf8() -> None:
    """Lets both streams write names of files that are no UTF-8, with escapes for their bytes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show_error(error: Exception, arguments: Sequence[str]) -> None:
    """Prints an error in one line; raises it with `--debug`."""
    if "--debug" in arguments:
        raise error
    print(f"error: {error}", file=sys.stderr)

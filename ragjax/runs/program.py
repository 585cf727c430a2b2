"""What the scripts share: flags, one line for an error, exit codes."""

import argparse
import dataclasses
import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

# The Rust tokenizers use their own threads; transformers talks about a missing PyTorch.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import tyro

from ragjax.refresh import IndexTooStaleError, RefreshError, ResumeError
from ragjax.runs import AdaptConfig, CompareConfig, EvaluateConfig, RagConfig, dry_run
from ragjax.runs.options.checks import check_all, checked_later
from ragjax.runs.options.files import load_config_file, to_dict
from ragjax.runs.options.tracking import masked
from ragjax.runs.saved import Results
from ragjax.storage import processes
from ragjax.training.finite import NonFiniteError
from ragjax.training.loop import Interrupted, graceful_stop

BAD_INPUT, DIVERGED, NO_FRESH_INDEX, LOST = 2, 3, 4, 5
Config = TypeVar("Config", AdaptConfig, RagConfig, EvaluateConfig, CompareConfig)


@dataclass(frozen=True, kw_only=True)
class CommonFlags(Generic[Config]):
    """Options of a program, and the flags that every program has.

    Attributes:
        options: Options of the program.
        config: TOML, YAML or JSON file of options; flags override it.
        debug: Show tracebacks.
    """

    options: Annotated[Config, tyro.conf.arg(name="")]
    config: str = ""
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class Flags(CommonFlags[Config], Generic[Config]):
    """Flags of a program that makes something.

    Attributes:
        dry_run: Read the data, load the models, print the forecast and stop.
    """

    dry_run: bool = False


def run_program(
    program: Callable[..., Results],
    default: Config,
    description: str | None,
    arguments: Sequence[str] | None,
) -> int:
    """Runs `adapt`, `train_rag`, `evaluate` or `compare_runs` with its flags.

    Args:
        program: Takes a config and a stop flag.
        default: Its options where neither a flag nor the config file says otherwise.
        description: Help text of the script.
        arguments: Flags; None: those of the command line.

    Returns:
        Exit code: 0; 1 where a comparison found too great a loss; 2 for bad input or too little
        memory; 3 where training diverged; 4 where the index could not be kept fresh; 5 where
        another process of the run was lost; 128 + signal if stopped.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    escape_what_is_no_utf8()
    names = flag_names(default)

    def log(line: str) -> None:
        print(in_own_flags(line, names), flush=True)

    code = 0
    again = f"the same command continues this {default.kind}"
    lost = f"a process of this {default.kind} is lost: {again}, given to each process again"
    try:
        flags: Flags[Config] = parse_flags(default, description, arguments)
        if flags.options.distributed != "off":
            print("waiting for the other processes", flush=True)
        processes.start(flags.options.distributed)
        logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
        with processes.last_words(lost), graceful_stop() as stop, _first_speaks():
            print(_describe_options(flags.options, default), flush=True)
            if flags.dry_run:
                dry_run(flags.options, stop=stop, log=log)
            else:
                results = program(flags.options, stop=stop, log=log)
                print(f"\nresults: {results.report}, {results.folder / results.main_file}")
                code = results.exit_code
    except Interrupted as stopped:
        print(f"{stopped}; {again}", file=sys.stderr)
        code = 128 + stopped.signum
    except (RefreshError, IndexTooStaleError) as error:
        show_error(error, arguments, names)
        if not isinstance(error, ResumeError):
            print(again, file=sys.stderr)
        code = NO_FRESH_INDEX
    except (ValueError, OSError, ImportError, MemoryError) as error:
        show_error(error, arguments, names)
        code = DIVERGED if isinstance(error, NonFiniteError) else BAD_INPUT
        code = LOST if processes.misses_another(error) else code
    except jax.errors.JaxRuntimeError as error:
        full = str(error).startswith("RESOURCE_EXHAUSTED")
        if not (full or processes.misses_another(error)):
            raise
        show_error(_no_room(error) if full else error, arguments, names)
        code = BAD_INPUT if full else LOST
    processes.leave(code, together=code in (0, 128 + signal.SIGTERM, 128 + signal.SIGINT))
    return code


def _describe_options(options: Any, default: Any) -> str:
    """Returns a line with the options that are not the program's own, secrets masked."""
    own = list(_flat(to_dict(default)))
    changed = [option for option in _flat(masked(to_dict(options))) if option not in own]
    listed = " ".join(f"{name}={json.dumps(value)}" for name, value in changed)
    return f"options: {listed or 'all by default'}"


def _flat(values: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `retriever.temperature` and its value, and so on."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{group}{name}.")
        else:
            yield f"{group}{name}", value


def _no_room(error: jax.errors.JaxRuntimeError) -> MemoryError:
    """Returns what to say of a device whose memory does not hold what it computes."""
    said = str(error).partition("\n")[0].rstrip(".")
    return MemoryError(
        f"a device has no room left ({said}); lower --encode_tokens or --score_tokens, divide the"
        " models with --fsdp, or see docs/troubleshooting.rst"
    )


@contextmanager
def _first_speaks() -> Iterator[None]:
    """Hushes each process of a run but the first, which has the same to say; errors are shown."""
    if processes.is_first():
        yield
        return
    with redirect_stdout(_Nowhere()) as nowhere, redirect_stderr(nowhere):
        yield


class _Nowhere(io.TextIOBase):
    """Takes text and keeps none."""

    def write(self, text: str) -> int:
        """Returns the length of the text."""
        return len(text)


def parse_flags(
    default: Config, description: str | None, arguments: Sequence[str], kind: Any = Flags
) -> Any:
    """Returns the flags over the values of the `--config` file over the defaults.

    Args:
        default: Options where neither a flag nor the config file says otherwise.
        description: Help text of the script.
        arguments: As they were given.
        kind: `CommonFlags` that the program has.

    Raises:
        ValueError: For values out of range or at odds; the message names the flag. A misspelt flag
            ends the program with code 2.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default="")
    path = early.parse_known_args(arguments)[0].config
    options = load_config_file(path, default) if path else default
    options_kind: Any = type(default)
    with checked_later():
        flags = tyro.cli(
            kind[options_kind],
            args=list(arguments),
            default=kind(options=options, config=path),
            description=description,
            use_underscores=True,
        )
    check_all(flags.options, mark="--")
    return flags


def escape_what_is_no_utf8() -> None:
    """Lets both streams write names of files that are no UTF-8, with escapes for their bytes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flag_names(options: Any, group: str = "") -> set[str]:
    """Returns the flags of options, without dashes: `seed`, `retriever.temperature`."""
    names = set()
    for field in dataclasses.fields(options):
        value = getattr(options, field.name, None)
        is_group = dataclasses.is_dataclass(value) and not isinstance(value, type)
        inner = flag_names(value, f"{group}{field.name}.") if is_group else set()
        names |= inner or {f"{group}{field.name}"}
    return names


def in_own_flags(message: str, names: Collection[str]) -> str:
    """Returns a message with the flags of one program.

    What several programs share names an option in full, `--evaluation.documents`, where some have
    `--documents`; a library names an argument, "with fields='text=body'".

    Args:
        message: To the user.
        names: The program's flags, as of `flag_names`.
    """

    def own(flag: re.Match[str]) -> str:
        full, last = flag.group(1), flag.group(1).rpartition(".")[2]
        return f"--{last}" if full not in names and last in names else flag.group()

    def argument(found: re.Match[str]) -> str:
        flags = [name for name in names if name.rpartition(".")[2] == found.group(1)]
        return f"with --{flags[0]}={found.group(2)}" if len(flags) == 1 else found.group()

    message = re.sub(r"\bwith ([a-z_]+)=('[^']*'|[\w.-]+)", argument, message)
    return re.sub(r"(?<![\w-])--([a-z_]+\.[a-z_]+)", own, message)


def show_error(error: Exception, arguments: Sequence[str], names: Collection[str]) -> None:
    """Prints an error in one line; raises it with `--debug`.

    Args:
        error: What ended the program.
        arguments: What it was called with.
        names: Its flags, as of `flag_names`.
    """
    if "--debug" in arguments:
        raise error
    print(f"error: {in_own_flags(str(error), names)}", file=sys.stderr)

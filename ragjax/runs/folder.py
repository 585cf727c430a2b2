"""The output folder of a run: its lock, its options, its files and what the run cost."""

import dataclasses
import json
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ragjax.models.layers.linear import matmul_precision
from ragjax.runs.options.evaluate import EvaluateConfig
from ragjax.runs.options.files import to_dict
from ragjax.runs.options.shared import OF_MACHINE, RunConfig
from ragjax.runs.options.tracking import masked
from ragjax.storage import RunLock, keep_compiled, processes, read_lines, write_json
from ragjax.training.loop import StopFlag, graceful_stop


class RunFiles:
    """Reads the files of a folder and remembers what could not be read.

    Attributes:
        problems: A sentence on each damaged file.
    """

    def __init__(self, folder: Path):
        """Names the folder."""
        self._folder = folder
        self.problems: list[str] = []

    def mapping(self, name: str) -> dict[str, Any]:
        """Returns the JSON object in a file; empty where there is none."""
        try:
            value = json.loads((self._folder / name).read_text("utf-8-sig"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.problems.append(f"{name} cannot be read: {error}")
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{name} holds no JSON object")
            return {}
        return value

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Returns the JSON objects of a file of lines; a torn last line is left out."""
        try:
            rows = [row for _, row in read_lines(self._folder / name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            self.problems.append(f"{name} cannot be read: {error}")
            return []
        if lost := rows.count(None):
            self.problems.append(f"{name}: {lost} lines cannot be read")
        return [row for row in rows if row is not None]


CONFIG = "config.json"
COST = "cost.json"
# Written last: where it is, the run has finished.
REPORT = "report.html"


def add_seconds(folder: Path, stage: str, seconds: float) -> None:
    """Adds the wall-clock time of a stage to that of earlier calls of the run.

    The cost of a run that has its report stays as it is, so that repeating it changes no byte of
    the report.

    Args:
        folder: Output folder of the run.
        stage: Name of the stage.
        seconds: Time that this call spent in it.
    """
    if (folder / REPORT).exists():
        return
    cost = read_cost(folder)
    known = cost.setdefault("seconds", {})
    known[stage] = round(known.get(stage, 0.0) + seconds, 3)
    cost["peak_memory_bytes"] = max(cost.get("peak_memory_bytes", 0), _peak_memory_bytes())
    write_json(folder / COST, cost)


def read_cost(folder: Path) -> dict[str, Any]:
    """Returns the cost so far; a damaged file, which no result depends on, counts as none."""
    cost = RunFiles(folder).mapping(COST)
    return cost if isinstance(cost.get("seconds", {}), dict) else {}


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Claimed(NamedTuple):
    """An output folder that is held."""

    stop: StopFlag  # stops the run
    folder: Path  # where this process works; not that of the results in all processes but the first


@contextmanager
def claim(
    config: RunConfig | EvaluateConfig, record: Mapping[str, Any], stop: StopFlag | None
) -> Iterator[Claimed]:
    """Holds an output folder that is free, or that holds an earlier part of the same run.

    Where several processes make the run (`distributed`), it joins them first.

    Args:
        config: Options; its folder is made where it is missing.
        record: What config.json will hold, as of `config_record`.
        stop: Set by the caller to stop the run; None: set by SIGTERM and SIGINT.

    Raises:
        ValueError: Another process holds the folder, or it holds something else, or a run with
            other options (the first that differ are named).
    """
    processes.start(config.distributed)
    folder = Path(config.output)
    lock = RunLock(folder, remedy="use another --output folder")
    with nullcontext(stop) if stop else graceful_stop(kill=False) as flag, ExitStack() as held:

        def take() -> None:
            held.enter_context(lock)
            check_free(record, config)

        processes.first_alone(take)
        keep_compiled()
        with processes.folder_of_run(folder) as own, fast_products():
            yield Claimed(flag, own)


@contextmanager
def fast_products() -> Iterator[None]:
    """Lets a CPU that multiplies bfloat16 in hardware do so, as a TPU does by default.

    Factors are rounded, sums and gradients stay float32: see `ragjax.models.layers.linear`. Where
    the user has set jax_default_matmul_precision (JAX_DEFAULT_MATMUL_PRECISION), that holds.
    """
    # Of the process and not of a thread, so that an index that is built behind is one of the same.
    given = matmul_precision()
    if given is None and jax.default_backend() == "cpu" and _multiplies_bfloat16():
        jax.config.update("jax_default_matmul_precision", "bfloat16")
    try:
        yield
    finally:
        jax.config.update("jax_default_matmul_precision", given)


def _multiplies_bfloat16() -> bool:
    """Says whether a CPU has instructions for it, where the kernel says."""
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(words)


def config_record(
    config: RunConfig | EvaluateConfig, fingerprint: str, *, mode: str
) -> dict[str, Any]:
    """Returns what config.json holds, with secrets masked.

    Args:
        config: The options.
        fingerprint: A digest of them.
        mode: How several documents make one answer, which the options may leave to the run.
    """
    made_by = {"program": config.program} if config.program else {}
    values = {name: value for name, value in to_dict(config).items() if name not in OF_MACHINE}
    return made_by | {"fingerprint": fingerprint, "mode": mode, "config": masked(values)}


def check_free(record: Mapping[str, Any], config: RunConfig | EvaluateConfig) -> None:
    """Raises ValueError where the output folder holds anything but a part of the same run.

    Args:
        record: What config.json will hold, as of `config_record`.
        config: The options.
    """
    folder, kind = Path(config.output), config.kind
    path = folder / CONFIG
    if not path.is_file():
        ours = {"run.lock", "data", COST, CONFIG + ".tmp"}  # what is there before the config is
        there = [p for p in folder.glob("*") if p.name not in ours]
        strangers = sorted(p.name for p in there if not _is_left(p))
        if strangers:
            raise ValueError(
                f"{folder} is not empty ({', '.join(strangers[:3])}) and holds no {kind};"
                " choose another --output folder"
            )
        return
    try:
        earlier = json.loads(path.read_text("utf-8-sig"))
        same = earlier["fingerprint"] in (
            record["fingerprint"],
            _when_adopted_later(config, earlier),
        )
        differences = _differences(earlier["config"], record["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not the config of a {kind} ({error}); choose another --output folder"
        ) from error
    if not same:
        what = "; ".join(differences[:5]) or "the run was made again"
        raise ValueError(
            f"{folder} holds another {kind} ({what}); choose another --output folder, or give the"
            " same options to continue it"
        )


def _is_left(path: Path) -> bool:
    """Says whether a run leaves this behind that was refused once its models were read."""
    if path.name == "metrics.jsonl":
        return path.stat().st_size == 0
    if path.name == "checkpoints":
        return not any(path.iterdir())
    return processes.is_left(path)


def _when_adopted_later(
    config: RunConfig | EvaluateConfig, earlier: Mapping[str, Any]
) -> str | None:
    """Returns the fingerprint that a run had before it gave up adopting its indexes at fixed steps.

    What a run promised with `adopt_after` it may give up on the way, as it must where the index of
    its checkpoint is lost; None where this run does not.
    """
    if not isinstance(config, RunConfig) or config.refresh.adopt_after >= 0:
        return None
    after = earlier["config"]["refresh"]["adopt_after"]
    refresh = dataclasses.replace(config.refresh, adopt_after=after)
    return dataclasses.replace(config, refresh=refresh).fingerprint()


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*earlier, *now} - {"output"}):
        old, new = earlier.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} there, {new!r} here")
    return found

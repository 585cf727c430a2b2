"""Speed on an accelerator: one program, one file, four minutes.

    python benchmarks/accelerator.py --output accelerator.json

Measures, on the devices that JAX shows: encoding, a step of the retriever with its candidates
scored by the language model, a step of the language model (adapters, top layers), the end-to-end
step with documents from the host and from a callback, re-indexing meanwhile, generation, exact
search of 1 and 20 million vectors, and what left devices idle, before and after: checkpoints of
each step, cold compilation, encoder batches of 64 rows, adapters beside the weights. The encoder
has the sizes of BERT-base, the decoder those of Llama 3.2 1B; all weights are random, so nothing
is downloaded. Where torch sees the same device, transformers' models of the same sizes are
measured, eager and compiled.

The file is written again after each part. What no longer fits into `--minutes` is skipped and
says so; a part that fails says why, the others go on, and the exit code is 1. Utilisation is the
model's own multiplications (the file has the formula of each part) over the peak of the devices.
On a CPU all sizes are tiny: about a minute on one core, and the numbers mean nothing.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# PyTorch shares the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from _accelerator_list import ENTRIES, PARTS, Entry
from _accelerator_models import FULL, TOY, Bench, Skipped
from _accelerator_torch import torch_problem
from _beside import run_program
from _work import peak_source, peak_tflops

from ragjax.runs.models import visible_devices
from ragjax.storage import write_text
from ragjax.training.mesh import make_layout

FORMAT = 1
# Of the seconds that a part is expected to take, what it takes at tiny sizes.
_TOY_SHARE = 0.03
_SLOWEST, _FASTEST = 4.0, 0.25


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Measures the speed of everything that ragjax does on an accelerator.

    Attributes:
        output: JSON file that is written.
        minutes: For everything; what would take longer is skipped.
        only: Parts to measure; none: all.
        toy: Tiny sizes; on a CPU in any case.
        rounds: Timed calls of each thing, fewer where they take long; the median counts.
        fsdp: Devices that have an equal part of each large parameter.
        chunk_tokens: Tokens of the documents that a training step encodes at a time, on one device,
            as a run does; 0: all at once.
        torch: Measure PyTorch where it is installed.
    """

    output: str = "accelerator.json"
    minutes: float = 4.0
    only: tuple[str, ...] = ()
    toy: bool = False
    rounds: int = 5
    fsdp: int = 1
    chunk_tokens: int = 2048
    torch: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, 1 where a part failed, or 2 for bad input."""
    failures: list[str] = []
    code = run_program(Flags, lambda flags: failures.extend(measure(flags)), arguments, __doc__)
    return code or int(bool(failures))


def measure(flags: Flags) -> list[str]:
    """Measures, writes the file and prints the table; returns what failed.

    Raises:
        ValueError: A flag is out of range.
    """
    _check(flags)
    started = time.perf_counter()
    devices = visible_devices()
    toy = flags.toy or devices[0].platform == "cpu"
    if toy and not flags.toy:
        print("on a CPU: tiny sizes, as with --toy; the numbers say nothing of an accelerator")
    peak = peak_tflops(devices[0].device_kind)
    report = Report(flags, devices, toy=toy, started=started)
    with tempfile.TemporaryDirectory() as folder, _compiled_quickly(toy):
        bench = Bench(
            TOY if toy else FULL,
            make_layout(devices, fsdp=flags.fsdp),
            Path(folder),
            chunk_tokens=flags.chunk_tokens,
            rounds=flags.rounds,
            peak=peak and peak * 1e12,
            torch=flags.torch,
        )
        report.note(bench)
        try:
            for entry in ENTRIES:
                if entry.part not in (flags.only or PARTS) or (entry.torch and not flags.torch):
                    continue
                report.take(entry, bench)
        finally:
            bench.close()
    report.finish()
    return report.failures


class Report:
    """The file, the time that is left, and what failed."""

    def __init__(
        self, flags: Flags, devices: Sequence[jax.Device], *, toy: bool, started: float
    ) -> None:
        """Begins the file."""
        self._flags, self._started, self._toy = flags, started, toy
        self._budget, self._path = 60 * flags.minutes, Path(flags.output)
        self._expected = self._took = 0.0
        self.failures: list[str] = []
        kind = devices[0].device_kind
        peak = peak_tflops(kind)
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "device": {
                "kind": kind,
                "platform": devices[0].platform,
                "count": len(devices),
                "memory_bytes": (devices[0].memory_stats() or {}).get("bytes_limit"),
                "peak_flops_per_second": peak and peak * 1e12,
                "peak_source": peak_source(kind),
            },
            "jax": jax.__version__,
            "torch": _torch_words(flags),
            "revision": _revision(),
            "command": shlex.join(["python", "benchmarks/accelerator.py", *_flag_words(flags)]),
            "sizes": "toy" if toy else "full",
            "budget_seconds": self._budget,
            "finished": False,
            "parts": {},
        }

    def note(self, bench: Bench) -> None:
        """Adds how the models lie on the devices."""
        self.content |= {
            "layout": bench.layout.describe(),
            "remat": bench.remat,
            "chunk_tokens": bench.chunk_tokens,
        }
        self._write()

    def take(self, entry: Entry, bench: Bench) -> None:
        """Measures an entry if there is time, and writes the file."""
        part = self.content["parts"].setdefault(entry.part, dict(PARTS[entry.part]))
        elapsed, expected = self._elapsed(), entry.seconds * (_TOY_SHARE if self._toy else 1.0)
        # How long parts take here, by those that were taken.
        pace = self._took / self._expected if self._expected else 1.0
        guess = expected * min(max(pace, _FASTEST), _SLOWEST)
        if elapsed + guess > self._budget:
            words = (
                f"no time left: {elapsed:.0f} of {self._budget:g} s are over and it takes about"
                f" {guess:.2g} s"
            )
            found = dict.fromkeys(entry.sides, {"skipped": words})
        else:
            found = self._run(entry, bench)
            if not all("skipped" in side for side in found.values()):
                self._took += self._elapsed() - elapsed
                self._expected += expected
        part |= found
        for name, side in found.items():
            words = _words(side)
            print(f"[{self._elapsed():6.1f} s] {entry.part}, {name}: {words}", flush=True)
        self._write()

    def finish(self) -> None:
        """Writes the whole file and prints the table."""
        self.content["finished"] = True
        self._write()
        kind, count = (self.content["device"][name] for name in ("kind", "count"))
        print(f"\n{count} x {kind}, jax {self.content['jax']}, {self.content['seconds']:.0f} s")
        for part, sides in self.content["parts"].items():
            for side, found in sides.items():
                if isinstance(found, dict):
                    print(f"{part:18} {side:20} {_words(found)}")
        print(f"written to {self._path}" + (f"; failed: {self.failures}" if self.failures else ""))

    def _run(self, entry: Entry, bench: Bench) -> dict[str, Any]:
        try:
            found = entry.run(bench)
        except Skipped as reason:
            found = dict.fromkeys(entry.sides, {"skipped": str(reason)})
        except Exception as error:  # whatever it is, the other parts can still be measured
            found = dict.fromkeys(entry.sides, {"failed": f"{type(error).__name__}: {error}"})
            self.failures.append(entry.part)
        return found

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def _write(self) -> None:
        self.content["seconds"] = round(self._elapsed(), 2)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(self.content, indent=1, allow_nan=False) + "\n")


def _words(found: dict[str, Any]) -> str:
    """Returns what one side of a part came to, in a line."""
    for problem in ("skipped", "failed"):
        if problem in found:
            return f"{problem}: {found[problem][:200]}"
    words = [f"{1e3 * found['seconds']:10.2f} ms"]
    for name, value in found.items():
        if name.endswith("_per_second") and name not in (
            "model_flops_per_second",
            "steps_per_second",
        ):
            words.append(f"{value:,.0f} {name.removesuffix('_per_second').replace('_', ' ')}/s")
    if found.get("utilisation") is not None:
        words.append(f"{100 * found['utilisation']:.1f} % of the peak")
    return "  ".join(words)


def _check(flags: Flags) -> None:
    """Raises ValueError naming the flag that is out of range."""
    if unknown := sorted(set(flags.only) - PARTS.keys()):
        raise ValueError(f"--only {unknown[0]}: the parts are {', '.join(PARTS)}")
    if not flags.minutes > 0 or flags.rounds < 1 or flags.chunk_tokens < 0:
        raise ValueError(
            "--minutes must be more than 0, --rounds at least 1 and --chunk_tokens at least 0,"
            f" got {flags.minutes:g}, {flags.rounds} and {flags.chunk_tokens}"
        )


@contextlib.contextmanager
def _compiled_quickly(toy: bool) -> Iterator[None]:
    """Leaves most optimisations out where nobody looks at the speed: compiling takes longest."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, toy or before)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _torch_words(flags: Flags) -> str:
    if not flags.torch:
        return "torch: not asked for"
    if problem := torch_problem():
        return problem
    import torch  # pyrefly: ignore  (not a dependency)

    return torch.__version__


def _flag_words(flags: Flags) -> Iterator[str]:
    """Yields the flags that are not as they are by default."""
    for name, default in vars(Flags()).items():
        value = getattr(flags, name)
        if value == default:
            continue
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif isinstance(value, tuple):
            yield from (f"--{name}", *value)
        else:
            yield from (f"--{name}", f"{value:g}" if isinstance(value, float) else str(value))


def _revision() -> str | None:
    """Returns the git revision of the program, with a + where files differ; None: unknown."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = [
            subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
        return found[0] + ("+" if found[1] else "")
    return None


if __name__ == "__main__":
    sys.exit(main())

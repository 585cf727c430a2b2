"""Breaks the losses one line at a time and checks that a test notices.

    python tests/mutation/mutate_losses.py --output runs/mutants.jsonl

Every mask, guard, cast and stopped gradient of `ragjax/losses` is removed in turn, in a temporary
copy of the repository, and the tests of the losses run against that copy. The table says which test
noticed; a mutant that no test notices SURVIVED, and the exit status is 1. With `--output` an
interrupted run continues: a killed mutant is run again only if its own file has changed, any other
if the package or the tests have.
"""

import argparse
import ast
import concurrent.futures
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from mutants import Mutant, discover, functions, one_line

# Mutants that compute the same thing as the original, so that no test can notice: the key as
# `--list` prints it, and why.
EQUIVALENT: dict[str, str] = {}

_NOT_COPIED = (
    ".git", ".venv*", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "_build", "build",
    "dist", "runs", "node_modules",
)  # fmt: skip
# Found by pytest through `-p`; refuses to test anything but the copy.
_PLUGIN = """
import importlib.util
import os

import pytest


def pytest_configure(config):
    name, root = os.environ["MUTANT_PACKAGE"], os.environ["MUTANT_ROOT"]
    origin = importlib.util.find_spec(name.split(".")[0]).origin
    if not os.path.realpath(origin).startswith(os.path.realpath(root) + os.sep):
        pytest.exit(f"{name} would be imported from {origin}", returncode=99)
"""


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _folder_digest(folder: Path) -> str:
    return _digest(*(path.read_text("utf-8") for path in sorted(folder.rglob("*.py"))))


def test_order(root: Path, tests: str, mutant_path: str) -> list[str]:
    """Orders the test modules: the file's own, then those that name most of its functions."""
    own = f"test_{Path(mutant_path).stem.strip('_')}.py"
    tree = ast.parse((root / mutant_path).read_text("utf-8"))
    names = [name for name, _ in functions(tree) if "." not in name]

    def likelihood(module: Path) -> tuple[bool, int]:
        text = module.read_text("utf-8")
        return module.name == own, sum(text.count(name) for name in names)

    modules = sorted((root / tests).rglob("test_*.py"))
    modules.sort(key=likelihood, reverse=True)
    return [module.relative_to(root).as_posix() for module in modules]


class Workplace:
    """A copy of the repository in which one mutant at a time is tested."""

    def __init__(self, root: Path, folder: Path, package: str, tests: str) -> None:
        """Copies `root` without its history and build outputs into `folder`."""
        self.root, self.package, self.tests = folder / "copy", package, tests
        self.compiled = folder / "compiled"
        shutil.copytree(root, self.root, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        self.plugins = folder / "plugins"
        self.plugins.mkdir()
        (self.plugins / "only_the_copy.py").write_text(_PLUGIN)

    def run(self, modules: list[str], timeout: float) -> tuple[int, str]:
        """Runs test modules until the first failure.

        Returns:
            pytest's exit status, -1 after the timeout, and the first failing test (or why not).
        """
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no"]
        command += ["-p", "no:cacheprovider", "-p", "only_the_copy", *modules]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.root), str(self.plugins)]),
            # A mutant may have its original's size and second: a .pyc would hide it.
            "PYTHONDONTWRITEBYTECODE": "1",
            "MUTANT_PACKAGE": self.package.replace("/", "."),
            "MUTANT_ROOT": str(self.root),
            # Most of the time goes into compiling what a mutant has not changed. The key is the
            # program itself, so a mutant never gets the original's. One folder per process.
            "JAX_COMPILATION_CACHE_DIR": str(self.compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "COLUMNS": "1000",
        }
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return -1, f"timeout after {timeout:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        if failed:
            return process.returncode, failed[1]
        tail = one_line(output[-300:])
        return process.returncode, f"exit status {process.returncode}: {tail}"

    def test(self, mutant: Mutant, modules: list[str], timeout: float) -> dict[str, str | float]:
        """Applies one mutant, runs the tests and puts the original back."""
        target = self.root / mutant.path
        original = target.read_bytes()
        start = time.monotonic()
        try:
            target.write_bytes(mutant.source.encode())
            status, by = self.run(modules, timeout)
        finally:
            target.write_bytes(original)
        if status in (4, 5, 99):  # bad usage, no test found, not the copy: nothing was tested
            raise RuntimeError(f"{mutant.key}: {by}")
        verdict = "SURVIVED" if status == 0 else "killed"
        seconds = round(time.monotonic() - start, 1)
        return {"verdict": verdict, "by": "" if status == 0 else by, "seconds": seconds}


class Campaign:
    """All mutants of a package, with the results so far."""

    def __init__(self, root: Path, package: str, tests: str, output: Path | None) -> None:
        """Reads the sources and whatever an earlier run has written to `output`."""
        self.root, self.package, self.tests, self.output = root, package, tests, output
        self.mutants = discover(root, package)
        self.orders = {m.path: test_order(root, tests, m.path) for m in self.mutants}
        self.everything = _digest(_folder_digest(root / package), _folder_digest(root / tests))
        self.records: dict[str, dict] = {}
        if output and output.exists():
            for line in output.read_text("utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the last line of a run that was cut
                    continue
                if record["verdict"] == "killed" or record["everything"] == self.everything:
                    self.records[record["id"]] = record
        self._lock = threading.Lock()

    @staticmethod
    def identity(mutant: Mutant) -> str:
        """Names a mutant by the text of the whole file."""
        return _digest(mutant.path, mutant.source)

    def result(self, mutant: Mutant) -> dict | None:
        """What is known of a mutant; None before it has run."""
        if mutant.key in EQUIVALENT:
            return {"verdict": "equivalent", "by": EQUIVALENT[mutant.key]}
        return self.records.get(self.identity(mutant))

    def run(self, mutants: list[Mutant], jobs: int, timeout: float | None) -> None:
        """Tests the mutants that have no result yet.

        Args:
            mutants: which.
            jobs: how many at a time.
            timeout: seconds per mutant; if None, from the time that the unchanged package takes.

        Raises:
            RuntimeError: the tests fail on the unchanged package, or cannot run at all.
        """
        todo = [mutant for mutant in mutants if self.result(mutant) is None]
        if not todo:
            return
        with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
            folders = [Path(temporary, str(job)) for job in range(min(jobs, len(todo)))]
            places = [Workplace(self.root, f, self.package, self.tests) for f in folders]
            print("first the tests on the unchanged package", file=sys.stderr, flush=True)
            start = time.monotonic()
            status, by = places[0].run(self.orders[todo[0].path], timeout or 3600)
            if status:
                raise RuntimeError(f"the tests fail on the unchanged package: {by}")
            seconds = time.monotonic() - start
            print(f"they took {seconds:.0f} s", file=sys.stderr, flush=True)
            # Far above: a mutant compiles anew, beside others.
            timeout = timeout or max(60.0, 5 * seconds)
            for place in places[1:]:
                if places[0].compiled.exists():
                    shutil.copytree(places[0].compiled, place.compiled)
            self._run_in(places, todo, timeout)

    def _run_in(self, places: list[Workplace], todo: list[Mutant], timeout: float) -> None:
        free: queue.SimpleQueue[Workplace] = queue.SimpleQueue()
        for place in places:
            free.put(place)
        start = time.monotonic()

        def one(mutant: Mutant) -> Mutant:
            place = free.get()
            try:
                self._keep(mutant, place.test(mutant, self.orders[mutant.path], timeout))
            finally:
                free.put(place)
            return mutant

        survived = 0
        with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
            futures = [pool.submit(one, mutant) for mutant in todo]
            try:
                for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    mutant = future.result()
                    result = self.result(mutant) or {}
                    survived += result["verdict"] == "SURVIVED"
                    left = (time.monotonic() - start) / done * (len(todo) - done) / 60
                    print(
                        f"[{done}/{len(todo)}] {survived} survived, about {left:.0f} min left: "
                        f"{result['verdict']} {mutant.path}:{mutant.line} {mutant.before[:60]}",
                        file=sys.stderr,
                        flush=True,
                    )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _keep(self, mutant: Mutant, result: dict) -> None:
        record = {
            "id": self.identity(mutant),
            "everything": self.everything,
            "key": mutant.key,
        } | result
        with self._lock:
            self.records[record["id"]] = record
            if self.output:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                with self.output.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(record, ensure_ascii=False) + "\n")

    def table(self, mutants: list[Mutant]) -> str:
        """Returns a markdown table of the mutants that have a result."""

        def cell(text: str) -> str:
            short = text if len(text) <= 70 else text[:67] + "..."
            return f"`{short}`".replace("|", "\\|") if short else "(dropped)"

        lines = ["| where | mutation | noticed by |", "|---|---|---|"]
        for mutant in mutants:
            result = self.result(mutant)
            if result is None:
                continue
            by = result["by"].replace("|", "\\|")
            by = {"SURVIVED": "**SURVIVED**", "equivalent": f"equivalent: {by}"}.get(
                result["verdict"], f"`{by}`"
            )
            change = f"{cell(mutant.before)} → {cell(mutant.after)}"
            lines.append(f"| {mutant.path}:{mutant.line} | {change} | {by} |")
        verdicts = [result["verdict"] for m in mutants if (result := self.result(m))]
        counts = ", ".join(
            f"{verdicts.count(verdict)} {verdict}"
            for verdict in ("killed", "SURVIVED", "equivalent")
        )
        return "\n".join([*lines, "", f"{len(mutants)} mutants: {counts}."])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if a mutant survived, 2 if the tests cannot say."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--package", default="ragjax/losses", help="folder of the sources")
    parser.add_argument("--tests", default="tests/losses", help="folder of the tests to run")
    parser.add_argument("--only", metavar="FILE", help="mutants of files whose path ends so")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--timeout", type=float, help="seconds per mutant (5 x the unchanged run)")
    parser.add_argument("--output", type=Path, help="JSON lines to write to and continue from")
    parser.add_argument("--list", action="store_true", help="print the keys and run nothing")
    options = parser.parse_args(arguments)

    campaign = Campaign(options.root.resolve(), options.package, options.tests, options.output)
    mutants = [m for m in campaign.mutants if m.path.endswith(options.only or "")]
    if not mutants:
        parser.error(f"no mutant in {options.package} for --only {options.only}")
    if options.list:
        print(*(f"{m.path}:{m.line}\t{m.key}" for m in mutants), sep="\n")
        return 0
    try:
        campaign.run(mutants, options.jobs, options.timeout)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; so far:", file=sys.stderr)
        print(campaign.table(mutants))
        return 130
    print(campaign.table(mutants))
    return int(any((campaign.result(m) or {})["verdict"] == "SURVIVED" for m in mutants))


if __name__ == "__main__":
    sys.exit(main())

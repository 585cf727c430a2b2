"""Programs under test: loaded into this process, or started as their users start them."""

import functools
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ragjax.training.loop import StopFlag

ROOT = Path(__file__).parents[1]


class StopAfter(StopFlag):
    """Asks a run to stop when it has been looked at so often."""

    def __init__(self, looks):
        super().__init__()
        self._looks = looks

    def check(self):
        self._looks -= 1
        if self._looks == 0:
            self.signum = 15
        super().check()


@functools.cache
def load_script(path: str) -> ModuleType:
    """Returns the module of a program such as "experiments/adapt.py", loaded once."""
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and tyro look it up
    if str(folder := (ROOT / path).parent) not in sys.path:
        sys.path.insert(0, str(folder))  # where Python puts it for a program
    spec.loader.exec_module(module)
    return module


def environment(*folders: Path, devices: int = 1) -> dict[str, str]:
    """Returns the environment of a child: on few devices, compiled as here, with these sources."""
    count = "--xla_force_host_platform_device_count"
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(count)]
    # What a test put there, such as a hook into its children, goes along.
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.environ | {
        "XLA_FLAGS": " ".join([*flags, f"{count}={devices}"]),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", *folders, *given))),
    }


def start(path: str, flags: Sequence[str]) -> subprocess.Popen:
    """Starts a program such as "experiments/adapt.py" as a user does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(ROOT / path), *flags], env=environment(), **pipes)


def send_at(process: subprocess.Popen, landmark: Path, signum: int) -> tuple[str, str]:
    """Sends a program a signal once a file is there; returns what it printed."""
    try:
        end = time.monotonic() + 300
        while not landmark.exists() and process.poll() is None:
            assert time.monotonic() < end, f"no {landmark}"
            time.sleep(0.005)
        process.send_signal(signum)
        return process.communicate(timeout=300)
    finally:
        process.kill()

"""Programs under test: loaded into this process, or started as their users start them."""

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
# Where the scripts find the module that they share.
sys.path.append(str(ROOT / "experiments"))


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
    return os.environ | {
        "XLA_FLAGS": " ".join([*flags, f"{count}={devices}"]),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", *folders))),
    }

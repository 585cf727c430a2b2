"""The output folder of a run: who owns it, what its files hold, what the run cost."""

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragjax.runs.options.files import to_dict
from ragjax.runs.options.shared import RunConfig, fingerprint
from ragjax.storage import read_lines, write_json


class RunFiles:
    """Reads the files of a folder and remembers what could not be read.

    Attributes:
        problems: A sentence on each file that is damaged.
    """

    def __init__(self, folder: Path):
        """Names the folder."""
        self._folder = folder
        self.problems: list[str] = []

    def mapping(self, name: str) -> dict[str, Any]:
        """Returns the JSON object in a file; empty where there is none."""
        try:
            value = json.loads((self._folder / name).read_text("utf-8"))
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


COST = "cost.json"
# Written last: where it lies, the run is finished and repeating it costs no more.
REPORT = "report.html"


def add_seconds(folder: Path, stage: str, seconds: float) -> None:
    """Adds the wall-clock time of a stage to what earlier calls of the run took for it.

    A run that has its report is finished; what it cost stays as it is, so that repeating it changes
    no byte of the report.

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
    """Returns what is known; a damaged file, which no result depends on, counts as none."""
    try:
        cost = json.loads((folder / COST).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(cost, dict) and isinstance(cost.get("seconds", {}), dict)
    return cost if whole else {}


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_CONFIG = "config.json"


def check_output(config: RunConfig, folder: Path) -> None:
    """Checks that an output folder is free, or holds an earlier life of this same run.

    Args:
        config: Options of the run.
        folder: Output folder; may be missing.

    Raises:
        ValueError: If the folder holds something else, or a run with other options (the first that
            differ are named).
    """
    path = folder / _CONFIG
    if not path.is_file():
        ours = {"run.lock", "data", _CONFIG + ".tmp"}  # what is there before the config is
        strangers = sorted(p.name for p in folder.glob("*") if p.name not in ours)
        if strangers:
            raise ValueError(
                f"{folder} is not empty ({', '.join(strangers[:3])}) and holds no run;"
                " choose another --output folder"
            )
        return
    try:
        earlier = json.loads(path.read_text("utf-8"))
        same = earlier["fingerprint"] == fingerprint(config)
        differences = _differences(earlier["config"], to_dict(config))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not the config of a run ({error}); choose another --output"
        ) from error
    if not same:
        raise ValueError(
            f"{folder} holds a run with other options ({'; '.join(differences[:5])}); choose"
            " another --output folder, or give the same options to continue it"
        )


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*earlier, *now} - {"output"}):
        old, new = earlier.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} there, {new!r} here")
    return found

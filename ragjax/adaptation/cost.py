"""What a run has cost so far, in `cost.json`: seconds by stage over all its calls, and memory."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

from ragjax.training.files import write_json

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

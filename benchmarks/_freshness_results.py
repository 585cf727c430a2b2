"""What `benchmarks/freshness.py` shows of its results: rows of the table, and the picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.evaluation import bootstrap_interval, paired_difference


def table_row(
    arm: str, results: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> str:
    """Returns the row of an arm: means over its runs, and the difference from the first arm."""
    scores = _mean_questions(results, "recall@5")
    interval = bootstrap_interval(scores)
    mrr = bootstrap_interval(_mean_questions(results, "mrr@10"))
    difference = paired_difference(scores, _mean_questions(base, "recall@5"))
    mean = {
        name: np.mean([result[name] for result in results])
        for name in ("seconds", "refreshes", "staleness_steps", "step_seconds")
    }
    return (
        f"| {arm} | {len(results)} | {_shown(interval)} | {_shown(mrr)} |"
        f" {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] |"
        f" {mean['seconds']:.0f} | {mean['refreshes']:.1f} | {mean['staleness_steps']:.1f} |"
        f" {mean['step_seconds']:.2f} |"
    )


def plot_quality(
    results: Sequence[Mapping[str, Any]], arms: Sequence[str], path: Path, metric: str = "mrr@10"
) -> None:
    """Draws the quality of each run against its training time and against its refreshes.

    Args:
        results: Lines of results.jsonl.
        arms: Those that are drawn, in this order.
        path: Of the picture.
        metric: What is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (by_time, by_refreshes) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    start = [r["questions"][metric] for r in results if r["arm"] == "un-adapted"]
    for color, arm in enumerate(arms):
        for result in (r for r in results if r["arm"] == arm):
            points = [(0.0, 0, float(np.mean(start[-1])))] if start else []
            points += [(p["seconds"], p["refreshes"], p[metric]) for p in result["points"]]
            seconds, refreshes, values = np.array(points, float).T
            style = {"color": f"C{color}", "marker": "o", "markersize": 4}
            label = arm if result["seed"] == 0 else None
            by_time.plot(seconds, values, label=label, **style)
            by_refreshes.plot(refreshes, values, linestyle="-" if refreshes[-1] else "", **style)
    by_time.set_xlabel("training time, evaluation excluded (s)")
    by_refreshes.set_xlabel("refreshes of the index so far")
    by_time.set_ylabel(f"{metric} on test questions")
    by_time.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _mean_questions(results: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray:
    """Returns the metric of each question, averaged over the seeds."""
    return np.mean([result["questions"][metric] for result in results], axis=0)


def _shown(interval: Any) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"

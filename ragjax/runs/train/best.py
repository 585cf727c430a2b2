"""Parameters measured on dev while they train, and the best of them kept.

Q dev questions.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ragjax.runs.workspace import Workspace
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.score_cache import ResultCache

FACTORS = (0.75, 0.5, 0.25)
"""Weights of the trained parameters that are tried beside 0 (before training) and 1."""
_TIMES = 4

Measure = Callable[[Any], NDArray[np.float64]]  # parameters -> [Q] figure, higher is better


class Measured(NamedTuple):
    """The figure of each dev question; None: unknown."""

    figures: list[float | None]


class Saved(NamedTuple):
    """What a checkpoint of kept parameters holds."""

    params: Any


def measured_steps(num_steps: int, times: int = _TIMES) -> list[int]:
    """Returns after how many steps of a stage it is measured, last at its end."""
    return sorted({math.ceil(num_steps * part / times) for part in range(1, times + 1)} - {0})


class BestStep:
    """Measures parameters every few steps and saves those of the best, across kills.

    Figures are in `dev/NAME.jsonl`, the parameters of the best step in `checkpoints/NAME-best`.

    Attributes:
        figures: What was measured, by name: the steps in their order, as `retriever-0 15`.
    """

    def __init__(self, workspace: Workspace, name: str, measure: Measure) -> None:
        """Reads what an earlier life measured.

        Args:
            workspace: Folder and log.
            name: Of what is trained.
            measure: Computes the figure of each dev question, a pure function.
        """
        self._workspace, self._name, self._measure = workspace, name, measure
        self._known = ResultCache(workspace.folder / "dev" / f"{name}.jsonl", Measured)
        folder = workspace.folder / "checkpoints" / f"{name}-best"
        self._saved = Checkpointer(folder, keep=1, report=workspace.log)
        self.figures: dict[str, NDArray[np.float64]] = {}
        self._best = (-math.inf, 0, "")  # mean, number in order and name of the best step

    def watch(
        self,
        stage: str,
        num_steps: int,
        params_of: Callable[[Any], Any] = lambda params: params,
        *,
        times: int = _TIMES,
    ) -> Callable[[int, Any], None]:
        """Returns what `run_stage` calls after each step.

        Args:
            stage: Its name.
            num_steps: Its length.
            params_of: Trainable parameters to what is measured and kept.
            times: How often it is measured.
        """
        points = measured_steps(num_steps, times)
        names = {done: f"{stage} {done}" for done in points}
        first = len(self.figures)
        for place, done in enumerate(points):  # of an earlier life, whose steps are not repeated
            if (measured := self._known.get(names[done])) is not None:
                self._note(names[done], first + place, _array(measured))

        def after_step(done: int, trainable: Any) -> None:
            if done not in names or names[done] in self.figures:
                return
            params = params_of(trainable)
            figure, place = self._measure(params), first + points.index(done)
            if self._note(names[done], place, figure):
                self._saved.save(place, Saved(params), {"name": names[done]})
            # Behind its parameters: where the line is, they are.
            self._known.put([names[done]], [_measured(figure)])
            self._workspace.log(f"{names[done]}: dev {_mean(figure):.3f}")

        return after_step

    def measure(self, name: str, params: Any) -> NDArray[np.float64]:
        """Returns the figure of parameters that are no step of a stage, measured once."""
        known = self._known.get(name)
        if known is None:
            known = _measured(self._measure(params))
            self._known.put([name], [known])
        return _array(known)

    def restore(self, template: Any) -> tuple[str, Any]:
        """Returns name and parameters of the best step.

        Args:
            template: Parameters of the same shapes, in the same places.

        Raises:
            ValueError: They are damaged.
        """
        restored = self._saved.latest_good(Saved(template))
        if restored is None or restored.info.get("name") != self._best[2]:
            folder = self._workspace.folder
            raise ValueError(
                f"{folder / 'checkpoints'}/{self._name}-best does not hold the parameters of"
                f" {self._best[2]}, the best step on dev; delete the folders"
                f" checkpoints/{self._name}* and dev of {folder} to train again"
            )
        return self._best[2], restored.state.params

    def _note(self, name: str, place: int, figure: NDArray[np.float64]) -> bool:
        """Remembers a step; returns whether it is the best so far, of equal ones the first."""
        self.figures[name] = figure
        if better := (mean := _mean(figure)) > self._best[0]:
            self._best = (mean, place, name)
        return better


def save_kept(workspace: Workspace, name: str, params: Any, info: Mapping[str, Any]) -> None:
    """Saves what was kept of a training, in `checkpoints/NAME`, where the run's models are read."""
    keeper = Checkpointer(workspace.folder / "checkpoints" / name, keep=1, report=workspace.log)
    keeper.save(1, Saved(params), {"num_steps": 1, **info})


def _measured(figure: NDArray[np.float64]) -> Measured:
    return Measured([None if math.isnan(value) else value for value in figure.tolist()])


def _array(measured: Measured) -> NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in measured.figures])


def _mean(figure: NDArray[np.float64]) -> float:
    known = figure[~np.isnan(figure)]
    return float(known.mean()) if known.size else -math.inf

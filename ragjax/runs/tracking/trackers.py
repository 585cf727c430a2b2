"""The trackers of `log_to`, and what they are told of a run."""

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ragjax.runs.folder import RunFiles
from ragjax.runs.options.evaluate import EvaluateConfig
from ragjax.runs.options.shared import RunConfig
from ragjax.runs.options.tracking import PACKAGES, tracker_names
from ragjax.runs.tracking.behind import Behind
from ragjax.runs.workspace import Workspace
from ragjax.storage import write_json
from ragjax.storage.processes import is_first
from ragjax.training.loop import MetricWriter

TRACKING = "tracking.json"
_PROJECT = "ragjax"
# Seconds that W&B may take to answer, and for the rest of its uploads, also as the process ends.
_SECONDS = 20


class Tracked(NamedTuple):
    """What a tracker is told of a run."""

    folder: Path
    name: str
    id: str  # the same after each resume
    options: Mapping[str, Any]  # as config.json has them, without secrets


def check_trackers(log_to: str) -> None:
    """Raises ValueError for a tracker whose package is not installed."""
    for name in tracker_names(log_to):
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"--log_to {name}: {PACKAGES[name]} is not installed: pip install 'ragjax[{name}]'"
            )


@contextmanager
def track(
    config: RunConfig | EvaluateConfig, record: Mapping[str, Any], workspace: Workspace
) -> Iterator[None]:
    """Lets the trackers of `log_to` follow the metrics of a run for the length of the block.

    Args:
        config: Options.
        record: What config.json holds, as of `ragjax.runs.folder.config_record`.
        workspace: Of the run, claimed and begun.
    """
    names = tracker_names(config.log_to) if is_first() else ()
    followers: list[MetricWriter] = []
    if names:
        run = _tracked(workspace.folder, config, record)
        followers += [Behind(name, partial(_OPEN[name], run), log=workspace.log) for name in names]
    workspace.metrics.followers += followers
    try:
        yield
    finally:
        for follower in followers:
            workspace.metrics.followers.remove(follower)
            follower.close()


def _tracked(
    folder: Path, config: RunConfig | EvaluateConfig, record: Mapping[str, Any]
) -> Tracked:
    """Returns what trackers are told; the id is kept in the folder of the run."""
    known = RunFiles(folder).mapping(TRACKING).get("id")
    id = known if isinstance(known, str) and known else secrets.token_hex(4)
    if id != known:
        write_json(folder / TRACKING, {"id": id})
    options = {"program": f"experiments/{Path(config.program or 'adapt').stem}.py"}
    return Tracked(folder, f"{Path(config.output).name}-{id}", id, options | record["config"])


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, run: Tracked, _: Callable[[str], None]) -> None:
        """Opens a new file, beside those of earlier starts."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), flush_secs=10)
        text = json.dumps(run.options, indent=2, ensure_ascii=False)
        self._writer.add_text("options", f"```json\n{text}\n```", 0)

    def write(self, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Writes the values of one step, as `stage/metric`."""
        for name, value in _known(metrics).items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Writes the results, as `result/system/metric`."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"result/{name}", value, 0)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B; where it cannot be reached, one that `wandb sync` sends later."""

    def __init__(self, run: Tracked, note: Callable[[str], None]) -> None:
        """Starts the run, or goes on with it."""
        import wandb

        mode: Literal["offline"] | None = None  # as W&B is configured
        begin = partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.id,
            name=run.name,
            resume="allow",
            reinit="create_new",  # beside a run of the user's
            dir=str(run.folder),
            config=dict(run.options),
            settings=wandb.Settings(
                console="off",
                init_timeout=_SECONDS,
                finish_timeout=_SECONDS,
                x_disable_meta=True,  # has the command line as it is, with its secrets
            ),
        )
        later = f"wandb sync {run.folder / 'wandb' / 'offline-run-*'} sends it later"
        # Without a login W&B would ask for one, in a thread, and wait.
        configured = wandb.setup().settings.mode
        if configured == "online" and not wandb.login(prompt=False, verify=False):
            note(f"nobody is logged in: set WANDB_API_KEY, or wandb login; {later}")
            mode = "offline"
        try:
            self._run = begin(mode=mode)
        except wandb.Error as error:
            note(f"{error}; {later}")
            if wandb.run is None:
                wandb.teardown()  # it holds the id
                self._run = begin(mode="offline")
            else:  # a run of the user's, which would end with it
                self._run = begin(mode="offline", id=f"{run.id}-{secrets.token_hex(4)}")
        self._stages: set[str] = set()

    def write(self, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Logs one step over the steps of its stage: W&B's own count may not go back."""
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        values = {f"{stage}/{name}": value for name, value in _known(metrics).items()}
        self._run.log({**values, f"{stage}/step": step})

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Puts the results into the run's summary."""
        self._run.summary.update({f"result/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Trackio:
    """A run of Trackio, on this machine or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

    def __init__(self, run: Tracked, _: Callable[[str], None]) -> None:
        """Starts the run, or goes on with the one of its name."""
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=run.name,
            config=dict(run.options),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Logs one step, as `stage/metric`."""
        values = {f"{stage}/{name}": value for name, value in _known(metrics).items()}
        self._run.log(values, step=step)

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Logs the results, as `result/system/metric`."""
        self._run.log({f"result/{name}": value for name, value in metrics.items()}, step=0)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def _known(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}


_OPEN: dict[str, Callable[[Tracked, Callable[[str], None]], MetricWriter]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}

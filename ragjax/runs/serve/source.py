"""What a run has to serve: the system that it ships, or, while it trains, its newest generation."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ragjax.index import EmbeddingStore
from ragjax.refresh import Expected, Generation, GenerationStore, load_snapshot
from ragjax.refresh.generations import EMBEDDINGS
from ragjax.runs.ask.asker import Asker
from ragjax.runs.data import Log
from ragjax.runs.indexes import Retriever
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.saved import ModelChoice, open_run, script_of
from ragjax.runs.system import System, open_system
from ragjax.runs.trainable import END_TO_END, SplitModels, folded, split_models
from ragjax.runs.workspace import Workspace, tower_params
from ragjax.training.checkpoint import Checkpointer, Restored
from ragjax.training.lsr import towers

_CHECKPOINTS = Path("checkpoints") / END_TO_END


class Opened(NamedTuple):
    """What answers until something newer takes its place."""

    name: str  # of the generation, told with every answer
    asker: Asker
    held: Generation | None  # stays on disk as long as this is here


class Source:
    """Opens the newest that a run's folder has."""

    def __init__(
        self,
        folder: str | Path,
        prepare: Callable[[System], Asker],
        *,
        models: ModelChoice = "shipped",
        devices: int = 1,
        log: Log = print,
    ) -> None:
        """Names the run, of which nothing but its options is read yet.

        Args:
            folder: Output folder.
            prepare: Makes what answers from a system.
            models: As of `open_system`, of a run that has ended; one in training serves those of
                its newest checkpoint, or `base`.
            devices: That have an equal part of each parameter.
            log: Shows one line to the user.

        Raises:
            FileNotFoundError: There is no run.
            ValueError: It has not ended, and has no generation of an index.
        """
        self._folder, self._prepare, self._log = Path(folder), prepare, log
        self._models: ModelChoice = models
        self._devices = devices
        self._generations = GenerationStore(self._folder / "refresh", report=log)
        # Of a run in training: what stays when its generation moves, and what is trained of it.
        self._training: tuple[System, SplitModels] | None = None
        self.newest()

    def newest(self) -> str:
        """Returns what there is to open, in a word that changes with it; reads little.

        Raises:
            FileNotFoundError, ValueError: As `__init__`.
        """
        run = open_run(self._folder)
        # What the base models made is there from the start of training.
        base = self._models == "base" and (self._folder / "index" / "0").is_dir()
        if run.metrics is not None or base:
            return "ended"
        numbers = self._generations.numbers()
        if not isinstance(run.config, RagConfig) or not numbers:
            raise ValueError(
                f"{self._folder}: the run has not ended, and has no index generation that could be"
                f" served before; the same {script_of(run.config)} command finishes it"
            )
        saved = (self._folder / _CHECKPOINTS).glob("[0-9]*")
        steps = [int(path.name) for path in saved if path.name.isdecimal()]
        return f"generation {numbers[-1]}, step {max(steps, default=0)}"

    def open(self) -> Opened:
        """Opens the newest.

        Raises:
            OSError: Files are not there (any more).
            ValueError: They are damaged, or do not belong together.
        """
        if self.newest() != "ended":
            return self._open_generation()
        self._training = None
        system = open_system(
            self._folder, models=self._models, devices=self._devices, log=self._log
        )
        return Opened(f"index/{system.retriever.version}", self._prepare(system), None)

    def _open_generation(self) -> Opened:
        if self._training is None:
            base = open_system(self._folder, models="base", devices=self._devices, log=self._log)
            self._training = base, _split(base.workspace)
        base, split = self._training
        workspace = base.workspace
        # The checkpoint first: the trainer may publish meanwhile, and an index may lag its encoder.
        saved = self._checkpoint(split)
        expected = Expected(corpus_fingerprint=workspace.task.corpus_digest)
        generation = self._generations.newest(expected=expected)
        if generation is None:
            raise ValueError(f"{self._folder}: no whole generation of the index of this corpus")
        step, query, doc, lm = 0, base.retriever.query_params, base.doc_params, base.lm_params
        if saved is not None:
            step, trained = saved.step, split.merged(saved.state)
            query, doc = towers(trained.towers, None)
            lm = workspace.in_compute_dtype(folded(trained.lm_params))
        dense = load_snapshot(generation, workspace.layout.devices).index
        store = EmbeddingStore.open(generation.folder / EMBEDDINGS, verified=True)
        retriever = Retriever(
            version=generation.number,
            query_params=query,
            dense=dense,
            hybrid=base.retriever.hybrid.with_dense(dense),
            embeddings=store.rows(),
            store=store,
        )
        system = dataclasses.replace(base, retriever=retriever, doc_params=doc, lm_params=lm)
        name = f"refresh/{generation.number:06d}, step {step}"
        return Opened(name, self._prepare(system), generation)

    def _checkpoint(self, split: SplitModels) -> Restored | None:
        """Reads the newest whole checkpoint of a run that may go on; None: there is none yet."""
        folder = self._folder / _CHECKPOINTS
        if not folder.is_dir():
            return None
        # What the trainer removes meanwhile is passed over.
        checkpoints = Checkpointer(folder, report=lambda note: None)
        return checkpoints.latest_good(split.trainable, field="params")


def _split(workspace: Workspace) -> SplitModels:
    """Returns base models of an end-to-end run with what it trains apart from the rest."""
    config, lm = workspace.config, workspace.lm
    assert isinstance(config, RagConfig), "both models are trained and saved together"
    return split_models(config, lm.family, lm.params, tower_params(workspace))

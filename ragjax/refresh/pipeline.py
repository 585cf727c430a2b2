"""One refresh from parameters to a loaded index: export, encode, build, publish, open.

Each part leaves either a complete result on disk or something the next attempt goes on from.
N documents, D embedding size, P probe queries, R documents encoded again.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ragjax import storage
from ragjax.index import (
    EmbeddingStore,
    IndexSnapshot,
    ShardWriter,
    StoreSpec,
    choose_index,
)
from ragjax.index.shards import write_store
from ragjax.refresh.build import ScannBuild
from ragjax.refresh.drift import top_k_overlap
from ragjax.refresh.export import is_export, list_exports, write_export
from ragjax.refresh.generations import (
    EMBEDDINGS,
    INDEX,
    Description,
    Expected,
    GenerationStore,
    library_versions,
)
from ragjax.refresh.options import RefreshOptions
from ragjax.refresh.partial import RetrievalCounts, select_rows
from ragjax.refresh.snapshot import load_snapshot
from ragjax.refresh.task import EncodeProgress, EncodeRequest, EncodeTask, Executor, params_digest

_OVERLAP_K = 10
_CHANGED = "changed"


class Submission(NamedTuple):
    """Parameters handed over by the trainer."""

    params: Any  # a copy
    step: int
    counts: NDArray[np.int64]  # [N] retrievals since a document was encoded, when it was exported
    probe_queries: NDArray[np.floating] | None  # [P, D]
    store: EmbeddingStore | None = None  # of the embeddings, where they need no encoding


class _Plan(NamedTuple):
    """Which documents a refresh encodes, and from which index the others are kept."""

    rows: NDArray[np.int64] | None  # None: all
    base: IndexSnapshot | None


class Pipeline:
    """What the refresher's thread does with an export; used by one thread at a time."""

    def __init__(
        self,
        folder: Path,
        task: EncodeTask,
        executor: Executor,
        generations: GenerationStore,
        options: RefreshOptions,
        *,
        cancelled: threading.Event,
        on_progress: Callable[[EncodeProgress], None],
        report: Callable[[str], None],
    ) -> None:
        """Takes its parts; see `Refresher`."""
        self._folder, self._task, self._executor = folder, task, executor
        self._generations = generations
        # The numbers' formats decide what is stored as much as the weights do.
        self._model = f"{task.model_fingerprint} {task.options.compute_dtype} {task.dtype}".strip()
        self._index, self._build = str(options.index), options.build
        self._partial, self._devices = options.partial, options.devices
        self._cancelled, self._on_progress, self._report = cancelled, on_progress, report
        self.counts = RetrievalCounts(len(task.documents))
        # Known change of each document's embedding at its newest encoding, and the step of it.
        self._drift = np.full(len(task.documents), np.nan, np.float32)
        self._encoded_at = np.zeros(len(task.documents), np.int64)
        self._latest: IndexSnapshot | None = None
        self._refreshes = 0  # since the start; the first index is number 0
        self._pinned: frozenset[int] = frozenset()
        self._pinned_exports: frozenset[int] = frozenset()
        self._process: ScannBuild | None = None
        self.building = False
        self.exported: dict[int, str] = {}  # digests of the parameters on disk, by step

    @property
    def builder_pid(self) -> int:
        """Process that builds an index at the moment, 0 where none does."""
        process = self._process
        return 0 if process is None else process.pid

    def clean(self) -> None:
        """Removes what a killed export or removal left behind; before anything is under way."""
        self._generations.clean()
        finished = {path for _, path in list_exports(self._folder / "exports")}
        for path in (self._folder / "exports").glob("*"):
            if path not in finished:
                shutil.rmtree(path, ignore_errors=True)

    def pin(self, numbers: frozenset[int], export_steps: frozenset[int]) -> None:
        """Keeps generations, and exported parameters by their steps, that checkpoints name."""
        self._pinned, self._pinned_exports = numbers, export_steps

    def export_folder(self, step: int) -> Path:
        """Returns where the parameters of a step are kept."""
        return self._folder / "exports" / f"{step:08d}"

    def open_existing(self, digest: str, *, number: int | None = None) -> IndexSnapshot | None:
        """Opens the newest generation that was made from these parameters, if there is one.

        Args:
            digest: Of the parameters.
            number: A generation that may also hold documents encoded earlier, because a
                checkpoint names it; any other must have been encoded as a whole.
        """
        generations, expected = self._generations, self._expected(digest)
        named = [number] if number in generations.numbers() else []
        generation = generations.newest(expected=expected, numbers=named) or generations.newest(
            expected=dataclasses.replace(expected, whole=True)
        )
        if generation is not None:
            self._latest = load_snapshot(generation, self._devices)
        return None if generation is None else self._latest

    def mismatch(self) -> str:
        """Says what the newest generation was made from if not from this corpus and encoder."""
        described = self._generations.descriptions()
        if not described:
            return ""
        number = max(described)
        problem = self._expected("").problem(described[number])
        return f"generation {number} is not used: {problem}" if problem else ""

    def run(self, export: Submission) -> IndexSnapshot:
        """Makes a generation of the parameters, or opens the one there is, and loads it.

        Raises:
            Cancelled: The refresher is closed.
            ValueError: Embeddings that are not finite; the message names the documents.
            OSError: The disk is full, or gone.
            BuildError: The process that builds the index failed.
        """
        digest = params_digest(export.params)
        self._write_export(export, digest)
        self._collect_exports(export.step)
        existing = self.open_existing(digest)
        if existing is not None:
            # The same parameters, so the index is as fresh as if it were built again.
            step = max(existing.encoder_step, export.step)
            return dataclasses.replace(existing, encoder_step=step)
        spec = self._task.spec(export.params, params_digest=digest)
        plan = _Plan(None, self._latest) if export.store is not None else self._plan(export)
        folder = self._building_folder(spec, plan)
        started = time.monotonic()
        store = self._encode(export, spec, plan, folder)
        encode_seconds = time.monotonic() - started
        self.building = True
        try:
            snapshot = self._build_and_publish(export, digest, store, plan, folder, encode_seconds)
        finally:
            self.building = False
            self._process = None
        self._note_encoded(export, plan, snapshot)
        self._latest = snapshot
        self._generations.collect(pinned=self._pinned)
        return snapshot

    # ------------------------------------------------------------------ the parts of a run

    def _write_export(self, export: Submission, digest: str) -> None:
        """Keeps the parameters, so that a lost generation can be made again."""
        folder = self.export_folder(export.step)
        if self.exported.get(export.step) != digest or not folder.is_dir():
            # One that an earlier life wrote stays: a checkpoint may count on it, and the disk may
            # be full by now.
            if not is_export(folder, export.params, digest):
                shutil.rmtree(folder, ignore_errors=True)
                write_export(folder, export.params, step=export.step, info={})
        self.exported[export.step] = digest

    def _plan(self, export: Submission) -> _Plan:
        """Decides whether all documents are encoded or those that matter most."""
        base = self._latest
        policy = self._partial
        if policy is None or base is None or base.doc_embeddings is None:
            return _Plan(None, None)
        if policy.is_full(self._refreshes):
            return _Plan(None, base)
        budget = policy.budget(len(self._task.documents))
        age = int(self._encoded_at.max()) - self._encoded_at
        rows = select_rows(counts=export.counts, drift=self._drift, age=age, budget=budget)
        return _Plan(rows, base)

    def _building_folder(self, spec: StoreSpec, plan: _Plan) -> Path:
        """Returns the folder this refresh is built in, and removes those of given-up ones."""
        rows = None if plan.rows is None else plan.rows.tobytes().hex()
        parts = json.dumps([str(spec), rows, self._index, str(self._build.scann)])
        name = hashlib.sha256(parts.encode()).hexdigest()[:16]
        root = self._folder / "building"
        root.mkdir(parents=True, exist_ok=True)
        for path in root.iterdir():
            if path.name != name:
                shutil.rmtree(path, ignore_errors=True)
        folder = root / name
        folder.mkdir(exist_ok=True)
        # Embeddings are worth keeping; anything else of a killed attempt would be published.
        finished = (folder / EMBEDDINGS).is_dir()
        parts = (EMBEDDINGS,) if finished else (EMBEDDINGS, _CHANGED)
        kept = {name for part in parts for name in (part, f"{part}.building")}
        for path in folder.iterdir():
            if path.name not in kept:
                _remove(path)
        return folder

    def _encode(
        self, export: Submission, spec: StoreSpec, plan: _Plan, folder: Path
    ) -> EmbeddingStore:
        """Encodes the documents of the plan and returns the store of all of them."""
        target = folder / EMBEDDINGS
        if finished := self._open_finished(target, spec):
            return finished
        if export.store is not None:
            names = ("size", "dim", "model_fingerprint", "corpus_fingerprint", "dtype")
            wanted = {name: getattr(spec, name) for name in names}
            if problem := export.store.spec.differences(wanted):
                raise ValueError(f"the embeddings in {export.store.folder} have {problem}")
            return export.store.linked(target)
        if plan.rows is None:
            return self._request(export, target, spec, None)
        part = _part_spec(spec, plan.rows)
        changed = folder / _CHANGED
        store = self._open_finished(changed, part)
        if store is None:
            store = self._request(export, changed, part, plan.rows)
        embeddings = self._base_embeddings(plan)
        embeddings[plan.rows] = store.read()
        whole = write_store(target, spec, embeddings)
        shutil.rmtree(changed)
        return whole

    def _open_finished(self, folder: Path, spec: StoreSpec) -> EmbeddingStore | None:
        """Opens a store that an attempt killed later finished; removes what is damaged."""
        try:
            if folder.is_dir():
                return EmbeddingStore.open(
                    folder,
                    model_fingerprint=spec.model_fingerprint,
                    corpus_fingerprint=spec.corpus_fingerprint,
                )
            with contextlib.suppress(FileNotFoundError):  # none under way, or it has just begun
                ShardWriter.open(folder, spec)
        except (OSError, ValueError) as error:
            self._report(f"embeddings of an earlier attempt cannot be used and are redone: {error}")
            for path in (folder, folder.with_name(f"{folder.name}.building")):
                _remove(path)
        return None

    def _request(
        self, export: Submission, folder: Path, spec: StoreSpec, rows: NDArray[np.int64] | None
    ) -> EmbeddingStore:
        request = EncodeRequest(
            export.params, export.step, folder, spec, rows, self._on_progress, self._cancelled
        )
        return self._executor.encode(self._task, request)

    def _base_embeddings(self, plan: _Plan) -> NDArray[np.float32]:
        """Returns the embeddings `[N, D]` of the index that a partial refresh starts from."""
        assert plan.base is not None and plan.base.doc_embeddings is not None, "checked by _plan"
        return plan.base.doc_embeddings(np.arange(len(self._task.documents)))

    def _build_and_publish(
        self,
        export: Submission,
        digest: str,
        store: EmbeddingStore,
        plan: _Plan,
        folder: Path,
        encode_seconds: float,
    ) -> IndexSnapshot:
        """Builds the index beside the embeddings, publishes both and loads them, verified."""
        kind = self._kind(store.spec)
        started = time.monotonic()
        recall = 1.0
        if kind == "scann":
            recall = self._build_scann(export, plan, folder)
        description = Description(
            encoder_step=export.step,
            params_digest=digest,
            corpus_fingerprint=self._task.corpus_digest,
            model_fingerprint=self._model,
            size=store.spec.size,
            dim=store.spec.dim,
            kind=kind,
            recall=recall,
            encode_seconds=encode_seconds,
            build_seconds=time.monotonic() - started,
            base=-1 if plan.rows is None or plan.base is None else plan.base.version,
            encoded=store.spec.size if plan.rows is None else len(plan.rows),
            built_at=time.time(),
            versions=library_versions(),
        )
        number = self._generations.publish(folder, description)
        generation = self._generations.open(number, expected=self._expected(digest))
        snapshot = load_snapshot(generation, self._devices)
        if export.probe_queries is None or self._latest is None:
            return snapshot
        k = min(_OVERLAP_K, snapshot.index.size)
        before, after = (
            each.index.search(export.probe_queries, k) for each in (self._latest, snapshot)
        )
        return dataclasses.replace(snapshot, overlap=top_k_overlap(before, after))

    def _build_scann(self, export: Submission, plan: _Plan, folder: Path) -> float:
        """Builds the ScaNN index in its own process and returns its recall."""
        base = None
        if plan.rows is not None and plan.base is not None:
            path = self._generations.path(plan.base.version) / INDEX
            base = path if path.is_dir() else None
        self._process = ScannBuild(
            folder,
            self._build,
            probe_queries=export.probe_queries,
            base=base,
            rows=None if base is None else plan.rows,
        )
        self._process.wait(self._cancelled.wait)
        manifest = storage.read_sealed(folder / INDEX / "ragjax.json", what="ScaNN index")
        details = manifest["details"]
        return float(details["recall"])

    def _note_encoded(self, export: Submission, plan: _Plan, snapshot: IndexSnapshot) -> None:
        """Remembers what was encoded and how much it had changed, for the next partial refresh."""
        if self._partial is None or snapshot.doc_embeddings is None:
            return
        rows = np.arange(len(self._task.documents)) if plan.rows is None else plan.rows
        if plan.base is not None and plan.base.doc_embeddings is not None:
            old, new = plan.base.doc_embeddings(rows), snapshot.doc_embeddings(rows)
            norms = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
            self._drift[rows] = 1 - (old * new).sum(axis=1) / np.maximum(norms, 1e-12)
        self._encoded_at[rows] = export.step
        # What was retrieved meanwhile still counts.
        self.counts.forget(rows, export.counts)
        self._refreshes += 1

    def _collect_exports(self, step: int) -> None:
        """Removes exports before this step that no generation was made from."""
        described = self._generations.descriptions().values()
        needed = {what.encoder_step for what in described} | self._pinned_exports
        for exported, path in list_exports(self._folder / "exports"):
            if exported not in needed and exported < step:
                shutil.rmtree(path, ignore_errors=True)
                self.exported.pop(exported, None)

    def _kind(self, spec: StoreSpec) -> str:
        """Returns the kind of index, "exact" or "scann"."""
        if self._index == "auto":
            choice = choose_index(spec.size, spec.dim, devices=self._devices)
            self._index = choice.name
            self._report(choice.reason)
        return self._index

    def _expected(self, digest: str) -> Expected:
        return Expected(
            corpus_fingerprint=self._task.corpus_digest,
            model_fingerprint=self._model,
            params_digest=digest,
            kind="" if self._index == "auto" else self._index,
        )


def _remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _part_spec(spec: StoreSpec, rows: NDArray[np.int64]) -> StoreSpec:
    """Returns the spec of a store that holds some documents only."""
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    return dataclasses.replace(spec, size=len(rows), settings={**spec.settings, "rows": digest})

"""Live retrieval of a training stage, from an index that is kept fresh in the folder `refresh`.

Q questions, B of them a step, K candidates, N documents, D embedding size.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from ragjax import refresh
from ragjax.data import batch_rows
from ragjax.index import Bm25Index, EmbeddingStore, IndexKind
from ragjax.index.scann import scann_problem
from ragjax.runs.found import findable_in_training, search_in_training
from ragjax.runs.indexes import live_search
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.options.shared import RunConfig
from ragjax.runs.trainable import SplitTowers
from ragjax.runs.workspace import Workspace
from ragjax.storage.processes import SHARES, several
from ragjax.training.live import LiveRetrieval, refresh_trigger
from ragjax.training.lsr import towers

# Questions whose results measure the recall of an index and how much a refresh changed them.
_PROBES = 64
_DRIFT_PROBES = 64


def open_retrieval(
    workspace: Workspace,
    split: SplitTowers,
    store: EmbeddingStore | None,
    *,
    k: int,
    batch_size: int,
    bm25: Bm25Index | None = None,
    dense_weight: float = 1.0,
    sources: Sequence[frozenset[int]] | None = None,
) -> LiveRetrieval:
    """Opens retrieval for the training questions of each step with the current towers.

    Args:
        workspace: Data, models, options; `refresh.mode` decides how fresh the index is.
        split: The towers before training.
        store: Embeddings of the documents with them; None encodes the documents.
        k: K, fewer where the corpus is smaller.
        batch_size: B.
        bm25: Joins the dense index; None: dense alone.
        dense_weight: Weight of the dense index.
        sources: Corpus rows that each question was made from, which are left out; None: none are.

    Returns:
        The retrieval, whose refresher the caller closes.
    """
    questions, query_ids = workspace.questions["train"], workspace.train_query_ids
    search = live_search(workspace, bm25, dense_weight=dense_weight)
    search = search_in_training(search, findable_in_training(workspace, sources), questions)
    return LiveRetrieval(
        functools.partial(open_refresher, workspace),
        towers=lambda trainable: towers(split.merged(trainable), None),
        encode_queries=lambda params, rows: workspace.encode_query_ids(
            params, [query_ids[row] for row in rows]
        ),
        rows_at=lambda step: batch_rows(
            workspace.config.seed, step, num_examples=len(questions), batch_size=batch_size
        ),
        k=min(k, len(workspace.doc_tokens)),
        search=search,
        store=store,
    )


def open_refresher(workspace: Workspace, query_params: Callable[[], Any]) -> refresh.Refresher:
    """Opens the refresher of a run in its folder `refresh`, as the options say.

    Args:
        workspace: Corpus, options, questions, folder.
        query_params: Returns the live parameters of the query encoder.

    Raises:
        ValueError: For more devices than there are.
    """
    config = workspace.config.refresh
    if config.mode == "off":
        raise ValueError("refresh.mode is off: there is nothing to refresh")
    trigger = config.trigger
    if isinstance(trigger, refresh.OnDrift):
        drift = refresh.EmbeddingDrift(
            workspace.task, num_probes=_DRIFT_PROBES, seed=workspace.config.seed
        )
        trigger = dataclasses.replace(trigger, measure=drift)
    probes = (workspace.questions["dev"] or workspace.questions["train"])[:_PROBES]
    folder = workspace.folder / "refresh"
    return refresh.Refresher(
        folder,
        workspace.task,
        executor=_executor(workspace),
        trigger=refresh_trigger(config.mode, trigger),
        options=refresh_options(config, workspace.layout.devices, index=workspace.config.index),
        probe_queries=lambda: workspace.encode_queries(query_params(), probes),
        report=workspace.log,
        # Processes of a run look at the flag together, and do not wait for as long.
        check=(lambda: None) if several() else workspace.stop.check,
    )


def refresh_options(
    config: RefreshConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    index: IndexKind = "auto",
) -> refresh.RefreshOptions:
    """Returns the refresher's options for those of a run, whose devices share an exact index."""
    partial = (
        refresh.PartialPolicy(config.partial, config.full_every) if config.partial < 1 else None
    )
    return refresh.RefreshOptions(
        index=index,
        build=refresh.BuildOptions(deadline_seconds=config.deadline_seconds),
        devices=devices,
        keep=config.keep,
        on_failure=config.on_failure,
        max_index_lag_steps=config.max_lag,
        on_lag=config.on_lag,
        adopt_after=0 if config.mode == "sync" else config.adopt_after,
        partial=partial,
    )


def check_machine(config: RunConfig) -> None:
    """Raises ValueError for an index that this machine cannot build, or devices that it lacks."""
    count, kept = jax.local_device_count(), config.refresh.devices
    if kept and kept >= count:
        raise ValueError(
            f"--refresh.devices {kept}: there are {count} local devices and training"
            " needs one; use 0 to encode beside training"
        )
    if config.refresh.dispatch == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("--refresh.dispatch ray: Ray is not installed: pip install 'ragjax[ray]'")
    if config.index == "scann" and (problem := scann_problem()):
        raise ValueError(f"--index scann: {problem}")


def _executor(workspace: Workspace) -> refresh.Executor:
    config = workspace.config.refresh
    check_machine(workspace.config)
    if config.dispatch == "ray":
        return refresh.RayExecutor(report=workspace.log)
    if not config.devices:
        # No program of the background may wait for another process.
        devices = workspace.layout.devices if several() else None
        return refresh.ThreadExecutor(devices, shared=_shared(workspace))
    return refresh.ThreadExecutor(jax.local_devices()[-config.devices :], shared=_shared(workspace))


def _shared(workspace: Workspace) -> Path:
    """Returns where the processes of a run encode together; each has a folder of its own beside."""
    return Path(workspace.config.output) / "refresh" / SHARES

"""Encoding by processes that divide the shards by number: the same program, started W times.

    store = encode_share(task, request, find_share())

Process r encodes the shards r, r + W, r + 2W, ... that are missing in a folder that all see, and
the one that finds all of them there publishes the store. Nothing is locked and nobody waits: a
process that was killed is started again with its number.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ragjax.index import EmbeddingStore, EmbeddingWriter, ShardWriter
from ragjax.index.objects import ObjectWriter
from ragjax.index.shards import publisher_of
from ragjax.refresh.encode import encode_shards, encode_to_store
from ragjax.refresh.task import EncodeProgress, EncodeRequest, EncodeTask, OnProgress
from ragjax.storage.processes import several


class Share(NamedTuple):
    """Which part of the shards a process encodes."""

    rank: int = 0  # number of this process
    world: int = 1  # of how many

    def of(self, shards: Sequence[int]) -> list[int]:
        """Returns those of this process."""
        return [shard for shard in shards if shard % self.world == self.rank]

    def __str__(self) -> str:
        """Returns its name for people, and for the note of who publishes."""
        return f"process {self.rank} of {self.world}"


class IncompleteError(Exception):
    """Others have shards to finish, or the store to publish; the message names them."""


def find_share(
    rank: int | None = None, world: int | None = None, environ: Mapping[str, str] = os.environ
) -> Share:
    """Returns the share of this process.

    Args:
        rank: Its number; None: as what started it says, which is one of: a SLURM array
            (SLURM_ARRAY_TASK_ID and _COUNT, with SLURM_PROCID and SLURM_NTASKS where a task has
            several processes), `srun`, a Kubernetes indexed job (JOB_COMPLETION_INDEX), RANK, or
            JAX where `jax.distributed` is initialized.
        world: How many there are; None: as that says, too. Kubernetes does not: WORLD_SIZE.
        environ: Environment variables.

    Raises:
        ValueError: One of the two is not told, no whole number, or the number is none of so many.
    """
    number, of, said = _told(environ)
    rank, world = (number if rank is None else rank), (of if world is None else world)
    if rank is None and world in (None, 1):
        return Share()
    if rank is None or world is None:
        missing = "rank" if rank is None else "world"
        raise ValueError(f"{said or 'the other'} is given, but not {missing}: give rank and world")
    if not 0 <= rank < world:
        raise ValueError(
            f"rank {rank} of world {world} ({said or 'as given'}): ranks are counted from 0; give"
            " both where the numbers of an array have gaps"
        )
    return Share(rank, world)


def _told(environ: Mapping[str, str]) -> tuple[int | None, int | None, str]:
    """Returns number, how many, and who says so; None: not told."""

    def read(name: str, default: int | None = None) -> int | None:
        text = environ.get(name, "")
        if text and not text.isdigit():
            raise ValueError(f"{name}={text}: expected a whole number")
        return int(text) if text else default

    task, tasks = read("SLURM_PROCID", 0) or 0, read("SLURM_NTASKS", 1) or 1
    if (array := read("SLURM_ARRAY_TASK_ID")) is not None:
        first, step = read("SLURM_ARRAY_TASK_MIN", 0) or 0, read("SLURM_ARRAY_TASK_STEP", 1) or 1
        count = read("SLURM_ARRAY_TASK_COUNT", 1) or 1
        return (array - first) // step * tasks + task, count * tasks, "SLURM_ARRAY_TASK_ID"
    if tasks > 1:
        return task, tasks, "SLURM_PROCID"
    for name in ("JOB_COMPLETION_INDEX", "RANK"):
        if (number := read(name)) is not None:
            return number, read("WORLD_SIZE"), name
    if several():
        return jax.process_index(), jax.process_count(), "jax.process_index()"
    return None, read("WORLD_SIZE"), "WORLD_SIZE" if read("WORLD_SIZE") else ""


def encode_share(
    task: EncodeTask,
    request: EncodeRequest,
    share: Share,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> EmbeddingStore:
    """Encodes the missing shards of this process, and publishes the store if all are there.

    Args:
        task: The documents and their encoder.
        request: What is encoded, the same in all processes; its folder is one that all see. Its
            progress counts the documents of this process.
        share: Of this process; no other that runs has the same, and all have the same world.
        devices: As in `encode_corpus`.

    Returns:
        The store, by whomever it was published.

    Raises:
        IncompleteError: Shards of others are missing, or another process publishes.
        Cancelled: `request.cancelled` was set.
        ValueError: As `encode_to_store`; or the store there, begun or complete, is for other
            embeddings (the message says which), so that this process does nothing.
    """
    folder, spec = request.folder, request.spec
    options: dict[str, Any] = {
        "rows": request.rows,
        "devices": devices,
        "cancelled": request.cancelled,
    }
    publisher = None
    if not folder.exists():
        try:
            writer = ShardWriter.join(folder, spec)
            if mine := share.of(writer.missing()):
                show = _of_this_process(request.progress, writer, mine)
                encode_shards(task, request.params, writer, mine, progress=show, **options)
            if left := writer.missing():
                raise IncompleteError(_missing(left, spec.num_shards, share))
            publisher = writer.claim(str(share))
        except FileNotFoundError:
            # One that publishes takes the folder from under the others' feet.
            publisher = publisher_of(folder)
            if publisher is None and not folder.exists():
                raise
    if folder.exists():
        names = ("model_fingerprint", "corpus_fingerprint")
        wanted = {name: getattr(spec, name) for name in names}
        return EmbeddingStore.open(folder, **wanted, settings=spec.settings)
    if publisher != str(share):
        raise IncompleteError(
            f"all shards are there, and {publisher} publishes {folder}; start it again if it has"
            " ended"
        )
    writer = EmbeddingWriter.open(folder, spec)
    return encode_to_store(task, request.params, writer, progress=request.progress, **options)


def encode_share_to_objects(
    task: EncodeTask,
    request: EncodeRequest,
    share: Share,
    url: str,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> None:
    """Does what `encode_share` does in an object store; `fetch_store` copies the result.

    Args:
        task: As in `encode_share`, like all but the following.
        request: As in `encode_share`; its folder does not count.
        share: As in `encode_share`.
        url: Where the embeddings will lie, see `ragjax.index.objects`.
        devices: As in `encode_corpus`.

    Raises:
        IncompleteError: Shards of others are missing.
        Cancelled: `request.cancelled` was set.
        ValueError: As `encode_share`, or the object store cannot be used.
    """
    writer = ObjectWriter.join(url, request.spec)
    if mine := share.of(writer.missing()):
        encode_shards(
            task, request.params, writer, mine, rows=request.rows, devices=devices,
            progress=_of_this_process(request.progress, writer, mine), cancelled=request.cancelled,
        )  # fmt: skip
    if left := writer.missing():
        raise IncompleteError(_missing(left, request.spec.num_shards, share))
    writer.publish()


def _of_this_process(
    report: OnProgress, writer: ShardWriter | ObjectWriter, shards: Sequence[int]
) -> OnProgress:
    """Returns a callback that counts the documents of some shards only."""
    total = sum(len(writer.rows(shard)) for shard in shards)
    others = writer.spec.size - total

    def show(progress: EncodeProgress) -> None:
        done = progress.fraction * progress.total - others
        report(progress._replace(done=progress.done - others, total=total, fraction=done / total))

    return show


def _missing(shards: Sequence[int], of: int, share: Share) -> str:
    """Says which shards are missing, and whose they are."""
    counts = Counter(shard % share.world for shard in shards)
    ranks = ", ".join(f"{rank} ({count:,})" for rank, count in sorted(counts.items())[:10])
    more = f" and {len(counts) - 10} more" if len(counts) > 10 else ""
    return (
        f"{len(shards):,} of {of:,} shards are missing, first {shards[0]}; they are of rank"
        f" {ranks}{more}. The last process to finish publishes the store; start those again that"
        " have ended"
    )

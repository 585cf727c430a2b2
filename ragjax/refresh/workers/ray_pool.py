"""Actors of a Ray cluster that encode, and the trainer's list of them. R rows, D dimensions."""

import collections
import dataclasses
import functools
import hashlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from ragjax.refresh.encode import encode_corpus
from ragjax.refresh.generations import library_versions
from ragjax.refresh.task import EncodeTask
from ragjax.storage.processes import host
from ragjax.storage.random_keys import key_data, with_keys

# Between two looks at what has ended, and at what the cluster has.
_POLL_SECONDS, _LOOK_SECONDS = 0.2, 1.0
# Shards given to an actor: the second one is on its way while the first is encoded.
_IN_FLIGHT = 2


class Params(NamedTuple):
    """Parameters as they go through the object store."""

    arrays: Any  # typed random keys as integers
    shapes: Any  # `jax.ShapeDtypeStruct`s, with those keys

    @classmethod
    def of(cls, params: Any) -> "Params":
        """Returns parameters to send."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), params)
        return cls(jax.tree.map(host, key_data(params)), shapes)


class ShardError(Exception):
    """A shard could not be encoded, but another try may succeed."""


class RayPool:
    """The actors of a task: those that start, those that can encode, and what each is at."""

    def __init__(
        self,
        ray: Any,
        task: EncodeTask,
        resources: Mapping[str, float],
        most: int,
        *,
        report: Callable[[str], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            ray: The package.
            task: Whose encoder the actors have.
            resources: What an actor takes.
            most: Actors; 0: as many as the resources allow.
            report: Called with one sentence when something needs attention.
        """
        self.task = task
        self.names: dict[Any, str] = {}  # of the actors that can encode
        self._ray, self._resources, self._most, self._report = ray, resources, most, report
        self._starting: dict[Any, Any] = {}  # actor by what it says when it can encode
        self._at: dict[Any, Any] = {}  # actor by what it works on
        self._refused: dict[Any, str] = {}  # they keep their places, which no other then gets
        self._looked = 0.0
        others = {name: n for name, n in resources.items() if name not in ("CPU", "GPU")}
        self._class = ray.remote(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            resources=others,
            max_restarts=0,
        )(_Encoder)
        # The encoder only: neither the corpus nor a tokenizer.
        bare = dataclasses.replace(task, documents=[[0]], tokenize=list, corpus_fingerprint="-")
        self._bare, self._on_cpu = ray.put(bare), set(resources) <= {"CPU"}

    def begin(self) -> None:
        """Forgets what an encoding that was given up is still at; its actors finish that first."""
        self._at.clear()

    def grow(self) -> None:
        """Starts actors where the cluster has room."""
        if time.monotonic() < self._looked + _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        has = self._ray.cluster_resources()
        room = min(int(has.get(name, 0) // need) for name, need in self._resources.items() if need)
        room = min(room, self._most) if self._most else room
        for _ in range(room - len(self.names) - len(self._starting) - len(self._refused)):
            actor = self._class.remote()
            self._starting[actor.prepare.remote(self._bare, self._on_cpu)] = actor

    def free(self) -> Any:
        """Returns the actor with the least to do; None: all have enough."""
        counts = collections.Counter(self._at.values())
        actor = min(self.names, key=lambda actor: counts[actor], default=None)
        return None if actor is None or counts[actor] >= _IN_FLIGHT else actor

    def give(self, actor: Any, *arguments: Any) -> Any:
        """Gives an actor a shard; returns what stands for its embeddings."""
        result = actor.encode.remote(*arguments)
        self._at[result] = actor
        return result

    def wait(self) -> list[Any]:
        """Waits a little; returns what has ended of what was given."""
        under_way = [*self._at, *self._starting]
        if not under_way:
            time.sleep(_POLL_SECONDS)
            return []
        ended, _ = self._ray.wait(under_way, num_returns=1, timeout=_POLL_SECONDS)
        for each in ended:
            if each in self._starting:
                self._admit(each, self._starting.pop(each))
        return [each for each in ended if each in self._at]

    def take(self, result: Any) -> NDArray[np.float32]:
        """Returns embeddings.

        Raises:
            ValueError: They are not finite.
            ShardError: Another error in the actor, which may have no memory at the moment.
            RayError: The actor is lost, or what it returned.
        """
        actor = self._at.pop(result)
        try:
            return self._ray.get(result)
        except self._ray.exceptions.RayTaskError as error:
            told = f"{self.names.get(actor, 'a lost actor')} failed: {error.cause}"
            if isinstance(error.cause, ValueError):
                raise ValueError(told) from error
            raise ShardError(f"{type(error.cause).__name__}: {told}") from error
        except self._ray.exceptions.RayError:
            if (name := self.names.pop(actor, None)) is not None:
                self._report(f"{name} is lost; its shards go to others")
                self._end(actor)
            raise

    @property
    def all_refused(self) -> bool:
        """True where every actor that there was room for is refused."""
        return bool(self._refused) and not self.names and not self._starting

    def describe(self) -> str:
        """Says what actors need and what there is."""
        has = self._ray.cluster_resources()
        need = ", ".join(f"{need:g} {name}" for name, need in self._resources.items())
        there = ", ".join(f"{has.get(name, 0):g} {name}" for name in self._resources)
        why = next(iter(self._refused.values()), "add machines, or free theirs")
        return (
            f"each takes {need}, the cluster has {there}; {len(self._starting)} are starting and"
            f" {len(self._refused)} refused: {why}"
        )

    def close(self) -> None:
        """Ends all actors."""
        for actor in (*self.names, *self._starting.values(), *self._refused):
            self._end(actor)

    def _admit(self, said: Any, actor: Any) -> None:
        """Takes an actor that has started, unless it would compute something else."""
        try:
            name, found = self._ray.get(said)
        except self._ray.exceptions.RayTaskError as error:
            problem, name = str(error.cause), "an actor"
        except self._ray.exceptions.RayError as error:
            self._report(f"an actor was lost while it started: {str(error).splitlines()[0]}")
            return self._end(actor)
        else:
            expected = code_versions()
            problem = "; ".join(
                f"{part} {found.get(part)} there, {expected.get(part)} here"
                for part in sorted({*found, *expected})
                if found.get(part) != expected.get(part)
            )
        if problem:
            self._refused[actor] = f"{problem}; install the same on all machines"
            self._report(f"{name} is refused, the others go on: {self._refused[actor]}")
        else:
            self.names[actor] = name

    def _end(self, actor: Any) -> None:
        self._ray.kill(actor)


class _Encoder:
    """An actor: encodes token ids."""

    def __init__(self) -> None:
        """Loads nothing yet, so that an error is no lost actor."""
        self._task: EncodeTask | None = None
        self._held = ""
        self._params: Any = None

    def prepare(self, task: EncodeTask, on_cpu: bool) -> tuple[str, dict[str, str]]:
        """Takes the encoder; returns a name for people, and what decides embeddings here."""
        if on_cpu:
            jax.config.update("jax_platforms", "cpu")
        self._task = task
        return f"process {os.getpid()} on host {socket.gethostname()}", code_versions()

    def encode(
        self, params: list[Any], rows: NDArray[np.int64], token_ids: list[list[int]]
    ) -> NDArray[np.float32]:
        """Returns the embeddings `[R, D]` of documents, given by row for messages.

        Args:
            params: A reference to the parameters, in a list so that Ray leaves it to this actor
                when they are read.
            rows: `[R]` int64.
            token_ids: Of the R documents.
        """
        assert self._task is not None, "prepared before"
        (reference,) = params
        if self._held != reference.hex():
            import ray

            self._params = None  # the old ones make room
            arrays, shapes = ray.get(reference)
            self._params, self._held = jax.device_put(with_keys(arrays, shapes)), reference.hex()
        documents: Any = dict(zip(rows.tolist(), token_ids, strict=True))
        options = dataclasses.replace(self._task.options, window=len(rows))
        task = dataclasses.replace(self._task, documents=documents, options=options)
        return encode_corpus(task, self._params, rows=rows)


@functools.cache
def code_versions() -> dict[str, str]:
    """Returns what decides which embeddings a machine computes: libraries, and these sources."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    versions = {"jax": library_versions().get("jax", "unknown")}
    return versions | {"ragjax": digest.hexdigest()[:12]}

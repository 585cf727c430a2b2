"""Embeddings in an object store: the shards and manifest of `ragjax.index.shards`, as objects.

    writer = ObjectWriter.join("s3://bucket/embeddings", spec)
    for shard in writer.missing():
        writer.write(shard, embeddings_of(writer.rows(shard)))
    writer.publish()
    store = fetch_store("s3://bucket/embeddings", folder)

An object is there whole or not at all, and never changes: the digest of a shard stands in its
name, so two processes that write the same one cannot disturb each other, and nothing is renamed,
locked or removed. The manifest chooses one of each; with it the embeddings are published. Anything
that `tensorstore.KvStore` opens will do: `s3://bucket/path`, `gs://bucket/path`, `file:///path`.
"""

import collections
import functools
import hashlib
import io
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from ragjax import storage
from ragjax.index.shards import EmbeddingWriter, checked_shard
from ragjax.index.store import (
    FORMAT,
    MANIFEST,
    WHAT,
    EmbeddingStore,
    StoreSpec,
    read_spec,
    spec_as_json,
)

T = TypeVar("T")
_SPEC = "spec.json"
_SHARD = re.compile(r"shards/(\d{6,})-([0-9a-f]{64})\.npy")
_ABSENT = b"\x02"  # the generation of an object that is not there, in `tensorstore`
_RETRIES = 32  # of a request to a server that does not answer, a second and more apart
_AHEAD = 4  # objects that are asked for before the oldest is used


class ObjectWriter:
    """Fills embeddings in an object store together with any number of others."""

    def __init__(self, url: str, spec: StoreSpec) -> None:
        """Names the place; use `join`."""
        self.spec = spec
        self._objects = _Objects(url)

    @classmethod
    def join(cls, url: str, spec: StoreSpec) -> "ObjectWriter":
        """Begins embeddings there, or goes on with those that others began.

        Args:
            url: Where they will lie.
            spec: What they are.

        Raises:
            ValueError: They were begun with another spec (the message names what differs), or the
                store cannot be used.
        """
        writer = cls(url, spec)
        value = {"format": FORMAT, "spec": spec_as_json(spec)}
        found = writer._objects.create(_SPEC, storage.sealed(value))
        name = writer._objects.shown(_SPEC)
        if problem := read_spec(found, Path(name)).differences(_fields(spec)):
            raise ValueError(
                f"{name} was begun for other embeddings ({problem}); remove what lies there, or"
                " choose another place"
            )
        return writer

    def missing(self) -> list[int]:
        """Returns the shards that nobody has finished, in order; none once all is published."""
        if self._objects.read(MANIFEST) is not None:
            return []
        found = self._found()
        return [shard for shard in range(self.spec.num_shards) if shard not in found]

    def rows(self, shard: int) -> range:
        """Returns the documents of a shard."""
        return self.spec.rows(shard)

    def write(self, shard: int, embeddings: ArrayLike) -> None:
        """Writes one shard; it is stored when this returns.

        Args:
            shard: Its number.
            embeddings: `[rows of the shard, D]`, cast to the stored dtype.

        Raises:
            ValueError: As `ShardWriter.write`, or the store cannot be used.
        """
        content = io.BytesIO()
        array = checked_shard(self.spec, shard, embeddings)
        np.lib.format.write_array(content, array, allow_pickle=False)
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        self._objects.write(f"shards/{shard:06d}-{digest}.npy", content.getvalue())

    def publish(self) -> None:
        """Writes the manifest, once all shards are there; the first one stays.

        Raises:
            ValueError: Shards are missing, or the store cannot be used.
        """
        if missing := self.missing():
            raise ValueError(
                f"{len(missing)} of {self.spec.num_shards} shards are not written yet, first"
                f" {missing[0]}"
            )
        found = self._found()
        digests = [found[shard] for shard in range(self.spec.num_shards)]
        value = {"format": FORMAT, "spec": spec_as_json(self.spec), "sha256": digests}
        self._objects.create(MANIFEST, storage.sealed(value))

    def _found(self) -> dict[int, str]:
        """Returns the digest of each shard that is there; of several the first one by name."""
        names = sorted(self._objects.names("shards/"), reverse=True)
        matches = filter(None, map(_SHARD.fullmatch, names))
        return {int(match[1]): match[2] for match in matches}


def is_url(place: str | os.PathLike[str]) -> bool:
    """Tells whether a place is one in an object store."""
    return isinstance(place, str) and "://" in place


def published(url: str) -> StoreSpec | None:
    """Returns what the embeddings at a place are; None: nothing is published there."""
    found = _manifest(_Objects(url))
    return None if found is None else found[0]


def fetch_store(url: str, folder: str | os.PathLike[str]) -> EmbeddingStore:
    """Copies published embeddings to a local folder, comparing every digest.

    A call that was killed goes on with the shards that it had.

    Args:
        url: Where they lie.
        folder: Where the store will be; it must not be there.

    Raises:
        FileNotFoundError: Nothing is published there.
        FileExistsError: The folder is there.
        ValueError: An object is missing or damaged (the message names it), or the store cannot be
            used.
    """
    objects = _Objects(url)
    found = _manifest(objects)
    if found is None:
        raise FileNotFoundError(
            f"{objects.shown('')} holds no published embeddings: {MANIFEST} is missing; if they are"
            " still being encoded, wait for the last process"
        )
    spec, digests = found
    writer = EmbeddingWriter.open(folder, spec)
    names = {shard: f"shards/{shard:06d}-{digests[shard]}.npy" for shard in writer.missing()}
    pending: collections.deque[Any] = collections.deque()
    left = iter(names.items())
    for shard, name in tqdm(names.items(), desc="fetching embeddings", unit=" shards", delay=5):
        while len(pending) < _AHEAD and (following := next(left, None)):
            pending.append(objects.begin_reading(following[1]))
        content = objects.finish_reading(name, pending.popleft())
        damaged = content is None or hashlib.sha256(content).hexdigest() != digests[shard]
        if damaged:
            state = "missing" if content is None else f"damaged ({len(content):,} bytes)"
            raise ValueError(
                f"{objects.shown(name)} is {state}; remove it and {objects.shown(MANIFEST)}, and"
                " encode again, which makes this shard anew"
            )
        writer.write(shard, np.load(io.BytesIO(content), allow_pickle=False))
    return writer.publish()


def _manifest(objects: "_Objects") -> tuple[StoreSpec, list[str]] | None:
    content = objects.read(MANIFEST)
    if content is None:
        return None
    name = objects.shown(MANIFEST)
    value = _unsealed(content)
    if value is None or value.get("format") != FORMAT:
        raise ValueError(f"{name} is damaged, or no manifest of {WHAT}s of this version")
    spec = read_spec(value, Path(name))
    if len(value.get("sha256", ())) != spec.num_shards:
        raise ValueError(f"{name} does not list its {spec.num_shards} shards")
    return spec, value["sha256"]


def _unsealed(content: bytes | None) -> dict[str, Any] | None:
    """Returns a sealed JSON object; None: it is damaged."""
    try:
        value = json.loads(content or b"")
    except ValueError:
        return None
    return storage.unsealed(value) if isinstance(value, dict) else None


def _fields(spec: StoreSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


class _Objects:
    """Objects below a URL, and errors that name them without anybody's secrets."""

    def __init__(self, url: str) -> None:
        import tensorstore

        self._url = url.rstrip("/")
        spec: Any = f"{self._url}/"
        parts = urllib.parse.urlsplit(self._url)
        if "@" in parts.netloc:
            raise ValueError(
                f"{self.shown('')}: no user or password in an address, which is shown and logged;"
                " the environment has them (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS)"
            )
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if parts.scheme == "s3" and endpoint:
            # A store that speaks S3's protocol under an address of its own.
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            spec = {
                "driver": "s3", "bucket": parts.netloc, "path": f"{parts.path.lstrip('/')}/",
                "endpoint": endpoint, "aws_region": region or "us-east-1",
                "s3_request_retries": {"max_retries": _RETRIES},
            }  # fmt: skip
        self._store = self._named("", lambda: tensorstore.KvStore.open(spec).result())

    def shown(self, name: str) -> str:
        """Returns the URL of an object for messages, without a user or password in it."""
        parts = urllib.parse.urlsplit(self._url)
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{host}{parts.path}/{name}"

    def names(self, prefix: str) -> list[str]:
        """Returns the names of all objects that begin so."""
        import tensorstore

        # The character after "/" ends the range.
        keys = tensorstore.KvStore.KeyRange(prefix, f"{prefix[:-1]}0")
        found = self._named(prefix, lambda: self._store.list(keys).result())
        return [name.decode() for name in found]

    def read(self, name: str) -> bytes | None:
        """Returns an object; None: it is not there."""
        return self.finish_reading(name, self.begin_reading(name))

    def begin_reading(self, name: str) -> Any:
        """Asks for an object."""
        return self._store.read(name)

    def finish_reading(self, name: str, asked: Any) -> bytes | None:
        """Waits for an object that was asked for."""
        found = self._named(name, lambda: asked.result())
        return found.value if found.state == "value" else None

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, whole or not at all."""
        self._named(name, lambda: self._store.write(name, content).result())

    def create(self, name: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a JSON object unless there is one; returns the one that is there then."""
        content = json.dumps(value).encode()
        write = functools.partial(self._store.write, name, content, if_equal=_ABSENT)
        self._named(name, lambda: write().result())
        if (there := _unsealed(self.read(name))) is None:
            raise ValueError(f"{self.shown(name)} is damaged; remove it")
        return there

    def _named(self, name: str, call: Callable[[], T]) -> T:
        try:
            return call()
        # The last one where an address can be read only, as those of http:// can.
        except (ValueError, OSError, RuntimeError) as error:
            # What a server answers may hold the request, with whoever signed it.
            reason = str(error).split(" [")[0]
            raise ValueError(f"{self.shown(name)}: {reason[:300]}") from None

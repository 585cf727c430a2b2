"""What is encoded and how, apart from the parameters; and the interface of those who do it.

N = documents, D = embedding size.
"""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from ragjax.index import store
from ragjax.refresh.batches import EncodeOptions
from ragjax.storage.processes import host
from ragjax.storage.random_keys import key_data


class Cancelled(Exception):
    """An encoding or a build was given up because its result is no longer wanted."""


class Tokens(NamedTuple):
    """Token ids and their mask, as every encoder takes them."""

    ids: Array  # [B, L] int32
    mask: Array  # [B, L] bool, True = real token


class EncodeProgress(NamedTuple):
    """How far an encoding is, reported after each batch."""

    done: int  # documents encoded
    total: int  # documents in all
    fraction: float  # of the work, long documents counting for more
    seconds: float  # since the start of this call
    texts_per_second: float  # on average over the documents of this call
    remaining_seconds: float  # estimate
    num_shapes: int  # different [rows, length] run by this call

    @classmethod
    def measured(
        cls, already: int, done: int, total: int, *, work: float, seconds: float, num_shapes: int
    ) -> "EncodeProgress":
        """Returns the progress of a call that began when `already` documents were done.

        Args:
            already: Documents that were done at the start.
            done: Documents that are done.
            total: Documents in all.
            work: What is done, in documents of average length.
            seconds: Since the start.
            num_shapes: Different [rows, length] run so far.
        """
        return cls(
            done=done,
            total=total,
            fraction=work / total,
            seconds=seconds,
            texts_per_second=(done - already) / max(seconds, 1e-9),
            remaining_seconds=(total - work) * seconds / max(work - already, 1e-9),
            num_shapes=num_shapes,
        )


OnProgress = Callable[[EncodeProgress], None]
DocRows = range | NDArray[np.int64]
"""Documents of a corpus, given by row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeTask:
    """A corpus and the encoder that turns it into embeddings, given parameters.

    Attributes:
        encode: Pure function `(params, tokens) -> [B, D]`, not jitted.
        documents: N documents, read by index.
        pad_id: Id that fills up a row of tokens.
        tokenize: Token ids, cut to length, of a list of documents; the default takes documents
            that are token ids already.
        make_tokens: Makes what `encode` takes from ids and mask `[B, L]`.
        options: Sizes of the batches.
        corpus_fingerprint: Of the documents in their order; "" computes one from the documents.
        model_fingerprint: Of everything but the weights that decides an embedding: architecture,
            tokenizer, longest length, pooling, prefix.
        dtype: In which embeddings are stored, "float32" or "float16".
        rows_per_shard: Documents in a shard; what a killed encoding repeats at most.
    """

    encode: Callable[[Any, Any], Array]
    documents: Sequence[Any]
    pad_id: int
    tokenize: Callable[[Sequence[Any]], Sequence[Sequence[int]]] = list
    make_tokens: Callable[[Array, Array], Any] = Tokens
    options: EncodeOptions = dataclasses.field(default_factory=EncodeOptions)
    corpus_fingerprint: str = ""
    model_fingerprint: str = ""
    dtype: str = "float32"
    rows_per_shard: int = 512

    def __post_init__(self) -> None:
        """Refuses a corpus without documents."""
        if not len(self.documents):
            raise ValueError("There are no documents to encode")

    @functools.cached_property
    def corpus_digest(self) -> str:
        """The fingerprint of the corpus, as given or else computed once from the documents."""
        if self.corpus_fingerprint:
            return self.corpus_fingerprint
        digest = hashlib.sha256()
        for row in range(len(self.documents)):
            try:
                digest.update(content_bytes(self.documents[row]))
            except TypeError as error:
                raise ValueError(
                    f"documents[{row}] {error}; give EncodeTask a corpus_fingerprint that changes"
                    " with the documents"
                ) from error
        return digest.hexdigest()

    def of_token_ids(self, token_ids: Sequence[Sequence[int]]) -> "EncodeTask":
        """Returns the task of encoding other texts, token ids already, with the same encoder."""
        return dataclasses.replace(self, documents=token_ids, tokenize=list, corpus_fingerprint="")

    def dim(self, params: Any) -> int:
        """Returns D, by tracing the encoder without computing anything.

        Raises:
            ValueError: The encoder returns anything else than one embedding for a document.
        """
        length = self.options.buckets[0]
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), params)
        ids = jax.ShapeDtypeStruct((1, length), np.int32)
        mask = jax.ShapeDtypeStruct((1, length), np.bool_)

        def run(params: Any, ids: Array, mask: Array) -> Array:
            return self.encode(params, self.make_tokens(ids, mask))

        return embedding_size(jax.eval_shape(run, shapes, ids, mask), rows=1)

    def spec(self, params: Any, *, params_digest: str) -> store.StoreSpec:
        """Returns what a store of all documents, encoded with these parameters, holds."""
        return store.StoreSpec(
            size=len(self.documents),
            dim=self.dim(params),
            model_fingerprint=params_digest,
            corpus_fingerprint=self.corpus_digest,
            settings={
                "model": self.model_fingerprint,
                "compute_dtype": self.options.compute_dtype,
            },
            dtype=self.dtype,
            rows_per_shard=self.rows_per_shard,
        )


def embedding_size(result: Any, *, rows: int) -> int:
    """Returns D of what an encoder returned for so many rows of tokens.

    Raises:
        ValueError: It is not `[rows, D]`.
    """
    shape = getattr(result, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != rows:
        found = type(result).__name__ if shape is None else f"an array {list(shape)}"
        raise ValueError(
            f"The encoder returned {found} for {rows} rows of tokens; encode(params, tokens) must "
            f"return one embedding for each, [{rows}, D]"
        )
    return int(shape[1])


class EncodeRequest(NamedTuple):
    """One encoding of a corpus, or of a part of it."""

    params: Any  # a copy that nothing else changes or donates
    step: int  # training step of the parameters
    folder: Path  # where the store is published; `<folder>.building` may hold finished shards
    spec: store.StoreSpec
    rows: NDArray[np.int64] | None  # documents to encode, in the order of the store; None: all
    progress: OnProgress
    cancelled: threading.Event  # set when the result is no longer wanted


class Executor(Protocol):
    """Where documents are encoded: which shards this process does, and how the rest get there."""

    def copy_params(self, params: Any) -> Any:
        """Copies live parameters; called in the trainer's thread, before its next step donates."""
        ...

    def encode(self, task: EncodeTask, request: EncodeRequest) -> store.EmbeddingStore:
        """Encodes and publishes the store; called in the refresher's thread.

        Shards that an earlier, killed call finished are kept.

        Raises:
            Cancelled: `request.cancelled` was set.
            ValueError: Embeddings that are not finite (the message names the documents).
        """
        ...

    def close(self) -> None:
        """Gives up what it holds; no encoding is under way."""
        ...


def content_bytes(value: Any) -> bytes:
    """Returns bytes that are equal for equal content and differ for any other.

    Not `repr`, which numpy cuts in the middle and which depends on its print options. Whole
    numbers count by their value, so token ids are the same as a list or as an array of any width.

    Args:
        value: Text, bytes, numbers, None, arrays, and sequences, mappings and dataclasses of them.

    Raises:
        TypeError: It holds something else, which the message names.
    """
    if isinstance(value, str):
        return _framed("s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _framed("b", value)
    if value is None or isinstance(value, bool | np.bool_):
        return _framed("c", str(value).encode())
    if isinstance(value, int | np.integer):
        return _framed("i", str(int(value)).encode())
    if isinstance(value, float) or hasattr(value, "__array__"):
        return _array_bytes(host(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return _framed("t", b"".join(map(content_bytes, fields)))
    if isinstance(value, Mapping):
        items = sorted(content_bytes(name) + content_bytes(value[name]) for name in value)
        return _framed("m", b"".join(items))
    if isinstance(value, Sequence):
        if value and all(type(item) is int and abs(item) < 2**63 for item in value):
            return _array_bytes(np.asarray(value))  # token ids, the common case
        return _framed("t", b"".join(map(content_bytes, value)))
    raise TypeError(f"holds a {type(value).__name__}, whose content cannot be read for a digest")


def _array_bytes(array: NDArray[Any]) -> bytes:
    if array.dtype.kind == "O" or array.shape == (0,):
        return content_bytes(array.tolist())
    if array.dtype.kind in "iu" and array.dtype != np.uint64:
        array = array.astype(np.int64)
    header = f"{array.dtype} {array.shape} ".encode()
    return _framed("a", header + np.ascontiguousarray(array).tobytes())


def _framed(kind: str, content: bytes) -> bytes:
    return f"{kind}{len(content)}:".encode() + content


def params_digest(params: Any) -> str:
    """Returns a digest of a tree of arrays: names, shapes, dtypes and bytes; 32 hex digits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(key_data(params)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{np.shape(leaf)}{array.dtype}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]

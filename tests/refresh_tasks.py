"""A tiny corpus and encoder that the processes of the tests share."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.index import EmbeddingWriter
from ragjax.refresh import EncodeOptions, encode_to_store
from ragjax.refresh.task import EncodeRequest, EncodeTask, params_digest

DOCUMENTS = [[1 + (7 * row + place) % 48 for place in range(1 + row % 9)] for row in range(120)]
ROWS_PER_SHARD = 5


def encode(params, tokens):
    """The mean of the embeddings of the tokens."""
    weights = tokens.mask[..., None].astype(jnp.float32)
    hidden = params["embed"][tokens.ids] * weights
    return jnp.tanh(hidden.sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1.0))


def encode_slowly(params, tokens):
    """The same, 10 ms a batch wherever it runs."""

    def wait(hidden):
        time.sleep(0.01)
        return hidden

    hidden = encode(params, tokens)
    return jax.pure_callback(wait, jax.ShapeDtypeStruct(hidden.shape, hidden.dtype), hidden)


def encode_without_memory(params, tokens):
    """Fails as where there is no room."""
    raise MemoryError("no memory for the batch")


def make_params(seed=0):
    return {"embed": np.random.default_rng(seed).normal(size=(50, 8)).astype(np.float32)}


def make_task(*, seconds_per_shard=0.0, **changes):
    """A task whose tokenizer takes its time, so that a test meets a worker in the middle."""

    def tokenize(documents):
        time.sleep(seconds_per_shard)
        return documents

    settings = {
        "encode": encode,
        "documents": DOCUMENTS,
        "pad_id": 49,
        "tokenize": tokenize,
        "options": EncodeOptions(buckets=(4, 16), batch_tokens=64),
        "model_fingerprint": "tiny",
        "rows_per_shard": ROWS_PER_SHARD,
    }
    return EncodeTask(**(settings | changes))


def make_request(folder, task, params, *, rows=None, step=0, cancelled=None, progress=None):
    spec = task.spec(params, params_digest=params_digest(params))
    if rows is not None:
        spec = type(spec)(**(vars(spec) | {"size": len(rows), "corpus_fingerprint": "part"}))
    return EncodeRequest(
        params=params,
        step=step,
        folder=folder,
        spec=spec,
        rows=rows,
        progress=progress or (lambda _: None),
        cancelled=cancelled or threading.Event(),
    )


def encode_here(folder, task, request):
    """The same encoding in one process."""
    writer = EmbeddingWriter.open(folder, request.spec)
    return encode_to_store(task, request.params, writer, rows=request.rows)


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for(condition, *, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)

"""Trains two towers in plain JAX on hard negatives from an index that is rebuilt meanwhile."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.refresh import EncodeTask, EveryNSteps, Refresher, RefreshOptions

docs = np.random.default_rng(0).integers(1, 1000, size=(4000, 16))  # token ids; 0 is padding
towers = 0.3 * jax.random.normal(jax.random.key(0), (2, 1000, 32))
params = {"query": towers[0], "doc": towers[1]}
encode = jax.jit(lambda tower, ids: jnp.where(ids[..., None] > 0, tower[ids], 0).sum(axis=1))


def _loss(params, queries, rows):  # rows of docs: the B relevant ones, then hard negatives
    scores = encode(params["query"], queries) @ encode(params["doc"], jnp.array(docs)[rows]).T
    relevant = jnp.eye(*scores.shape, dtype=bool)  # found once more, it is no negative: -inf
    scores = jnp.where((rows[: len(queries), None] != rows) | relevant, scores, -jnp.inf)
    return -jnp.diagonal(jax.nn.log_softmax(scores)).mean()


@jax.jit(donate_argnums=0)  # donating is safe: the refresher encodes with a copy
def _train_step(params, queries, rows):
    loss, gradient = jax.value_and_grad(_loss)(params, queries, rows)
    return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, gradient), loss


task = EncodeTask(encode=lambda tower, tokens: encode(tower, tokens.ids), documents=docs, pad_id=0)
options = RefreshOptions(max_index_lag_steps=150)  # training waits for an index that lags more
with Refresher(tempfile.mkdtemp(), task, trigger=EveryNSteps(50), options=options) as refresher:
    refresher.start(params["doc"])
    for step in range(501):
        snapshot = refresher.update(step, params["doc"])  # the one call a step
        rows = np.arange(step * 32, step * 32 + 32) % len(docs)
        found = snapshot.index.search(encode(params["query"], docs[rows, :6]), k=8)
        params, loss = _train_step(params, docs[rows, :6], np.append(rows, found.doc_ids))
        if step % 50 == 0:
            print(f"step {step} loss {loss:.3f} {refresher.line(step)}")

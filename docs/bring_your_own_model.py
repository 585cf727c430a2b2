"""Plugs models written in plain JAX into ragjax: two pure functions, nothing to subclass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ragjax.index import ExactIndex
from ragjax.losses import rag_sequence_loss
from ragjax.models import LMBatch, Tokens
from ragjax.refresh import encode_token_ids
from ragjax.training import init_state, make_lm_loss, make_train_step

FACTS, K, VOCAB, SIZE = 200, 8, 600, 32
rng = np.random.default_rng(0)
# A question is a word, its document another word for the same thing, filler, and the answer.
answers = rng.permutation(np.arange(400, 600))
docs = np.column_stack([np.arange(200, 400), rng.integers(0, 200, (FACTS, 3)), answers])


def encode(params, tokens: Tokens):
    """Return the embeddings of texts, [B, D] float32."""
    hidden = jnp.where(tokens.mask[..., None], params["words"][tokens.ids], 0).sum(axis=1)
    return hidden / (jnp.linalg.norm(hidden, axis=1, keepdims=True) + 1e-6)


def token_log_probs(params, batch: LMBatch):
    """Return log p(y_t | c, y_<t), [R, T] float32 in nats, 0 where masked."""
    context = params["words"][batch.context_ids]  # [R, L, D]
    scores = jnp.where(batch.context_mask, context @ params["attention"], -1e9)
    read = jnp.einsum("rl,rld->rd", jax.nn.softmax(scores), context)
    log_probs = jax.nn.log_softmax(read @ params["words"].T)  # every answer is one token here
    found = jnp.take_along_axis(log_probs, batch.target_ids, axis=1)
    return jnp.where(batch.target_mask, found, 0.0)


def _draw(key, *shape):
    return 0.3 * jax.random.normal(jax.random.key(key), shape)


def _tokens(ids):
    return Tokens(jnp.asarray(ids), jnp.ones(np.shape(ids), bool))


def _pairs(docs, answers):  # every document with every answer, as an LMBatch of B·M rows
    rows = jnp.tile(jnp.arange(len(docs.ids)), len(answers))
    targets = _tokens(jnp.repeat(answers, len(docs.ids), axis=0))
    return LMBatch(docs.ids[rows], docs.mask[rows], *targets)


# The language model is trained to read first, in place of pretraining.
optimizer = optax.adam(1e-2)
train_step = make_train_step(make_lm_loss(token_log_probs), optimizer)
state = init_state({"words": _draw(0, VOCAB, SIZE), "attention": _draw(1, SIZE)}, optimizer, seed=0)
for _ in range(200):
    state, metrics = train_step(state, LMBatch(*_tokens(docs), *_tokens(answers[:, None])))
reader = state.params
print(f"reader: {metrics['loss']:.2f} nats per answer")


def loss(retriever, reader, batch, key):
    """Return the mean of -log Σ_c p_R(c|x) p_LM(y|c): its gradient goes through `encode`."""
    queries, retrieved, targets = batch  # Tokens [B, 1], Tokens [M, L], [B, 1]
    scores = 10 * encode(retriever, queries) @ encode(retriever, retrieved).T  # [B, M]
    log_probs = token_log_probs(reader, _pairs(retrieved, targets))
    return rag_sequence_loss(scores, log_probs.reshape(*scores.shape, 1)).mean(), {}


train_step = make_train_step(loss, optimizer)
state = init_state({"words": _draw(2, VOCAB, SIZE)}, optimizer, seed=0)
for step in range(301):
    if step % 20 == 0:  # any (params, tokens) -> [B, D] can be encoded, searched and refreshed
        index = ExactIndex(encode_token_ids(encode, state.params, docs.tolist(), pad_id=0))
    rows = rng.permutation(FACTS)[:16]
    top = index.search(np.asarray(encode(state.params, _tokens(rows[:, None]))), K).doc_ids
    batch = _tokens(rows[:, None]), _tokens(docs[top.ravel()]), jnp.asarray(answers[rows, None])
    state, metrics = train_step(state, batch, reader)
    if step % 100 == 0:
        hits = (top == rows[:, None]).any(axis=1).mean()
        print(f"step {step}: loss {metrics['loss']:.2f}, right document among {K}: {hits:.2f}")

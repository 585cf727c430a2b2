"""Trains a Fusion-in-Decoder reader and, from its attention, a retriever (ADist), in plain JAX."""

import jax
import jax.numpy as jnp

from ragjax.losses import lsr_target, pdist_loss
from ragjax.models.seq2seq.fusion import FusionBatch, fusion_attention_mass, fusion_token_log_probs
from ragjax.models.testing import tiny_language_model

lm = tiny_language_model(family="t5")  # or load_language_model("a folder of Flan-T5")
contexts, subjects, tokens = 4, 16, 3  # each question has 4 contexts, one of them on its subject


def _make_batch(key):
    """Questions on a subject; context "subject value" answers it, "other value" does not."""
    keys = jax.random.split(key, 3)
    docs = jax.vmap(lambda k: jax.random.permutation(k, subjects)[:contexts])(
        jax.random.split(keys[0], 32)
    )  # [B, K]
    values = jax.random.randint(keys[1], docs.shape, 100, 104)
    gold = jax.random.randint(keys[2], (32,), 0, contexts)
    row = jnp.arange(32)
    subject = jnp.broadcast_to(docs[row, gold][:, None], docs.shape)
    ids = jnp.stack([subject, docs, values], axis=-1)  # question, document: its subject and value
    answer = values[row, gold][:, None]
    batch = FusionBatch(ids, jnp.ones(ids.shape, bool), answer, jnp.ones(answer.shape, bool))
    return batch, subject[:, 0], docs, gold


def _loss(params, batch, queries, docs):
    log_probs = fusion_token_log_probs(lm.config, params["reader"], batch)
    mass = fusion_attention_mass(lm.config, params["reader"], batch)
    target = lsr_target(mass / mass.sum(axis=1, keepdims=True), temperature=0.1)
    scores = jnp.einsum("bd,bkd->bk", params["query"][queries], params["doc"][docs])
    return (pdist_loss(scores, target) - log_probs.sum(axis=1)).mean(), scores


@jax.jit
def _train_step(params, moments, key):
    batch, queries, docs, gold = _make_batch(key)
    (loss, scores), gradient = jax.value_and_grad(_loss, has_aux=True)(params, batch, queries, docs)
    moments = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, moments, gradient)
    params = jax.tree.map(
        lambda p, g, m: p - 0.003 * g / (jnp.sqrt(m) + 1e-6), params, gradient, moments
    )
    return params, moments, loss, (scores.argmax(axis=1) == gold).mean()


tower_keys = jax.random.split(jax.random.key(0), 2)
query, doc = (0.1 * jax.random.normal(key, (subjects, 16)) for key in tower_keys)
params = {"reader": lm.params, "query": query, "doc": doc}
moments = jax.tree.map(jnp.zeros_like, params)
for step in range(201):
    key = jax.random.fold_in(jax.random.key(1), step)
    params, moments, loss, accuracy = _train_step(params, moments, key)
    if step % 50 == 0:
        print(f"step {step} loss {loss:.3f} retriever {accuracy:.2f}")

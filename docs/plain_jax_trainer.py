"""Trains a linear two-tower retriever with two of ragjax's losses, otherwise in plain JAX."""

import jax
import jax.numpy as jnp

from ragjax.losses import info_nce_loss, lsr_target, pdist_loss

keys = jax.random.split(jax.random.key(0), 4)
queries = jax.random.normal(keys[0], (32, 16))  # query i is answered by document i
docs = queries @ jax.random.normal(keys[1], (16, 16)) / 4
towers = jax.random.normal(keys[2], (2, 16, 8)) / 4
# Stands for log p_LM(answer | document, query): the nearer the document, the likelier the answer.
answer_log_probs = -jnp.linalg.norm(queries[:, None] - queries[None], axis=-1)
target = lsr_target(answer_log_probs, temperature=0.5)


def _loss(towers):
    scores = (queries @ towers[0]) @ (docs @ towers[1]).T  # [B, M]
    return (info_nce_loss(scores, jnp.arange(32)) + pdist_loss(scores, target)).mean()


loss_and_gradient = jax.jit(jax.value_and_grad(_loss))
for step in range(201):
    loss, gradient = loss_and_gradient(towers)
    towers = towers - 0.03 * gradient
    if step % 50 == 0:
        print(f"step {step} loss {loss:.3f}")

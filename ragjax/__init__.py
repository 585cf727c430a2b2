"""Train a retriever and a language model together, in JAX.

This file imports nothing, so `import ragjax.losses` loads jax and nothing heavier.
"""

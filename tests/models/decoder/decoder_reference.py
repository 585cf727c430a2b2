"""What the tests of decoder families share: batches, and the classes of transformers."""

import numpy as np

from ragjax.models.inputs import LMBatch


def language_class(transformers, family):
    return getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")


def make_batch(rng, vocab_size):
    """Left-padded contexts and right-padded targets; padded slots hold arbitrary tokens."""
    contexts = rng.integers(0, vocab_size, (3, 10)).astype(np.int32)
    targets = rng.integers(0, vocab_size, (3, 6)).astype(np.int32)
    context_mask = np.arange(10)[::-1][None] < np.array([[10], [5], [1]])
    target_mask = np.arange(6)[None] < np.array([[3], [6], [2]])
    return LMBatch(contexts, context_mask, targets, target_mask)

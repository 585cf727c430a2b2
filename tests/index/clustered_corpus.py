"""Embeddings that lie in clusters, as those of texts do."""

import numpy as np


def clustered(rng, size, *, dim=32, clusters=50):
    centres = rng.normal(size=(clusters, dim))
    points = centres[rng.integers(0, clusters, size)] + 0.3 * rng.normal(size=(size, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)

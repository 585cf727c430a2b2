"""Strict, offline, deterministic: eight fake CPU devices, no silent rank promotion."""

import os

# Before jax is imported anywhere: XLA reads these once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed, one per test."""
    return np.random.default_rng(0)

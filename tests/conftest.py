"""Strict, offline, deterministic: eight fake CPU devices, no silent rank promotion.

Tiny models compile far longer than they run. A session therefore compiles each program once, for
its workers and the programs that tests start, and with little optimisation;
`JAX_DISABLE_MOST_OPTIMIZATIONS=0` compiles as users do, and `JAX_COMPILATION_CACHE_DIR` keeps what
was compiled from session to session.
"""

import atexit
import contextlib
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before jax is imported anywhere: it reads these once. Processes that tests start inherit them.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The same numbers on every CPU; see `ragjax.runs.folder.fast_products`.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0":
    if version("jaxlib").startswith("0.10."):  # later ones have no other code generator
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # half the time
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="ragjax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    # Of the process that starts the workers: it ends last.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed, one per test."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Frees what was compiled once there is much of it.

    Each program holds memory maps. Linux allows a process 65,530 of them; without one more, XLA
    ends the process with a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def compilations():
    """Makes a context that gives a list with an entry for each program compiled in it."""

    @contextlib.contextmanager
    def collected():
        compiled = []

        def hear(name, seconds, **rest):
            if "backend_compile" in name:  # also where the program comes from the cache
                compiled.append(name)

        jax.monitoring.register_event_duration_secs_listener(hear)
        try:
            jax.jit(lambda x: x * 3 + 1)(np.ones(5))
            assert compiled, "the listener does not hear"
            compiled.clear()
            yield compiled
        finally:
            jax.monitoring.unregister_event_duration_listener(hear)

    return collected

"""Time and memory of the target tokens' log-probs: chunked, plain JAX and PyTorch, in one run.

    python experiments/benchmark_log_probs.py

Value and gradient (to hidden states and unembedding) for 64 x 64 positions at the vocabularies of
SmolLM2 (49,152) and Qwen2 (151,936); about six minutes and 12 GB on two CPU cores. Temporary
memory is the compiler's own figure, parameters and gradients not counted. PyTorch is measured if
it is installed.
"""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ragjax import losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    sizes: tuple[tuple[int, int], ...] = ((49_152, 576), (151_936, 896))
    """Vocabulary and hidden width of each table."""
    rows: int = 64
    """B·K, rows of a batch."""
    tokens: int = 64
    """T, target tokens of a row."""
    rounds: int = 3
    """Repetitions, interleaved; the median is shown."""


def plain(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean log-prob with all logits in memory."""
    return losses.token_log_probs(hidden @ table.T, targets).mean()


def chunked(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean log-prob in blocks of the vocabulary."""
    return losses.chunked_token_log_probs(hidden, table, targets).mean()


def torch_step(hidden: np.ndarray, table: np.ndarray, targets: np.ndarray) -> Callable[[], Any]:
    """Returns the same with `F.cross_entropy`."""
    import torch  # pyrefly: ignore  (not a dependency)

    inputs = [torch.tensor(a, requires_grad=True) for a in (hidden, table)]
    ids = torch.tensor(targets).reshape(-1)

    def step() -> float:
        for tensor in inputs:
            tensor.grad = None
        logits = (inputs[0] @ inputs[1].T).reshape(len(ids), -1)
        loss = -torch.nn.functional.cross_entropy(logits, ids)
        loss.backward()
        return loss.item()

    return step


def main(options: Options) -> None:
    """Prints one table per size."""
    for vocab, width in options.sizes:
        rng = np.random.default_rng(0)
        hidden = rng.normal(size=(options.rows, options.tokens, width)).astype(np.float32)
        table = (0.02 * rng.normal(size=(vocab, width))).astype(np.float32)
        targets = rng.integers(0, vocab, (options.rows, options.tokens))
        steps: dict[str, Callable[[], Any]] = {}
        memory: dict[str, int] = {}
        arguments = jnp.asarray(hidden), jnp.asarray(table), jnp.asarray(targets)
        for name, function in (("chunked", chunked), ("plain", plain)):
            compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*arguments).compile()
            if analysis := compiled.memory_analysis():  # not offered by every backend
                memory[name] = analysis.temp_size_in_bytes
            steps[name] = lambda run=compiled, args=arguments: jax.block_until_ready(run(*args))[0]
        if importlib.util.find_spec("torch"):
            steps["PyTorch"] = torch_step(hidden, table, targets)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        values = {}
        for _ in range(options.rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                values[name] = float(step())
                seconds[name].append(time.perf_counter() - start)
        print(f"V={vocab:,} H={width} positions={targets.size:,}", flush=True)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        for name in steps:
            share = f"{memory[name] / 2**20:8.0f} MiB temporary" if name in memory else ""
            ratio = median[name] / median["plain"]
            print(f"  {name:8} {median[name]:7.2f} s  {ratio:5.2f}x plain  {share}", flush=True)
        if memory:
            print(f"  memory: plain / chunked = {memory['plain'] / memory['chunked']:.1f}")
        spread = max(values.values()) - min(values.values())
        print(f"  largest difference of the values: {spread:.1e} nats", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Time and memory of the target tokens' log-probs: chunked, plain JAX and PyTorch, in one run.

    python benchmarks/log_probs.py

Scoring, the gradient to the hidden states (a frozen table) and to both, for 64 x 64 positions at
the vocabularies of SmolLM2 (49,152) and Qwen2 (151,936); about twelve minutes and 12 GB on two CPU
cores. Temporary memory is the compiler's own figure, parameters and gradients not counted. PyTorch
is measured if it is installed.
"""

import dataclasses
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _beside import in_turns

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


# What is differentiated: nothing (scoring), hidden states (a frozen table), both.
_CASES = {"value": (), "to hidden": (0,), "to both": (0, 1)}


def jax_step(
    function: Callable[..., jax.Array], case: tuple[int, ...], arguments: tuple[jax.Array, ...]
) -> tuple[Callable[[], Any], int]:
    """Compiles one case; returns the step and its temporary memory in bytes (0 if not told)."""
    whole = jax.value_and_grad(function, case) if case else function
    compiled = jax.jit(whole).lower(*arguments).compile()

    def step() -> Any:
        result = jax.block_until_ready(compiled(*arguments))
        return result[0] if case else result

    analysis = compiled.memory_analysis()
    return step, analysis.temp_size_in_bytes if analysis else 0


def torch_step(case: tuple[int, ...], arguments: tuple[np.ndarray, ...]) -> Callable[[], Any]:
    """Returns the same with `F.cross_entropy`."""
    import torch  # pyrefly: ignore  (not a dependency)

    hidden, table = (
        torch.tensor(array, requires_grad=i in case) for i, array in enumerate(arguments[:2])
    )
    ids = torch.tensor(arguments[2]).reshape(-1)

    def step() -> float:
        hidden.grad = table.grad = None
        with torch.set_grad_enabled(bool(case)):
            logits = (hidden @ table.T).reshape(len(ids), -1)
            loss = -torch.nn.functional.cross_entropy(logits, ids, reduction="none").mean()
        if case:
            loss.backward()
        return loss.item()

    return step


def measure(case: tuple[int, ...], arguments: tuple[np.ndarray, ...], rounds: int) -> None:
    """Prints one line per implementation, the rounds interleaved."""
    steps: dict[str, Callable[[], Any]] = {}
    memory: dict[str, int] = {}
    on_device = tuple(map(jnp.asarray, arguments))
    for name, function in (("chunked", chunked), ("plain", plain)):
        steps[name], memory[name] = jax_step(function, case, on_device)
    if importlib.util.find_spec("torch"):
        steps["PyTorch"] = torch_step(case, arguments)
    values = {name: float(step()) for name, step in steps.items()}
    seconds = in_turns({name: lambda s=step: float(s()) for name, step in steps.items()}, rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name in steps:
        mebibytes = f"{memory[name] / 2**20:8.0f} MiB" if memory.get(name) else ""
        ratio = median[name] / median["plain"]
        print(f"    {name:8} {median[name]:7.2f} s  {ratio:5.2f}x plain {mebibytes}", flush=True)
    spread = max(values.values()) - min(values.values())
    print(f"    largest difference of the values: {spread:.1e} nats", flush=True)


def main(options: Options) -> None:
    """Measures every size and case."""
    for vocab, width in options.sizes:
        rng = np.random.default_rng(0)
        arguments = (
            rng.normal(size=(options.rows, options.tokens, width)).astype(np.float32),
            (0.02 * rng.normal(size=(vocab, width))).astype(np.float32),
            rng.integers(0, vocab, (options.rows, options.tokens)),
        )
        for name, case in _CASES.items():
            what = f"gradient {name}" if case else name
            print(f"V={vocab:,} H={width} positions={arguments[2].size:,}: {what}", flush=True)
            measure(case, arguments, options.rounds)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

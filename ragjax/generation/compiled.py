"""Compiles decoding functions: on a CPU, where memory is the bottleneck, with another schedule."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

_P = ParamSpec("_P")
_R = TypeVar("_R")

# XLA's usual schedule runs independent operations side by side, each on fewer cores and with more
# arrays alive at once. A decoding step takes twice as long then (32 rows of a model of 135 million
# parameters, two CPU cores, jax 0.10); training steps do not differ.
_ONE_AT_A_TIME = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_COMPILES_ONLY = contextvars.ContextVar("compiles_only", default=False)


def jit_decoding(
    function: Callable[_P, _R],
    *,
    static_argnames: str | Sequence[str] = (),
    donate_argnames: str | Sequence[str] = (),
) -> Callable[_P, _R]:
    """Compiles a function as `jax.jit` does; on a CPU with the XLA schedule that suits decoding.

    Inside another `jax.jit`, whose options count for all of it, and where it is differentiated,
    this is `jax.jit`.

    Args:
        function: The function to compile.
        static_argnames: As of `jax.jit`.
        donate_argnames: As of `jax.jit`.
    """
    options = {"static_argnames": static_argnames, "donate_argnames": donate_argnames}
    usual = jax.jit(function, **options)
    one_at_a_time = jax.jit(function, compiler_options=_ONE_AT_A_TIME, **options)

    def choose(arguments: Any) -> Any:
        return usual if jax.default_backend() != "cpu" or _is_traced(arguments) else one_at_a_time

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        chosen = choose((args, kwargs))
        if _COMPILES_ONLY.get() and not _is_traced((args, kwargs)):
            return _compiled_only(chosen.lower(*args, **kwargs))
        return chosen(*args, **kwargs)

    def lower(*args: _P.args, **kwargs: _P.kwargs) -> jax.stages.Lowered:
        return choose((args, kwargs)).lower(*args, **kwargs)

    call.lower = lower  # pyrefly: ignore[missing-attribute]  (as of what `jax.jit` returns)
    return call


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Within it, what `jit_decoding` made is compiled, unless it is, and zeros are its result."""
    token = _COMPILES_ONLY.set(True)
    try:
        yield
    finally:
        _COMPILES_ONLY.reset(token)


def _compiled_only(lowered: jax.stages.Lowered) -> Any:
    shardings = lowered.compile().output_shardings

    def zeros(out: Any, sharding: jax.sharding.Sharding) -> Any:
        array = np.zeros(out.shape, out.dtype)
        return array if sharding.num_devices == 1 else jax.device_put(array, sharding)

    return jax.tree.map(zeros, lowered.out_info, shardings)


def _is_traced(arguments: Any) -> bool:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
        return True
    # Inside a function that is being compiled, a new array is a tracer, whatever the arguments are.
    with jax.transfer_guard("allow"):
        return isinstance(jnp.zeros(()), jax.core.Tracer)

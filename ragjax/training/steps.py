"""Training steps: one pure, jitted, donated function (state, batch) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Metrics = dict[str, jax.Array]
# (trainable parameters, frozen parameters, batch, key) -> (scalar loss, metrics)
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Metrics]]


class TrainState(NamedTuple):
    """What one update reads and writes; a plain tree, so it goes through jit and checkpoints."""

    step: jax.Array  # [] int32, updates tried, skipped ones included
    params: Any  # trainable parameters only
    opt_state: Any
    key: jax.Array  # [2] uint32, raw data of the run's random key; a step uses fold_in(key, step)
    skipped: jax.Array  # [] int32, updates skipped in a row because something was not finite


def init_state(params: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: Trainable parameters; copied, because the step donates its state.
      optimizer: The transformation that will update them.
      seed: Seed of the run's random key.
    """
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
        skipped=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds `step(state, batch, frozen=None) -> (state, metrics)`, jitted, with the state donated.

    An update whose loss or gradient is not finite is skipped: parameters and optimiser state keep
    their bits, `skipped` counts how many came in a row. (`optax.apply_if_finite` would apply the
    NaN after its last allowed error; here nothing but the caller decides when to stop.)

    Args:
      loss_fn: `(params, frozen, batch, key) -> (loss [], metrics)`; differentiated in `params`.
      optimizer: Transformation over `params`.

    Returns:
      The step. Its metrics are those of `loss_fn` plus `loss`, `grad_norm` (before clipping) and
      `skipped`, all float32 scalars. `frozen` is an argument and not a closure, so new values
      (another index, another language model of the same shapes) do not recompile it.

    Gradients:
      Taken here, and only here; none through `frozen` or `batch`.
    """

    def step(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, frozen, batch, key
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update(_: None) -> tuple[Any, Any]:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return optax.apply_updates(state.params, updates), opt_state

        def skip(_: None) -> tuple[Any, Any]:
            return state.params, state.opt_state

        params, opt_state = jax.lax.cond(finite, update, skip, None)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        new_state = TrainState(state.step + 1, params, opt_state, state.key, skipped)
        report = metrics | {"loss": loss, "grad_norm": grad_norm, "skipped": skipped}
        return new_state, {k: jnp.asarray(v, jnp.float32) for k, v in report.items()}

    return jax.jit(step, donate_argnums=0)

"""Training steps: one pure, jitted, donated function (state, batch) -> (state, metrics)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ragjax.training.mesh import ROWS

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
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    weight: Callable[[Any], jax.Array] | None = None,
    mapped: Sequence[jax.Device] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds `step(state, batch, frozen=None) -> (state, metrics)`, jitted, with the state donated.

    An update whose loss or gradient is not finite is skipped: parameters and optimiser state keep
    their bits, `skipped` counts how many came in a row. (`optax.apply_if_finite` would apply the
    NaN after its last allowed error; here nothing but the caller decides when to stop.)

    Args:
        loss_fn: `(params, frozen, batch, key) -> (loss [], metrics)`; differentiated in `params`.
        optimizer: Transformation over `params`.
        accumulate: N: the batch's rows (the first axis of all its arrays) are taken in N equal
            parts, one after the other, so that the activations of one part only are in memory; rows
            that are spread over devices stay spread, in each part. Only
            for losses in which the rows do not meet: a contrastive loss needs
            `losses.encode_in_chunks`.
        weight: With N > 1: batch -> the number [] that `loss_fn` divides by, such as the answer
            tokens or the rows. With it, the N parts together give the loss and the gradient of the
            whole batch, however unevenly that number is spread. Metrics of an integer type are
            counts and are added up; the others are averaged with it.
        mapped: Devices of a `jax.pmap` over the rows, which each of them gets an equal part of, and
            whose losses, gradients and metrics are averaged by `weight` over the axis `mesh.ROWS`;
            None: `jax.jit`, which goes where its arguments lie. A loss in which rows meet gathers
            them over that axis.

    Returns:
        The step. Its metrics are those of `loss_fn` plus `loss`, `grad_norm` (before clipping) and
        `skipped`, all float32 scalars. `frozen` is an argument and not a closure, so new values
        (another index, another language model of the same shapes) do not recompile it.

    Raises:
        ValueError: `accumulate` is below 1 or comes without `weight`, as `mapped` must not; the
            step, when first called, if the rows of a batch cannot be divided by it, or among the
            devices.

    Gradients:
        Taken here, and only here; none through `frozen` or `batch`.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if weight is None and (accumulate > 1 or mapped is not None):
        what = "mapped" if accumulate == 1 else f"accumulate={accumulate}"
        raise ValueError(f"{what} needs weight=, what the loss is a mean over")
    differentiated = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate > 1 and weight is not None:
        differentiated = _accumulated(differentiated, accumulate, weight)
    elif mapped is not None and weight is not None:
        differentiated = jax.value_and_grad(_shared(loss_fn, weight), has_aux=True)
    if mapped is not None and weight is not None:
        differentiated = _summed(differentiated, weight, weighted=accumulate == 1)

    def step(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (loss, metrics), grads = differentiated(state.params, frozen, batch, key)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update(_: None) -> tuple[Any, Any]:
            # optax mixes integers and floats, which a project may have forbidden.
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
                return optax.apply_updates(state.params, updates), opt_state

        def skip(_: None) -> tuple[Any, Any]:
            return state.params, state.opt_state

        params, opt_state = jax.lax.cond(finite, update, skip, None)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        new_state = TrainState(state.step + 1, params, opt_state, state.key, skipped)
        report = metrics | {"loss": loss, "grad_norm": grad_norm, "skipped": skipped}
        return new_state, {k: jnp.asarray(v, jnp.float32) for k, v in report.items()}

    if mapped is None:
        return jax.jit(step, donate_argnums=0)
    on_each = jax.pmap(
        step, ROWS, in_axes=(None, 0, None), out_axes=None, devices=mapped, donate_argnums=0
    )

    def mapped_step(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, Any]:
        return on_each(state, _for_each(batch, len(mapped)), frozen)

    return mapped_step


def _shared(loss_fn: LossFn, weight: Callable[[Any], jax.Array]) -> LossFn:
    """Returns a device's part of the loss of all, so that gradients of gathered rows add up."""

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        value, metrics = loss_fn(params, frozen, batch, key)
        return value * _share(weight, batch), metrics

    return loss


def _share(weight: Callable[[Any], jax.Array], batch: Any) -> jax.Array:
    own = weight(batch).astype(jnp.float32)
    return own / jnp.maximum(jax.lax.psum(own, ROWS), 1e-30)


def _summed(
    differentiated: Callable[..., Any], weight: Callable[[Any], jax.Array], *, weighted: bool
) -> Callable[..., Any]:
    """Returns a function like `differentiated` whose result is that of all devices' rows.

    Args:
        differentiated: Of a device's own rows.
        weight: What their loss is a mean over.
        weighted: Loss and gradient, though not the metrics, are parts of the whole already.
    """

    def whole(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        # Draws of different rows differ.
        key = jax.random.fold_in(key, jax.lax.axis_index(ROWS))
        (loss, metrics), grads = differentiated(params, frozen, batch, key)
        share = _share(weight, batch)
        metrics = jax.tree.map(lambda value: _weighted(value, share), metrics)
        if not weighted:
            loss, grads = jax.tree.map(lambda value: _weighted(value, share), (loss, grads))
        return jax.lax.psum(((loss, metrics), grads), ROWS)

    return whole


def _for_each(batch: Any, devices: int) -> Any:
    """Returns arrays `[devices, rows / devices, ...]`."""

    def divide(leaf: Any) -> Any:
        rows = leaf.shape[0]
        if rows % devices:
            raise ValueError(
                f"a batch of {rows} rows cannot be taken by {devices} devices in equal parts, as"
                " pmap takes it; choose a batch size that is a multiple, other devices, or the mesh"
            )
        return np.reshape(leaf, (devices, rows // devices, *leaf.shape[1:]))

    return jax.tree.map(divide, batch)


def _accumulated(
    differentiated: Callable[..., Any], parts: int, weight: Callable[[Any], jax.Array]
) -> Callable[..., Any]:
    """Returns a function like `differentiated` that takes the batch part by part."""

    def whole(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        split = _split_rows(batch, parts)
        total = jnp.maximum(jax.vmap(weight)(split).astype(jnp.float32).sum(), 1e-30)

        def add(sums: Any, part: tuple[jax.Array, Any]) -> tuple[Any, None]:
            number, rows = part
            (loss, metrics), grads = differentiated(
                params, frozen, rows, jax.random.fold_in(key, number)
            )
            share = weight(rows).astype(jnp.float32) / total
            new = jax.tree.map(lambda value: _weighted(value, share), ((loss, metrics), grads))
            return jax.tree.map(jnp.add, sums, new), None

        first = jax.tree.map(lambda leaf: leaf[0], split)
        shapes = jax.eval_shape(differentiated, params, frozen, first, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(parts), split))[0]

    return whole


def _weighted(value: jax.Array, share: jax.Array) -> jax.Array:
    return value if jnp.issubdtype(value.dtype, jnp.integer) else value * share.astype(value.dtype)


def _split_rows(batch: Any, parts: int) -> Any:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(f"batch: expected arrays with one common first axis, got shapes {shapes}")
    rows = shapes[0][0]
    if rows % parts:
        raise ValueError(
            f"a batch of {rows} rows cannot be taken in {parts} equal parts; choose a batch size "
            "that is a multiple of accumulate"
        )

    # Part p takes rows p, p + parts, ...: where the rows are spread over devices, each device then
    # has its share of every part. Of parts in one piece it would have all or nothing.
    def strided(leaf: Any) -> Any:
        return leaf.reshape(rows // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(strided, batch)

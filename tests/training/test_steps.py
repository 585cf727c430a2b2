import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ragjax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from ragjax.training.steps import init_state, make_train_step


def quadratic(params, frozen, batch, key):
    del key
    loss = jnp.sum((params["w"] - frozen["target"]) ** 2) * batch
    return loss, {"half": loss / 2}


def start(optimizer, seed=0):
    return init_state({"w": jnp.array([1.0, -2.0])}, optimizer, seed)


FROZEN = {"target": jnp.array([0.5, 0.5])}


def test_one_step_is_one_optax_update_by_hand():
    optimizer = optax.sgd(0.1)
    state, metrics = make_train_step(quadratic, optimizer)(start(optimizer), 1.0, FROZEN)
    w, target = np.array([1.0, -2.0]), np.array([0.5, 0.5])
    np.testing.assert_allclose(state.params["w"], w - 0.1 * 2 * (w - target), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], ((w - target) ** 2).sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["half"], ((w - target) ** 2).sum() / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(2 * (w - target)), rtol=1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_parameters_and_optimiser_bit_identical(bad):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), total_steps=10)
    step = make_train_step(quadratic, optimizer)
    state, _ = step(start(optimizer), 1.0, FROZEN)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    state, metrics = step(state, bad, FROZEN)
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.opt_state))
    assert int(state.skipped) == 1 and metrics["skipped"] == 1 and int(state.step) == 2
    state, _ = step(state, bad, FROZEN)
    assert int(state.skipped) == 2
    state, _ = step(state, 1.0, FROZEN)
    assert int(state.skipped) == 0
    assert not np.array_equal(before[0]["w"], state.params["w"])


def test_a_step_mixes_no_dtypes_of_its_own():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), total_steps=10)
    state = start(optimizer)
    with jax.numpy_dtype_promotion("strict"):
        state, _ = make_train_step(quadratic, optimizer)(state, 1.0, FROZEN)
    assert int(state.skipped) == 0


def test_the_caller_keeps_its_parameters_though_the_state_is_donated():
    optimizer = optax.sgd(0.1)
    params = {"w": jnp.array([1.0, -2.0])}
    state = init_state(params, optimizer, 0)
    make_train_step(quadratic, optimizer)(state, 1.0, FROZEN)
    np.testing.assert_array_equal(params["w"], [1.0, -2.0])


def test_a_step_gets_fold_in_of_the_runs_key_and_its_number():
    def noisy(params, frozen, batch, key):
        del frozen, batch
        return jnp.sum(params["w"] ** 2), {"draw": jax.random.uniform(key)}

    optimizer = optax.sgd(0.1)
    step = make_train_step(noisy, optimizer)
    state = start(optimizer, seed=3)
    draws = []
    for _ in range(3):
        state, metrics = step(state, 1.0)
        draws.append(float(metrics["draw"]))
    expected = [
        float(jax.random.uniform(jax.random.fold_in(jax.random.key(3), n))) for n in range(3)
    ]
    np.testing.assert_allclose(draws, expected, rtol=1e-6)


def test_new_values_do_not_recompile():
    optimizer = optax.sgd(0.1)
    step = make_train_step(quadratic, optimizer)
    state = start(optimizer)
    for value in (1.0, 2.0, 3.0):
        state, _ = step(state, jnp.float32(value), {"target": jnp.full((2,), value)})
    assert step._cache_size() == 1


def test_a_frozen_tower_gets_no_update_and_the_others_their_own_rate():
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.0, schedule="constant")
    params = {"query": {"w": jnp.ones((2, 2))}, "doc": {"w": jnp.ones((2, 2))}}
    optimizer = make_optimizer(config, total_steps=5, learning_rates={"query": 0.1, "doc": 0.0})
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # Adam's first update is the learning rate times the sign of the gradient.
    np.testing.assert_allclose(updates["query"]["w"], -0.1, rtol=1e-4)
    np.testing.assert_array_equal(updates["doc"]["w"], 0.0)


def test_weight_decay_leaves_biases_and_norms_alone():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    params = {
        "dense": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
        "layer_norm": {"scale": jnp.ones((2, 3))},
    }
    optimizer = make_optimizer(config, total_steps=5)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(updates["dense"]["bias"], 0.0)
    np.testing.assert_array_equal(updates["layer_norm"]["scale"], 0.0)


@pytest.mark.parametrize("schedule,last", [("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)])
def test_schedules_rise_to_the_peak_and_end_where_they_say(schedule, last):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule=schedule)
    rate = learning_rate_schedule(config, 20)
    assert 0 < float(rate(0)) < float(rate(2)) < 1.0
    assert float(rate(4)) == pytest.approx(1.0, abs=0.02)
    assert float(rate(20)) == pytest.approx(last, abs=1e-6)


def test_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=30 is more than the 20 steps"):
        learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=30), 20)


@pytest.mark.parametrize(
    "field,value",
    [("learning_rate", -1.0), ("clip_norm", 0.0), ("adam_b2", 1.0), ("weight_decay", -0.1)],
)
def test_options_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{"learning_rate": 1.0, field: value})


def mean_of_squares(params, frozen, batch, key):
    """A mean over the marked rows only, which may be spread unevenly."""
    del frozen, key
    marked = batch["marked"]
    errors = (batch["x"] @ params["w"] - batch["y"]) ** 2
    count = jnp.maximum(1, marked.sum())
    return jnp.where(marked, errors, 0).sum() / count, {
        "count": marked.sum(),
        "mean_x": jnp.where(marked, batch["x"][:, 0], 0).sum() / count,
    }


def uneven_batch(rng):
    return {
        "x": jnp.float32(rng.normal(size=(12, 2))),
        "y": jnp.float32(rng.normal(size=12)),
        # The first of four parts has no marked row at all.
        "marked": jnp.asarray([0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0], bool),
    }


@pytest.mark.parametrize("parts", [2, 4, 12])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(rng, parts):
    batch, optimizer = uneven_batch(rng), optax.sgd(0.1)
    whole = make_train_step(mean_of_squares, optimizer)
    in_parts = make_train_step(
        mean_of_squares, optimizer, accumulate=parts, weight=lambda rows: rows["marked"].sum()
    )
    (one, expected), (other, found) = (step(start(optimizer), batch) for step in (whole, in_parts))
    np.testing.assert_allclose(one.params["w"], other.params["w"], atol=1e-6)
    assert found.keys() == expected.keys() and found["count"] == 6
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_device_computes_its_share_of_every_part(parts):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))

    def loss(params, frozen, batch, key):
        return jnp.tanh(batch @ params["w"]).mean(), {}

    optimizer = optax.sgd(0.1)
    step = make_train_step(
        loss, optimizer, accumulate=parts, weight=lambda batch: jnp.float32(batch.shape[0])
    )
    state = jax.device_put(init_state({"w": jnp.ones((24, 48))}, optimizer, 0), everywhere)
    batch = jax.device_put(jnp.ones((64, 24)), rows)
    program = step.lower(state, batch).compile().as_text()
    # Of all arrays with 48 columns, the products of the rows have the fewest rows but the weights'.
    sizes = {int(size) for size in re.findall(r"f32\[(\d+),48\]", program)} - {24}
    assert sizes == {64 // parts // 8}


def test_a_batch_without_anything_to_learn_changes_nothing_in_parts_too(rng):
    batch, optimizer = uneven_batch(rng), optax.sgd(0.1)
    batch["marked"] = jnp.zeros(12, bool)
    step = make_train_step(
        mean_of_squares, optimizer, accumulate=3, weight=lambda rows: rows["marked"].sum()
    )
    state, metrics = step(start(optimizer), batch)
    np.testing.assert_array_equal(state.params["w"], [1.0, -2.0])
    assert metrics["loss"] == 0 and metrics["skipped"] == 0


def test_a_part_that_is_not_finite_skips_the_whole_step(rng):
    batch, optimizer = uneven_batch(rng), optax.sgd(0.1)
    batch["y"] = batch["y"].at[10].set(jnp.nan)
    step = make_train_step(
        mean_of_squares, optimizer, accumulate=4, weight=lambda rows: rows["marked"].sum()
    )
    state, metrics = step(start(optimizer), batch)
    np.testing.assert_array_equal(state.params["w"], [1.0, -2.0])
    assert metrics["skipped"] == 1


def test_parts_that_cannot_be_equal_are_refused(rng):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        make_train_step(mean_of_squares, optimizer, accumulate=0)
    with pytest.raises(ValueError, match="accumulate=2 needs weight="):
        make_train_step(mean_of_squares, optimizer, accumulate=2)
    step = make_train_step(
        mean_of_squares, optimizer, accumulate=5, weight=lambda rows: rows["marked"].sum()
    )
    with pytest.raises(ValueError, match="12 rows cannot be taken in 5 equal parts"):
        step(start(optimizer), uneven_batch(rng))

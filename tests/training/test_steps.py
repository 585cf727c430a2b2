import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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

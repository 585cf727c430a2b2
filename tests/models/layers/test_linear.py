"""The product of a linear layer in the precision that JAX is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models.layers.linear import product
from ragjax.runs import AdaptConfig, folder
from ragjax.runs.options.dual import LMConfig
from ragjax.runs.speed import _backward
from ragjax.training.loop import StopFlag


@pytest.fixture
def factors(rng):
    return (
        jnp.asarray(rng.normal(size=(64, 48)), jnp.float32),
        jnp.asarray(rng.normal(size=(48, 16)), jnp.float32),
    )


def test_a_cpu_rounds_the_factors_and_neither_the_sum_nor_the_gradient(factors):
    rows, kernel = factors
    exact = np.asarray(product(rows, kernel))
    np.testing.assert_array_equal(exact, np.asarray(rows @ kernel))
    rounded = [np.asarray(part.astype(jnp.bfloat16), np.float64) for part in factors]
    weights = jnp.cos(jnp.arange(exact.size, dtype=jnp.float32)).reshape(exact.shape)

    def loss(rows, kernel):
        return (product(rows, kernel) * weights).sum()

    gradients = jax.grad(loss, (0, 1))(rows, kernel)
    with jax.default_matmul_precision("bfloat16"):
        fast = product(rows, kernel)
        again = jax.jit(jax.grad(loss, (0, 1)))(rows, kernel)
    assert fast.dtype == jnp.float32
    np.testing.assert_allclose(fast, rounded[0] @ rounded[1], rtol=1e-5, atol=1e-5)
    assert 1e-3 < np.abs(fast - exact).max() < 0.2
    for one, other in zip(gradients, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_parameters_in_bfloat16_are_multiplied_as_ever(factors):
    halves = [part.astype(jnp.bfloat16) for part in factors]
    with jax.default_matmul_precision("bfloat16"):
        assert product(*halves).dtype == jnp.bfloat16


def test_a_few_rows_are_not_rounded(factors):
    rows, kernel = factors[0][:63], factors[1]
    with jax.default_matmul_precision("bfloat16"):
        np.testing.assert_array_equal(product(rows, kernel), rows @ kernel)


@pytest.mark.parametrize("able", [True, False])
def test_a_run_rounds_where_the_cpu_can_and_the_user_has_not_said_otherwise(
    monkeypatch, tmp_path, able
):
    monkeypatch.setattr(folder, "_multiplies_bfloat16", lambda: able)
    asked = jax.config.jax_default_matmul_precision
    try:
        for given, expected in (("float32", "float32"), (None, "bfloat16" if able else None)):
            jax.config.update("jax_default_matmul_precision", given)
            run = folder.claim(AdaptConfig(output=str(tmp_path)), {}, StopFlag())
            with pytest.raises(ZeroDivisionError), run:
                assert jax.config.jax_default_matmul_precision == expected
                raise ZeroDivisionError
            assert jax.config.jax_default_matmul_precision == given
    finally:
        jax.config.update("jax_default_matmul_precision", asked)


def test_a_forecast_knows_that_backward_passes_do_not_gain():
    config = LMConfig(train_layers=0)
    exact = _backward(config, 2, 2.0)
    with jax.default_matmul_precision("bfloat16"):
        assert _backward(config, 2, 2.0) == pytest.approx(1.8 * exact)

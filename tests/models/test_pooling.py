"""Pooling against loops in numpy, and its behaviour at nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models.pooling import cls_pool, l2_normalize, mean_pool

MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)


@pytest.fixture
def hidden(rng):
    return rng.normal(size=(3, 4, 5)).astype(np.float32)


def test_mean_pool_is_the_mean_of_the_real_tokens(hidden):
    pooled = mean_pool(jnp.asarray(hidden), jnp.asarray(MASK))
    expected = [hidden[0].mean(0), hidden[1, :2].mean(0), np.zeros(5)]
    np.testing.assert_allclose(pooled, np.stack(expected), atol=1e-6)


def test_cls_pool_is_the_first_token(hidden):
    pooled = cls_pool(jnp.asarray(hidden), jnp.asarray(MASK))
    np.testing.assert_array_equal(pooled, np.stack([hidden[0, 0], hidden[1, 0], np.zeros(5)]))


@pytest.mark.parametrize("pool", [mean_pool, cls_pool])
def test_masked_tokens_have_no_influence(pool, hidden):
    changed = np.where(MASK[:, :, None], hidden, 1e6)
    before, after = (pool(jnp.asarray(h), jnp.asarray(MASK)) for h in (hidden, changed))
    np.testing.assert_array_equal(before, after)


def test_l2_normalize_divides_by_the_length(hidden):
    rows = hidden[:, 0] * np.array([[1.0], [1e-3], [1e3]], np.float32)
    expected = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(l2_normalize(jnp.asarray(rows)), expected, atol=1e-6)


@pytest.mark.parametrize("pool", [mean_pool, cls_pool])
def test_gradient_is_finite_where_there_is_nothing(pool):
    def total(hidden):
        return l2_normalize(pool(hidden, jnp.asarray(MASK))).sum()

    gradient = jax.grad(total)(jnp.zeros((3, 4, 5)))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[:2]).max() > 0
    assert (gradient[2] == 0).all()

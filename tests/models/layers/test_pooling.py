"""Pooling and normalisation against numpy and sentence-transformers, and where there is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models.layers.pooling import (
    POOLINGS,
    cls_pool,
    concatenated,
    l2_normalize,
    last_token_pool,
    max_pool,
    mean_pool,
    mean_sqrt_length_pool,
    pooling_modes,
    weighted_mean_pool,
)

MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
EVERY = [pytest.param(pool, id=name) for name, pool in POOLINGS.items()]


@pytest.fixture
def hidden(rng):
    return rng.normal(size=(3, 4, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (mean_pool, lambda tokens: tokens.mean(0)),
        (cls_pool, lambda tokens: tokens[0]),
        (max_pool, lambda tokens: tokens.max(0)),
        (last_token_pool, lambda tokens: tokens[-1]),
        (mean_sqrt_length_pool, lambda tokens: tokens.sum(0) / np.sqrt(len(tokens))),
        (
            weighted_mean_pool,
            lambda tokens: np.average(tokens, 0, weights=np.arange(1, len(tokens) + 1)),
        ),
    ],
)
def test_pooling_equals_its_formula_on_the_real_tokens(hidden, pool, expected):
    pooled = pool(jnp.asarray(hidden), jnp.asarray(MASK))
    rows = [expected(hidden[0]), expected(hidden[1, :2]), np.zeros(5)]
    np.testing.assert_allclose(pooled, np.stack(rows), atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peer
@pytest.mark.parametrize("name", [*POOLINGS, "mean+cls", "cls+max+lasttoken"])
def test_pooling_equals_sentence_transformers(hidden, name):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    parts = pytest.importorskip("sentence_transformers.models", reason="needs the [parity] extra")
    real = slice(0, 2)  # it has no defined answer for a text without tokens
    module = parts.Pooling(5, name.split("+"))
    features = {
        "token_embeddings": torch.tensor(hidden[real]),
        "attention_mask": torch.tensor(MASK[real]).long(),
    }
    expected = module(features)["sentence_embedding"].numpy()
    pool = concatenated(pooling_modes(name))
    pooled = np.asarray(pool(jnp.asarray(hidden), jnp.asarray(MASK)))[real]
    assert pooled.shape == expected.shape
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="pooling 'cls.median': 'median' is not one of cls, max"):
        pooling_modes("cls+median")


@pytest.mark.parametrize("pool", EVERY)
def test_masked_tokens_have_no_influence(pool, hidden):
    changed = np.where(MASK[:, :, None], hidden, 1e6)
    before, after = (pool(jnp.asarray(h), jnp.asarray(MASK)) for h in (hidden, changed))
    np.testing.assert_array_equal(before, after)


def test_l2_normalize_divides_by_the_length(hidden):
    rows = hidden[:, 0] * np.array([[1.0], [1e-3], [1e3]], np.float32)
    expected = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(l2_normalize(jnp.asarray(rows)), expected, atol=1e-6)


@pytest.mark.parametrize("pool", EVERY)
def test_gradient_is_finite_where_there_is_nothing(pool):
    def total(hidden):
        return l2_normalize(pool(hidden, jnp.asarray(MASK))).sum()

    gradient = jax.grad(total)(jnp.zeros((3, 4, 5)))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[:2]).max() > 0
    assert (gradient[2] == 0).all()

"""Dense layers, normalisation and truncation of pooled embeddings against numpy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models.layers.head import (
    ACTIVATIONS,
    Dense,
    Normalize,
    Truncate,
    apply_steps,
    is_normalized,
    output_size,
    with_normalization,
)


def test_steps_run_in_their_order(rng):
    embeddings = rng.normal(size=(3, 5)).astype(np.float32)
    first, second = rng.normal(size=(5, 4)), rng.normal(size=(4, 6))
    bias = rng.normal(size=6)
    steps = (
        Dense(inputs=5, outputs=4, use_bias=False, activation="Identity"),
        Normalize(),
        Dense(inputs=4, outputs=6),
        Truncate(size=2),
    )
    projection = {
        "0": {"kernel": jnp.asarray(first, jnp.float32)},
        "1": {"kernel": jnp.asarray(second, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)},
    }
    expected = embeddings @ first
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    expected = np.tanh(expected @ second + bias)[:, :2]
    result = apply_steps(steps, projection, jnp.asarray(embeddings))
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert output_size(steps, 5) == 2 and not is_normalized(steps)


def test_every_activation_equals_its_formula():
    x = np.linspace(-4, 4, 101)
    expected = {
        "Identity": x,
        "Tanh": np.tanh(x),
        "GELU": 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        "ReLU": np.maximum(x, 0),
        "SiLU": x / (1 + np.exp(-x)),
        "Sigmoid": 1 / (1 + np.exp(-x)),
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, values in expected.items():
        result = ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(result, values, atol=1e-6, err_msg=name)


def test_normalisation_is_added_or_removed_where_it_scales_the_result():
    dense, cut, norm = Dense(inputs=5, outputs=4), Truncate(size=2), Normalize()
    assert with_normalization((dense,), True) == (dense, norm)
    assert with_normalization((norm, cut), True) == (norm, cut, norm)
    assert with_normalization((dense, norm), True) == (dense, norm)
    assert with_normalization((norm, dense, norm, cut), False) == (norm, dense, cut)
    assert with_normalization((norm, cut), False) == (cut,)
    assert with_normalization([norm, dense], None) == (norm, dense)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Dense(inputs=4, outputs=2),), "takes 4 dimensions, but gets embeddings of 5"),
        ((Truncate(size=6),), "truncate_dim 6 is not between 1 and 5"),
        ((Truncate(size=0),), "truncate_dim 0 is not between 1 and 5"),
    ],
)
def test_steps_that_do_not_fit_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        output_size(steps, 5)

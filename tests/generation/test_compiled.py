"""The compiler options of decoding: where they count, and where they would be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.generation import compiled
from ragjax.generation.compiled import jit_decoding


def double(x, *, times):
    return times * x


def test_it_compiles_once_per_shape_with_static_and_donated_arguments():
    traced = []

    def counted(x, *, times):
        traced.append(times)
        return times * x

    function = jit_decoding(counted, static_argnames="times", donate_argnames="x")
    given = jnp.arange(3.0)
    np.testing.assert_array_equal(function(given, times=2), [0, 2, 4])
    np.testing.assert_array_equal(function(jnp.ones(3), times=2), [2, 2, 2])
    assert given.is_deleted()
    assert traced == [2]


def test_the_options_count_on_a_cpu_and_at_the_top_only(monkeypatch):
    monkeypatch.setattr(compiled, "_ONE_AT_A_TIME", {"no_such_option": 1})
    function = jit_decoding(double, static_argnames="times")
    with pytest.raises(Exception, match="no_such_option"):
        function(jnp.ones(2), times=2)
    inside = jax.jit(lambda x: function(x, times=2) + 1)
    np.testing.assert_array_equal(inside(jnp.ones(2)), [3, 3])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(function(jnp.ones(2), times=2), [2, 2])


def test_decoding_may_be_mapped_and_compiled_by_the_caller():
    function = jit_decoding(double, static_argnames="times")
    rows = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.vmap(lambda x: function(x, times=2))(rows), 2 * rows)
    np.testing.assert_array_equal(
        jax.lax.map(lambda x: function(x, times=2), rows), 2 * np.asarray(rows)
    )

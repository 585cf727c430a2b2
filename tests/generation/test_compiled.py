"""The compiler options of decoding: where they count, and where they would be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.generation import compiled
from ragjax.generation.compiled import compiling_only, jit_decoding


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


def test_decoding_may_be_differentiated_where_it_can_be():
    function = jit_decoding(double, static_argnames="times")
    slope = jax.grad(lambda x: function(x, times=2).sum())(jnp.ones(3))
    np.testing.assert_array_equal(slope, [2, 2, 2])


def test_arrays_on_the_device_are_all_that_a_call_needs():
    function = jit_decoding(double, static_argnames="times")
    given = jnp.ones(2)
    function(given, times=2)
    with jax.transfer_guard("disallow"):
        result = function(given, times=2)
    np.testing.assert_array_equal(result, [2, 2])


def test_a_function_is_lowered_ahead_of_time():
    function = jit_decoding(double, static_argnames="times")
    compiled_ahead = function.lower(jnp.ones(2), times=3).compile()
    np.testing.assert_array_equal(compiled_ahead(jnp.ones(2)), [3, 3])


def test_what_was_only_compiled_has_not_run_and_needs_no_other_program(compilations):
    ran = []

    def double(x, cache, *, times):
        jax.debug.callback(lambda: ran.append(times))
        return {"doubled": times * x, "whole": (x > 0).all()}, cache + 1

    function = jit_decoding(double, static_argnames="times", donate_argnames="cache")
    x = jnp.ones((2, 3))
    with compiling_only(), compilations() as first:
        _, cache = function(x, np.zeros(4, np.float32), times=2)
        result, _ = function(x, cache, times=2)
    assert len(first) == 1 and not ran
    np.testing.assert_array_equal(result["doubled"], np.zeros((2, 3)))
    assert result["whole"].dtype == bool and result["whole"].shape == ()
    with compilations() as second:
        result, cache = function(x, np.zeros(4, np.float32), times=2)
    jax.effects_barrier()
    assert not second and ran == [2]
    np.testing.assert_array_equal(result["doubled"], np.full((2, 3), 2))
    np.testing.assert_array_equal(cache, np.ones(4))


def test_what_was_only_compiled_lies_where_its_results_do():
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    given = jax.device_put(jnp.ones((4, 3)), rows)
    function = jit_decoding(double, static_argnames="times")
    with compiling_only():
        zeros = function(given, times=2)
    assert zeros.sharding.is_equivalent_to(function(given, times=2).sharding, 2)


def test_constants_inside_a_compiled_function_are_traced():
    function = jit_decoding(double, static_argnames="times")
    constant = jnp.arange(2.0)
    np.testing.assert_array_equal(jax.jit(lambda x: x + function(constant, times=2))(1.0), [1, 3])

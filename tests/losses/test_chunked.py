"""Chunked log-probs equal the plain ones, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from losses_reference import f32

from ragjax import losses
from ragjax.losses.chunked import _default_block

VOCAB = 30


@pytest.fixture
def inputs(rng):
    hidden, table = f32(rng.normal(size=(8, 3, 5))), f32(rng.normal(size=(VOCAB, 5)))
    return hidden, table, rng.integers(0, VOCAB, (8, 3)), f32(rng.normal(size=(8, 3)))


def plain(hidden, table, targets, weights):
    log_probs = jax.nn.log_softmax(hidden @ table.T)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    return (weights * chosen).sum(), chosen


def chunked(hidden, table, targets, weights, **options):
    log_probs = losses.chunked_token_log_probs(hidden, table, targets, **options)
    return (weights * log_probs).sum(), log_probs


def slopes(function, *arguments, **options):
    (_, value), both = jax.value_and_grad(function, (0, 1), has_aux=True)(*arguments, **options)
    return value, *both


def assert_same(got, expected, tolerance=1e-5):
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 10, 16, 29, 30, 99])
def test_value_and_gradients_equal_the_plain_form(chunk_size, inputs):
    got = slopes(chunked, *inputs, chunk_size=chunk_size)
    with jax.enable_x64(True):
        exact = [np.asarray(a, np.float64) if a.dtype == np.float32 else a for a in inputs]
        expected = slopes(plain, *exact)
    assert_same(got, expected)


def test_default_blocks_cover_a_vocabulary_with_no_fitting_divisor(rng, monkeypatch):
    monkeypatch.setattr("ragjax.losses.chunked._BLOCK_ELEMENTS", 24 * 8)
    monkeypatch.setattr("ragjax.losses.chunked._SMALLEST_BLOCK", 4)
    hidden, table = f32(rng.normal(size=(8, 3, 5))), f32(rng.normal(size=(31, 5)))
    targets, weights = np.arange(24).reshape(8, 3) + 7, f32(rng.normal(size=(8, 3)))
    arguments = hidden, table, targets, weights
    assert_same(slopes(chunked, *arguments), slopes(plain, *arguments))


def test_bfloat16_is_close_and_returned_in_float32(inputs):
    hidden, table, targets, weights = inputs
    low = hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16), targets, weights
    same = low[0].astype(np.float32), low[1].astype(np.float32), targets, weights
    with jax.numpy_dtype_promotion("strict"):  # every cast is written out, also backwards
        got = slopes(chunked, *low, chunk_size=7)
    expected = slopes(plain, *same)
    assert got[0].dtype == jnp.float32 and got[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(np.float32(ours), theirs, rtol=0.03, atol=0.05)


@pytest.mark.parametrize("chunk_size", [7, None])
@pytest.mark.parametrize("outside", [-1, VOCAB, -100])
def test_id_outside_the_vocabulary_is_nan_and_masked_garbage_is_nothing(
    outside, chunk_size, inputs
):
    hidden, table, targets, weights = (np.array(a) for a in inputs)
    mask = np.ones_like(targets, bool)
    mask[2, 1] = False
    expected = slopes(chunked, hidden, table, targets, np.where(mask, weights, 0.0))
    targets[2, 1], hidden[2, 1] = outside, np.nan
    alone = losses.chunked_token_log_probs(inputs[0], table, targets, chunk_size=chunk_size)
    np.testing.assert_array_equal(np.isnan(alone), ~mask)
    got = slopes(chunked, hidden, table, targets, weights, mask=mask, chunk_size=chunk_size)
    assert got[0][2, 1] == 0 and not got[1][2, 1].any()
    assert_same(got[1:], expected[1:])


def test_jit_vmap_and_remat_agree_and_new_values_compile_nothing(inputs):
    traces = []

    def traced(*arguments):
        traces.append(1)
        return slopes(chunked, *arguments, chunk_size=7)

    expected, step = slopes(plain, *inputs), jax.jit(traced)
    assert_same(step(*inputs), expected)
    hidden, table, targets, weights = inputs
    step(hidden + 1, table * 2, targets[::-1], weights)
    assert len(traces) == 1
    mapped = jax.vmap(lambda h, t: losses.chunked_token_log_probs(h, table, t, chunk_size=7))(
        hidden, targets
    )
    np.testing.assert_allclose(mapped, expected[0], rtol=1e-5, atol=1e-5)
    again = jax.checkpoint(lambda *a: chunked(*a, chunk_size=7))
    assert_same(slopes(again, *inputs), expected)


@pytest.mark.parametrize("large", [3, 17, 29])
def test_extreme_logits_in_any_block_overflow_nowhere(large, inputs):
    hidden, table, targets, weights = inputs
    table = table.copy()
    table[large] *= 1e4
    got = slopes(chunked, hidden, table, targets, weights, chunk_size=7)
    assert_same(got, slopes(plain, hidden, table, targets, weights), 1e-4)
    # Scoring alone runs a loop of its own.
    alone = losses.chunked_token_log_probs(hidden, table, targets, chunk_size=7)
    np.testing.assert_allclose(alone, got[0], rtol=1e-4)


def matmuls(jaxpr):
    """Every dot_general of a program, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from matmuls(getattr(inner, "jaxpr", inner))


def test_bfloat16_is_multiplied_as_such_and_added_up_in_float32(inputs):
    hidden, table, targets, weights = inputs
    low = hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16), targets, weights
    program = jax.make_jaxpr(lambda *a: slopes(chunked, *a, chunk_size=7))(*low)
    found = list(matmuls(program.jaxpr))
    assert len(found) == 8  # 2 forward and 2 backward, in the loop and for the last block
    for equation in found:
        assert {variable.aval.dtype for variable in equation.invars} == {jnp.dtype("bfloat16")}
        assert equation.outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize(
    ("vocab", "tokens", "expected"),
    [
        (151_936, 4096, 2374),  # a divisor, near 2**24 logits
        (49_152, 192, 49_152),  # fits whole
        (49_152, 10**6, 512),  # never below 512
        (1009, 2**20, 1009),  # a prime: too small to halve
        (300, 0, 300),
    ],
)
def test_default_blocks(vocab, tokens, expected):
    assert _default_block(vocab, tokens) == expected


def test_gradient_to_hidden_alone_does_not_go_through_the_vocabulary_again(inputs):
    hidden, table, targets, weights = inputs

    def count(function):
        # As compiled: what is not asked for is gone. One loop body stands for all its rounds.
        text = jax.jit(function).lower(hidden, table).compile().as_text()
        return text.count(" dot(")

    def value(hidden, table):
        return chunked(hidden, table, targets, weights, chunk_size=10)[0]

    assert count(value) < count(jax.grad(value)) < count(jax.grad(value, (0, 1)))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_shard_map_equals_one_device(check_vma, where, inputs):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    options = {"mesh": mesh, "in_specs": (P("x"), P(), P("x"), P("x")), "check_vma": check_vma}

    def total(*arguments):
        return jax.lax.psum(chunked(*arguments, chunk_size=7)[0], "x")

    def inside(*arguments):
        to_hidden, to_table = jax.grad(total, (0, 1))(*arguments)
        if not check_vma:  # the caller's duty: there psum's transpose is psum
            to_hidden, to_table = to_hidden / 8, jax.lax.psum(to_table, "x") / 8
        return to_hidden, to_table

    if where == "inside":
        function = jax.shard_map(inside, out_specs=(P("x"), P()), **options)
    else:
        function = jax.grad(jax.shard_map(total, out_specs=P(), **options), (0, 1))
    assert_same(jax.jit(function)(*inputs), slopes(plain, *inputs)[1:])


def test_sharded_jit_and_pmap_equal_one_device(inputs):
    expected = slopes(plain, *inputs)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    hidden, table, targets, weights = inputs
    put = [jax.device_put(a, NamedSharding(mesh, P("x"))) for a in (hidden, targets, weights)]
    got = jax.jit(lambda *a: slopes(chunked, *a, chunk_size=7))(put[0], table, put[1], put[2])
    assert_same(got, expected)
    mapped = jax.pmap(lambda *a: slopes(chunked, *a, chunk_size=7), in_axes=(0, None, 0, 0))(
        *inputs
    )
    assert_same((mapped[0], mapped[1], mapped[2].sum(0)), expected)


def test_memory_is_at_most_an_eighth_of_the_plain_form():
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [((64, 16, 16), "float32"), ((32768, 16), "float32")]
        + [((64, 16), "int32"), ((64, 16), "float32")]
    ]

    def bytes_of(function, **options):
        step = jax.jit(lambda *a: slopes(function, *a, **options))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(chunked, chunk_size=1024) * 8 < bytes_of(plain)


H, W, Y = np.zeros((2, 3)), np.zeros((7, 3)), np.zeros(2, int)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((H[0], W, Y), {}, r"hidden: .*\[\.\.\., T, H\].*\[3\]"),
        ((H.astype(int), W, Y), {}, "hidden: .*floating-point.*int"),
        ((H, W.T, Y), {}, r"unembedding: .*\[V, H=3 \(as hidden\)\].*\[3, 7\]"),
        ((H, W.astype(int), Y), {}, "unembedding: .*floating-point.*int"),
        ((H, W[0], Y), {}, r"unembedding: .*\[3\]"),
        ((H, W, Y[:1]), {}, r"targets: .*\[\.\.\.=\[\] \(as hidden\), T=2.*\[1\]"),
        ((H, W, H[:, 0]), {}, "targets: .*integer.*float"),
        ((H, W, Y), {"mask": np.ones(2)}, "mask: .*bool.*float"),
        ((H, W, Y), {"mask": np.ones(3, bool)}, r"mask: .*T=2 \(as hidden\).*\[3\]"),
        ((H, W, Y), {"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
    ],
)
def test_bad_input_of_chunked_log_probs_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        losses.chunked_token_log_probs(*arguments, **options)

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models.layers import attention
from ragjax.models.layers.attention import attend, choose_implementation

IMPLEMENTATIONS = ("matmul", "xla")
# rows, query slots, key slots, query heads, key heads, width
SIZES = ((2, 5, 5, 4, 4, 8), (3, 4, 7, 6, 2, 16))


def draw(rng, size):
    rows, slots, keys, heads, groups, width = size
    return (
        rng.normal(size=(rows, slots, heads, width)),
        rng.normal(size=(rows, keys, groups, width)),
        rng.normal(size=(rows, keys, groups, width)),
    )


def reference(queries, keys, values, *, mask=None, bias=None, scale=None):
    """The formula, one head at a time, in float64; a row without any allowed slot is skipped."""
    rows, slots, heads, width = queries.shape
    shape = (rows, heads, slots, keys.shape[1])
    mask = np.broadcast_to(True if mask is None else mask, shape)
    bias = np.broadcast_to(0.0 if bias is None else bias, shape)
    shared = heads // keys.shape[2]
    attended = np.zeros(queries.shape)
    for row, head in np.ndindex(rows, heads):
        scores = queries[row, :, head] @ keys[row, :, head // shared].T
        scores = scores * (width**-0.5 if scale is None else scale) + bias[row, head]
        weights = np.where(mask[row, head], np.exp(scores - scores.max()), 0.0)
        total = weights.sum(axis=1, keepdims=True)
        attended[row, :, head] = (
            weights / np.where(total > 0, total, 1) @ values[row, :, head // shared]
        )
    return attended


def options(rng, size, kind):
    rows, slots, keys, heads, _, _ = size
    padding = np.arange(keys)[None, :] < rng.integers(1, keys + 1, rows)[:, None]
    return {
        "plain": {},
        "scale": {"scale": 0.3},
        "padding": {"mask": padding[:, None, None, :]},
        "causal": {"mask": np.tril(np.ones((slots, keys), bool), keys - slots)[None, None]},
        "bias": {"bias": rng.normal(size=(1, heads, slots, keys))},
        "both": {
            "mask": padding[:, None, None, :],
            "bias": rng.normal(size=(rows, 1, slots, keys)),
        },
    }[kind]


@pytest.mark.parametrize("kind", ["plain", "scale", "padding", "causal", "bias", "both"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_the_formula(rng, implementation, size, kind):
    arrays = draw(rng, size)
    given = options(rng, size, kind)
    as_jax = {name: jnp.asarray(v) if name != "scale" else v for name, v in given.items()}
    found = attend(*map(jnp.float32, arrays), **as_jax, implementation=implementation)
    np.testing.assert_allclose(found, reference(*arrays, **given), atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_stays_within_its_rounding(rng, implementation):
    size = SIZES[1]
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in draw(rng, size)]
    mask = options(rng, size, "padding")["mask"]
    found = attend(*arrays, mask=jnp.asarray(mask), implementation=implementation)
    assert found.dtype == jnp.bfloat16
    expected = reference(*(np.asarray(array, np.float64) for array in arrays), mask=mask)
    # Weights and values are rounded to 8 bits; the values are of order 1.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_without_any_allowed_slot_is_finite_and_so_is_its_gradient(
    rng, implementation, dtype
):
    arrays = [jnp.asarray(array, dtype) for array in draw(rng, SIZES[0])]
    mask = jnp.ones((2, 1, 5, 5), bool).at[0].set(False).at[1, :, 2].set(False)

    def loss(arrays):
        found = attend(*arrays, mask=mask, implementation=implementation)
        return found.astype(jnp.float32).sum()

    value, grads = jax.value_and_grad(loss)(arrays)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(grad).all() for grad in grads)


def test_both_have_the_same_gradients_under_jit_and_vmap(rng):
    arrays = [jnp.stack([x, 2 * x]) for x in map(jnp.float32, draw(rng, SIZES[1]))]
    mask = jnp.asarray(options(rng, SIZES[1], "padding")["mask"])

    def gradients(implementation):
        def loss(*arrays):
            return (attend(*arrays, mask=mask, implementation=implementation) ** 2).sum()

        return jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*arrays)

    for one, other in zip(gradients("matmul"), gradients("xla"), strict=True):
        # Of up to 40, and either is 3e-5 off the gradient in float64.
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_bias_gets_the_sum_of_what_it_was_broadcast_to(rng):
    size = SIZES[1]
    arrays = list(map(jnp.float32, draw(rng, size)))
    mask = jnp.asarray(options(rng, size, "padding")["mask"])
    shapes = [(1, 6, 4, 7), (3, 1, 1, 7), (4, 7), (1,)]

    def gradients(implementation, shape):
        def loss(bias):
            found = attend(*arrays, mask=mask, bias=bias, implementation=implementation)
            return (found**2).sum()

        return jax.grad(loss)(jnp.ones(shape))

    for shape in shapes:
        if shape == (1,):  # an equal bias for all changes nothing
            np.testing.assert_allclose(gradients("matmul", shape), [0.0], atol=1e-4)
            continue
        whole = (1,) * (4 - len(shape)) + shape
        expected = gradients("xla", whole).reshape(shape)
        np.testing.assert_allclose(gradients("matmul", shape), expected, atol=1e-5)


def test_a_mask_that_all_devices_share_may_meet_rows_that_they_do_not(rng):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = list(map(jnp.float32, draw(rng, SIZES[1])))
    bias = jnp.float32(rng.normal(size=(1, 6, 4, 7)))

    def loss(bias, *arrays):
        return (attend(*arrays, bias=bias, implementation="matmul") ** 2).sum()

    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        lambda bias, *arrays: jax.grad(loss)(bias, *arrays),
        mesh=mesh,
        in_specs=(spec(), *(spec("rows"),) * 3),
        out_specs=spec(),
    )
    np.testing.assert_allclose(
        jax.jit(sharded)(bias, *arrays), jax.grad(loss)(bias, *arrays), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["plain", "scale", "padding", "causal", "bias", "both", "flat"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_of_queries_give_what_all_give_at_once(rng, monkeypatch, implementation, kind):
    size = (3, 21, 7, 6, 2, 16)
    arrays = tuple(map(jnp.float32, draw(rng, size)))
    # "flat": an array without axes of rows and heads.
    given = {"mask": rng.random((21, 7)) < 0.7} if kind == "flat" else options(rng, size, kind)
    given = {name: jnp.asarray(v) if name != "scale" else v for name, v in given.items()}

    def results(*arrays):
        def total(bias, *arrays):
            others = given if bias is None else given | {"bias": bias}
            out = attend(*arrays, **others, implementation=implementation)
            return (out * jnp.arange(16.0).reshape(1, 1, 1, 16)).sum(), out

        bias = given.get("bias")
        argnums = (1, 2, 3) if bias is None else (0, 1, 2, 3)
        return jax.grad(total, argnums, has_aux=True)(bias, *arrays)

    expected = results(*arrays)
    monkeypatch.setattr(attention, "_MOST_SCORES", 21 * 6 * 7 - 1)
    monkeypatch.setattr(attention, "_SCORES_OF_BLOCK", 8 * 6 * 7)
    assert attention.queries_at_once(*arrays[:2]) == 8  # 21 queries: three blocks, the last padded
    assert "scan" in str(jax.make_jaxpr(results)(*arrays))
    jax.tree.map(
        lambda found, right: np.testing.assert_allclose(found, right, rtol=1e-5, atol=2e-5),
        results(*arrays),
        expected,
    )


@pytest.mark.parametrize(
    ("slots", "heads", "expected"),
    [(512, 12, 512), (2048, 32, 2048), (4096, 8, 4096), (4096, 32, 256), (8192, 12, 256)],
)
def test_rows_of_many_scores_are_divided(slots, heads, expected):
    arrays = [jax.ShapeDtypeStruct((2, slots, n, 64), jnp.float32) for n in (heads, heads)]
    assert attention.queries_at_once(*arrays) == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_long_row_needs_no_memory_for_all_its_scores(implementation):
    """Compiled, not run: 8 rows of 4,096 slots and 16 heads, 1 GiB of scores each, on 8 devices."""
    rows = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(rows, jax.sharding.PartitionSpec("rows"))
    arrays = [jax.ShapeDtypeStruct((8, 4096, 16, 64), jnp.float32, sharding=where)] * 3

    def loss(*arrays):
        mask = jnp.tril(jnp.ones((1, 1, 4096, 4096), bool))
        return (attend(*arrays, mask=mask, implementation=implementation) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 2**28


def shaped(slots, width, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, slots, 4, width), dtype)


@pytest.mark.parametrize(
    ("platform", "width", "dtype", "expected"),
    [
        ("cpu", 64, jnp.bfloat16, "matmul"),
        ("tpu", 64, jnp.bfloat16, "xla"),
        ("gpu", 64, jnp.bfloat16, "xla"),  # not driven by CUDA
        ("cuda:8.0", 64, jnp.bfloat16, "cudnn"),
        ("cuda:8.0", 64, jnp.float16, "cudnn"),
        ("cuda:8.0", 64, jnp.float32, "xla"),
        ("cuda:8.0", 256, jnp.bfloat16, "xla"),
        ("cuda:9.0", 256, jnp.bfloat16, "cudnn"),
        ("cuda:10.0", 256, jnp.bfloat16, "cudnn"),
        ("cuda:9.0", 264, jnp.bfloat16, "xla"),
        ("cuda:9.0", 60, jnp.bfloat16, "xla"),
    ],
)
@pytest.mark.parametrize("slots", [7, 8])
def test_the_fastest_implementation_that_the_rules_allow(platform, slots, width, dtype, expected):
    arrays = shaped(slots, width, dtype), shaped(8, width, dtype)
    assert choose_implementation(*arrays, platform=platform) == expected


@pytest.mark.parametrize("lengths", [(7, 9), (6, 9), (7, 8), (6, 8)])
@pytest.mark.parametrize("given", ["mask", "bias", "both"])
def test_cudnn_gets_even_lengths_and_the_result_is_the_same(rng, monkeypatch, lengths, given):
    t, s = lengths
    queries = jnp.asarray(rng.normal(size=(2, t, 4, 8)), jnp.float32)
    keys, values = (jnp.asarray(rng.normal(size=(2, s, 2, 8)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.random((2, 1, t, s)) < 0.7).at[..., 0].set(True)
    bias = jnp.asarray(rng.normal(size=(1, 4, t, s)), jnp.float32)
    given = {"mask": {"mask": mask}, "bias": {"bias": bias}, "both": {"mask": mask, "bias": bias}}[
        given
    ]
    shapes, real = [], jax.nn.dot_product_attention

    def standing_in(queries, keys, values, bias, mask, *, implementation, **options):
        assert implementation == "cudnn"
        shapes.append((queries.shape[1], keys.shape[1], values.shape[1]))
        return real(queries, keys, values, bias, mask, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", standing_in)

    def total(queries, keys, values, implementation):
        out = attend(queries, keys, values, **given, implementation=implementation)
        return (out * jnp.arange(8.0).reshape(1, 1, 1, 8)).sum(), out

    def results(implementation):
        grads = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
        return grads(queries, keys, values, implementation)

    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5),
        results("cudnn"),
        results("matmul"),
    )
    assert set(shapes) == {(t + t % 2, s + s % 2, s + s % 2)}


def fake_device(capability, others=()):
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 12090")
    device = SimpleNamespace(platform="gpu", client=client, compute_capability=capability)
    each = [SimpleNamespace(compute_capability=other) for other in (capability, *others)]
    client.local_devices = lambda: each
    return device


def test_the_platform_is_that_of_the_default_device(monkeypatch):
    assert attention._platform() == "cpu"
    with jax.default_device(jax.devices()[3]):
        assert attention._platform() == "cpu"
    monkeypatch.setattr(jax, "local_devices", lambda: [fake_device("9.0", ("8.6", "10.0"))])
    assert attention._platform() == "cuda:8.6"


def test_cudnn_gets_masks_and_biases_with_all_slots(rng, monkeypatch):
    """A GPU is not needed to see what it would be asked."""
    asked = {}

    def fake(queries, keys, values, bias, mask, **others):
        asked.update(others, bias=bias, mask=mask)
        return queries

    monkeypatch.setattr(attention, "_platform", lambda: "cuda:9.0")
    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in draw(rng, (2, 4, 6, 4, 2, 8))]
    attend(*arrays, mask=jnp.ones((2, 1, 1, 6), bool), bias=jnp.zeros((4, 1, 6)))
    assert asked["implementation"] == "cudnn" and asked["scale"] == 8**-0.5
    assert asked["mask"].shape == (2, 1, 4, 6)
    assert asked["bias"].shape == (1, 4, 4, 6) and asked["bias"].dtype == jnp.bfloat16

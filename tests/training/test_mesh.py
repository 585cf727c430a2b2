import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from ragjax.training import mesh
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.lsr import gathered
from ragjax.training.mesh import Layout, make_layout, mesh_of, rows_multiple, spread_rows
from ragjax.training.steps import init_state, make_train_step

# Not Adam, which makes a whole step of a gradient that is nothing but rounding.
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def layout(data, fsdp):
    return make_layout(jax.devices()[: data * fsdp], fsdp=fsdp)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("head", (512, 1024), (None, "fsdp")),
        ("head", (512, 1023), ("fsdp",)),
        ("layers/up", (64, 48, 32), (None, "fsdp")),  # never the axis of the stack
        ("layers/norm", (65_536, 3), ()),
        ("head", (255, 256), ()),  # as quickly read as gathered
        ("head", (511, 513), ()),
        ("step", (), ()),
    ],
)
def test_the_largest_axis_that_can_be_divided_is(path, shape, spec):
    assert layout(2, 4).sharding(path, shape).spec == PartitionSpec(*spec)
    assert layout(8, 1).sharding(path, shape).is_fully_replicated
    assert Layout().sharding(path, shape) is None


def test_one_device_leaves_everything_as_it_is():
    params, batch = {"w": np.ones((300, 300))}, np.ones((5, 3))
    alone = make_layout(jax.devices()[:1])
    assert alone == Layout() and alone.num_devices == 1 and alone.devices is None
    assert alone.place(params) is params and spread_rows(batch, params) is batch
    assert mesh_of(params) is None and rows_multiple(params) == 1


@pytest.mark.parametrize("fsdp", [0, 3])
def test_parts_that_the_devices_do_not_make_are_refused(fsdp):
    with pytest.raises(ValueError, match=f"fsdp={fsdp} does not divide the 8 devices"):
        make_layout(jax.devices(), fsdp=fsdp)


@pytest.mark.parametrize(
    ("rows", "devices_apart"), [(16, 8), (8, 8), (6, 2), (4, 4), (3, 1), (1, 1)]
)
def test_rows_are_divided_as_far_as_they_go(rows, devices_apart):
    params = layout(2, 4).place({"w": jnp.ones((3, 3))})
    spread = spread_rows({"ids": np.zeros((rows, 5)), "none": None, "x": jnp.float32(1)}, params)
    assert spread["none"] is None and spread["x"].is_fully_replicated
    shards = spread["ids"].addressable_shards
    assert {shard.data.shape[0] for shard in shards} == {rows // devices_apart}
    assert len(spread["ids"].sharding.device_set) == 8
    assert rows_multiple(params) == 8


def wide(key):
    first, second = jax.random.split(jax.random.key(key))
    return {
        "layers": {"w": 0.1 * jax.random.normal(first, (3, 256, 256))},
        "head": 0.1 * jax.random.normal(second, (256, 512)),
    }


def loss_of(params, frozen, batch, key):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, params["layers"]["w"])
    return (x @ params["head"] @ frozen).mean() ** 2, {}


def train(where, folder=None, *, steps=3, state=None):
    """Returns the losses of some steps, and the state behind them."""
    optimizer = OPTIMIZER
    step = make_train_step(
        loss_of, optimizer, accumulate=2, weight=lambda batch: jnp.float32(len(batch))
    )
    frozen = where.place(0.1 * jax.random.normal(jax.random.key(9), (512, 256)))
    if state is None:
        state = where.place(init_state(wide(0), optimizer, 0))
    losses = []
    for number in range(steps):
        batch = np.random.default_rng(number).normal(size=(32, 256)).astype(np.float32)
        state, metrics = step(state, spread_rows(batch, state.params), frozen)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)])
def test_every_mesh_trains_as_one_device_and_holds_its_part(shape):
    expected, alone = train(Layout())
    losses, state = train(layout(*shape))
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state, alone)

    def held(tree):
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    assert held(state) <= 1.2 / shape[1] * held(alone)


def test_what_is_saved_on_one_mesh_goes_on_on_another(tmp_path):
    _, state = train(layout(2, 4), steps=1)
    Checkpointer(tmp_path).save(1, state)
    for other in (layout(4, 2), Layout()):
        template = other.place(init_state(wide(1), OPTIMIZER, 0))
        restored = Checkpointer(tmp_path).latest_good(template).state
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        same = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, template)
        assert all(jax.tree.leaves(same))


def test_rows_of_each_device_shrink_with_the_parts_of_a_step():
    where = layout(8, 1)
    seen = []

    def looks(params, frozen, batch, key):
        jax.debug.inspect_array_sharding(batch, callback=seen.append)
        return (batch @ params).mean() ** 2, {}

    params = where.place(jnp.ones((4, 4)))
    for parts in (1, 2, 4):
        step = make_train_step(
            looks, optax.sgd(0.1), accumulate=parts, weight=lambda batch: jnp.float32(len(batch))
        )
        state = where.place(init_state(params, optax.sgd(0.1), 0))
        step(state, spread_rows(np.ones((64, 4), np.float32), params))
        assert seen[-1].shard_shape((64 // parts, 4)) == (8 // parts, 4)


# Some loss whose rows meet: each is compared with those of the whole batch.
def contrastive_of(axis_name):
    def loss(params, frozen, batch, key):
        vectors = jnp.tanh(batch["x"] @ params)
        everyone = gathered(vectors, axis_name)
        own = (vectors**2).sum(1)
        each = jax.nn.logsumexp(vectors @ everyone.T, axis=1) - own
        counted = batch["counts"]
        total = jnp.maximum(1, counted.sum()).astype(each.dtype)
        metrics = {"real": counted.sum(), "mean": jnp.where(counted, own, 0.0).sum() / total}
        return jnp.where(counted, each, 0.0).sum() / total, metrics

    return loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pmap_learns_what_jit_learns_where_rows_meet_and_count_differs(rng, accumulate):
    batch = {
        "x": rng.normal(size=(16, 4)).astype(np.float32),
        "counts": np.arange(16) % 5 < 2 + np.arange(16) // 8,  # unlike on each device
    }
    optimizer, params = optax.sgd(0.1), rng.normal(size=(4, 4)).astype(np.float32)
    axis = mesh.ROWS if accumulate == 1 else None
    results = []
    for mapped, name in ((None, None), (jax.devices()[:4], axis)):
        loss = contrastive_of(name) if accumulate == 1 else mean_of_rows
        step = make_train_step(
            loss, optimizer, accumulate=accumulate, mapped=mapped,
            weight=lambda batch: batch["counts"].sum(),
        )  # fmt: skip
        state = init_state(jnp.asarray(params), optimizer, 0)
        for _ in range(3):
            state, metrics = step(state, batch)
        results.append((state.params, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *results)


def mean_of_rows(params, frozen, batch, key):
    each = ((batch["x"] @ params) ** 2).sum(1)
    counted = batch["counts"]
    total = jnp.maximum(1, counted.sum()).astype(each.dtype)
    return jnp.where(counted, each, 0.0).sum() / total, {"real": counted.sum()}


def test_rows_that_pmap_cannot_give_out_are_refused():
    step = make_train_step(
        mean_of_rows, optax.sgd(0.1), weight=lambda b: b["counts"].sum(), mapped=jax.devices()
    )
    batch = {"x": np.ones((12, 4), np.float32), "counts": np.ones(12, bool)}
    with pytest.raises(ValueError, match="a batch of 12 rows cannot be taken by 8 devices"):
        step(init_state(jnp.ones((4, 4)), optax.sgd(0.1), 0), batch)
    with pytest.raises(ValueError, match="needs weight="):
        make_train_step(mean_of_rows, optax.sgd(0.1), mapped=jax.devices())

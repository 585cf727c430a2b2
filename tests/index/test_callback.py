"""The current index inside jit: one generation per call, no gradient, no hang, clear errors."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs import environment

from ragjax.index import ExactIndex, IndexSnapshot, ScannIndex, make_jit_search

NUM_DOCS, DIM = 200, 16


def snapshot_of(index, version=0):
    return IndexSnapshot(
        index=index, version=version, encoder_step=0, corpus_hash="x", built_at=0.0
    )


@pytest.fixture
def docs(rng):
    return rng.normal(size=(NUM_DOCS, DIM)).astype(np.float32)


@pytest.fixture
def queries(rng):
    return rng.normal(size=(6, DIM)).astype(np.float32)


def assert_found(result, expected, version=0):
    np.testing.assert_array_equal(result.doc_ids, expected.doc_ids)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result.mask, expected.mask)
    assert int(result.version) == version
    assert [leaf.dtype.name for leaf in result] == ["int32", "float32", "bool", "int32"]


def test_equals_a_search_outside_and_a_new_snapshot_compiles_nothing(docs, queries):
    holder = [snapshot_of(ExactIndex(docs))]
    step = jax.jit(make_jit_search(lambda: holder[0], k=5))
    assert_found(step(queries), ExactIndex(docs).search(queries, 5))
    # Another number of documents, negative scores and another kind of index.
    fewer = ExactIndex(-np.abs(docs[:3]))
    holder[0] = snapshot_of(fewer, version=7)
    assert_found(step(np.abs(queries)), fewer.search(np.abs(queries), 5), version=7)
    assert step._cache_size() == 1


def test_scann_answers_too(docs, queries):
    pytest.importorskip("scann", reason="ScaNN has no package for this platform")
    index = ScannIndex.build(docs)
    step = jax.jit(make_jit_search(lambda: snapshot_of(index, 3), k=5))
    assert_found(step(queries), index.search(queries, 5), version=3)


def test_half_precision_queries_and_none_at_all(docs, queries):
    index = ExactIndex(docs)
    step = jax.jit(make_jit_search(lambda: snapshot_of(index), k=2))
    half = jnp.asarray(queries, jnp.bfloat16)
    assert_found(step(half), index.search(np.asarray(half, np.float32), 2))
    assert step(queries[:0]).doc_ids.shape == (0, 2)


def test_gradients_stop_at_the_search(docs, queries):
    index = ExactIndex(docs)
    search = make_jit_search(lambda: snapshot_of(index), k=3)
    table = jnp.asarray(docs)

    def loss(scale, search):
        embeddings = queries * scale
        found = search(embeddings)
        live = jnp.einsum("bd,bkd->bk", embeddings, table[found.doc_ids])
        return jnp.sum(live + found.scores)

    fixed = index.search(queries * 1.5, 3)
    gradient = jax.jit(jax.grad(functools.partial(loss, search=search)))(1.5)
    expected = jax.grad(functools.partial(loss, search=lambda _: fixed))(1.5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_an_error_of_the_search_ends_the_program_with_its_message(docs, queries, caplog):
    step = jax.jit(make_jit_search(lambda: snapshot_of(ExactIndex(docs)), k=3))
    queries[4, 1] = np.nan
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"query embeddings hold NaN .*row 4"):
        jax.block_until_ready(step(queries))
    with pytest.raises(jax.errors.JaxRuntimeError, match="size 5 but the index was built with"):
        jax.block_until_ready(step(np.zeros((1, 5), np.float32)))


def test_bad_arguments_are_refused():
    for k in (0, True, 2.0):
        with pytest.raises(ValueError, match="k must be a positive integer, got"):
            make_jit_search(lambda: None, k=k)
    with pytest.raises(ValueError, match=r"Queries must be \[B, D\], got shape \(4,\)"):
        make_jit_search(lambda: None, k=1)(np.zeros(4))


def test_works_in_scan_cond_and_vmap(docs, queries):
    index = ExactIndex(docs)
    search = make_jit_search(lambda: snapshot_of(index), k=4)
    stacked = np.stack([queries, 2 * queries, queries[::-1]])

    @jax.jit
    def scanned(stacked):
        return jax.lax.scan(lambda carry, item: (carry, search(item)), 0, stacked)[1]

    @jax.jit
    def chosen(flag, queries):
        return jax.lax.cond(flag, search, lambda q: search(-q), queries)

    for each in (scanned(stacked), jax.jit(jax.vmap(search))(stacked)):
        for row, item in enumerate(stacked):
            assert_found(jax.tree.map(lambda leaf, row=row: leaf[row], each), index.search(item, 4))
    assert_found(chosen(False, queries), index.search(-queries, 4))


def test_queries_sharded_over_a_mesh(rng, docs):
    index = ExactIndex(docs)
    search = make_jit_search(lambda: snapshot_of(index), k=4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    queries = rng.normal(size=(16, DIM)).astype(np.float32)
    expected = index.search(queries, 4)
    sharded = jax.device_put(queries, NamedSharding(mesh, PartitionSpec("data")))
    assert_found(jax.jit(search)(sharded), expected)
    rows = PartitionSpec("data")
    per_device = jax.shard_map(
        lambda block: search(block)._replace(version=search(block).version[None]),
        mesh=mesh,
        in_specs=rows,
        out_specs=rows,
    )
    result = jax.jit(per_device)(sharded)
    assert result.version.shape == (8,)
    assert_found(result._replace(version=result.version[0]), expected)


# What hangs, hangs in XLA's threads, where no exception reaches: only a process can be ended.
PROGRAM = """
import faulthandler, sys, threading
faulthandler.dump_traceback_later(50, exit=True)
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ragjax.index import ExactIndex, IndexSnapshot, make_jit_search

rng = np.random.default_rng(0)
docs = rng.normal(size=(300, {dim})).astype(np.float32)
docs /= np.linalg.norm(docs, axis=1, keepdims=True)
# A score tells its generation: 1 or 1000 for the own document of a query.
snapshots = [
    IndexSnapshot(
        index=ExactIndex(scale * docs, devices={devices}),
        version=version, encoder_step=0, corpus_hash="", built_at=0.0,
    )
    for version, scale in ((0, 1.0), (1, 1000.0))
]
holder = [snapshots[0]]
done = threading.Event()

def swap():
    while not done.is_set():
        holder[0] = snapshots[1 - holder[0].version]
        done.wait(0.0005)

thread = threading.Thread(target=swap)
thread.start()
step = jax.jit(make_jit_search(lambda: holder[0], k=2))
eye = jnp.eye({dim})
same = jax.jit(lambda q: jax.lax.fori_loop(0, 10, lambda _, q: q @ eye, q))
queries = jnp.asarray(np.tile(docs, (-(-{rows} // 300), 1))[:{rows}])
if {sharded}:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    queries = jax.device_put(queries, NamedSharding(mesh, PartitionSpec("data")))
versions = set()
pending = []
for call in range({calls}):
    # Queries that are not ready yet: the program with the search waits in XLA's pool of threads.
    pending.append(step(same(queries)))
    if len(pending) == 8:
        result = jax.tree.map(np.asarray, pending.pop(0))
        version = int(result.version)
        versions.add(version)
        np.testing.assert_allclose(result.scores[:, 0], 1000.0**version, rtol=1e-4)
        assert (result.doc_ids[:, 0] == np.arange({rows}) % 300).all()
        assert (result.scores[:, 1] < 0.999 * 1000.0**version).all()
jax.block_until_ready(pending)
done.set()
thread.join()
assert versions == {{0, 1}} or {calls} < 100, versions
print("finished")
"""


def run_program(*, devices, dim, rows, calls, sharded=False, cores=None):
    """Runs the program in a process with so many fake devices and, where told, CPU cores."""
    script = PROGRAM.format(
        dim=dim, rows=rows, calls=calls, sharded=sharded,
        devices="jax.devices()" if sharded else None,
    )  # fmt: skip
    if cores:
        script = f"import os; os.sched_setaffinity(0, {cores})\n{script}"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, env=environment(devices=devices), timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0 and "finished" in result.stdout, result.stderr[-4000:]


@pytest.mark.slow
def test_two_hundred_calls_between_swaps_see_one_generation_each():
    run_program(devices=1, dim=32, rows=300, calls=200)


@pytest.mark.slow
def test_two_hundred_calls_on_eight_devices():
    run_program(devices=8, dim=32, rows=304, calls=200, sharded=True)


def test_nothing_large_is_given_to_the_callback(docs):
    search = make_jit_search(lambda: snapshot_of(ExactIndex(docs)), k=4)
    jaxpr = jax.make_jaxpr(search)(np.zeros((700, 300), np.float32))
    (call,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "io_callback"]
    sizes = [variable.aval.size * 4 for variable in call.invars]
    assert sum(sizes) == 700 * 300 * 4 and max(sizes) < 100 * 1024


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot choose the cores here")
def test_large_queries_on_one_core():
    # One thread in XLA's pool, and it runs the callback.
    run_program(devices=1, cores={min(os.sched_getaffinity(0))}, dim=512, rows=600, calls=24)


@pytest.mark.slow
def test_large_queries_sharded_over_every_thread():
    run_program(devices=8, dim=256, rows=800, calls=16, sharded=True)

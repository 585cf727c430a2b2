"""Streaming: peak memory, dtypes and placement of parameters loaded from safetensors files."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from programs import environment, load_script
from safetensors.numpy import save_file

from ragjax.models.files.config import fingerprint
from ragjax.models.files.key_table import KeyRule, apply_key_table, read_safetensors, transpose
from ragjax.models.files.placement import Placement, loading_as
from ragjax.models.files.safetensors import StoredTensor

LAYERS = 4
TABLE = {
    "embed.weight": KeyRule("embed/embedding"),
    "layer.{}.dense.weight": KeyRule("layers/dense/kernel", transpose),
    "layer.{}.dense.bias": KeyRule("layers/dense/bias"),
    "layer.{}.gain": KeyRule("layers/gain", lambda gain: gain + 1),
}
TARGET = {
    "embed": {"embedding": jax.ShapeDtypeStruct((48, 16), np.float32)},
    "layers": {
        "dense": {
            "kernel": jax.ShapeDtypeStruct((LAYERS, 16, 40), np.float32),
            "bias": jax.ShapeDtypeStruct((LAYERS, 40), np.float32),
        },
        "gain": jax.ShapeDtypeStruct((LAYERS,), np.float32),
    },
}


@pytest.fixture
def tensors(rng):
    shapes = {"embed.weight": (48, 16)}
    for layer in range(LAYERS):
        shapes |= {f"layer.{layer}.dense.weight": (40, 16), f"layer.{layer}.dense.bias": (40,)}
        shapes[f"layer.{layer}.gain"] = ()
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def expected(tensors):
    """What comes out, by plain numpy."""
    each = [{name: tensors[f"layer.{i}.{name}"] for name in NAMES} for i in range(LAYERS)]
    return {
        "embed": {"embedding": tensors["embed.weight"]},
        "layers": {
            "dense": {
                "kernel": np.stack([layer["dense.weight"].T for layer in each]),
                "bias": np.stack([layer["dense.bias"] for layer in each]),
            },
            "gain": np.stack([layer["gain"] + 1 for layer in each]),
        },
    }


NAMES = ("dense.weight", "dense.bias", "gain")


def test_nothing_is_read_before_the_shapes_are_known_to_fit(folder, tensors, monkeypatch):
    """A configuration of absurd sizes is refused from the headers alone."""
    absurd = {**TARGET, "embed": {"embedding": jax.ShapeDtypeStruct((2**31, 2**31), np.float32)}}

    def fail(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoredTensor, "read", fail)
    with pytest.raises(ValueError, match=r"embed.weight has shape \(48, 16\), .* needs \(2147"):
        apply_key_table(read_safetensors(folder), TABLE, absurd)
    many = {**TARGET["layers"], "gain": jax.ShapeDtypeStruct((10**9,), np.float32)}
    with pytest.raises(ValueError, match="describes 1000000000 layers, but the checkpoint has 13"):
        apply_key_table(read_safetensors(folder), TABLE, {**TARGET, "layers": many})


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "keep"])
def test_parameters_have_the_dtype_asked_for(tmp_path, tensors, stored, asked):
    tensors = {name: tensor.astype(stored) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with loading_as(dtype=asked):
        params = apply_key_table(read_safetensors(tmp_path), TABLE, TARGET)
    kept = np.float32 if stored is np.float64 else stored
    dtype = np.dtype(kept) if asked == "keep" else jnp.dtype(asked)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {dtype}
    jax.tree.map(
        lambda found, wanted: np.testing.assert_array_equal(found, wanted.astype(dtype)),
        params,
        expected(tensors),
    )


def test_large_transposed_matrices_are_copied_right(tmp_path, rng):
    """More rows than a tile, and a number of them that is no multiple of it."""
    for dtype in (np.float32, ml_dtypes.bfloat16):
        weight = rng.normal(size=(77, 19)).astype(dtype)
        save_file({"w": weight}, tmp_path / "model.safetensors")
        target = {"w": jax.ShapeDtypeStruct((19, 77), np.float32)}
        for asked in (np.float32, jnp.bfloat16):
            table = {"w": KeyRule("w", transpose)}
            found = apply_key_table(
                read_safetensors(tmp_path), table, target, placement=Placement(asked)
            )
            np.testing.assert_array_equal(found["w"], weight.T.astype(asked))


def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))


def spec_of(path, shape):
    """Kernels and the embedding over "model", the rest on all devices alike."""
    specs = {
        "layers/dense/kernel": PartitionSpec(None, None, "model"),
        "layers/gain": PartitionSpec("model"),
        "embed/embedding": PartitionSpec("model", None),
    }
    return NamedSharding(mesh(), specs.get(path, PartitionSpec()))


def test_each_device_gets_its_slice_and_nothing_else(folder, tensors):
    with loading_as(shardings=spec_of):
        params = apply_key_table(read_safetensors(folder), TABLE, TARGET)
    jax.tree.map(np.testing.assert_array_equal, params, expected(tensors))
    kernel = params["layers"]["dense"]["kernel"]
    assert kernel.sharding == spec_of("layers/dense/kernel", None)
    whole = expected(tensors)["layers"]["dense"]["kernel"]
    assert len(kernel.addressable_shards) == 8
    for shard in kernel.addressable_shards:
        assert shard.data.shape == (LAYERS, 16, 10)
        column = list(mesh().devices[0]).index(shard.device) if shard.replica_id == 0 else None
        if column is not None:
            slices = whole[:, :, column * 10 : column * 10 + 10]
            np.testing.assert_array_equal(shard.data, slices)


def test_shardings_may_be_a_tree_or_one_for_all(folder, tensors):
    everywhere = NamedSharding(mesh(), PartitionSpec())
    tree = jax.tree.map(lambda _: everywhere, TARGET)
    for shardings in (everywhere, tree, jax.devices()[3]):
        params = apply_key_table(
            read_safetensors(folder), TABLE, TARGET, placement=Placement("keep", shardings)
        )
        jax.tree.map(np.testing.assert_array_equal, params, expected(tensors))
        devices = params["embed"]["embedding"].devices()
        assert devices == ({shardings} if shardings is jax.devices()[3] else set(jax.devices()))
    del tree["layers"]["gain"]
    with pytest.raises(ValueError, match="shardings: nothing for parameter layers/gain"):
        apply_key_table(read_safetensors(folder), TABLE, TARGET, placement=Placement("keep", tree))


def test_without_shardings_parameters_go_where_jit_wants_them(folder):
    params = apply_key_table(read_safetensors(folder), TABLE, TARGET)
    batch = jax.device_put(
        np.ones((8, 16), np.float32), NamedSharding(mesh(), PartitionSpec("data"))
    )
    jax.jit(lambda table, batch: batch @ table.T)(params["embed"]["embedding"], batch)


def test_donating_loaded_parameters_changes_no_other(folder, tensors):
    """Devices that hold the same may share the host's memory."""
    everywhere = NamedSharding(mesh(), PartitionSpec())
    with loading_as(shardings=everywhere):
        params = apply_key_table(read_safetensors(folder), TABLE, TARGET)
    table = params["embed"]["embedding"]
    copies = [np.array(shard.data) for shard in table.addressable_shards]
    after = jax.jit(lambda table: table * 2 + 1, donate_argnums=0)(table)
    for shard, before in zip(after.addressable_shards, copies, strict=True):
        np.testing.assert_array_equal(shard.data, before * 2 + 1)


def test_sharded_parameters_have_the_same_fingerprint(folder):
    class Tokens:
        def to_str(self):
            return ""

    found = []
    for shardings in (None, spec_of):
        with loading_as(dtype="bfloat16", shardings=shardings):
            params = apply_key_table(read_safetensors(folder), TABLE, TARGET)
        found.append(fingerprint(3, params, Tokens()))
    assert found[0] == found[1]


def test_a_file_cut_while_it_is_open_is_named(folder):
    tensors = read_safetensors(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="model.safetensors: ends inside tensor"):
        apply_key_table(tensors, TABLE, TARGET)


CHILD = """
import json, sys
from programs import load_script
benchmark = load_script("benchmarks/loading.py")
print(json.dumps(benchmark.load(benchmark.Path(sys.argv[1]), sys.argv[2], True)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
@pytest.mark.parametrize(("stored", "asked"), [("float32", "keep"), ("bfloat16", "float32")])
def test_peak_memory_is_the_parameters_and_little_more(tmp_path, stored, asked):
    benchmark = load_script("benchmarks/loading.py")
    folder = benchmark.write_checkpoint(tmp_path / "model", 0.4, stored)
    assert len(list(folder.glob("*.safetensors"))) == 1
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), asked],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["params"] > 0.3e9
    assert found["rise"] < 1.2 * found["params"] + found["largest"], found

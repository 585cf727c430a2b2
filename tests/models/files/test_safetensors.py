"""Reading safetensors folders, and the strict key table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ragjax.models.files import key_table
from ragjax.models.files.key_table import KeyRule, apply_key_table, read_safetensors, transpose

TABLE = {
    "embed.weight": KeyRule("embed/embedding"),
    "layer.{}.dense.weight": KeyRule("layers/dense/kernel", transpose),
    "layer.{}.dense.bias": KeyRule("layers/dense/bias"),
}
TARGET = {
    "embed": {"embedding": jax.ShapeDtypeStruct((7, 3), np.float32)},
    "layers": {
        "dense": {
            "kernel": jax.ShapeDtypeStruct((2, 3, 5), np.float32),
            "bias": jax.ShapeDtypeStruct((2, 5), np.float32),
        }
    },
}


@pytest.fixture
def tensors(rng):
    shapes = {"embed.weight": (7, 3)}
    for layer in range(2):
        shapes |= {f"layer.{layer}.dense.weight": (5, 3), f"layer.{layer}.dense.bias": (5,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_sharded(folder, tensors):
    weight_map = {}
    for number, name in enumerate(tensors):
        shard = f"model-{number % 2}.safetensors"
        weight_map[name] = shard
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_key_table_stacks_and_transposes(tensors):
    params = apply_key_table(tensors, TABLE, TARGET)
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["embed.weight"])
    for layer in range(2):
        kernel, bias = (tensors[f"layer.{layer}.dense.{kind}"] for kind in ("weight", "bias"))
        np.testing.assert_array_equal(params["layers"]["dense"]["kernel"][layer], kernel.T)
        np.testing.assert_array_equal(params["layers"]["dense"]["bias"][layer], bias)


def test_single_and_sharded_files_read_the_same(tmp_path, tensors):
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    single.mkdir(), sharded.mkdir()
    save_file(tensors, single / "model.safetensors")
    write_sharded(sharded, tensors)
    for folder in (single, sharded):
        read = read_safetensors(folder)
        assert sorted(read) == sorted(tensors) and len(read) == len(tensors)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(read[name], tensor)


def test_half_precision_checkpoints_become_float32(tmp_path, tensors):
    halved = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    save_file(halved, tmp_path / "weights.safetensors")  # the only file, under another name
    params = apply_key_table(read_safetensors(tmp_path), TABLE, TARGET)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    expected = halved["embed.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embed"]["embedding"], expected)


def change(tensors, **changes):
    """Replace tensors by shape (None removes one); names with "_" for "."."""
    changed = dict(tensors)
    for name, shape in changes.items():
        name = name.replace("_", ".")
        changed.pop(name, None)
        if shape is not None:
            changed[name] = np.zeros(shape, np.float32)
    return changed


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"embed_weight": None}, [r"missing tensor embed.weight, .*embed/embedding .*\(7, 3\)"]),
        ({"layer_1_dense_bias": None}, [r"missing tensor layer.1.dense.bias.*\(5,\)"]),
        ({"layer_2_dense_bias": (5,)}, [r"unexpected tensor layer.2.dense.bias of shape \(5,\)"]),
        ({"head_weight": (7, 3)}, [r"unexpected tensor head.weight of shape \(7, 3\)"]),
        (
            {"layer_0_dense_weight": (3, 5)},
            [r"layer.0.dense.weight has shape \(3, 5\)", r"\(3, 5\)"],
        ),
        ({"layer_0_dense_weight": (15,)}, [r"layer.0.dense.weight has shape \(15,\)"]),
        ({"embed_weight": (1, 3)}, [r"embed.weight has shape \(1, 3\).* needs \(7, 3\)"]),
        ({"embed_weight": (), "a": (1,)}, ["unexpected tensor a ", r"embed.weight has shape \(\)"]),
    ],
)
def test_whatever_does_not_fit_is_named_with_its_shape(tensors, changes, messages):
    with pytest.raises(ValueError) as raised:
        apply_key_table(change(tensors, **changes), TABLE, TARGET, source="there")
    assert str(raised.value).startswith("there: ")
    for message in messages:
        assert raised.match(message)


def test_a_parameter_without_a_rule_is_named(tensors):
    target = TARGET | {"norm": {"scale": jax.ShapeDtypeStruct((3,), np.float32)}}
    with pytest.raises(ValueError, match=r"no rule fills parameter norm/scale of shape \(3,\)"):
        apply_key_table(tensors, TABLE, target)


def test_a_rule_without_a_parameter_is_named(tensors):
    with pytest.raises(ValueError, match="'head' fills 'head/kernel', not a parameter"):
        apply_key_table(tensors, TABLE | {"head": KeyRule("head/kernel")}, TARGET)


def test_only_the_first_ten_problems_are_listed(tensors):
    extra = {f"extra.{i:02}": np.zeros(1, np.float32) for i in range(13)}
    with pytest.raises(ValueError) as raised:
        apply_key_table(tensors | extra, TABLE, TARGET)
    assert str(raised.value).count("unexpected tensor") == 10
    assert str(raised.value).endswith("and 3 more")


def test_ignored_patterns_cover_numbers_and_anything_and_are_named(tensors, caplog):
    extra = {"layer.11.mask": np.zeros(1, np.float32), "head.a.b": np.zeros(1, np.float32)}
    apply_key_table(
        tensors | extra | {"layer.2.mask": np.ones(1)}, TABLE, TARGET, source="folder",
        ignored=["layer.{}.mask", "head.*"],
    )  # fmt: skip
    left = "folder: not read, no part of this model: layer.*.mask (2 tensors), head.a.b"
    assert [record.getMessage() for record in caplog.records] == [left]
    with pytest.raises(ValueError, match=r"unexpected tensor layer.11.mask"):
        apply_key_table(tensors | extra, TABLE, TARGET, ignored=["layer.{}", "head.*"])


def test_weights_beside_those_that_are_read_are_named(tmp_path, caplog):
    for name in ("model", "consolidated", "adapter_model"):
        save_file({name: np.ones(1)}, tmp_path / f"{name}.safetensors")
    assert list(read_safetensors(tmp_path)) == ["model"]
    left = "not read beside model.safetensors: adapter_model.safetensors, consolidated.safetensors"
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: {left}"]


def test_a_stored_buffer_is_what_is_computed_or_named(tensors, caplog):
    for stored, said in (([[0, 1, 2]], 0), ([[0, 1, 1]], 1)):
        apply_key_table(
            tensors | {"position_ids": np.array(stored)}, TABLE, TARGET,
            buffers={"position_ids": key_table.counts_up}, source="folder",
        )  # fmt: skip
        assert len(caplog.records) == said
    assert "folder: tensor position_ids holds other values than config.json" in caplog.text


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_stored_tensors_are_compared_in_parts(tmp_path, rng, dtype, monkeypatch):
    monkeypatch.setattr(key_table, "_COMPARED_BYTES", 40)
    one = rng.normal(size=(7, 5)).astype(np.float16)
    last = one.copy()
    last[-1, -1] += 1
    tensors = {"one": one, "copy": one.astype(dtype), "last": last, "wide": one[:, :4].copy()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_safetensors(tmp_path)
    equal = [key_table.same_values(stored["one"], stored[name]) for name in tensors]
    assert equal == [True, True, False, False]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pytorch_files_alone_get_a_conversion_hint(tmp_path, name):
    (tmp_path / name).write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=f"only PyTorch weights .{name}.*convert with"):
        read_safetensors(tmp_path)


@pytest.mark.slow
def test_the_conversion_hint_works_when_pasted(tmp_path):
    """On shards, tensors that share memory, and a folder name that a shell would split."""
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    folder = tmp_path / "a model's folder"
    folder.mkdir()
    table = torch.arange(6.0).reshape(2, 3)
    first = {"shared.weight": table, "lm_head.weight": table, "turned.weight": table.T}
    second = {"half": table.bfloat16()[1:], "positions": torch.arange(4)}
    torch.save(first, folder / "pytorch_model-00001-of-00002.bin")
    torch.save(second, folder / "pytorch_model-00002-of-00002.bin")
    torch.save({"a": 1}, folder / "optimizer.bin")
    with pytest.raises(FileNotFoundError, match="only PyTorch weights .pytorch_model-") as raised:
        read_safetensors(folder)
    command = re.search("convert with `(.*)`$", str(raised.value))[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, env=os.environ | {"PATH": path})
    found = read_safetensors(folder)
    expected = first | second
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert str(tensor.dtype) == f"torch.{found[name].dtype}"
        np.testing.assert_array_equal(
            np.asarray(found[name]).astype(np.float32), tensor.float().numpy()
        )
    # transformers asks for it.
    assert b'"format":"pt"' in (folder / "model.safetensors").read_bytes()[:300]


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        read_safetensors(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match="2 files .* no model.safetensors.index.json"):
        read_safetensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path, tensors):
    write_sharded(tmp_path, tensors)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1.safetensors: shard named in"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match='index.json: expected a JSON object with a "weight_map"'):
        read_safetensors(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path, tensors):
    save_file(tensors, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": dict.fromkeys(tensors, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'../outside.safetensors' is not a plain file name"):
        read_safetensors(folder)


def test_a_damaged_file_is_refused(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("layer.0.dense.weight", np.int8),
        ("layer.0.dense.weight", ml_dtypes.float8_e4m3fn),
        ("layer.0.dense.qweight", np.int32),
        ("layer.0.dense.weight_scale", np.float32),
    ],
)
def test_quantised_checkpoints_are_refused_by_name(tmp_path, tensors, name, dtype):
    save_file(tensors | {name: np.ones((5, 3), dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensor '{name}' is quantised"):
        read_safetensors(tmp_path)

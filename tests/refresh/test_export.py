"""Parameters as a folder: read back exactly, verified, and refused where they do not fit."""

import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax import storage
from ragjax.index import DiskFullError
from ragjax.refresh import list_exports, read_export, write_export
from ragjax.refresh.task import params_digest


@pytest.fixture
def params(rng):
    return {
        "layers": {
            "kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16),
            "transposed": np.asfortranarray(rng.normal(size=(5, 7)).astype(np.float32)),
        },
        "scale": np.float32(2.5),
        "ids": [np.arange(6, dtype=np.int32)[::2], np.zeros((0, 3), np.float16)],
    }


@pytest.fixture
def folder(params, tmp_path):
    write_export(tmp_path / "export", params, step=7, info={"encoder": "tiny"})
    return tmp_path / "export"


@pytest.mark.parametrize("shapes_only", [False, True])
def test_reads_back_what_was_written(params, folder, shapes_only):
    template = params
    if shapes_only:
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), params)
    export = read_export(folder, template)
    assert (export.step, export.info) == (7, {"encoder": "tiny"})
    assert export.digest == params_digest(export.params)
    assert jax.tree.structure(export.params) == jax.tree.structure(params)
    for found, wanted in zip(jax.tree.leaves(export.params), jax.tree.leaves(params), strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == np.ascontiguousarray(wanted).tobytes()
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "params.safetensors"]


@pytest.mark.parametrize("shapes_only", [False, True])
def test_typed_random_keys_come_back_as_the_same_keys(tmp_path, shapes_only):
    params = {"w": jnp.ones(2), "dropout": jax.random.key(3), "rbg": jax.random.key(4, impl="rbg")}
    write_export(tmp_path / "export", params, step=1, info={})
    template = jax.eval_shape(lambda: params) if shapes_only else params
    found = read_export(tmp_path / "export", template).params
    assert all(found[name] == params[name] for name in ("dropout", "rbg"))
    assert params_digest(found) == params_digest(params)
    assert params_digest(params | {"dropout": jax.random.key(5)}) != params_digest(params)


def test_the_order_of_the_leaves_does_not_matter(tmp_path, folder, params):
    backwards = dict(reversed(params.items()))
    digest = write_export(tmp_path / "backwards", backwards, step=7, info={})
    assert digest == read_export(folder, backwards).digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"extra": p["scale"]}, r"\['extra'\] is missing"),
        (lambda p: {"scale": p["scale"]}, r"\['ids'\]\[0\] is not expected"),
        (
            lambda p: p | {"scale": np.zeros(3, np.float32)},
            r"\(\) float32, expected \(3,\) float32",
        ),
        (
            lambda p: p | {"scale": np.float16(1)},
            r"\['scale'\] is \(\) float32, expected .* float16",
        ),
    ],
)
def test_another_model_is_refused_and_what_differs_named(params, folder, change, message):
    with pytest.raises(ValueError, match=message):
        read_export(folder, change(params))


def test_damage_and_links_are_refused(params, folder, tmp_path):
    path = folder / "params.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"params.safetensors is damaged: expected SHA-256"):
        read_export(folder, params)
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is no plain file"):
        read_export(folder, params)
    path.unlink()
    path.write_bytes(original)
    manifest = folder / "manifest.json"
    value = json.loads(manifest.read_text())
    storage.write_sealed(manifest, value | {"params_digest": "0" * 64})
    with pytest.raises(ValueError, match="its manifest says 000"):
        read_export(folder, params)
    storage.write_sealed(manifest, value | {"format": 9})
    with pytest.raises(ValueError, match="has format 9; this version reads 1"):
        read_export(folder, params)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match="holds no complete export"):
        read_export(folder, params)


def test_an_export_is_not_written_over(params, folder):
    with pytest.raises(FileExistsError):
        write_export(folder, params, step=8, info={})
    assert read_export(folder, params).step == 7
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"400,000 bytes .*params.safetensors"):
            write_export(tmp_path / "a", {"a": np.zeros(100_000, np.float32)}, step=0, info={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_exports_are_listed_by_number(tmp_path, params):
    for name in ("10", "9", "000002"):
        write_export(tmp_path / name, params, step=0, info={})
    (tmp_path / "11.building").mkdir()
    (tmp_path / "12").write_text("")
    (tmp_path / "13").symlink_to(tmp_path / "9")
    assert [(number, path.name) for number, path in list_exports(tmp_path)] == [
        (2, "000002"),
        (9, "9"),
        (10, "10"),
    ]
    assert list_exports(tmp_path / "absent") == []

import errno
import json
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.storage import DiskFullError
from ragjax.training import checkpoint
from ragjax.training.checkpoint import Checkpointer


def tree(value: float) -> dict:
    return {"w": jnp.full((3, 2), value), "step": jnp.int32(7), "k": (jnp.zeros(2, jnp.uint32),)}


def test_a_saved_step_comes_back_with_its_bits_and_its_info(tmp_path, rng):
    state = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "n": jnp.int32(3)}
    Checkpointer(tmp_path).save(5, state, {"index_version": 2})
    restored = Checkpointer(tmp_path).latest_good(state)
    assert restored is not None and restored.step == 5 and restored.info == {"index_version": 2}
    np.testing.assert_array_equal(restored.state["w"], state["w"])
    assert restored.state["n"].dtype == jnp.int32


def test_only_the_newest_steps_are_kept(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, tree(step))
    assert checkpoints.steps() == [3, 4]


def flip(folder: Path) -> None:
    """Changes one byte of the largest array on disk."""
    data = max((p for p in folder.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    data.write_bytes(raw)


def test_flipped_bytes_are_found_and_the_step_before_is_used(tmp_path):
    reports = []
    checkpoints = Checkpointer(tmp_path, keep=3, report=reports.append)
    checkpoints.save(1, tree(1.0))
    checkpoints.save(2, tree(2.0))
    flip(tmp_path / "2")
    restored = checkpoints.latest_good(tree(0.0))
    assert restored is not None and restored.step == 1
    np.testing.assert_array_equal(restored.state["w"], np.full((3, 2), 1.0))
    assert "sha256" in reports[0] and str(tmp_path / "2") in reports[0]


def test_a_full_disk_names_the_step_and_leaves_the_earlier_one_alone(tmp_path):
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, tree(1.0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        state = {"w": np.random.default_rng(0).normal(size=50_000).astype(np.float32)}
        with pytest.raises(DiskFullError, match=r"200,000 bytes are needed.*/2'"):
            checkpoints.save(2, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.steps() == [1] == [int(path.name) for path in tmp_path.iterdir()]


@pytest.mark.parametrize("looks_first", [True, False])
def test_damaged_later_steps_never_push_out_the_one_just_saved(tmp_path, looks_first):
    reports = []
    checkpoints = Checkpointer(tmp_path, keep=2, report=reports.append)
    for step in (20, 30):
        checkpoints.save(step, tree(float(step)))
        flip(tmp_path / str(step))
    if looks_first:
        assert checkpoints.latest_good(tree(0.0)) is None
    for step in (10, 11, 12):
        checkpoints.save(step, tree(float(step)))
        assert checkpoints.latest_good(tree(0.0)).step == step
    assert checkpoints.steps() == [11, 12]
    assert any(str(tmp_path / "30") in r and "removed" in r for r in reports)


def test_damaged_steps_do_not_count_as_kept(tmp_path):
    Checkpointer(tmp_path, keep=2).save(1, tree(1.0))
    Checkpointer(tmp_path, keep=2).save(2, tree(2.0))
    flip(tmp_path / "2")
    checkpoints = Checkpointer(tmp_path, keep=2, report=lambda _: None)  # a restarted run
    checkpoints.save(3, tree(3.0))
    assert checkpoints.steps() == [1, 3]


def test_a_whole_later_step_stays_and_so_does_the_one_just_saved(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=1)
    checkpoints.save(7, tree(7.0))
    checkpoints.save(3, tree(3.0))
    assert 3 in checkpoints.steps()


def test_a_save_that_fails_leaves_the_earlier_one_of_the_same_step(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path, keep=1)
    checkpoints.save(3, tree(3.0))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_sealed", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(3, tree(4.0))
    np.testing.assert_array_equal(checkpoints.latest_good(tree(0.0)).state["w"], np.full((3, 2), 3))


@pytest.mark.parametrize(
    "damage", ["missing_file", "no_digests", "torn_digests", "flipped_info", "empty_folder"]
)
def test_an_unfinished_or_damaged_step_is_passed_over(tmp_path, damage):
    reports = []
    checkpoints = Checkpointer(tmp_path, keep=3, report=reports.append)
    checkpoints.save(1, tree(1.0))
    if damage == "empty_folder":
        (tmp_path / "2").mkdir()
    else:
        checkpoints.save(2, tree(2.0), {"index": 3})
        digests = tmp_path / "2" / "ragjax.json"
        if damage == "missing_file":
            name = next(n for n in json.loads(digests.read_text())["sha256"] if "/d/" in n)
            (tmp_path / "2" / name).unlink()
        elif damage == "no_digests":
            digests.unlink()
        elif damage == "flipped_info":
            digests.write_text(digests.read_text().replace('"index": 3', '"index": 2'))
        else:
            digests.write_text('{"format": 1, "sha')
    restored = checkpoints.latest_good(tree(0.0))
    assert restored is not None and restored.step == 1
    assert len(reports) == 1


def test_a_step_left_half_written_can_be_saved_again(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "junk").write_text("x")
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(3, tree(3.0))
    assert checkpoints.latest_good(tree(0.0)).step == 3


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e5m2", "complex64"])
def test_nan_is_not_saved_and_the_last_good_step_stays(tmp_path, dtype, bad):
    checkpoints = Checkpointer(tmp_path, keep=1)
    checkpoints.save(1, {"w": jnp.ones(3, dtype)})
    with pytest.raises(ValueError, match=r"NaN or infinity in \['w'\]"):
        checkpoints.save(2, {"w": jnp.array([1, float(bad), 1]).astype(dtype)})
    assert checkpoints.steps() == [1]


def test_other_shapes_are_refused_with_the_folder_named(tmp_path):
    Checkpointer(tmp_path).save(1, tree(1.0))
    other = tree(0.0) | {"w": jnp.zeros((5, 2))}
    with pytest.raises(ValueError, match="checkpoint"):
        Checkpointer(tmp_path).latest_good(other)


def test_other_dtypes_are_refused_instead_of_cast(tmp_path):
    Checkpointer(tmp_path).save(1, tree(1.0))
    other = tree(0.0) | {"w": jnp.zeros((3, 2), jnp.bfloat16)}
    with pytest.raises(ValueError, match="checkpoint"):
        Checkpointer(tmp_path).latest_good(other)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_random_keys_come_back_as_the_same_keys(tmp_path, impl):
    key = jax.random.key(5, impl=impl)
    state = {"key": key, "keys": jax.random.split(key, 3), "w": jnp.ones(2)}
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(np.int64(1), state)
    shapes = jax.eval_shape(lambda: state)
    for template in (state, shapes):
        found = checkpoints.latest_good(template).state
        assert [found[name].dtype for name in state] == [leaf.dtype for leaf in state.values()]
        assert all((found[name] == state[name]).all() for name in state)
    with pytest.raises(ValueError, match="is of another run: .'key'."):
        checkpoints.latest_good(state | {"key": jax.random.key_data(key)})


def test_nothing_saved_is_none(tmp_path):
    assert Checkpointer(tmp_path).latest_good(tree(0.0)) is None


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        Checkpointer(tmp_path, keep=0)


def test_a_step_that_is_saved_in_the_background_has_the_values_of_its_moment(tmp_path):
    checkpoints, state = Checkpointer(tmp_path), tree(1.0)
    donated = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints.save(1, state, {"index_version": 3}, wait=False)
    state = donated(state)
    checkpoints.wait()
    assert not checkpoints.busy
    restored = checkpoints.latest_good(state)
    assert restored is not None and restored.info == {"index_version": 3}
    np.testing.assert_array_equal(restored.state["w"], np.full((3, 2), 1.0))


@pytest.mark.parametrize("call", ["wait", "save", "end"])
def test_what_fails_in_the_background_is_raised_by_what_comes_next(tmp_path, call):
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, tree(1.0))
    with pytest.raises(ValueError, match="step 2 is not saved: NaN"):
        with checkpoints:
            checkpoints.save(2, tree(jnp.nan), wait=False)
            if call == "wait":
                checkpoints.wait()
            if call == "save":
                checkpoints.save(3, tree(3.0))
    assert checkpoints.steps() == [1]


def test_an_error_of_the_training_is_not_hidden_by_that_of_its_last_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="no index") as raised:
        with Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(2, tree(jnp.nan), wait=False)
            raise RuntimeError("no index")
    assert "checkpoint could not be written: step 2" in raised.value.__notes__[0]

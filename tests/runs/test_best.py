"""Parameters measured while they train: the best step is kept, also across a kill."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.runs.train.best import BestStep, measured_steps
from ragjax.runs.trainable import average_params


@dataclasses.dataclass(frozen=True)
class Place:
    """What `BestStep` reads of a workspace."""

    folder: object
    log: object = staticmethod(lambda line: None)


class Counted:
    """A measure whose figure is the parameter itself, and that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, params):
        self.calls += 1
        return np.array([float(params["w"][0]), 0.5, np.nan])


def params(value):
    return {"w": jnp.full(2, value, jnp.float32)}


def test_a_stage_is_measured_four_times_and_at_its_end():
    assert measured_steps(40) == [10, 20, 30, 40]
    assert measured_steps(5) == [2, 3, 4, 5]
    assert measured_steps(1) == [1]


def test_the_best_step_is_kept_over_rounds_and_of_equal_ones_the_first(tmp_path):
    best = BestStep(Place(tmp_path), "towers", Counted())
    values = iter([0.1, 0.7, 0.2, 0.3, 0.4, 0.7, 0.0, 0.1])
    for stage in ("first", "second"):
        watch = best.watch(stage, 4)
        for done in range(1, 5):
            watch(done, params(next(values)))
    name, kept = best.restore(params(0.0))
    assert name == "first 2"
    np.testing.assert_array_equal(kept["w"], np.float32([0.7, 0.7]))
    assert list(best.figures) == [f"{s} {n}" for s in ("first", "second") for n in range(1, 5)]


def test_what_an_earlier_life_measured_is_not_measured_again(tmp_path):
    values = [0.1, 0.7, 0.2, 0.3]
    watch = BestStep(Place(tmp_path), "towers", Counted()).watch("stage", 4)
    for done in (1, 2, 3):
        watch(done, params(values[done - 1]))
    measure = Counted()
    again = BestStep(Place(tmp_path), "towers", measure)
    watch = again.watch("stage", 4)
    for done in (2, 3, 4):  # the last checkpoint was at step 1
        watch(done, params(values[done - 1]))
    assert measure.calls == 1
    assert again.restore(params(0.0))[0] == "stage 2"
    assert again.measure("factor", params(0.9))[0] == pytest.approx(0.9)
    assert again.measure("factor", params(0.1))[0] == pytest.approx(0.9)


def test_parameters_that_are_lost_are_named(tmp_path):
    best = BestStep(Place(tmp_path), "towers", Counted())
    best.watch("stage", 1)(1, params(0.3))
    for file in (tmp_path / "checkpoints" / "towers-best").rglob("ragjax.json"):
        file.unlink()
    with pytest.raises(ValueError, match="parameters of stage 1, the best step on dev"):
        best.restore(params(0.0))


def test_weights_are_averaged_and_of_adapters_their_product():
    before, after = {"kernel": jnp.zeros(2)}, {"kernel": jnp.full(2, 4.0)}
    assert average_params(before, after, 0) is before
    assert average_params(before, after, 1) is after
    np.testing.assert_array_equal(average_params(before, after, 0.25)["kernel"], [1.0, 1.0])

    def adapters(down, up):
        return {"lora": {"down": jnp.full((2, 1), down), "up": jnp.full((1, 2), up), "scale": 2.0}}

    mixed = average_params(adapters(1.0, 0.0), adapters(3.0, 4.0), 0.5)["lora"]
    np.testing.assert_array_equal(mixed["down"] @ mixed["up"], np.full((2, 2), 0.5 * 3 * 4))
    assert mixed["scale"] == 2.0

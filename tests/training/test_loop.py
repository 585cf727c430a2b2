import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ragjax.training.checkpoint import Checkpointer
from ragjax.training.finite import NonFiniteError, not_finite
from ragjax.training.loop import (
    Interrupted,
    LoopConfig,
    MetricsLog,
    StopFlag,
    graceful_stop,
    run_steps,
)
from ragjax.training.steps import init_state, make_train_step


def noisy_quadratic(params, frozen, batch, key):
    import jax

    target = batch + 0.1 * jax.random.normal(key, params["w"].shape)
    return jnp.sum((params["w"] - target) ** 2), {}


OPTIMIZER = optax.adam(0.05)
STEP = make_train_step(noisy_quadratic, OPTIMIZER)


def batch_at(step):
    return jnp.asarray(np.random.default_rng(step).normal(size=3), jnp.float32)


def train(folder, *, num_steps=9, stop=None, batches=batch_at, step_fn=STEP, **changes):
    return run_steps(
        LoopConfig(stage="s", num_steps=num_steps, checkpoint_seconds=0, **changes),
        step_fn,
        init_state({"w": jnp.zeros(3)}, OPTIMIZER, 0),
        batches,
        checkpointer=Checkpointer(folder / "checkpoints"),
        log=MetricsLog(folder / "metrics.jsonl"),
        stop=stop or StopFlag(),
        info={"index_version": 0},
        describe_batch=lambda step: f"questions q{step}",
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 4, 5])
def test_a_run_cut_after_any_step_continues_bit_identically(tmp_path, cut):
    whole = train(tmp_path / "whole")

    class Killed(Exception):
        pass

    def dies(step):
        if step == cut:
            raise Killed
        return batch_at(step)

    with pytest.raises(Killed):
        train(tmp_path / "cut", batches=dies)
    continued = train(tmp_path / "cut")
    np.testing.assert_array_equal(continued.params["w"], whole.params["w"])
    assert [row["step"] for row in lines(tmp_path / "cut")] == list(range(9))
    assert [r["loss"] for r in lines(tmp_path / "cut")] == [
        r["loss"] for r in lines(tmp_path / "whole")
    ]


def test_a_finished_stage_is_not_run_again(tmp_path):
    train(tmp_path)

    def forbidden(step):
        raise AssertionError("no step is left")

    again = train(tmp_path, batches=forbidden)
    assert int(again.step) == 9


def test_a_stop_saves_the_step_and_says_by_which_signal(tmp_path):
    stop = StopFlag()

    def asks_to_stop(step):
        stop.signum = signal.SIGTERM if step == 4 else None
        return batch_at(step)

    with pytest.raises(Interrupted) as stopped:
        train(tmp_path, stop=stop, batches=asks_to_stop)
    assert stopped.value.signum == signal.SIGTERM
    assert Checkpointer(tmp_path / "checkpoints").steps()[-1] == 5
    np.testing.assert_array_equal(
        train(tmp_path).params["w"], train(tmp_path / "whole").params["w"]
    )


def test_nan_in_a_row_stops_the_run_with_the_batch_named_and_the_last_good_step_kept(tmp_path):
    def sick(step):
        return batch_at(step) * (jnp.nan if step >= 4 else 1.0)

    with pytest.raises(NonFiniteError, match=r"step 7 \(questions q7\)"):
        train(tmp_path, batches=sick, max_skipped=3)
    restored = Checkpointer(tmp_path / "checkpoints").latest_good(
        init_state({"w": jnp.zeros(3)}, OPTIMIZER, 0)
    )
    assert np.isfinite(restored.state.params["w"]).all()
    assert lines(tmp_path)[-1]["loss"] is None


def test_a_single_nan_is_skipped_and_the_run_goes_on(tmp_path):
    def sick(step):
        return batch_at(step) * (jnp.nan if step == 4 else 1.0)

    assert np.isfinite(train(tmp_path, batches=sick).params["w"]).all()
    assert [row["skipped"] for row in lines(tmp_path)] == [0, 0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("scale", "frozen", "cause"),
    [
        (jnp.nan, 0.0, "The loss itself is not finite from the first step on"),
        (1.0, 0.0, "The gradient overflows from the first step on"),
        (1.0, jnp.nan, "1 arrays of the parameters hold NaN or infinity, the first 1/lm: no learn"),
    ],
)
def test_a_stage_of_which_nothing_was_applied_fails_by_its_cause(tmp_path, scale, frozen, cause):
    def norm(params, frozen, batch, key):  # whose gradient at 0 is 0 / 0
        return scale * jnp.sqrt((params["w"] ** 2).sum()) + frozen["lm"], {}

    step = make_train_step(norm, OPTIMIZER)

    def run():
        state = init_state({"w": jnp.zeros(3)}, OPTIMIZER, 0)
        run_steps(
            LoopConfig(stage="s", num_steps=3), step, state, batch_at,
            checkpointer=Checkpointer(tmp_path / "checkpoints"),
            log=MetricsLog(tmp_path / "metrics.jsonl"), stop=StopFlag(),
            frozen={"lm": jnp.float32(frozen)},
        )  # fmt: skip

    with pytest.raises(NonFiniteError, match=f"s: 3 of 3 updates were skipped .*{cause}"):
        run()
    with pytest.raises(NonFiniteError, match="3 of 3"):  # nor is it a success the second time
        run()


def test_arrays_that_are_not_finite_are_named_by_one_program(compilations):
    params = {
        "good": jnp.ones((2, 3)),
        "bad": [jnp.ones(2).at[1].set(jnp.nan), jnp.full((3, 1), -jnp.inf, jnp.bfloat16)],
        "counts": jnp.arange(4),
    }
    with compilations() as compiled:
        assert not_finite(params) == ["bad/0", "bad/1"]
    assert len(compiled) == 1


def test_few_skipped_updates_and_impossible_answers_are_said(tmp_path, capsys):
    def sick(step):
        return batch_at(step) * (jnp.nan if step in (4, 6) else 1.0)

    def step_fn(state, batch, frozen):
        state, metrics = STEP(state, batch, frozen)
        return state, metrics | {"impossible_answers": jnp.float32(state.step == 3) * 2}

    train(tmp_path, batches=sick, step_fn=step_fn)
    said = capsys.readouterr().out
    assert "s: 2 of 9 updates were skipped" in said and "the first at step 4 (questions q4)" in said
    assert "s: 2 answers had probability 0" in said and "the first at step 2 (questions q2)" in said


def test_a_checkpoint_of_another_index_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match="index_version=0, this run has 1"):
        run_steps(
            LoopConfig(stage="s", num_steps=9),
            STEP,
            init_state({"w": jnp.zeros(3)}, OPTIMIZER, 0),
            batch_at,
            checkpointer=Checkpointer(tmp_path / "checkpoints"),
            log=MetricsLog(tmp_path / "metrics.jsonl"),
            stop=StopFlag(),
            info={"index_version": 1},
        )


def test_rewinding_drops_redone_and_torn_lines_of_one_stage_only(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    for stage, step in (("a", 0), ("a", 1), ("b", 0), ("b", 1)):
        log.write(stage, step, {"loss": 1.0})
    with open(path, "a") as file:
        file.write('{"stage": "b", "st')
    log.rewind("b", 1)
    assert [(row["stage"], row["step"]) for row in lines_of(path)] == [("a", 0), ("a", 1), ("b", 0)]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_signal_sets_the_flag_and_the_old_handlers_come_back():
    old = signal.getsignal(signal.SIGTERM)
    with graceful_stop(report=lambda _: None) as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) is old


def test_the_second_signal_ends_the_process_at_once():
    program = (
        "import os, signal, time\n"
        "from ragjax.training.loop import graceful_stop\n"
        "with graceful_stop():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT


def test_the_host_builds_a_batch_while_the_step_before_runs(tmp_path):
    written = []

    def notes_what_is_written(step):
        path = tmp_path / "metrics.jsonl"
        written.append(len(lines(tmp_path)) if path.exists() else 0)
        return batch_at(step)

    config = LoopConfig(stage="s", num_steps=5, checkpoint_seconds=1e9)
    run_steps(
        config, STEP, init_state({"w": jnp.zeros(3)}, OPTIMIZER, 0), notes_what_is_written,
        checkpointer=Checkpointer(tmp_path / "checkpoints"),
        log=MetricsLog(tmp_path / "metrics.jsonl"), stop=StopFlag(),
    )  # fmt: skip
    assert written == [0, 0, 1, 2, 3]  # of step n - 1 nothing was fetched yet
    assert [row["step"] for row in lines(tmp_path)] == list(range(5))
    assert Checkpointer(tmp_path / "checkpoints").steps() == [5]


def test_checkpoints_in_the_background_hold_the_step_they_name(tmp_path):
    whole = train(tmp_path / "whole")

    def dies(step):
        if step == 7:
            raise KeyError("killed")
        return batch_at(step)

    def run(batches):
        return run_steps(
            LoopConfig(stage="s", num_steps=9, checkpoint_seconds=1e-9), STEP,
            init_state({"w": jnp.zeros(3)}, OPTIMIZER, 0), batches,
            checkpointer=Checkpointer(tmp_path / "cut" / "checkpoints"),
            log=MetricsLog(tmp_path / "cut" / "metrics.jsonl"), stop=StopFlag(),
        )  # fmt: skip

    with pytest.raises(KeyError):
        run(dies)
    assert Checkpointer(tmp_path / "cut" / "checkpoints").steps()
    np.testing.assert_array_equal(run(batch_at).params["w"], whole.params["w"])
    assert [row["step"] for row in lines(tmp_path / "cut")] == list(range(9))


class Host:
    """Host work that shifts the batch by the parameters it sees, and can fail at a step."""

    def __init__(self, fails_at=None):
        self.fails_at, self.resumed, self.shift = fails_at, None, 0.0

    def resume(self, step, state, saved):
        self.resumed = (step, None if saved is None else saved["seen"])
        self.seen = 0 if saved is None else saved["seen"]

    def before_step(self, step, state):
        if step == self.fails_at:
            raise RuntimeError("no index")
        self.seen += 1
        self.shift = float(state.params["w"][0])
        return {"host/seen": self.seen}

    def state_dict(self):
        return {"seen": self.seen}

    def line(self, step):
        return f"seen {self.seen}"


def train_with_host(folder, host):
    return run_steps(
        LoopConfig(stage="s", num_steps=7, checkpoint_seconds=1e9),
        STEP,
        init_state({"w": jnp.zeros(3)}, OPTIMIZER, 0),
        lambda step: batch_at(step) + host.shift,
        checkpointer=Checkpointer(folder / "checkpoints"),
        log=MetricsLog(folder / "metrics.jsonl"),
        stop=StopFlag(),
        host=host,
    )


def test_the_host_prepares_each_step_and_its_state_comes_back_where_it_failed(tmp_path):
    whole = train_with_host(tmp_path / "whole", host := Host())
    assert host.resumed == (0, None)
    assert [row["host/seen"] for row in lines(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(RuntimeError, match="no index"):
        train_with_host(tmp_path / "cut", Host(fails_at=4))
    continued = train_with_host(tmp_path / "cut", host := Host())
    assert host.resumed == (4, 4)  # saved though no checkpoint was due
    np.testing.assert_array_equal(continued.params["w"], whole.params["w"])
    assert [row["host/seen"] for row in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6, 7]

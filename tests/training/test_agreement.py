"""What a process of a run does where others have something else to say, without the others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ragjax.refresh import background
from ragjax.storage import processes
from ragjax.training import checkpoint, loop
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.steps import init_state, make_train_step


@pytest.mark.parametrize(
    ("error", "missing"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: connection closed by peer"), True),
        (TimeoutError("waiting at barrier"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ValueError("of bad input"), False),
    ],
)
def test_which_errors_come_of_a_lost_process(monkeypatch, error, missing):
    assert not processes.misses_another(error)  # of a run of one process
    monkeypatch.setattr(processes, "several", lambda: True)
    assert processes.misses_another(error) == missing


@pytest.fixture
def saved(tmp_path):
    """A checkpointer with steps 1 and 2, and their state."""
    saver, state = Checkpointer(tmp_path), {"w": jnp.arange(3.0)}
    for step in (1, 2):
        saver.save(step, state)
    return saver, state


@pytest.mark.parametrize(("of_first", "expected"), [(2, 2), (1, 1), (-1, None)])
def test_the_checkpoint_that_process_0_reads_is_read_by_all(saved, monkeypatch, of_first, expected):
    monkeypatch.setattr(checkpoint, "several", lambda: True)
    monkeypatch.setattr(checkpoint, "everyone", lambda mine: np.array([[of_first], [mine]]))
    back = saved[0].latest_good(saved[1])
    assert (back and back.step) == expected


def test_a_checkpoint_that_does_not_come_in_sight_is_an_error(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "several", lambda: True)
    monkeypatch.setattr(checkpoint, "everyone", lambda mine: np.array([[7], [mine]]))
    monkeypatch.setattr(checkpoint, "_SEEN_AFTER", 0)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: None)
    with pytest.raises(ValueError, match="7: it was not finished"):
        saved[0].latest_good(saved[1])


class Others:
    """Votes of two processes, this one first; what the other says is given."""

    def __init__(self, other):
        self.other, self.last = iter(other), None

    def __call__(self, *mine):
        earlier, self.last = self.last, np.array([mine, next(self.other)])
        return earlier


def make_background(monkeypatch, other, failed):
    monkeypatch.setattr(background, "several", lambda: True)
    monkeypatch.setattr(background, "largest", lambda mine: max(int(mine), failed))
    work = background.Background(
        lambda export: None, None, max_retries=0, backoff_seconds=0, report=print
    )
    work._votes = Others(other)
    return work


def test_an_index_serves_once_all_have_it(monkeypatch):
    work = make_background(monkeypatch, [(0,), (1,), (1,)], failed=0)
    work.ready = "index"
    assert work.busy and not work.works
    assert work.fetch() == (None, None)  # no vote before
    assert work.fetch() == (None, None)  # the other had none at the first
    assert work.fetch() == ("index", None)
    assert not work.busy


@pytest.mark.parametrize("waits", [False, True])
def test_a_refresh_that_failed_in_one_process_failed_in_all(monkeypatch, waits):
    work = make_background(monkeypatch, [(2,), (2,)], failed=1)
    work.ready = "index"
    if waits:
        assert work.wait(None, lambda: None, lambda: None)
    else:
        work.fetch()
    ready, failure = work.fetch()
    assert ready is None and "another process failed" in str(failure)


def run(tmp_path, monkeypatch, other, *, seconds):
    monkeypatch.setattr(loop, "several", lambda: True)
    monkeypatch.setattr(loop, "Votes", lambda: Others(other))
    saves, optimizer = [], optax.sgd(0.1)

    class Saver(Checkpointer):
        busy = False

        def save(self, step, *rest, **options):
            saves.append(step)

    saver = Saver(tmp_path / "checkpoints")
    step = make_train_step(
        lambda params, frozen, batch, key: ((params["w"] ** 2).sum(), {}), optimizer
    )
    config = loop.LoopConfig(stage="s", num_steps=6, checkpoint_seconds=seconds)
    try:
        loop.run_steps(
            config, step, init_state({"w": jnp.ones(2)}, optimizer, 0), lambda n: jnp.zeros(1),
            checkpointer=saver, log=loop.MetricsLog(tmp_path / "m.jsonl"), stop=loop.StopFlag(),
        )  # fmt: skip
    except loop.Interrupted as stopped:
        saves.append(stopped.signum)
    return saves


QUIET = [(0, 0)] * 6


@pytest.mark.parametrize(
    ("seconds", "other", "expected"),
    [
        # Due at each step by the clock of process 0: heard a step late, and once for each save.
        (1e-9, QUIET, [3, 5, 6]),
        (1e9, QUIET, [6]),
        (0, QUIET, [1, 2, 3, 4, 5, 6]),
        # The other one was asked to stop in its second step.
        (1e9, [(0, 0), (15, 0), (15, 0)], [3, 15]),
    ],
)
def test_processes_save_and_stop_after_the_same_step(
    tmp_path, monkeypatch, seconds, other, expected
):
    assert run(tmp_path, monkeypatch, other, seconds=seconds) == expected

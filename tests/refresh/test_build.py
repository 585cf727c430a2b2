"""The process that builds a ScaNN index is killed, stopped, aborted, starved and orphaned."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from programs import environment
from refresh_builders import (
    HOOK,
    OPTIONS,
    check_serves,
    check_whole,
    is_gone,
    is_stopped,
    next_builder,
    train_until,
)
from refresh_tasks import make_params, make_task, wait_for

from ragjax.refresh import (
    BuildError,
    BuildOptions,
    GenerationStore,
    Refresher,
    RefreshError,
    RefreshOptions,
    RefreshState,
    ThreadExecutor,
)

pytest.importorskip("scann", reason="ScaNN has no package for this platform")
pytestmark = pytest.mark.slow


class First(NamedTuple):
    """Generation 0, built by a child that was looked at."""

    folder: Path
    command: list[str]
    environment: dict[str, str]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Builds generation 0 while no Python code may fork this process."""

    def refuse(*_):
        raise AssertionError("this process was forked")

    folder = tmp_path_factory.mktemp("first") / "refresh"
    preparations = []
    start = subprocess.Popen.__init__

    def spy(self, *arguments, preexec_fn=None, **options):
        preparations.append(preexec_fn)
        start(self, *arguments, preexec_fn=preexec_fn, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fork", refuse)
        patch.setattr(os, "forkpty", refuse)
        patch.setattr("multiprocessing.popen_fork.Popen.__init__", refuse)
        patch.setattr(subprocess.Popen, "__init__", spy)
        with Refresher(folder, make_task(), options=RefreshOptions(**OPTIONS)) as refresher:
            refresher.submit(make_params(0), 0)
            wait_for(lambda: refresher.status().builder_pid)
            about = Path(f"/proc/{refresher.status().builder_pid}")
            # Until the new program runs, these are the ones of this process.
            wait_for(lambda: b"refresh.build" in (about / "cmdline").read_bytes())
            command = (about / "cmdline").read_text().split("\0")
            environment = dict(
                entry.split("=", 1)
                for entry in (about / "environ").read_text().split("\0")
                if "=" in entry
            )
            assert refresher.wait(60)
            assert refresher.poll().version == 0
    assert preparations == [None]  # a callable would run in a forked copy of this process
    return First(folder, command, environment)


@pytest.fixture
def told():
    return []


@pytest.fixture
def folder(first, tmp_path):
    return shutil.copytree(first.folder, tmp_path / "refresh")


@pytest.fixture
def meet(monkeypatch, tmp_path):
    """Lets the next children stop, wait or abort at a moment; with no moment they live."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", str(hooks))

    def set_moment(moment, action="stop"):
        monkeypatch.setenv("MOMENT", moment)
        monkeypatch.setenv("ACTION", action)

    return set_moment


@pytest.fixture
def make(folder, told):
    """Makes refreshers that have opened generation 0, and closes them."""
    made = []

    def make_one(folder=folder, task=None, executor=None, probe_queries=None, **options):
        refresher = Refresher(
            folder, task or make_task(), executor=executor, probe_queries=probe_queries,
            options=RefreshOptions(**OPTIONS | options), report=told.append,
        )  # fmt: skip
        made.append(refresher)
        assert refresher.start(make_params(0)).version == 0
        return refresher

    yield make_one
    for refresher in made:
        refresher.close()


def test_the_builder_is_a_fresh_interpreter_with_few_threads_and_no_accelerator(first):
    assert first.command[0] == sys.executable
    assert first.command[1:3] == ["-P", "-c"] and "ragjax.refresh.build" in first.command[3]
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        assert first.environment[name] == "1"
    assert first.environment["JAX_PLATFORMS"] == "cpu"
    with GenerationStore(first.folder).newest() as generation:
        manifest = json.loads((generation.folder / "index" / "ragjax.json").read_text())
    assert manifest["details"]["options"]["threads"] == 1


def test_a_builder_killed_twice_is_started_again_and_training_never_waits(make, meet, told, folder):
    meet("save")
    refresher = make(max_retries=2)
    refresher.submit(make_params(1), 1)
    pid = next_builder(refresher)
    longest = train_until(lambda: is_stopped(pid), refresher)
    [building] = (folder / "building").iterdir()
    assert list(building.glob(".index.*/scann_config.pb"))  # half an index is there
    meet("start")
    os.kill(pid, signal.SIGKILL)
    second = next_builder(refresher, other_than=pid)
    assert refresher.snapshot.version == 0 and refresher.metrics(1)["index/failures"] == 1
    longest = max(longest, train_until(lambda: is_stopped(second), refresher))
    meet("")
    os.kill(second, signal.SIGKILL)
    longest = max(longest, train_until(lambda: refresher.snapshot.version == 1, refresher))
    check_serves(refresher.snapshot, 1, 1)
    assert longest < 1.0
    assert refresher.metrics(1)["index/failures"] == 2
    for victim, line, left in zip((pid, second), told, (2, 1), strict=True):
        assert f"(process {victim}) was killed (signal 9" in line
        assert "trying again" in line and f"{left} attempts left" in line
    check_whole(refresher, [0, 1])


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_builder_that_is_always_killed_fails_the_refresh_and_not_the_next(
    make, meet, told, policy
):
    meet("start")
    refresher = make(max_retries=1, on_failure=policy)
    refresher.submit(make_params(1), 1)
    pid = 0
    for _ in range(2):
        pid = next_builder(refresher, other_than=pid)
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: refresher.state is RefreshState.FAILED)
    assert f"process {pid}" in refresher.status().last_error
    if policy == "stop":
        with pytest.raises(RefreshError, match="signal 9.*generation of step 0 still") as raised:
            refresher.update(2, make_params(2))
        assert isinstance(raised.value.__cause__, BuildError)
    assert refresher.update(3, make_params(3)).version == 0
    assert any("could not be refreshed" in line for line in told) == (policy == "warn")
    assert refresher.metrics(3)["index/failures"] == 2
    check_whole(refresher, [0])
    if policy == "stop":
        meet("")
        refresher.submit(make_params(4), 4)
        assert refresher.wait(60)
        check_serves(refresher.update(5, make_params(5)), 1, 4)
        check_whole(refresher, [0, 1])


def test_a_fatal_error_in_the_builder_is_reported_with_what_it_said(make, meet):
    meet("save", "abort")
    refresher = make()
    refresher.submit(make_params(1), 1)
    refresher.wait(60)
    with pytest.raises(RefreshError, match=r"ended by signal 6.*Check failed: norm > 0"):
        refresher.poll()
    meet("save")
    refresher.submit(make_params(2), 2)
    pid = next_builder(refresher)
    wait_for(lambda: is_stopped(pid))
    os.kill(pid, signal.SIGABRT)
    os.kill(pid, signal.SIGCONT)
    refresher.wait(60)
    with pytest.raises(RefreshError, match="ended by signal 6.*Fatal Python error: Aborted"):
        refresher.poll()
    check_whole(refresher, [0])
    check_serves(refresher.snapshot, 0, 0)


def test_a_builder_that_hangs_is_ended_at_its_deadline(make, meet):
    meet("start")
    refresher = make(build=BuildOptions(threads=1, deadline_seconds=0.5))
    refresher.submit(make_params(1), 1)
    pid = next_builder(refresher)
    wait_for(lambda: is_stopped(pid))  # it does not hear SIGTERM any more
    started = time.monotonic()
    assert refresher.wait(60)
    assert time.monotonic() - started < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RefreshError, match=f"process {pid}.* deadline of 0.5 s"):
        refresher.update(1, make_params(1))
    assert refresher.metrics(1)["index/failures"] == 1
    assert refresher.status().builder_pid == 0
    check_whole(refresher, [0])


def test_closing_ends_a_builder_that_hangs(make, meet, folder):
    meet("start")
    refresher = make()
    refresher.submit(make_params(1), 1)
    pid = next_builder(refresher)
    wait_for(lambda: is_stopped(pid))
    assert refresher.state is RefreshState.BUILDING
    started = time.monotonic()
    refresher.close()
    assert time.monotonic() - started < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not any(thread.name == "refresh" for thread in threading.enumerate())
    make()  # the folder is free


TRAINER = """
import sys
from refresh_tasks import make_params, make_task, wait_for
from ragjax.refresh import Refresher, RefreshOptions
from refresh_builders import OPTIONS
refresher = Refresher(sys.argv[1], make_task(), options=RefreshOptions(**OPTIONS))
refresher.start(make_params(0))
refresher.submit(make_params(1), 1)
wait_for(lambda: refresher.status().builder_pid)
print(refresher.status().builder_pid, flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def trainer(folder):
    """A training process whose builder is under way; yields both."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(folder)], env=environment(Path(__file__).parent),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_a_builder_ends_with_a_trainer_that_is_killed_and_the_next_start_goes_on(
    make, meet, folder, told
):
    meet("save", "wait")
    with trainer(folder) as (process, pid):
        wait_for(lambda: list((folder / "building").glob("*/.index.*/scann_config.pb")))
        process.kill()
        process.wait()
        killed = time.monotonic()
        wait_for(lambda: is_gone(pid))
        assert time.monotonic() - killed < 2
    meet("")
    tokenized = []
    refresher = make(task=make_task(tokenize=lambda docs: tokenized.append(docs) or docs))
    refresher.submit(make_params(1), 1)
    assert refresher.wait(60)
    check_serves(refresher.poll(), 1, 1)
    assert tokenized == [] and told == []  # what was encoded is indexed
    check_whole(refresher, [0, 1])
    assert not list((folder / "building").iterdir())


def test_a_trainer_that_just_ends_takes_its_builder_along(meet, folder):
    meet("start", "wait")
    with trainer(folder) as (process, pid):
        ended = time.monotonic()
        _, errors = process.communicate("\n", timeout=30)
        assert process.returncode == 0 and errors == ""
        assert time.monotonic() - ended < 5 and is_gone(pid)


class FillingExecutor(ThreadExecutor):
    """Leaves a few pages of a disk free as soon as the documents are encoded."""

    def __init__(self, disk, page=4096):
        super().__init__()
        self.filler, self.page, self.pages = disk / "filler", page, None

    def encode(self, task, request):
        store = super().encode(task, request)
        if self.pages is not None:
            with contextlib.suppress(OSError), self.filler.open("wb", buffering=0) as file:
                while file.write(bytes(self.page)):
                    pass
            os.truncate(self.filler, self.filler.stat().st_size - self.pages * self.page)
        return store


def test_a_disk_that_is_full_while_the_index_is_built_publishes_nothing(make, folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        shutil.copytree(folder, disk / "refresh")
        executor = FillingExecutor(disk)
        probes = np.ones((4, 8), np.float32)
        refresher = make(disk / "refresh", executor=executor, probe_queries=lambda: probes)
        said = []
        for executor.pages in (0, 1, 2, 4):
            refresher.submit(make_params(1 + executor.pages), 1 + executor.pages)
            assert refresher.wait(60)
            with pytest.raises(RefreshError, match=f"{disk}/refresh/building/.*") as error:
                refresher.poll()
            said.append(str(error.value))
            check_whole(refresher, [0])
            check_serves(refresher.snapshot, 0, 0)
            executor.filler.unlink()
        assert "probe_queries.npy" in said[0] and "256 bytes are needed" in said[0]
        assert "build.json" in said[1]
        assert all("bytes" in line for line in said)
        executor.pages = None
        refresher.submit(make_params(9), 9)
        assert refresher.wait(60)
        check_serves(refresher.poll(), 1, 9)
        check_whole(refresher, [0, 1])
        refresher.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

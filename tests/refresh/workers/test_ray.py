"""Encoding by the actors of a real Ray cluster, which are killed, join late or are refused."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from programs import ROOT, environment
from refresh_tasks import (
    DOCUMENTS,
    encode_here,
    encode_slowly,
    encode_without_memory,
    file_bytes,
    make_params,
    make_request,
    make_task,
    wait_for,
)

from ragjax.refresh import RayExecutor
from ragjax.refresh.task import Cancelled

ray = pytest.importorskip("ray", reason="needs the [ray] extra")
# A cluster on this machine is started by forks of this process.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:os.fork:RuntimeWarning")


@pytest.fixture(scope="module")
def cluster():
    """A cluster on this machine with room for two actors; it ends with these tests."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # Ray lets other programs go first, by far.
        for name, value in (environment() | {"RAY_worker_niceness": "0"}).items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        options = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=options)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def make(cluster):
    """Makes executors that tell what they report, and closes them."""
    made = []

    def make(**options):
        told = []
        executor = RayExecutor(report=told.append, **options)
        executor.told = told
        made.append(executor)
        return executor

    yield make
    for executor in made:
        executor.close()


@pytest.fixture(scope="module")
def task():
    return make_task(encode=encode_slowly)


@pytest.fixture(scope="module")
def clean(tmp_path_factory, task):
    """Returns the bytes of the store of some parameters, encoded by one process."""
    folder, made = tmp_path_factory.mktemp("clean"), {}

    def clean(seed):
        if seed not in made:
            request = make_request(folder / str(seed), task, make_params(seed))
            made[seed] = file_bytes(encode_here(request.folder, task, request).folder)
        return made[seed]

    return clean


def pids(executor):
    return [int(re.search(r"process (\d+)", name)[1]) for name in executor.workers]


def test_actors_make_the_store_of_one_process_and_stay_warm(make, task, clean, tmp_path):
    executor, seen, before = make(), [], []
    for step in range(3):
        request = make_request(
            tmp_path / f"store-{step}", task, make_params(step), step=step, progress=seen.append
        )
        assert file_bytes(executor.encode(task, request).folder) == clean(step)
        assert set(before) <= set(pids(executor))
        before = pids(executor)
    assert seen[-1].done == seen[-1].total == len(DOCUMENTS) and seen[-1].fraction == 1
    assert executor.told == []


def test_a_part_of_the_documents_is_encoded_with_parameters_that_hold_a_key(make, task, tmp_path):
    params = make_params() | {"key": jax.random.key(0)}
    rows = np.array([100, 3, 3, 77, 5, 6, 7])
    store = make().encode(task, make_request(tmp_path / "store", task, params, rows=rows))
    whole = encode_here(tmp_path / "clean", task, make_request(None, task, make_params()))
    np.testing.assert_allclose(store.read(), whole.read()[rows], atol=1e-6)


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(3, id="few"),
        pytest.param(20, id="twenty", marks=pytest.mark.slow),
    ],
)
def test_actors_killed_at_any_moment_cost_their_shards_and_nothing_else(
    make, task, clean, tmp_path, moments
):
    executor, chance, killed = make(max_shard_failures=9), random.Random(moments), 0
    executor.encode(task, make_request(tmp_path / "warm", task, make_params()))
    with ThreadPoolExecutor(1) as pool:
        for moment in range(moments):
            request = make_request(tmp_path / f"store-{moment}", task, make_params(moment % 3))
            encoding = pool.submit(executor.encode, task, request)
            time.sleep(chance.random() * 0.4)
            # Now and then all of them.
            for pid in pids(executor)[: 2 if moment % 5 == 4 else 1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            assert file_bytes(encoding.result(120).folder) == clean(moment % 3)
    assert killed >= moments
    assert any(re.fullmatch(r"process \d+ on host .* is lost; its.*", t) for t in executor.told)


@pytest.mark.slow
def test_a_machine_that_comes_late_takes_work_and_one_that_goes_loses_only_its_shards(
    cluster, make, task, clean, tmp_path
):
    executor = make(resources={"late": 1}, start_seconds=60)
    request = make_request(tmp_path / "first", task, make_params(1))
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(executor.encode, task, request)
        wait_for(lambda: executor.told)
        assert executor.told[0].startswith("waiting for an actor: each takes 1 late, the cluster")
        first = cluster.add_node(num_cpus=1, resources={"late": 1})
        assert file_bytes(encoding.result(60).folder) == clean(1)
        second = cluster.add_node(num_cpus=1, resources={"late": 1})
        slow = make_task(encode=encode_slowly, seconds_per_shard=0.5)
        request = make_request(tmp_path / "second", slow, make_params(2))
        encoding = pool.submit(executor.encode, slow, request)
        wait_for(lambda: len(executor.workers) == 2)
        assert not encoding.done()
        cluster.remove_node(first, allow_graceful=False)
        assert file_bytes(encoding.result(120).folder) == clean(2)
    cluster.remove_node(second, allow_graceful=False)


@pytest.mark.slow
def test_a_machine_with_other_sources_is_refused_and_the_others_go_on(
    cluster, make, task, clean, tmp_path, monkeypatch
):
    shutil.copytree(ROOT / "ragjax", tmp_path / "other" / "ragjax")
    with (tmp_path / "other" / "ragjax" / "models" / "__init__.py").open("a") as file:
        file.write("# of another version\n")
    # Before Ray adds the folders of this program.
    (tmp_path / "other" / "sitecustomize.py").write_text("import ragjax\n")
    path = os.pathsep.join([str(tmp_path / "other"), os.environ["PYTHONPATH"]])
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        wrong = cluster.add_node(num_cpus=1, resources={"any": 1})
    executor = make(resources={"any": 1})
    request = make_request(tmp_path / "store", task, make_params())
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(executor.encode, task, request)
        wait_for(lambda: executor.told)
        assert re.fullmatch(
            r"process \d+ on host \S+ is refused, the others go on: ragjax \w+ there, \w+ here; "
            "install the same on all machines",
            executor.told[0],
        )
        assert executor.workers == [] and not encoding.done()
        right = cluster.add_node(num_cpus=1, resources={"any": 1})
        assert file_bytes(encoding.result(60).folder) == clean(0)
    for node in (wrong, right):
        cluster.remove_node(node, allow_graceful=False)


def test_without_room_for_an_actor_the_encoding_fails_and_says_what_is_missing(
    make, task, tmp_path
):
    executor = make(resources={"none": 2}, start_seconds=1)
    said = (
        "No actor could encode for 1 s: each takes 2 none, the cluster has 0 none; 0 are starting"
    )
    with pytest.raises(RuntimeError, match=f"{said} and 0 refused: add machines"):
        executor.encode(task, make_request(tmp_path / "store", task, make_params()))


def test_parameters_that_give_nan_fail_at_once_and_name_the_documents(make, task, tmp_path):
    executor, params = make(), make_params()
    params["embed"][13] = np.nan
    bad = next(row for row, ids in enumerate(DOCUMENTS) if 13 in ids)
    with pytest.raises(ValueError, match=rf"process \d+ on host .*row {bad}\b"):
        executor.encode(task, make_request(tmp_path / "store", task, params))
    executor.encode(task, make_request(tmp_path / "next", task, make_params()))


def test_other_errors_fail_when_a_shard_has_failed_too_often(make, task, tmp_path):
    request = make_request(tmp_path / "store", task, make_params())
    broken = make_task(encode=encode_without_memory)
    with pytest.raises(RuntimeError, match=r"Shard \d+ failed 2 times; the last time: MemoryError: "
                       r"process \d+ on host .* failed: no memory for the batch"):  # fmt: skip
        make(max_shard_failures=2).encode(broken, request)


def test_finished_shards_of_a_cancelled_encoding_are_kept(make, task, clean, tmp_path):
    executor, cancelled = make(), threading.Event()
    request = make_request(
        tmp_path / "store", task, make_params(), cancelled=cancelled,
        progress=lambda progress: cancelled.set() if progress.done >= 20 else None,
    )  # fmt: skip
    with pytest.raises(Cancelled):
        executor.encode(task, request)
    seen = []
    again = make_request(request.folder, task, make_params(), progress=seen.append)
    assert file_bytes(executor.encode(task, again).folder) == clean(0)
    assert 20 < seen[0].done <= 40


ALONE = """
import os, signal, sys
from pathlib import Path
from refresh_tasks import make_params, make_request, make_task
from ragjax.refresh import RayExecutor
signal.signal(signal.SIGTERM, lambda *_: None)
handler = signal.getsignal(signal.SIGTERM)
executor = RayExecutor(actors=1)
import ray
assert signal.getsignal(signal.SIGTERM) is handler and "GPU" not in ray.cluster_resources()
task = make_task()
executor.encode(task, make_request(Path(sys.argv[1]), task, make_params()))
assert len(executor.workers) == 1
executor.close()
assert not ray.is_initialized()
"""


@pytest.mark.slow
def test_without_a_cluster_one_is_started_and_ended_and_signals_stay_the_programs(tmp_path):
    world = environment() | {"RAY_worker_niceness": "0"}
    world.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", ALONE, str(tmp_path / "store")]
    subprocess.run(command, env=world, check=True, timeout=200)
    task = make_task()
    request = make_request(None, task, make_params())
    clean = encode_here(tmp_path / "clean", task, request)
    assert file_bytes(tmp_path / "store") == file_bytes(clean.folder)


def test_numbers_out_of_range_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="max_shard_failures at least 1, got 0, 300 and 0"):
        RayExecutor(max_shard_failures=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"Ray is not installed .*pip install 'ragjax\[ray\]'"):
        RayExecutor()

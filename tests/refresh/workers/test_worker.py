"""Worker processes that are killed, stopped and started again; nothing half done is ever used."""

import dataclasses
import importlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from programs import ROOT, environment
from refresh_tasks import (
    WorkerThread,
    encode_here,
    file_bytes,
    make_params,
    make_request,
    make_task,
    wait_for,
    worker_processes,
)

from ragjax.data import Corpus
from ragjax.index import EmbeddingStore
from ragjax.models.encoder import load_encoder
from ragjax.models.inputs import Tokens
from ragjax.models.testing import write_tiny_encoder
from ragjax.refresh import ProcessExecutor
from ragjax.refresh.workers.leases import read_holder
from ragjax.runs.models import in_compute_dtype
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.tokens import corpus_task

SECONDS = 0.05  # of a shard


class Encoding:
    """`encode` in a thread; `result` re-raises what it raised."""

    def __init__(self, executor, task, request):
        self._outcome = []
        self.building = request.folder.with_name(f"{request.folder.name}.building")

        def run():
            try:
                self._outcome.append(executor.encode(task, request))
            except Exception as error:
                self._outcome.append(error)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def wait_for_shards(self, count):
        wait_for(lambda: len(list(self.building.glob("shard-*.npy"))) >= count)

    def result(self):
        self._thread.join(60)
        assert not self._thread.is_alive()
        if isinstance(self._outcome[0], Exception):
            raise self._outcome[0]
        return self._outcome[0]


def leases(root):
    """The leases that are held, with the process of each."""
    held = {}
    for path in (root / "jobs").glob("*/leases/*.lease"):
        try:
            holder = read_holder(path.read_bytes())
        except FileNotFoundError:
            continue
        if holder:
            held[path.name] = holder.pid
    return held


def stop_in_a_shard(process, root, encoding):
    """Stops a worker that holds the lease on a shard it has not finished; returns the lease."""
    for _ in range(100):
        wait_for(lambda: process.pid in leases(root).values())
        process.send_signal(signal.SIGSTOP)
        for name, pid in leases(root).items():
            shard = encoding.building / name.replace(".lease", ".npy")
            if pid == process.pid and not shard.exists():
                return name
        process.send_signal(signal.SIGCONT)
        time.sleep(SECONDS / 3)
    raise AssertionError("never in the middle of a shard")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def executor(root):
    return ProcessExecutor(root, worker_timeout=5, lease_seconds=1, poll_seconds=0.02)


@pytest.mark.slow
def test_killed_workers_cost_their_shards_and_nothing_else(tmp_path, root, executor):
    task, chance = make_task(), random.Random(0)
    with worker_processes(root, 3, seconds_per_shard=SECONDS) as workers:
        # Two are killed one after another, each in the middle of a job and at a random point.
        for number in range(2):
            request = make_request(root / f"store-{number}", task, make_params(number))
            encoding = Encoding(executor, task, request)
            encoding.wait_for_shards(chance.randrange(1, 12))
            time.sleep(chance.random() * 2 * SECONDS)
            workers[number].kill()
            store = encoding.result()
            EmbeddingStore.open(store.folder)
            clean = encode_here(tmp_path / f"clean-{number}", task, request)
            assert file_bytes(store.folder) == file_bytes(clean.folder)
        assert workers[2].poll() is None
        # Without the last one there is an error, in time, and no store.
        request = make_request(root / "store", task, make_params(9))
        encoding = Encoding(executor, task, request)
        encoding.wait_for_shards(3)
        workers[2].kill()
        with pytest.raises(RuntimeError, match="No worker has shown a sign of life"):
            encoding.result()
    assert not request.folder.exists()
    assert list((root / "jobs").iterdir()) == []
    # The same command later goes on with the finished shards.
    with WorkerThread(root, task) as worker:
        store = executor.encode(task, request)
    assert 0 < worker.num_shards <= 22
    clean = encode_here(tmp_path / "clean", task, request)
    assert file_bytes(store.folder) == file_bytes(clean.folder)


@pytest.mark.slow
def test_a_stopped_worker_loses_its_shard_and_does_no_harm_when_it_wakes(tmp_path, root, executor):
    task = make_task(seconds_per_shard=SECONDS)
    request = make_request(root / "store", task, make_params())
    with worker_processes(root, 1, seconds_per_shard=SECONDS) as [sleeper]:
        encoding = Encoding(executor, task, request)
        encoding.wait_for_shards(2)
        name = stop_in_a_shard(sleeper, root, encoding)
        with WorkerThread(root, task):
            wait_for(lambda: leases(root).get(name) == os.getpid())
            sleeper.send_signal(signal.SIGCONT)
            store = encoding.result()
            again = make_request(root / "again", task, make_params(1))
            second = Encoding(executor, task, again)
            wait_for(lambda: sleeper.pid in leases(root).values())  # it works on
            second.result()
        sleeper.terminate()
        assert sleeper.wait(20) == 128 + signal.SIGTERM
    for folder, wanted in ((store.folder, request), (again.folder, again)):
        EmbeddingStore.open(folder)
        clean = encode_here(tmp_path / f"clean-{folder.name}", task, wanted)
        assert file_bytes(folder) == file_bytes(clean.folder)
    assert sorted(path.name for path in root.iterdir()) == ["again", "jobs", "store", "workers"]
    assert list((root / "workers").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_script_has_the_encoder_of_a_trainer_in_its_dtype(tmp_path, monkeypatch, dtype):
    write_tiny_encoder(tmp_path / "encoder")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "a cat"}\n')
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    script, tasks = importlib.import_module("refresh_worker"), []
    monkeypatch.setattr(script, "run_worker", lambda root, task, *rest, **_: tasks.append(task))
    flags = ["--root", str(tmp_path), "--data", str(tmp_path), "--compute_dtype", dtype]
    assert script.main([*flags, "--encoder", str(tmp_path / "encoder")]) == 0
    config = AdaptConfig(compute_dtype=dtype, refresh=RefreshConfig(mode="async", workers=True))
    encoder = in_compute_dtype(load_encoder(str(tmp_path / "encoder")), config)
    assert tasks[0].model_fingerprint == encoder.fingerprint
    ids = jnp.arange(8).reshape(1, 8)
    tokens = Tokens(ids, ids > 0)
    np.testing.assert_array_equal(
        tasks[0].encode(encoder.params, tokens), encoder.encode(encoder.params, tokens)
    )


@pytest.mark.slow
def test_the_script_encodes_for_a_trainer_and_leaves_on_a_signal(
    tmp_path, root, capsys, monkeypatch
):
    data = tmp_path / "data"
    data.mkdir()
    lines = [f'{{"_id": "{n}", "title": "t{n}", "text": "the {n} cats"}}\n' for n in range(40)]
    (data / "corpus.jsonl").write_text("".join(lines))
    write_tiny_encoder(tmp_path / "encoder")
    encoder = load_encoder(str(tmp_path / "encoder"))
    corpus = Corpus.open(data, cache=tmp_path / "cache")
    task = dataclasses.replace(corpus_task(encoder, corpus, encode_tokens=256), rows_per_shard=8)
    executor = ProcessExecutor(root, worker_timeout=60, poll_seconds=0.05)
    request = make_request(root / "store", task, encoder.params)
    command = [
        sys.executable, str(ROOT / "experiments" / "refresh_worker.py"), "--root", str(root),
        "--encoder", str(tmp_path / "encoder"), "--cache", str(tmp_path / "worker-cache"),
        "--poll_seconds", "0.1", "--data",
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    worker = subprocess.Popen([*command, str(data)], env=environment(), **pipes)
    try:
        store = executor.encode(task, request)
        clean = encode_here(tmp_path / "clean", task, request)
        np.testing.assert_allclose(store.read(), clean.read(), atol=1e-5)
        worker.terminate()
        assert worker.wait(20) == 128 + signal.SIGTERM
        told = worker.stdout.read()
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    assert "40 documents" in told and "shard 5 of 5" in told and "Traceback" not in told
    assert list((root / "workers").iterdir()) == []
    # One with other documents leaves with code 2, without a traceback, and costs the job nothing.
    (data / "corpus.jsonl").write_text("".join(lines[1:]))
    encoding = Encoding(executor, task, make_request(root / "next", task, encoder.params))
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    script = importlib.import_module("refresh_worker")
    assert script.main([*command[2:], str(data)]) == 2
    assert "error: This worker has another corpus" in capsys.readouterr().err
    (data / "corpus.jsonl").write_text("".join(lines))
    with WorkerThread(root, task, encoder.params):
        assert encoding.result().spec.size == 40

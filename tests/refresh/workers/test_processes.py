"""The trainer's side of encoding in other processes, with workers in threads of the test."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refresh_tasks import (
    DOCUMENTS,
    WorkerThread,
    encode_here,
    file_bytes,
    make_params,
    make_request,
    make_task,
    wait_for,
)

from ragjax import storage
from ragjax.index import DiskFullError, EmbeddingStore, EmbeddingWriter
from ragjax.refresh import ProcessExecutor
from ragjax.refresh.export import MismatchError
from ragjax.refresh.task import Cancelled, params_digest
from ragjax.refresh.workers import jobs


@pytest.fixture
def executor(tmp_path):
    return ProcessExecutor(tmp_path / "root", worker_timeout=20, lease_seconds=5, poll_seconds=0.02)


def left_over(root):
    return list((root / "jobs").iterdir()) + list(root.glob("*.building"))


@pytest.mark.slow
def test_workers_make_the_same_store_as_one_process(tmp_path, executor):
    task, seen = make_task(seconds_per_shard=0.02), []
    with WorkerThread(executor.root, task) as worker, WorkerThread(executor.root, task) as second:
        for step in range(2):
            request = make_request(
                executor.root / f"store-{step}", task, make_params(step), step=step,
                progress=seen.append,
            )  # fmt: skip
            store = executor.encode(task, request)
            clean = encode_here(tmp_path / f"clean-{step}", task, request)
            assert file_bytes(store.folder) == file_bytes(clean.folder)
            EmbeddingStore.open(store.folder, model_fingerprint=params_digest(make_params(step)))
    assert worker.num_shards + second.num_shards >= 48
    assert min(worker.num_shards, second.num_shards) > 5
    assert left_over(executor.root) == []
    assert list((executor.root / "workers").iterdir()) == []
    done = [progress.done for progress in seen]
    assert done[-1] == len(DOCUMENTS) and len(set(done)) > 5
    assert all(progress.total == len(DOCUMENTS) for progress in seen)
    assert seen[-1].fraction == 1 and seen[-1].remaining_seconds == 0


def test_a_part_of_the_documents_is_encoded(tmp_path, executor):
    task = make_task()
    request = make_request(
        executor.root / "store", task, make_params(), rows=np.array([100, 3, 3, 77, 5, 6, 7])
    )
    with WorkerThread(executor.root, task):
        store = executor.encode(task, request)
    whole = encode_here(tmp_path / "clean", task, make_request(None, task, make_params()))
    np.testing.assert_allclose(store.read(), whole.read()[request.rows], atol=1e-6)


def test_params_are_copied_before_they_are_donated(executor):
    params = {"embed": jnp.ones((3, 2), jnp.bfloat16)}
    copy = executor.copy_params(params)
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    assert copy["embed"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(copy["embed"], np.ones((3, 2)))


@pytest.mark.slow
def test_finished_shards_of_a_cancelled_encoding_are_kept(tmp_path, executor):
    task = make_task(seconds_per_shard=0.05)
    cancelled = threading.Event()
    request = make_request(
        executor.root / "store", task, make_params(), cancelled=cancelled,
        progress=lambda progress: cancelled.set() if progress.done >= 20 else None,
    )  # fmt: skip
    with WorkerThread(executor.root, task) as worker:
        with pytest.raises(Cancelled):
            executor.encode(task, request)
        assert jobs.job_numbers(executor.root) == []
        assert not request.folder.exists()
        wait_for(lambda: not list((executor.root / "jobs").iterdir()))
    again = make_request(request.folder, task, make_params())
    with WorkerThread(executor.root, task) as second:
        store = executor.encode(task, again)
    assert 4 <= worker.num_shards < 24
    assert worker.num_shards + second.num_shards == 24
    assert file_bytes(store.folder) == file_bytes(
        encode_here(tmp_path / "clean", task, again).folder
    )


@pytest.mark.parametrize("why", ["withdrawn", "stopped"])
def test_a_worker_drops_a_shard_that_is_no_longer_wanted(executor, why):
    task, cancelled = make_task(seconds_per_shard=0.7, rows_per_shard=120), threading.Event()
    request = make_request(executor.root / "store", task, make_params(), cancelled=cancelled)
    held = executor.root / "jobs" / "000001" / "leases" / "shard-000000.lease"
    with WorkerThread(executor.root, task) as worker:
        trainer = threading.Thread(target=lambda: pytest.raises(
            Cancelled, executor.encode, task, request))  # fmt: skip
        trainer.start()
        wait_for(held.exists)
        if why == "withdrawn":
            cancelled.set()
            trainer.join()
            time.sleep(1.0)
    assert worker.num_shards == 0
    assert not held.exists()  # given back
    cancelled.set()
    trainer.join()
    assert not list((executor.root / "store.building").glob("shard-*"))


def test_cancelling_is_noticed_at_once(tmp_path):
    executor = ProcessExecutor(tmp_path / "root", poll_seconds=30)
    task, cancelled = make_task(), threading.Event()
    request = make_request(executor.root / "store", task, make_params(), cancelled=cancelled)
    threading.Timer(0.3, cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        executor.encode(task, request)
    assert time.monotonic() - started < 2
    assert list((executor.root / "jobs").iterdir()) == []


def test_without_a_worker_the_encoding_fails_and_says_how_to_start_one(tmp_path, executor):
    clock = [0.0]
    executor = ProcessExecutor(
        executor.root, worker_timeout=100, poll_seconds=0.01, clock=lambda: clock[0]
    )
    task = make_task()
    request = make_request(executor.root / "store", task, make_params())
    # What a worker that was killed left behind is no sign of life.
    (executor.root / "workers" / "host-1.json").write_text(
        '{"counter": 5, "host": "host", "pid": 1, "machine": "m"}'
    )

    def turn():
        wait_for(lambda: jobs.job_numbers(executor.root))
        time.sleep(0.1)
        clock[0] = 101.0

    threading.Thread(target=turn).start()
    with pytest.raises(RuntimeError, match=r"No worker .* 101 s .*last seen: process 1 on host host"
                       r".*experiments/refresh_worker.py --root"):  # fmt: skip
        executor.encode(task, request)
    assert not request.folder.exists()
    assert jobs.job_numbers(executor.root) == []


def test_parameters_that_give_nan_fail_at_once_and_name_the_documents(executor):
    task, params = make_task(), make_params()
    params["embed"][13] = np.nan
    bad = next(row for row, ids in enumerate(DOCUMENTS) if 13 in ids)
    request = make_request(executor.root / "store", task, params)
    with WorkerThread(executor.root, task) as worker:
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on host .*row {bad}\b"):
            executor.encode(task, request)
        # The worker lives on and serves the next job.
        executor.encode(task, make_request(executor.root / "next", task, make_params()))
    assert worker.error is None
    assert not request.folder.exists()


def test_other_errors_fail_when_a_shard_has_failed_too_often(executor):
    calls = []

    def fail(documents):
        if documents[0] == DOCUMENTS[10]:
            calls.append(1)
            raise MemoryError("no memory for the batch")
        return documents

    task = make_task()
    request = make_request(executor.root / "store", task, make_params())
    with WorkerThread(executor.root, dataclasses.replace(task, tokenize=fail)) as worker:
        with pytest.raises(RuntimeError, match=r"Shard 2 failed 3 times; MemoryError in process "
                           r"\d+ on host .*no memory for the batch"):  # fmt: skip
            executor.encode(task, request)
    assert len(calls) >= 3
    assert worker.num_shards == 23  # all others are kept
    with WorkerThread(executor.root, task) as worker:
        executor.encode(task, request)
    assert worker.num_shards == 1


WRONG = {
    "corpus": ({"documents": DOCUMENTS[:-1] + [[1]]}, None, "another corpus than the trainer: f"),
    "encoder": ({"model_fingerprint": "large"}, None, "another encoder .* 'large' here, 'tiny' in"),
    "sizes": ({}, (50, 9), r"\['embed'\] is \(50, 8\) float32, expected \(50, 9"),
    "pooling": (
        {"encode": lambda params, tokens: params["embed"][tokens.ids].mean(1)[:, :5]}, None,
        "encoder gives 5 dimensions, that of the trainer 8 in job 1",
    ),
    "a failing encoder": ({"encode": lambda params, tokens: params["head"]}, None, "fails: 'head'"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_worker_is_refused_and_the_others_go_on(tmp_path, executor, wrong, caplog):
    changes, shape, message = WRONG[wrong]
    task = make_task()
    template = {"embed": jax.ShapeDtypeStruct(shape, np.float32)} if shape else None
    request = make_request(executor.root / "store", task, make_params())
    with WorkerThread(executor.root, make_task(**changes), template) as worker:
        with ThreadPoolExecutor(1) as pool:
            encoding = pool.submit(executor.encode, task, request)
            worker.thread.join(20)
            assert isinstance(worker.error, MismatchError) and worker.num_shards is None
            with WorkerThread(executor.root, task):
                store = encoding.result()
    assert file_bytes(store.folder) == file_bytes(
        encode_here(tmp_path / "clean", task, request).folder
    )
    refused = [record.message for record in caplog.records if "refused" in record.message]
    assert len(refused) == 1 and re.search(f"the others go on: .*{message}", refused[0])
    if wrong == "corpus":
        assert task.corpus_digest in refused[0]


def test_where_all_workers_are_refused_the_encoding_fails_and_says_why(executor):
    task = make_task()
    alone = ProcessExecutor(executor.root, worker_timeout=0.3, poll_seconds=0.02)
    request = make_request(executor.root / "store", task, make_params())
    with WorkerThread(executor.root, make_task(model_fingerprint="large")):
        with pytest.raises(RuntimeError, match="refused: .*'large' here.* job 1.*Start one"):
            alone.encode(task, request)


def test_a_newer_job_replaces_an_older_one(executor):
    """A trainer was killed and leaves its job; the next one's goes first and ends the old one."""
    task = make_task(seconds_per_shard=0.05)
    old = make_request(executor.root / "old", task, make_params(1))
    writer = EmbeddingWriter.open(old.folder, old.spec)
    jobs.write_job(executor.root, task, old, lease_seconds=5)
    with WorkerThread(executor.root, task):
        wait_for(lambda: writer.rescan() != list(range(24)))
        executor.encode(task, make_request(executor.root / "new", task, make_params(2)))
        assert jobs.job_numbers(executor.root) == []
    assert writer.rescan() != []


def test_a_store_outside_the_shared_folder_is_refused(tmp_path, executor):
    task = make_task()
    for folder in (tmp_path / "store", executor.root, executor.root / ".." / "store"):
        with pytest.raises(ValueError, match="must lie below .*root"):
            executor.encode(task, make_request(folder, task, make_params()))
    assert left_over(executor.root) == []


def test_a_job_that_leads_outside_or_is_of_another_version_is_refused(executor):
    task = make_task()
    request = make_request(executor.root / "store", task, make_params())
    job = jobs.write_job(executor.root, task, request, lease_seconds=5)
    path = job.folder / "job.json"
    text = path.read_text()
    for old, new, message in (
        ('"store": "store"', '"store": "../store"', "does not lie below the root"),
        ('"store": "store"', '"store": "/store"', "does not lie below the root"),
        (
            '"format": 1',
            '"format": 2',
            "has format 2; this version reads 1: use the same version for all",
        ),
        ('"rows_per_shard"', '"rows_each"', "describes no encoding job"),
    ):
        assert old in text
        storage.write_sealed(path, json.loads(text.replace(old, new)))
        with pytest.raises(ValueError, match=message):
            jobs.read_job(executor.root, job.number)


def test_numbers_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be positive"):
        ProcessExecutor(tmp_path, worker_timeout=0)


def test_a_worker_waits_for_the_folder_and_for_work(tmp_path):
    root = tmp_path / "root"
    task = make_task()
    with WorkerThread(root, task) as worker:
        wait_for(lambda: worker.lines)
        time.sleep(0.2)
        executor = ProcessExecutor(root, worker_timeout=20, poll_seconds=0.02)
        executor.encode(task, make_request(root / "store", task, make_params()))
    assert worker.lines[0].startswith(f"waiting for {root}")
    assert sum("waiting" in line for line in worker.lines) == 1
    assert worker.num_shards == 24
    with WorkerThread(root, task, once=True) as worker:
        worker.thread.join(10)
        assert worker.num_shards == 0


@pytest.fixture
def mount(tmp_path):
    """Mounts small file systems; skips where this needs rights that the test has not."""
    mounted = []

    def mount(name, options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if os.name != "posix" or os.geteuid() != 0 or not shutil.which("mount"):
            pytest.skip("mounting a file system needs root")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this system does not let root mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_is_told_at_the_start(mount):
    root = mount("readonly", "ro,size=64k")
    with WorkerThread(root, make_task()) as worker:
        worker.thread.join(10)
        assert not worker.thread.is_alive()
    assert isinstance(worker.error, OSError)
    assert "a worker must be able to write" in str(worker.error)
    assert str(root) in str(worker.error)


def test_a_full_disk_fails_with_the_bytes_needed_and_goes_on_when_there_is_room(mount):
    root = mount("small", "size=256k")
    task = make_task(rows_per_shard=400, documents=DOCUMENTS * 100)
    executor = ProcessExecutor(root, worker_timeout=20, poll_seconds=0.02)
    request = make_request(root / "store", task, make_params())
    ballast = root / "ballast"
    ballast.write_bytes(b"\0" * (250 << 10))
    with pytest.raises(DiskFullError, match="bytes"):
        executor.encode(task, request)  # no room for the parameters
    assert left_over(root) == [root / "store.building"]
    ballast.unlink()
    with WorkerThread(root, task) as worker:
        with pytest.raises(DiskFullError, match=r"process .*12,928 bytes are needed"):
            executor.encode(task, request)
    assert not request.folder.exists()
    assert 0 < worker.num_shards == len(list((root / "store.building").glob("shard-*.npy"))) < 30
    assert not list((root / "store.building").glob("partial-*/*"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(root)], check=True)
    with WorkerThread(root, task) as second:
        executor.encode(task, request)
    assert worker.num_shards + second.num_shards == 30

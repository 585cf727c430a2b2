"""Processes that divide the shards by number; nothing half done is ever used.

python test_shares.py FOLDER RANK WORLD NUMBER    # dies at a file operation, -1: at none
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from programs import environment
from refresh_tasks import DOCUMENTS, encode_here, file_bytes, make_params, make_request, make_task

from ragjax.index import EmbeddingStore
from ragjax.refresh import IncompleteError, Share, encode_share, find_share
from ragjax.refresh.task import Cancelled

SHARDS = 24


class Reading:
    """Documents of the task that remember which were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(DOCUMENTS)

    def __getitem__(self, row):
        self.read.append(row)
        return DOCUMENTS[row]


def encode(folder, rank, world, seed=0, **changes):
    task = make_task(**({"corpus_fingerprint": "the corpus"} | changes))
    return encode_share(task, make_request(folder, task, make_params(seed)), Share(rank, world))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    task = make_task(corpus_fingerprint="the corpus")
    folder = tmp_path_factory.mktemp("clean") / "store"
    return file_bytes(encode_here(folder, task, make_request(folder, task, make_params())).folder)


def test_each_encodes_its_own_and_the_last_publishes_the_bytes_of_one_process(tmp_path, clean):
    folder = tmp_path / "store"
    for rank in (2, 0, 1):
        documents = Reading()
        if rank != 1:
            left = {
                2: r"16 of 24 shards are missing, first 0; they are of rank 0 \(8\), 1 \(8\)",
                0: r"8 of 24 shards are missing, first 1; they are of rank 1 \(8\)",
            }
            with pytest.raises(IncompleteError, match=left[rank]):
                encode(folder, rank, 3, documents=documents)
        else:
            store = encode(folder, rank, 3, documents=documents)
        assert documents.read == [
            row for shard in range(rank, SHARDS, 3) for row in range(5 * shard, 5 * shard + 5)
        ]
    assert file_bytes(store.folder) == clean
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    documents = Reading()  # called again, there is nothing to do
    assert encode(folder, 0, 3, documents=documents).folder == folder and documents.read == []


def test_progress_counts_the_documents_of_a_process(tmp_path):
    seen, task = [], make_task()
    request = make_request(tmp_path / "store", task, make_params(), progress=seen.append)
    with pytest.raises(IncompleteError):
        encode_share(task, request, Share(1, 4))
    assert (seen[0].total, seen[-1].done) == (30, 30) and seen[0].done < 10
    assert 0 < seen[0].fraction < 0.5 and seen[-1].fraction == pytest.approx(1)


def test_another_corpus_or_encoder_is_refused_and_the_others_go_on(tmp_path, clean):
    folder = tmp_path / "store"
    with pytest.raises(IncompleteError):
        encode(folder, 0, 2)
    with pytest.raises(
        ValueError, match="started for other embeddings .corpus_fingerprint 'the co"
    ):
        encode(folder, 1, 2, corpus_fingerprint="other")
    with pytest.raises(ValueError, match="started for other embeddings .model_fingerprint"):
        encode(folder, 1, 2, seed=5)
    assert file_bytes(encode(folder, 1, 2).folder) == clean
    with pytest.raises(ValueError, match="not those of this encoder and corpus .corpus_finger"):
        encode(folder, 1, 2, corpus_fingerprint="other")


def test_a_damaged_shard_is_encoded_again_by_the_one_that_publishes(tmp_path, clean):
    folder = tmp_path / "store"
    with pytest.raises(IncompleteError):
        encode(folder, 0, 2)
    (tmp_path / "store.building" / "shard-000004.npy").write_bytes(b"damaged")
    assert file_bytes(encode(folder, 1, 2).folder) == clean


def test_many_at_once_end_with_one_store(tmp_path, clean):
    def run(folder, rank, world):
        try:
            return encode(folder, rank, world)
        except IncompleteError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        for turn in range(15):
            folder = tmp_path / f"store-{turn}"
            results = list(pool.map(lambda rank, to=folder: run(to, rank, 6), range(6)))
            assert file_bytes(folder) == clean, results
            assert any(isinstance(result, EmbeddingStore) for result in results)
    assert len(list(tmp_path.iterdir())) == 15


def test_a_claim_stays_with_a_process_that_died_until_it_is_started_again(tmp_path, clean):
    folder = tmp_path / "store"
    with pytest.raises(IncompleteError):
        encode(folder, 0, 2)
    (tmp_path / "store.publisher").write_text("process 0 of 2")
    with pytest.raises(IncompleteError, match="shards are there, and process 0 of 2 publishes"):
        encode(folder, 1, 2)
    assert file_bytes(encode(folder, 0, 2).folder) == clean
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def start(folder, rank, number, world=3):
    command = [sys.executable, __file__, str(folder), str(rank), str(world), str(number)]
    return subprocess.Popen(command, env=environment())


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(range(3), id="few"),
        pytest.param(range(20), id="twenty", marks=pytest.mark.slow),
    ],
)
def test_one_killed_at_any_moment_and_started_again_ends_with_the_same_bytes(
    tmp_path, clean, moments
):
    """The last process is killed while it encodes, or while it publishes; then all run again."""
    chance = random.Random(0)
    for moment in moments:
        folder = tmp_path / f"store-{moment}"
        for rank in (0, 1):
            with pytest.raises(IncompleteError):
                encode(folder, rank, 3)
        # About 110 operations while it encodes, and 75 while it publishes.
        process = start(folder, 2, chance.randrange(0, 185))
        assert process.wait(120) in (0, -signal.SIGKILL)
        for rank in (0, 1, 2):
            if not folder.exists():
                try:
                    encode(folder, rank, 3)
                except IncompleteError:
                    assert rank != 2
        assert file_bytes(folder) == clean
        EmbeddingStore.open(folder)
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {f"store-{number}" for number in moments}


@pytest.mark.slow
def test_processes_killed_at_random_and_started_again_end_with_the_same_bytes(tmp_path, clean):
    folder, chance = tmp_path / "store", random.Random(1)
    running = {rank: start(folder, rank, -1) for rank in range(3)}
    for _ in range(6):
        time.sleep(chance.random() * 2)
        rank = chance.randrange(3)
        running[rank].kill()
        running[rank].wait()
        running[rank] = start(folder, rank, -1)
    assert [process.wait(120) for process in running.values()] == [0, 0, 0]
    assert file_bytes(folder) == clean


ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("environ", "given", "share"),
    [
        ({}, (None, None), Share(0, 1)),
        ({}, (2, 5), Share(2, 5)),
        (ARRAY | {"SLURM_ARRAY_TASK_STEP": "2"}, (None, None), Share(2, 4)),
        (ARRAY | {"SLURM_ARRAY_TASK_STEP": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
         (None, None), Share(5, 8)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (None, None), Share(3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (None, None), Share(0, 1)),
        ({"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "4"}, (None, None), Share(3, 4)),
        ({"JOB_COMPLETION_INDEX": "3"}, (None, 5), Share(3, 5)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, (None, None), Share(0, 2)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, (1, None), Share(1, 2)),
    ],
)  # fmt: skip
def test_a_process_knows_its_share(environ, given, share):
    assert find_share(*given, environ) == share


@pytest.mark.parametrize(
    ("environ", "given", "said"),
    [
        ({"JOB_COMPLETION_INDEX": "3"}, (None, None), "JOB_COMPLETION_INDEX is given, but not wor"),
        ({"WORLD_SIZE": "4"}, (None, None), "WORLD_SIZE is given, but not rank"),
        ({}, (None, 4), "but not rank: give rank and world"),
        ({}, (3, 3), "rank 3 of world 3"),
        (ARRAY, (None, None), "rank 4 of world 4 .SLURM_ARRAY_TASK_ID"),
        ({"RANK": "one"}, (None, None), "RANK=one: expected a whole number"),
    ],
)
def test_a_share_that_is_told_in_part_is_refused(environ, given, said):
    with pytest.raises(ValueError, match=said):
        find_share(*given, environ)


def test_an_encoding_that_is_cancelled_keeps_its_shards(tmp_path, clean):
    task, cancelled = make_task(corpus_fingerprint="the corpus"), threading.Event()
    request = make_request(
        tmp_path / "store", task, make_params(), cancelled=cancelled,
        progress=lambda progress: cancelled.set() if progress.done >= 20 else None,
    )  # fmt: skip
    with pytest.raises(Cancelled):
        encode_share(task, request, Share(0, 1))
    documents = Reading()
    assert file_bytes(encode(tmp_path / "store", 0, 1, documents=documents).folder) == clean
    assert 0 < len(documents.read) < len(DOCUMENTS)


def die_at_file_operation(folder, number):
    """Kills the process before one of its operations on files of the store."""
    left = number

    def hook(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "os.link", "os.remove", "os.scandir", "os.mkdir"):
            if folder in str(arguments[0]):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

    sys.addaudithook(hook)


if __name__ == "__main__":
    die_at_file_operation(sys.argv[1], int(sys.argv[4]))
    try:
        encode(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except IncompleteError as others:
        print(others)

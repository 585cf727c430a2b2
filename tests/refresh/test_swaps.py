"""Hundreds of swaps under readers in threads and processes, and ends in the middle of one."""

import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from programs import environment
from refresh_tasks import make_params, make_task, wait_for

from ragjax.index import ExactIndex, IndexSnapshot, ScannIndex, ScannOptions
from ragjax.index.scann import scann_problem
from ragjax.refresh import EncodeOptions, EncodeTask, Refresher, RefreshOptions, RefreshState

SIZE, DIM, VOCABULARY, K = 1500, 16, 60, 7
WARM_UP, SWAPS = 20, 200
RNG = np.random.default_rng(0)
DOCUMENTS = RNG.integers(1, VOCABULARY, size=(SIZE, 4)).tolist()
EMBED = RNG.normal(size=(VOCABULARY, DIM)).astype(np.float32)
QUERIES = RNG.normal(size=(3, DIM)).astype(np.float32)


def encode(params, tokens):
    """The sum of the embeddings of the tokens, times a scale that tells the training step."""
    return params["scale"] * (params["embed"][tokens.ids] * tokens.mask[..., None]).sum(axis=1)


def params_at(step):
    return {"embed": jnp.asarray(EMBED), "scale": jnp.float32(1 + step)}


TASK = EncodeTask(
    encode=encode, documents=DOCUMENTS, pad_id=0, rows_per_shard=SIZE, corpus_fingerprint="corpus",
    options=EncodeOptions(buckets=(4,), batch_tokens=4 * SIZE),
)  # fmt: skip


def make(folder, **options):
    options = {"index": "exact", "max_retries": 0} | options
    return Refresher(folder, TASK, options=RefreshOptions(**options))


def refresh(refresher, step):
    refresher.submit(params_at(step), step)
    assert refresher.wait(60)
    return refresher.update(step, params_at(step))


class Searchers:
    """Threads that search the index that serves and check that each result is of one index."""

    def __init__(self, snapshot, expected, count=4):
        self._snapshot, self._expected = snapshot, expected
        self.errors, self.steps, self.searches = [], set(), 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def _run(self):
        try:
            while not self._stop.is_set():
                snapshot = self._snapshot()
                found = snapshot.index.search(QUERIES, K)
                scale = 1 + snapshot.encoder_step
                np.testing.assert_array_equal(found.doc_ids, self._expected.doc_ids)
                np.testing.assert_allclose(found.scores, scale * self._expected.scores, rtol=1e-5)
                self.steps.add(snapshot.encoder_step)
                self.searches += 1
                time.sleep(0.001)  # leaves the interpreter to the refresher now and then
        except BaseException as error:
            self.errors.append(repr(error))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def folder():
    """A folder in memory where there is one: hundreds of refreshes wait for thousands of syncs."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="test-swaps-") as name:
        yield Path(name) / "refresh"


def num_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_searches_during_two_hundred_swaps_see_one_index_each_and_nothing_piles_up(folder):
    with make(folder) as refresher:
        first = refresher.start(params_at(0))
        expected = first.index.search(QUERIES, K)
        alive = [weakref.ref(first)]
        del first
        with Searchers(lambda: refresher.snapshot, expected) as searchers:
            for step in range(1, WARM_UP + SWAPS + 1):
                alive.append(weakref.ref(refresh(refresher, step)))
                assert alive[-1]().encoder_step == step
                if step == WARM_UP:
                    gc.collect()
                    descriptors, memory = num_descriptors(), psutil.Process().memory_info().rss
        assert searchers.errors == []
        assert len(searchers.steps) > SWAPS / 2 and searchers.searches > SWAPS
        # Without a collection: a swap must not depend on when the next one comes.
        assert sum(snapshot() is not None for snapshot in alive) <= 2
        assert len(refresher.generations.numbers()) <= 4
        assert len(list((folder / "exports").iterdir())) <= 4
        gc.collect()
        # One more snapshot than at the warm-up may live; of 200 that piled up there would be 200.
        assert num_descriptors() <= descriptors + 2
        # An index that stayed would add its embeddings, 96 kB, for each swap: 19 MB.
        assert psutil.Process().memory_info().rss - memory < 10e6


@pytest.mark.slow
@pytest.mark.skipif(scann_problem() is not None, reason=str(scann_problem()))
def test_searches_during_swaps_of_scann_indexes_see_one_index_each(tmp_path):
    plain = np.asarray([EMBED[ids].sum(axis=0) for ids in DOCUMENTS])
    options = ScannOptions(dimensions_per_block=0, reorder=0, threads=1)
    for step in (0, 1):
        ScannIndex.build(plain * (1 + step), options=options).save(tmp_path / str(step))

    def load(version):
        step = version % 2
        return IndexSnapshot(
            index=ScannIndex.load(tmp_path / str(step)), version=version, encoder_step=step,
            corpus_hash="corpus", built_at=0.0,
        )  # fmt: skip

    with make(tmp_path / "refresh") as refresher:
        refresher._adopt(load(0))
        expected = ExactIndex(plain).search(QUERIES, K)
        with Searchers(lambda: refresher.snapshot, expected) as searchers:
            for version in range(1, 60):
                refresher._adopt(load(version))  # the last index goes while it is searched
                if version == 10:
                    descriptors = num_descriptors()
                seen = searchers.searches
                wait_for(lambda seen=seen: searchers.errors or searchers.searches > seen)
        assert searchers.errors == [] and searchers.steps == {0, 1}
        # One more snapshot than at the warm-up may live; of 200 that piled up there would be 200.
        assert num_descriptors() <= descriptors + 2


READER = """
import select, sys, time
import numpy as np
from ragjax.refresh import GenerationStore, load_snapshot
told = []
store = GenerationStore(sys.argv[1], report=told.append)
plain = np.load(sys.argv[2])
numbers, loads = set(), 0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    with store.newest() as generation:
        snapshot = load_snapshot(generation)
        step = snapshot.encoder_step
        embeddings = snapshot.doc_embeddings(np.arange(len(plain)))
        np.testing.assert_allclose(embeddings, (1 + step) * plain, rtol=1e-5, atol=1e-5)
        found = snapshot.index.search(embeddings[:2], 3)
        np.testing.assert_allclose(found.scores[:, 0], (embeddings[:2] @ embeddings.T).max(1), 1e-4)
        if loads % 5 == 0:  # a slow reader: several newer ones come while it holds this one
            time.sleep(0.3)
            store.open(generation.number).release()  # every byte is still there
    assert not numbers or snapshot.version >= max(numbers)
    numbers.add(snapshot.version)
    open(f"{sys.argv[3]}/{snapshot.version}", "w").close()
    loads += 1
    del snapshot, generation
assert told == [], told
print(len(numbers), loads, flush=True)
"""


@pytest.mark.slow
def test_another_process_reads_during_a_hundred_refreshes_without_an_error(folder, tmp_path):
    np.save(tmp_path / "plain.npy", np.asarray([EMBED[ids].sum(axis=0) for ids in DOCUMENTS]))
    (seen := tmp_path / "seen").mkdir()
    with make(folder) as refresher:
        refresher.start(params_at(0))
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, str(folder), str(tmp_path / "plain.npy"), str(seen)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(),
        )  # fmt: skip
        try:
            assert reader.stdout.readline() == "ready\n"
            for step in range(1, 101):
                refresh(refresher, step)
                # However slow the machine, the reader meets several generations.
                wait_for(lambda step=step: reader.poll() or len([*seen.iterdir()]) >= step // 15)
            answer, errors = reader.communicate("\n", timeout=60)
        finally:
            reader.kill()
            reader.communicate()
        assert reader.returncode == 0, errors
        different, loads = map(int, answer.split())
        assert different > 5 and loads >= different
        assert len(refresher.generations.numbers()) <= 5


def slow_task(seen=None):
    """24 shards of which each takes a fifth of a second; `seen` gets those that began."""

    def tokenize(documents):
        if seen is not None:
            seen.append(documents)
        time.sleep(0.2)
        return documents

    return make_task(tokenize=tokenize)


@pytest.mark.slow
def test_closing_during_the_encoding_is_prompt_and_keeps_the_finished_shards(tmp_path):
    folder, seen = tmp_path / "refresh", []
    options = RefreshOptions(index="exact")
    with Refresher(folder, make_task(), options=options) as refresher:
        refresher.start(make_params(0))
    refresher = Refresher(folder, slow_task(seen), options=options)
    refresher.start(make_params(0))
    refresher.submit(make_params(1), 1)
    wait_for(lambda: list(folder.glob("building/*/embeddings.building/shard-000003.json")))
    assert refresher.state is RefreshState.ENCODING
    started = time.monotonic()
    refresher.close()
    assert time.monotonic() - started < 2  # all shards would take 5 s
    running = {thread.name.partition("_")[0] for thread in threading.enumerate()}
    assert not running & {"refresh", "tokenize"}
    assert refresher.generations.numbers() == [0]
    kept = len(list(folder.glob("building/*/embeddings.building/shard-*.json")))
    assert 4 <= kept < 24
    again = []
    task = make_task(tokenize=lambda documents: again.append(documents) or documents)
    with Refresher(folder, task, options=options) as refresher:
        assert refresher.start(make_params(1), step=1).version == 1
    assert len(again) == 24 - kept


TRAINER = """
import sys
from refresh_tasks import make_params, wait_for
from ragjax.refresh import Refresher, RefreshOptions, RefreshState
from test_swaps import slow_task
refresher = Refresher(sys.argv[1], slow_task(), options=RefreshOptions(index="exact"), report=print)
refresher.submit(make_params(1), 1)
wait_for(lambda: refresher.status().fraction > 0.1)
assert refresher.state is RefreshState.ENCODING
print("encoding", flush=True)
if sys.argv[2] == "error":
    raise SystemExit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("return", 0), ("error", 7)])
def test_a_program_that_just_ends_is_not_held_up_by_an_encoding(tmp_path, end, code):
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path / "refresh"), end],
        env=environment(Path(__file__).parent),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "encoding\n"
        ended = time.monotonic()
        said, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code and said == "" and errors == ""
    assert time.monotonic() - ended < 3
    assert not list(tmp_path.glob("refresh/generations/*"))
    with make(tmp_path / "refresh") as refresher:  # the folder is free
        assert refresher.start(params_at(0)).version == 0

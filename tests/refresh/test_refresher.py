"""The refresher: nothing blocks, nothing is lost, and the deterministic mode repeats itself."""

import errno
import json
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refresh_tasks import wait_for

from ragjax.index import EmbeddingStore, EmbeddingWriter
from ragjax.refresh import (
    AsSoonAsPossible,
    EncodeOptions,
    EncodeTask,
    EveryNSteps,
    GenerationStore,
    IndexTooStaleError,
    PartialPolicy,
    Refresher,
    RefreshError,
    RefreshOptions,
    RefreshState,
    ResumeError,
    ThreadExecutor,
    encode_corpus,
    encode_to_store,
    encode_token_ids,
    load_snapshot,
)
from ragjax.refresh.task import params_digest

DIM, VOCABULARY = 8, 30
RNG = np.random.default_rng(0)
DOCS = [RNG.integers(1, VOCABULARY, size=size).tolist() for size in RNG.integers(1, 9, size=120)]
OPTIONS = EncodeOptions(buckets=(8,), batch_tokens=128)


def toy_encode(params, tokens):
    """The mean of the tokens' embeddings, times a scale that tells the training step."""
    weights = tokens.mask[..., None].astype(jnp.float32)
    pooled = (params["embed"][tokens.ids] * weights).sum(axis=1)
    return params["scale"] * pooled / jnp.maximum(weights.sum(axis=1), 1.0)


EMBED = RNG.normal(size=(VOCABULARY, DIM)).astype(np.float32)


def params_at(step):
    return {"embed": jnp.asarray(EMBED), "scale": jnp.float32(1 + step)}


def embeddings_at(step):
    return encode_token_ids(toy_encode, params_at(step), DOCS, pad_id=0, options=OPTIONS)


class Gate:
    """A tokenizer that waits until it is opened, and counts the documents it has seen."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()
        self.documents = 0

    def __call__(self, documents):
        assert self.open.wait(20)
        self.documents += len(documents)
        return list(documents)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def told():
    return []


@pytest.fixture
def make(tmp_path, gate, told):
    """Makes refreshers in one folder and closes them."""
    made = []

    def make_one(*, trigger=None, executor=None, probe_queries=None, encode=toy_encode, **options):
        task = EncodeTask(
            encode=encode, documents=DOCS, pad_id=0, tokenize=gate, options=OPTIONS,
            rows_per_shard=32,
        )  # fmt: skip
        refresher = Refresher(
            tmp_path / "refresh", task, trigger=trigger, executor=executor, report=told.append,
            probe_queries=probe_queries, options=RefreshOptions(**options),
        )  # fmt: skip
        made.append(refresher)
        return refresher

    yield make_one
    gate.open.set()
    for refresher in made:
        refresher.close()


def serves(snapshot, step):
    """Tells whether an index holds the documents encoded at a step."""
    rows = np.arange(len(DOCS))
    indexed = snapshot.doc_embeddings(rows)
    np.testing.assert_array_equal(indexed, embeddings_at(step))
    query = EMBED[:3]
    found = snapshot.index.search(query, 5)
    np.testing.assert_allclose(
        found.scores, np.sort(query @ indexed.T, axis=1)[:, ::-1][:, :5], rtol=1e-5
    )
    return snapshot.encoder_step == step


def test_the_first_index_is_built_in_the_foreground_and_opened_again_later(make, gate):
    refresher = make()
    with pytest.raises(RuntimeError, match="call start"):
        _ = refresher.snapshot
    assert serves(refresher.start(params_at(0)), 0)
    assert refresher.snapshot.version == 0 and refresher.state is RefreshState.IDLE
    refresher.close()
    seen = gate.documents
    again = make()
    assert serves(again.start(params_at(0)), 0)
    assert gate.documents == seen and again.generations.numbers() == [0]


def test_a_refresh_goes_through_its_states_and_nothing_waits_for_it(make, gate):
    refresher = make()
    refresher.start(params_at(0))
    gate.open.clear()
    started = time.perf_counter()
    assert refresher.submit(params_at(1), 1) is True
    for step in range(1, 50):
        snapshot = refresher.update(step, params_at(step))
        assert snapshot.encoder_step == 0 and refresher.poll() is None
    assert time.perf_counter() - started < 5
    assert refresher.state is RefreshState.ENCODING and refresher.busy
    while refresher.status().step < 0:  # the thread takes it when the system lets it run
        time.sleep(0.001)
    assert refresher.status().step == 1
    gate.open.set()
    assert refresher.wait(20)
    assert refresher.state is RefreshState.READY and refresher.snapshot.encoder_step == 0
    assert serves(refresher.update(50, params_at(50)), 1)
    assert refresher.state is RefreshState.IDLE and refresher.poll() is None
    metrics = refresher.metrics(50)
    assert metrics["index/staleness_steps"] == 49 and metrics["index/version"] == 1
    assert metrics["index/recall"] == 1 and metrics["index/failures"] == 0
    assert metrics["index/swap_seconds"] < 0.01
    assert metrics["index/encode_seconds"] > 0 and metrics["index/step_seconds_inside"] > 0


def test_the_parameters_may_be_donated_as_soon_as_they_are_submitted(make, gate):
    refresher = make()
    refresher.start(params_at(0))
    gate.open.clear()
    params = params_at(1)
    refresher.submit(params, 1)
    next_step = jax.jit(
        lambda params: jax.tree.map(lambda leaf: leaf * 0 + 7, params), donate_argnums=0
    )
    next_step(params)
    assert params["scale"].is_deleted()
    gate.open.set()
    refresher.wait()
    assert serves(refresher.poll(), 1)


def test_a_newer_export_replaces_the_one_that_waits(make, gate):
    refresher = make()
    refresher.start(params_at(0))
    gate.open.clear()
    assert refresher.submit(params_at(1), 1) is True
    while refresher.status().step != 1:
        time.sleep(0.001)
    assert refresher.submit(params_at(2), 2) is False
    assert refresher.submit(params_at(3), 3) is False
    assert refresher.status().waiting_step == 3
    gate.open.set()
    refresher.wait()
    assert serves(refresher.poll(), 3)
    steps = {refresher.generations.open(n).description.encoder_step
             for n in refresher.generations.numbers()}  # fmt: skip
    assert steps == {0, 1, 3}


def test_triggers_count_and_as_soon_as_possible_keeps_one_under_way(make):
    refresher = make(trigger=EveryNSteps(4))
    refresher.start(params_at(0))
    for step in range(13):
        refresher.update(step, params_at(step))
        refresher.wait()
    assert [refresher.generations.open(n).description.encoder_step
            for n in refresher.generations.numbers()] == [4, 8, 12]  # fmt: skip
    refresher.close()
    soon = make(trigger=AsSoonAsPossible())
    soon.start(params_at(100), step=100)
    seen, step = set(), 100

    def one_step():
        nonlocal step
        step += 1
        seen.add(soon.update(step, params_at(step)).encoder_step)
        return len(seen) > 3

    wait_for(one_step)


def versions(refresher, steps):
    return [refresher.update(step, params_at(step)).encoder_step for step in range(steps)]


def test_synchronous_refreshes_serve_in_the_step_that_exports(make):
    refresher = make(trigger=EveryNSteps(3), adopt_after=0)
    refresher.start(params_at(0))
    assert versions(refresher, 8) == [0, 0, 0, 3, 3, 3, 6, 6]


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_the_deterministic_mode_does_not_depend_on_the_speed(make, gate, delay, monkeypatch):
    def slow(documents):
        time.sleep(delay)
        return list(documents)

    monkeypatch.setattr(Gate, "__call__", lambda self, documents: slow(documents))
    refresher = make(trigger=EveryNSteps(2), adopt_after=3)
    refresher.start(params_at(0))
    # Exports at 2, 5, 8 and 11: what is due while an index is on its way waits for it.
    assert versions(refresher, 14) == [0] * 5 + [2] * 3 + [5] * 3 + [8] * 3


@pytest.mark.parametrize("lost", ["nothing", "generations", "first export"])
def test_a_resumed_run_searches_the_same_indexes(make, tmp_path, lost, told):
    refresher = make(trigger=EveryNSteps(4), adopt_after=3)
    refresher.start(params_at(0))
    expected = versions(refresher, 16)
    assert expected == [0] * 7 + [4] * 4 + [8] * 4 + [12]
    refresher.close()
    for cut in (5, 6, 9):
        folder = tmp_path / "refresh"
        shutil.rmtree(folder)
        first = make(trigger=EveryNSteps(4), adopt_after=3)
        first.start(params_at(0))
        seen = versions(first, cut)
        state = first.state_dict()
        first.close()
        if lost == "generations":
            shutil.rmtree(folder / "generations")
        elif lost == "first export":
            shutil.rmtree(folder / "exports" / f"{state['encoder_step']:08d}")
        second = make(trigger=EveryNSteps(4), adopt_after=3)
        second.start(params_at(cut), step=cut, state=state)
        assert serves(second.snapshot, seen[-1])
        rest = [second.update(step, params_at(step)).encoder_step for step in range(cut, 16)]
        assert seen + rest == expected
        second.close()
    assert any("built again from the exported" in line for line in told) == (lost == "generations")


def test_a_run_whose_index_cannot_be_had_again_is_refused_or_goes_on_with_a_word(make, tmp_path):
    first = make()
    first.start(params_at(0))
    state = first.state_dict()
    first.close()
    shutil.rmtree(tmp_path / "refresh" / "generations")
    shutil.rmtree(tmp_path / "refresh" / "exports")
    deterministic = make(adopt_after=2)
    with pytest.raises(ResumeError, match="cannot be continued identically: .*index of step 0"):
        deterministic.start(params_at(5), step=5, state=state)
    deterministic.close()
    assert serves(make().start(params_at(5), step=5, state=state), 5)


def test_what_a_checkpoint_names_is_kept(make):
    refresher = make(trigger=EveryNSteps(1), adopt_after=0)
    refresher.start(params_at(0))
    named = refresher.state_dict()["generation"]
    versions(refresher, 9)
    assert refresher.generations.numbers()[0] == named == 0
    assert len(refresher.generations.numbers()) <= 3 + 1 + 1  # kept, named, and the one that serves


def test_a_failed_refresh_is_tried_again(make, monkeypatch, told):
    failing = [OSError("the disk is gone"), OSError("the disk is gone")]
    encode = ThreadExecutor.encode

    def flaky(self, task, request):
        if failing and request.step:
            raise failing.pop()
        return encode(self, task, request)

    monkeypatch.setattr(ThreadExecutor, "encode", flaky)
    refresher = make(max_retries=2, backoff_seconds=0.01)
    refresher.start(params_at(0))
    refresher.submit(params_at(1), 1)
    refresher.wait()
    assert serves(refresher.poll(), 1)
    assert refresher.metrics(1)["index/failures"] == 2
    assert refresher.status().last_error == "the disk is gone"
    assert sum("trying again" in line for line in told) == 2


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_refresh_that_fails_for_good_stops_the_run_or_says_so(make, monkeypatch, told, policy):
    monkeypatch.setattr(
        "ragjax.refresh.pipeline.params_digest",
        lambda params: 1 / 0 if float(params["scale"]) == 2 else "good",
    )
    refresher = make(max_retries=1, backoff_seconds=0.0, on_failure=policy)
    refresher.start(params_at(0))
    refresher.submit(params_at(1), 1)
    refresher.wait()
    assert refresher.state is RefreshState.FAILED
    if policy == "stop":
        with pytest.raises(RefreshError, match="division by zero.*step 0 still serves") as raised:
            refresher.update(2, params_at(2))
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert serves(refresher.update(3, params_at(3)), 0)
    assert any("could not be refreshed" in line for line in told) == (policy == "warn")


def test_the_lag_is_bounded_by_waiting(make, gate):
    refresher = make(max_index_lag_steps=5, on_lag="wait")
    refresher.start(params_at(0))
    assert versions(refresher, 14) == [0] * 6 + [6] * 6 + [12] * 2


def test_the_lag_is_bounded_by_a_warning_or_a_stop(make, told):
    warning = make(max_index_lag_steps=3, on_lag="warn")
    warning.start(params_at(0))
    versions(warning, 9)
    assert sum("4 steps behind" in line for line in told) == 1
    warning.close()
    stopping = make(max_index_lag_steps=3, on_lag="stop")
    stopping.start(params_at(0))
    with pytest.raises(IndexTooStaleError, match="4 steps behind the encoder, more than 3"):
        versions(stopping, 9)


def test_documents_are_encoded_on_the_devices_that_were_given(make):
    used = set()
    spare = jax.devices()[4:6]

    def spying_encode(params, tokens):
        jax.debug.inspect_array_sharding(
            tokens.ids, callback=lambda sharding: used.update(sharding.device_set)
        )
        return toy_encode(params, tokens)

    refresher = make(executor=ThreadExecutor(spare), encode=spying_encode)
    refresher.start(params_at(0))
    assert used == set(spare)
    np.testing.assert_allclose(
        refresher.snapshot.doc_embeddings(np.arange(len(DOCS))), embeddings_at(0), rtol=1e-6
    )


@pytest.mark.parametrize("devices", [[], jax.devices()[:1] * 2])
def test_devices_that_cannot_be_are_refused(devices):
    with pytest.raises(ValueError, match="distinct local devices"):
        ThreadExecutor(devices)


def test_a_partial_refresh_encodes_what_is_retrieved_most(make, gate):
    refresher = make(partial=PartialPolicy(0.25, 3))
    refresher.start(params_at(0))
    wanted = np.arange(100, 115)
    refresher.note_retrieved(wanted[None], np.ones((1, 15), bool))
    encoded = []
    for step in (1, 2, 3, 4):
        seen = gate.documents
        refresher.submit(params_at(step), step)
        refresher.wait()
        snapshot = refresher.poll()
        encoded.append(gate.documents - seen)
        indexed = snapshot.doc_embeddings(np.arange(len(DOCS)))
        fresh = (indexed == embeddings_at(step)).all(axis=1)
        assert fresh.sum() == encoded[-1]
        if step == 1:
            assert fresh[wanted].all()
            np.testing.assert_array_equal(indexed[~fresh], embeddings_at(0)[~fresh])
    assert encoded == [30, 30, 120, 30]
    with refresher.generations.newest() as generation:
        assert generation.description.encoded == 30 and generation.description.base == 3


def test_probe_queries_measure_what_a_swap_changed(make):
    refresher = make(probe_queries=lambda: EMBED[:10])
    refresher.start(params_at(0))
    assert "index/overlap" not in refresher.metrics(0)
    refresher.submit(params_at(1), 1)  # another scale leaves the order alone
    refresher.wait()
    refresher.poll()
    assert refresher.metrics(1)["index/overlap"] == 1
    turned = {"embed": jnp.asarray(EMBED[::-1].copy()), "scale": jnp.float32(1)}
    refresher.submit(turned, 2)
    refresher.wait()
    refresher.poll()
    assert refresher.metrics(2)["index/overlap"] < 0.5


def test_the_line_says_which_index_serves_and_what_goes_on(make, gate):
    refresher = make()
    refresher.start(params_at(0))
    assert refresher.line(7) == "index 0 (7 steps old)"
    gate.open.clear()
    refresher.submit(params_at(1), 1)
    while refresher.state is not RefreshState.ENCODING:
        time.sleep(0.001)
    assert refresher.line().startswith("index 0, encoding 0%")
    gate.open.set()


def store_of(folder, step):
    """Embeddings on disk, as a run has them before its refresher starts."""
    task = EncodeTask(encode=toy_encode, documents=DOCS, pad_id=0, options=OPTIONS)
    spec = task.spec(params_at(step), params_digest=params_digest(params_at(step)))
    return encode_to_store(task, params_at(step), EmbeddingWriter.open(folder, spec))


@pytest.mark.parametrize("links", [True, False])
def test_embeddings_on_disk_are_indexed_and_neither_computed_nor_stored_again(
    make, gate, tmp_path, monkeypatch, links
):
    if not links:  # as a file system without hard links answers

        def refuse(source, target):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr("os.link", refuse)
    store = store_of(tmp_path / "index", 0)
    refresher = make()
    refresher.start(params_at(0), store=store)
    assert gate.documents == 0 and serves(refresher.snapshot, 0)
    shards = [folder / "shard-000000.npy" for folder in (
        store.folder, refresher.generations.path(0) / "embeddings")]  # fmt: skip
    assert shards[0].samefile(shards[1]) == links
    # Each may go without the other, and the run may move.
    refresher.close()
    shutil.copytree(tmp_path / "refresh", tmp_path / "moved")
    shutil.rmtree(store.folder)
    assert serves(make().start(params_at(0)), 0) and gate.documents == 0
    store_of(tmp_path / "index", 0)
    shutil.rmtree(tmp_path / "refresh")
    (tmp_path / "moved").rename(tmp_path / "refresh")
    EmbeddingStore.open(tmp_path / "index")
    with GenerationStore(tmp_path / "refresh").open(0) as generation:
        assert load_snapshot(generation).version == 0


@pytest.mark.parametrize("step", [0, 1])
def test_embeddings_of_other_parameters_are_refused(make, tmp_path, step):
    store = store_of(tmp_path / "index", step)
    with pytest.raises(RefreshError, match=r"index have model_fingerprint '\w+', expected '\w+'"):
        make().start(params_at(1 - step), store=store)


def test_a_closed_refresher_says_so(make):
    refresher = make()
    refresher.start(params_at(0))
    refresher.close()
    refresher.close()
    with pytest.raises(RuntimeError, match="closed"):
        refresher.submit(params_at(1), 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 2}, "keep must be at least 3"),
        ({"adopt_after": -2}, "adopt_after must be at least -1"),
        ({"max_retries": -1}, "max_retries"),
        ({"on_lag": "panic"}, "on_lag must be one of wait, warn, stop"),
        ({"index": "faiss"}, "index must be one of auto, exact, scann"),
        ({"on_failure": "ignore"}, "on_failure must be one of"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        RefreshOptions(**options)


def test_a_corpus_without_documents_is_refused():
    with pytest.raises(ValueError, match="no documents"):
        EncodeTask(encode=toy_encode, documents=[], pad_id=0)


@pytest.mark.parametrize("adopt_after", [-1, 0, 2])
def test_an_index_of_unchanged_parameters_is_as_fresh_as_they_are(make, adopt_after):
    refresher = make(max_index_lag_steps=3, adopt_after=adopt_after)
    refresher.start(params_at(0))
    served = [refresher.update(step, params_at(0)).encoder_step for step in range(10)]
    assert served == [0] * 4 + [4] * 4 + [8] * 2
    assert refresher.generations.numbers() == [0]
    state = refresher.state_dict()
    refresher.close()
    again = make(max_index_lag_steps=3, adopt_after=adopt_after)
    assert again.start(params_at(0), step=10, state=state).encoder_step == 8


@pytest.mark.parametrize("finished", [False, True])
def test_a_refresh_under_way_at_the_checkpoint_goes_on_after_it(make, gate, finished):
    first = make(trigger=EveryNSteps(50))
    first.start(params_at(0))
    gate.open.clear()
    first.update(50, params_at(50))
    while not first._pipeline.exported.get(50):
        time.sleep(0.001)
    if finished:
        gate.open.set()
        first.wait()
    state = first.state_dict()
    assert state["encoder_step"] == 0 and state["pending"][:2] == [50, -1]
    threading.Timer(0.1, gate.open.set).start()
    first.close()
    second = make(trigger=EveryNSteps(50))
    second.start(params_at(51), step=51, state=state)
    assert second.snapshot.encoder_step == 0
    second.update(51, params_at(51))
    second.wait()
    assert serves(second.update(52, params_at(52)), 50)


def test_a_scheduled_refresh_that_failed_is_tried_again_by_the_resumed_run(make, monkeypatch):
    broken = [True]
    encode = ThreadExecutor.encode

    def flaky(self, task, request):
        if broken and request.step:
            raise OSError("no disk")
        return encode(self, task, request)

    monkeypatch.setattr(ThreadExecutor, "encode", flaky)
    first = make(trigger=EveryNSteps(4), adopt_after=2, max_retries=0)
    first.start(params_at(0))
    with pytest.raises(RefreshError, match="no disk"):
        versions(first, 9)
    state = first.state_dict()
    assert state["pending"][:2] == [4, 6]
    first.close()
    broken.clear()
    second = make(trigger=EveryNSteps(4), adopt_after=2, max_retries=0)
    second.start(params_at(6), step=6, state=state)
    rest = [second.update(step, params_at(step)).encoder_step for step in range(6, 12)]
    assert rest == [4] * 4 + [8] * 2


def test_what_a_checkpoint_names_outlives_many_refreshes_and_two_lives(make):
    options = {"trigger": EveryNSteps(2), "adopt_after": 1}
    first = make(**options)
    first.start(params_at(0))
    seen = versions(first, 11)
    state = first.state_dict()  # at step 11: the index of 10 is due now
    assert state["pending"][:2] == [10, 11]
    for life in range(2):
        last = first if life == 0 else make(**options)
        if life:
            last.start(params_at(11), step=11, state=state)
        ahead = [last.update(step, params_at(step)).encoder_step for step in range(11, 31)]
        last.close()
        if life == 0:
            expected = ahead
        assert ahead == expected and seen[-1] == 8


def test_a_partly_encoded_index_is_not_taken_for_a_whole_one(make):
    first = make(partial=PartialPolicy(0.2, 100))
    first.start(params_at(0))
    first.submit(params_at(1), 1)
    first.wait()
    snapshot = first.poll()
    assert snapshot.fresh_fraction == 0.2
    assert first.metrics(1)["index/fresh_fraction"] == 0.2
    partly = snapshot.doc_embeddings(np.arange(len(DOCS)))
    state = first.state_dict()
    first.close()
    named = make(partial=PartialPolicy(0.2, 100))
    again = named.start(params_at(1), step=1, state=state)
    np.testing.assert_array_equal(again.doc_embeddings(np.arange(len(DOCS))), partly)
    named.close()
    assert serves(make().start(params_at(1), step=1), 1)


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_a_bounded_lag_keeps_the_deterministic_mode_deterministic(make, monkeypatch, delay):
    def slow(self, documents):
        time.sleep(delay)
        return list(documents)

    monkeypatch.setattr(Gate, "__call__", slow)
    refresher = make(trigger=EveryNSteps(10), adopt_after=5, max_index_lag_steps=12)
    refresher.start(params_at(0))
    assert versions(refresher, 26) == [0] * 13 + [10] * 10 + [20] * 3


def test_waiting_for_an_index_can_be_ended(tmp_path, gate):
    class Stopped(Exception):
        pass

    stop = []

    def check():
        if stop:
            raise Stopped

    task = EncodeTask(encode=toy_encode, documents=DOCS, pad_id=0, tokenize=gate, options=OPTIONS)
    refresher = Refresher(
        tmp_path / "r", task, trigger=EveryNSteps(1), options=RefreshOptions(adopt_after=0),
        check=check,
    )  # fmt: skip
    refresher.start(params_at(0))
    gate.open.clear()
    threading.Timer(0.1, lambda: stop.append(1)).start()
    with pytest.raises(Stopped):
        refresher.update(1, params_at(1))
    assert refresher.state_dict()["pending"][0] == 1  # a resumed run goes on with it
    gate.open.set()
    refresher.close()


def test_a_failure_that_newer_parameters_made_up_for_is_still_told(make, told, gate, monkeypatch):
    encode = ThreadExecutor.encode

    def flaky(self, task, request):
        if request.step == 1:
            raise ValueError("step 1 is bad")
        return encode(self, task, request)

    monkeypatch.setattr(ThreadExecutor, "encode", flaky)
    refresher = make(max_retries=0)
    refresher.start(params_at(0))
    refresher.submit(params_at(1), 1)
    refresher.wait()
    refresher.submit(params_at(2), 2)
    refresher.wait()
    assert serves(refresher.poll(), 2)
    assert any("step 1 is bad" in line for line in told)


@pytest.mark.parametrize("integer", [np.int64, jnp.int32, np.asarray])
def test_steps_may_be_integers_of_numpy_and_jax(make, integer):
    refresher = make(trigger=EveryNSteps(2), adopt_after=0)
    refresher.start(params_at(0), step=integer(0))
    for step in range(4):
        refresher.update(integer(step), params_at(step))
    refresher.submit(params_at(3), integer(3))
    assert refresher.wait() and serves(refresher.poll(), 3)
    assert type(refresher.metrics(integer(5))["index/staleness_steps"]) is float
    assert json.loads(json.dumps(refresher.state_dict()))["encoder_step"] == 3
    assert refresher.generations.descriptions()[2].encoder_step == 3


@pytest.mark.parametrize("step", [1.5, "3", None, jnp.ones(2), -1])
def test_a_step_that_is_no_number_of_a_step_is_refused(make, step):
    refresher = make()
    with pytest.raises(ValueError, match="step must be"):
        refresher.start(params_at(0), step=step)


def test_steps_that_go_back_are_named_and_begin_anew_with_start(make, gate):
    refresher = make(trigger=EveryNSteps(4), adopt_after=1)
    refresher.start(params_at(0))
    early = refresher.state_dict()
    seen = versions(refresher, 10)
    gate.open.clear()
    refresher.submit(params_at(9), 9)
    gate.open.set()
    for again in (refresher.update, lambda step, params: refresher.submit(params, step)):
        with pytest.raises(ValueError, match=r"Step 3 comes after step 9: .*start\(params, step=3"):
            again(3, params_at(3))
    assert serves(refresher.start(params_at(1), step=1, state=early), 0)
    again = [refresher.update(step, params_at(step)).encoder_step for step in range(1, 10)]
    assert again == seen[1:]


@pytest.mark.parametrize(
    ("encode", "found"),
    [
        (lambda params, tokens: toy_encode(params, tokens)[:, 0], r"an array \[1\]"),
        (lambda params, tokens: params["embed"][tokens.ids], r"an array \[1, 8, 8\]"),
        (lambda params, tokens: toy_encode(params, tokens).sum(0)[None], r"an array \[1, 8\]"),
        (lambda params, tokens: (toy_encode(params, tokens),), "tuple"),
    ],
    ids=["one number", "each token", "one for all", "a tuple"],
)
def test_an_encoder_that_gives_no_embedding_for_each_document_is_named(make, encode, found):
    task = EncodeTask(encode=encode, documents=DOCS, pad_id=0, options=OPTIONS)
    if found != r"an array \[1, 8\]":  # with one row it is right
        with pytest.raises(RefreshError, match=rf"The encoder returned {found} for 1 rows"):
            make(encode=encode).start(params_at(0))
    with pytest.raises(ValueError, match=r"The encoder returned .* return one .*, \[\d+, D\]"):
        encode_corpus(task, params_at(0))

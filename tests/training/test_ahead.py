import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from ragjax.index import IndexSnapshot, SearchResult
from ragjax.refresh.gauges import index_metrics
from ragjax.training.ahead import AheadRetrieval
from ragjax.training.live import LiveRetrieval, StepDocuments


class FakeRetrieval:
    """Finds documents whose ids tell with which parameters they were looked up."""

    def __init__(self):
        self.params, self.threads, self.noted, self.resumed = None, [], [], None
        self.refresher = SimpleNamespace(close=lambda: None)

    def resume(self, step, state, saved):
        self.resumed = (step, saved)

    def advance(self, step, state):
        self.params = state.params
        return "snapshot"

    def look_up(self, step, snapshot):
        params = self.params

        def search():
            self.threads.append(threading.get_ident())
            doc_ids = np.array([[100 * step + params, -1]], np.int32)
            scores = np.array([[0.1, -np.inf]], np.float32)
            return StepDocuments(
                step, np.array([step]), SearchResult(doc_ids, scores, doc_ids >= 0)
            )

        return search

    def note(self, retrieved):
        self.noted.append(retrieved.step)
        return {"noted": float(retrieved.step)}

    def state_dict(self):
        return {"version": 3}

    def line(self, step):
        return f"step {step}"


def prepare(retrieved):
    return int(retrieved.found.doc_ids[0, 0]), {"prepared": 1.0}


def state(step):
    return SimpleNamespace(params=step)


def run(host, first, last):
    batches = []
    for step in range(first, last):
        metrics = host.before_step(step, state(step))
        batches.append(host.batch_at(step))
        assert {"prepared", "noted", "index/search_seconds", "retrieval/wait_seconds"} <= set(
            metrics
        )
    return batches


def test_a_step_retrieves_with_the_parameters_of_the_step_before_in_another_thread():
    retrieval = FakeRetrieval()
    host = AheadRetrieval(retrieval, prepare, num_steps=3)
    host.resume(0, state(0), None)
    assert run(host, 0, 3) == [0, 100, 201]  # 100 * step + parameters it was looked up with
    assert retrieval.noted == [0, 1, 2]
    assert retrieval.threads[0] == threading.get_ident()
    assert threading.get_ident() not in retrieval.threads[1:]
    assert len(retrieval.threads) == 3  # nothing is retrieved for a step that never comes
    host.close()


def test_preparing_goes_on_while_the_step_is_computed():
    begun, go_on = threading.Event(), threading.Event()

    def wait(retrieved):
        if retrieved.step == 1:
            begun.set()
            assert go_on.wait(10)
        return retrieved.step, {}

    host = AheadRetrieval(FakeRetrieval(), wait, num_steps=2)
    host.resume(0, state(0), None)
    host.before_step(0, state(0))
    assert begun.wait(10)  # before anybody asked for the result
    go_on.set()
    host.before_step(1, state(1))
    assert host.batch_at(1) == 1
    host.close()


def test_without_overlap_it_retrieves_with_the_parameters_of_the_step():
    host = AheadRetrieval(FakeRetrieval(), prepare, num_steps=3, overlap=False)
    host.resume(0, state(0), None)
    assert run(host, 0, 3) == [0, 101, 202]
    assert "ahead" not in host.state_dict()
    host.close()


def test_a_run_that_is_continued_learns_from_what_had_been_retrieved():
    whole = AheadRetrieval(FakeRetrieval(), prepare, num_steps=4)
    whole.resume(0, state(0), None)
    expected = run(whole, 0, 2)
    saved = whole.state_dict()
    expected += run(whole, 2, 4)
    retrieval = FakeRetrieval()
    continued = AheadRetrieval(retrieval, prepare, num_steps=4)
    continued.resume(2, state(2), saved)
    assert retrieval.resumed == (2, {"version": 3})  # what the index keeps is handed on as it was
    assert run(continued, 2, 4) == expected[2:]
    for host in (whole, continued):
        host.close()


def test_what_was_retrieved_survives_json_to_the_bit():
    host = AheadRetrieval(FakeRetrieval(), lambda retrieved: (retrieved, {}), num_steps=2)
    host.resume(0, state(0), None)
    host.before_step(0, state(0))
    saved = json.loads(json.dumps(host.state_dict(), allow_nan=False))
    again = AheadRetrieval(FakeRetrieval(), lambda retrieved: (retrieved, {}), num_steps=2)
    again.resume(1, state(1), saved)
    again.before_step(1, state(1))
    host.before_step(1, state(1))
    for ours, theirs in zip(again.batch_at(1).found, host.batch_at(1).found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    host.close()
    again.close()


def test_an_error_while_preparing_ahead_comes_up_at_its_step():
    def fail(retrieved):
        if retrieved.step == 1:
            raise ValueError("question q7 has no documents")
        return 0, {}

    host = AheadRetrieval(FakeRetrieval(), fail, num_steps=3)
    host.resume(0, state(0), None)
    host.before_step(0, state(0))
    assert host.state_dict() == {"version": 3}  # a checkpoint can be written all the same
    with pytest.raises(ValueError, match="q7"):
        host.before_step(1, state(1))
    host.close()


def test_a_step_that_was_not_prepared_is_refused():
    host = AheadRetrieval(FakeRetrieval(), prepare, num_steps=3)
    host.resume(0, state(0), None)
    host.before_step(0, state(0))
    with pytest.raises(RuntimeError, match="not prepared"):
        host.batch_at(1)
    host.close()


class ServedRefresher:
    """Serves the index of step 0, and from step 5 on that of step 4."""

    def __init__(self):
        self.snapshot = None

    def start(self, params, *, step, state, store):
        self.update(step, params)

    def update(self, step, params):
        version = int(step >= 5)
        self.snapshot = IndexSnapshot(
            index=None, version=version, encoder_step=4 * version, corpus_hash="", built_at=0.0,
            overlap=0.5 if version else float("nan"),
        )  # fmt: skip
        return self.snapshot

    def metrics(self, step):
        return index_metrics(self.snapshot, step) | {"index/failures": 0.0}

    def note_retrieved(self, doc_ids, mask):
        pass

    def state_dict(self):
        return {}

    def close(self):
        pass


def ahead_of_a_served_index(**options):
    found = SearchResult(*(np.zeros((1, 1), kind) for kind in (np.int32, np.float32, bool)))
    retrieval = LiveRetrieval(
        lambda _: ServedRefresher(),
        towers=lambda params: (params, params),
        encode_queries=lambda params, rows: np.zeros((1, 1), np.float32),
        rows_at=lambda step: np.zeros(1, np.int64),
        k=1,
        search=lambda queries, k: found,
    )
    return AheadRetrieval(retrieval, lambda retrieved: (0, {}), num_steps=8, **options)


@pytest.mark.parametrize(
    "options,versions,staleness",
    [
        # What step 5 learns from was searched before the index of step 4 was there.
        ({}, [0] * 6 + [1] * 2, [0, 1, 2, 3, 4, 5, 2, 3]),
        ({"max_lag": 4}, [0] * 5 + [1] * 3, [0, 1, 2, 3, 4, 1, 2, 3]),
        ({"overlap": False}, [0] * 5 + [1] * 3, [0, 1, 2, 3, 4, 1, 2, 3]),
    ],
)
def test_the_index_that_was_searched_is_logged_and_bounded(options, versions, staleness):
    host = ahead_of_a_served_index(**options)
    host.resume(0, state(0), None)
    lines = [host.before_step(step, state(step)) for step in range(8)]
    assert [line["index/version"] for line in lines] == versions
    assert [line["index/staleness_steps"] for line in lines] == staleness
    assert [line.get("index/overlap") for line in lines] == [0.5 if v else None for v in versions]
    host.close()


def test_a_run_that_is_continued_logs_the_index_that_had_been_searched():
    host = ahead_of_a_served_index()
    host.resume(0, state(0), None)
    for step in range(5):
        host.before_step(step, state(step))
    again = ahead_of_a_served_index()
    again.resume(5, state(5), json.loads(json.dumps(host.state_dict())))
    ours, theirs = (each.before_step(5, state(5)) for each in (host, again))
    assert ours["index/version"] == theirs["index/version"] == 0
    assert ours["index/staleness_steps"] == theirs["index/staleness_steps"] == 5
    host.close()
    again.close()

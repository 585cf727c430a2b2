"""The retriever half with live retrieval: five ways of keeping the index fresh, and kills."""

import dataclasses
import json
import signal
from contextlib import closing

import jax
import numpy as np
import pytest
from programs import environment, load_script, send_at, start

from ragjax.index import IndexSnapshot, SearchResult
from ragjax.refresh import PartialPolicy, ThreadExecutor, live_embeddings
from ragjax.runs import indexes
from ragjax.runs.forecast import estimate_cost
from ragjax.runs.indexes import build_bm25, build_towers, live_search, search
from ragjax.runs.options.dual import AdaptConfig, RetrieverConfig
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.teachers.reading import score_candidates, score_step
from ragjax.runs.train import retriever as retriever_stage
from ragjax.runs.train.live import open_refresher, refresh_options
from ragjax.runs.train.retriever import labelled_targets, open_labelled, train_retriever
from ragjax.runs.workspace import open_workspace, tower_params
from ragjax.training.live import StepQueries
from ragjax.training.loop import MetricsLog, StopFlag
from ragjax.training.score_cache import ResultCache, Score

ADAPT = load_script("experiments/adapt.py")
DPR = RetrieverConfig(
    objective="dpr", train="both", candidates=3, batch_size=4, epochs=3, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def base(tiny_inputs, tmp_path_factory):
    """A workspace of the tiny domain, 12 questions and 9 steps of 4."""
    config = AdaptConfig(**tiny_inputs, output="unused", retriever=DPR)
    config = dataclasses.replace(
        config,
        language_model=dataclasses.replace(config.language_model, train_layers=1),
        data_options=dataclasses.replace(config.data_options, train_questions=12),
    )
    folder = tmp_path_factory.mktemp("base")
    return open_workspace(config, folder, stop=StopFlag(), log=lambda line: None)


@pytest.fixture
def make(base, tmp_path):
    """Makes a workspace with other options in a folder of its own."""

    def make_one(name="run", retriever=DPR, **refresh):
        config = dataclasses.replace(
            base.config, retriever=retriever, refresh=RefreshConfig(**refresh)
        )
        folder = tmp_path / name
        told = []
        workspace = dataclasses.replace(
            base, config=config, folder=folder, metrics=MetricsLog(folder / "metrics.jsonl"),
            log=told.append,
        )  # fmt: skip
        folder.mkdir()
        return workspace, told

    return make_one


def train(workspace, params=None):
    """Trains the retriever; returns the towers and the metrics of each step."""
    params = params or tower_params(workspace)
    config = workspace.config.retriever
    live = open_labelled(workspace, config, params)
    with closing(live.retrieval.refresher):
        trained = train_retriever(workspace, config, 0, params, live.at, live.retrieval)
    lines = (workspace.folder / "metrics.jsonl").read_text().splitlines()
    return trained, [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_actors_of_ray_encode_and_the_run_is_the_same_to_the_bit(make, monkeypatch):
    pytest.importorskip("ray", reason="needs the [ray] extra")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in (environment() | {"RAY_worker_niceness": "0"}).items():
        monkeypatch.setenv(name, value)
    options = {"mode": "async", "every": "2", "adopt_after": 1}
    results = [
        train(make(dispatch, DPR, **options, dispatch=dispatch)[0])
        for dispatch in ("static", "ray")
    ]
    assert equal(*(towers for towers, _ in results))
    here, there = (steps_of_index(rows) for _, rows in results)
    assert here == there == [0, 0, 0, 2, 2, 4, 4, 6, 6]


def steps_of_index(rows):
    return [row["step"] - int(row["index/staleness_steps"]) for row in rows]


def equal(left, right):
    return all(np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(left), jax.tree.leaves(right), strict=True))  # fmt: skip


@pytest.mark.slow
def test_the_modes_differ_in_how_old_the_index_is_and_in_which_towers_train(make):
    results = {}
    for mode, changes in {
        "frozen": {}, "rerank": {}, "query_only": {}, "sync": {"every": "2"},
        "async": {"every": "2", "adopt_after": 1},
    }.items():  # fmt: skip
        retriever = dataclasses.replace(DPR, train="query") if mode == "query_only" else DPR
        workspace, _ = make(mode, retriever, mode=mode, **changes)
        results[mode] = train(workspace)
    index_steps = {mode: steps_of_index(rows) for mode, (_, rows) in results.items()}
    assert index_steps["frozen"] == index_steps["rerank"] == [0] * 9
    assert index_steps["query_only"] == [0] * 9
    assert index_steps["sync"] == [0, 0, 2, 2, 4, 4, 6, 6, 8]
    assert index_steps["async"] == [0, 0, 0, 2, 2, 4, 4, 6, 6]
    towers = {mode: trained for mode, (trained, _) in results.items()}
    start = tower_params(make("start")[0])
    assert equal(towers["query_only"]["doc"], start["doc"])
    assert not equal(towers["query_only"]["query"], start["query"])
    for mode in ("frozen", "rerank", "sync", "async"):
        assert not equal(towers[mode]["doc"], start["doc"])
    # Another index gives other negatives, hence other towers.
    assert not equal(towers["frozen"], towers["sync"])
    assert not equal(towers["frozen"], towers["rerank"])
    assert not equal(towers["async"], towers["sync"])
    for _, rows in results.values():
        losses = [row["loss"] for row in rows]
        assert np.mean(losses[-3:]) < np.mean(losses[:3])
        assert all(0 <= row["index/callback_seconds"] for row in rows)


@pytest.mark.parametrize("mode", ["frozen", "rerank", "sync"])
def test_the_hybrid_of_a_step_ranks_as_the_one_that_is_evaluated(make, mode, monkeypatch):
    """The index is fresh, and has more documents (80) than `overfetch` candidates (6)."""
    more = {"overfetch": 2} if mode == "rerank" else {}
    workspace, _ = make(mode, mode=mode, **more)
    bm25, towers = build_bm25(workspace), tower_params(workspace)
    retriever = build_towers(workspace, bm25, towers, 0)
    rows = np.arange(12)
    expected = search(workspace, retriever, "train", 3)
    snapshot = IndexSnapshot(
        index=retriever.dense, version=0, encoder_step=0, corpus_hash="", built_at=0.0
    )
    queries = StepQueries(snapshot, rows, expected.queries, towers["doc"])
    encoded = []
    monkeypatch.setattr(
        indexes, "live_embeddings",
        lambda task, params: lambda ids: encoded.append(ids) or live_embeddings(task, params)(ids),
    )  # fmt: skip
    weight = retriever.hybrid.dense_weight
    found = live_search(workspace, bm25, dense_weight=weight)(queries, 3)
    np.testing.assert_array_equal(found.doc_ids, expected.hybrid.doc_ids)
    np.testing.assert_allclose(found.scores, expected.hybrid.scores, atol=1e-4)
    best = np.unique(search(workspace, retriever, "train", 6).dense.doc_ids)
    assert [ids.tolist() for ids in encoded] == ([best.tolist()] if mode == "rerank" else [])


DAMAGE = {
    "a byte": lambda folder: flip(folder / "shard-000000.npy"),
    "no shard": lambda folder: (folder / "shard-000000.npy").unlink(),
    "manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_embeddings_of_a_run_are_made_again_with_a_note(make, damage):
    workspace, told = make()
    bm25, towers, folder = (
        build_bm25(workspace),
        tower_params(workspace),
        workspace.folder / "index",
    )
    first = build_towers(workspace, bm25, towers, 0)
    DAMAGE[damage](folder / "0")
    # What a killed life left half done may be damaged too.
    (folder / "0.building").mkdir()
    (folder / "0.building" / "spec.json").write_text("?")
    again = build_towers(workspace, bm25, towers, 0)
    np.testing.assert_array_equal(again.embeddings, first.embeddings)
    notes = [line for line in told if line.startswith("note")]
    assert len(notes) == 2 and f"{folder / '0'} is damaged" in notes[0]
    assert "given up" in notes[1] and not (folder / "0.building").exists()
    told.clear()
    assert build_towers(workspace, bm25, towers, 0).store.folder == folder / "0"
    assert not any(line.startswith("note") for line in told)
    other = jax.tree.map(lambda leaf: leaf + 1, towers)
    with pytest.raises(ValueError, match="not those of this encoder and corpus"):
        build_towers(workspace, bm25, other, 0)


class Killed(Exception):
    """Ends a run between two of its steps."""


def dying_at(step):
    """Returns a method that writes metrics until a step, and then ends the run."""
    write = MetricsLog.write

    def write_or_die(self, stage, at, metrics):
        if at == step:
            raise Killed
        write(self, stage, at, metrics)

    return write_or_die


@pytest.mark.slow
def test_a_run_resumed_from_any_checkpoint_is_bit_identical(make, monkeypatch):
    options = {"mode": "async", "every": "2", "adopt_after": 3}
    workspace, _ = make("whole", **options)
    whole, rows = train(workspace)
    for cut in (4, 6):
        workspace, told = make(f"cut-{cut}", **options)
        config = dataclasses.replace(workspace.config, checkpoint_minutes=0)
        workspace = dataclasses.replace(workspace, config=config)

        monkeypatch.setattr(MetricsLog, "write", dying_at(cut))
        with pytest.raises(Killed):
            train(workspace)
        monkeypatch.undo()
        resumed, again = train(workspace)
        assert equal(resumed, whole)
        assert steps_of_index(again) == steps_of_index(rows)
        assert [row["loss"] for row in again] == [row["loss"] for row in rows]


def test_hard_negatives_are_what_the_index_returns_and_no_judged_document():
    found = SearchResult(
        np.array([[7, 3, 5, 9], [1, 2, -1, -1]], np.int32),
        np.zeros((2, 4), np.float32),
        np.array([[True] * 4, [True, True, False, False]]),
    )
    gold = [frozenset({3}), frozenset({8, 4})]
    drawn = set()
    for step in range(40):
        targets = labelled_targets(found, gold, 3, seed=(0, step))
        first, second = targets.doc_ids.tolist()
        assert targets.mask.all() and first[0] == 3 and second[:2] == [4, 8]
        assert len(set(first)) == 3 and set(first[1:]) <= {7, 5, 9} and second[2] in (1, 2)
        drawn |= set(first[1:])
    assert drawn == {7, 5, 9}  # not only the best
    again = labelled_targets(found, gold, 3, seed=(0, 39))
    np.testing.assert_array_equal(again.doc_ids, targets.doc_ids)


def test_the_judged_document_of_one_question_is_no_negative_of_another(make):
    workspace, _ = make(mode="frozen")
    gold = [frozenset({1}), frozenset({1, 2}), frozenset({3}), frozenset({3})]
    found = SearchResult(
        np.array([[5, 6], [5, 6], [1, 6], [2, 1]], np.int32), np.zeros((4, 2), np.float32),
        np.ones((4, 2), bool),
    )  # fmt: skip
    targets = labelled_targets(found, gold, 3, seed=(0, 0))
    config = workspace.config.retriever
    batch_at = retriever_stage._lsr_batches(workspace, config, 0, lambda step, rows: targets)
    batch = batch_at(0)
    target = np.exp(np.asarray(batch.target_log_probs))
    np.testing.assert_allclose(target.sum(axis=1), 1, rtol=1e-6)
    assert sorted(target[1][target[1] > 0]) == [0.5, 0.5]
    assert [int((row > 0).sum()) for row in target] == [1, 2, 1, 1]


def test_scores_of_a_step_are_those_of_the_whole_and_computed_once(make, base, tmp_path):
    workspace, _ = make(mode="frozen", retriever=dataclasses.replace(DPR, objective="pdist"))
    questions = workspace.questions["train"][:4]
    candidates = SearchResult(
        np.array([[0, 1, 2], [2, 1, 9], [0, 5, 6], [7, 8, -1]], np.int32),
        np.zeros((4, 3), np.float32), np.array([[True] * 3] * 3 + [[True, True, False]]),
    )  # fmt: skip
    lm = workspace.base_lm()
    whole = score_candidates(
        workspace, lm, questions, candidates, ResultCache(tmp_path / "a.jsonl", Score)
    )
    cache = ResultCache(tmp_path / "b.jsonl", Score)
    part = candidates.take(slice(2))
    score_step(workspace, lm, questions[:2], part, cache)
    known = dict(cache._results)
    stepwise = score_step(workspace, lm, questions, candidates, cache)
    np.testing.assert_allclose(stepwise.log_probs, whole.log_probs, rtol=1e-5)
    assert {key: cache._results[key] for key in known} == known
    size = (tmp_path / "b.jsonl").stat().st_size
    again = score_step(workspace, lm, questions, candidates, cache)
    np.testing.assert_array_equal(again.log_probs, stepwise.log_probs)
    assert (tmp_path / "b.jsonl").stat().st_size == size


def test_the_options_reach_the_refresher():
    options = refresh_options(
        RefreshConfig(
            mode="async",
            max_lag=9,
            on_lag="warn",
            partial=0.25,
            full_every=7,
            deadline_seconds=3.0,
            on_failure="warn",
            keep=5,
        ),
        index="scann",
    )
    assert (options.adopt_after, options.max_index_lag_steps, options.on_lag) == (-1, 9, "warn")
    assert options.partial == PartialPolicy(0.25, 7)
    assert (options.index, options.build.deadline_seconds) == ("scann", 3.0)
    assert (options.on_failure, options.keep) == ("warn", 5)
    assert refresh_options(RefreshConfig(mode="sync")).adopt_after == 0
    assert refresh_options(RefreshConfig(mode="async", adopt_after=4)).adopt_after == 4
    assert refresh_options(RefreshConfig(mode="async")).partial is None


@pytest.mark.parametrize(
    ("refresh", "kind", "devices"),
    [
        ({}, ThreadExecutor, None),
        ({"devices": 2}, ThreadExecutor, tuple(jax.devices()[-2:])),
    ],
)
def test_the_executor_is_the_one_asked_for(make, all_devices, refresh, kind, devices):
    workspace, _ = make(mode="async", **refresh)
    with closing(open_refresher(workspace, lambda: None)) as refresher:
        assert type(refresher._executor) is kind
        assert getattr(refresher._executor, "devices", None) == devices


def test_more_devices_than_there_are_is_refused(make):
    workspace, _ = make(mode="async", devices=8)
    with pytest.raises(ValueError, match="there are 8 local devices and training needs one"):
        open_refresher(workspace, lambda: None)


@pytest.mark.parametrize(
    ("retriever", "refresh", "said"),
    [
        ({"rounds": 2}, {"mode": "async"}, "add --retriever.rounds 1"),
        ({}, {"mode": "query_only"}, "add --retriever.train query"),
        ({"train": "query"}, {"mode": "sync"}, "use --refresh.mode query_only"),
        ({"train": "both", "doc_learning_rate": 0.0}, {"mode": "async"}, "leaves it as it is"),
        ({}, {"mode": "sync", "adopt_after": 2}, "nothing with refresh.mode sync; .* async"),
        ({}, {"every": "5"}, "refresh.every='5' does nothing with refresh.mode off"),
        ({}, {"keep": 4}, "refresh.keep=4 does nothing with refresh.mode off"),
        ({}, {"mode": "frozen", "max_lag": 3}, "refresh.max_lag=3 does nothing"),
        ({}, {"mode": "async", "overfetch": 9}, "overfetch=9 does .* --refresh.mode rerank"),
        ({}, {"partial": 0.0}, "partial must be greater than 0"),
        ({}, {"partial": 1.5}, "partial must be between 0 and 1"),
        ({}, {"partial": 0.5, "adopt_after": 3, "mode": "async"}, "leave one of them out"),
        ({}, {"keep": 2}, "keep must be at least 3"),
        ({}, {"devices": 1, "dispatch": "ray"}, "devices=1 encode in this process, dispatch=ray"),
        ({}, {"mode": "frozen", "dispatch": "ray"}, "refresh.dispatch='ray' does nothing"),
        ({}, {"every": "often", "mode": "async"}, "often"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(retriever, refresh, said):
    with pytest.raises(ValueError, match=said):
        AdaptConfig(retriever=RetrieverConfig(**retriever), refresh=RefreshConfig(**refresh))


def test_live_retrieval_without_training_the_retriever_is_refused():
    with pytest.raises(ValueError, match="add --stages retriever"):
        AdaptConfig(stages=("lm",), refresh=RefreshConfig(mode="async"))


def test_where_and_how_an_index_is_built_may_change_when_a_run_is_continued():
    here = AdaptConfig(refresh=RefreshConfig(mode="async", every="5"))
    there = RefreshConfig(mode="async", every="5", dispatch="ray", deadline_seconds=9.0, keep=4)
    assert here.fingerprint() == AdaptConfig(refresh=there).fingerprint()
    other = AdaptConfig(refresh=RefreshConfig(mode="async", every="6"))
    assert here.fingerprint() != other.fingerprint()


def test_the_forecast_says_what_refreshing_costs_before_the_start(make):
    workspace, _ = make(mode="async", every="2")
    described = estimate_cost(workspace, workspace.config).describe()
    assert "refresh: every 2 steps, 80 documents in about" in described
    assert "the index lags" in described
    assert "on top of the training time" in described
    workspace, _ = make("spare", mode="async", every="2", devices=2)
    assert "on spare devices" in estimate_cost(workspace, workspace.config).describe()
    workspace, _ = make("frozen", mode="frozen")
    assert estimate_cost(workspace, workspace.config).refresh is None


@pytest.mark.slow
def test_killed_anywhere_a_run_with_live_retrieval_ends_with_the_same_bytes(
    tiny_flags, tmp_path, capsys
):
    live = [
        *(flag for flag in tiny_flags if "rounds" not in flag and "keyword" not in flag),
        "--stages", "retriever", "--refresh.mode=async", "--refresh.every=2",
        "--refresh.adopt_after=2", "--retriever.train=both",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "cut"
    assert ADAPT.main([*live, f"--output={whole}"]) == 0
    # The first index of the training is there and the second is being built.
    with start("experiments/adapt.py", [*live, f"--output={killed}"]) as process:
        send_at(process, killed / "refresh" / "generations" / "000002", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    capsys.readouterr()
    assert ADAPT.main([*live, f"--output={killed}"]) == 0
    assert "resuming after step" in capsys.readouterr().out
    for name in ("metrics.json", "differences.json", "predictions.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, killed)
    ]
    # Keyword queries and all; without them it would be as few as the questions make.
    assert losses[0] == losses[1] and len(losses[0]) == 20


@pytest.mark.slow
def test_an_index_that_is_too_stale_ends_the_run_in_one_sentence_with_its_work_saved(
    tiny_flags, tmp_path, capsys
):
    flags = [
        *(flag for flag in tiny_flags if "rounds" not in flag and "checkpoint" not in flag),
        "--stages", "retriever", "--retriever.objective=dpr", "--refresh.mode=async",
        "--refresh.every=never", "--refresh.max_lag=1", "--refresh.on_lag=stop",
    ]  # fmt: skip
    assert ADAPT.main([*flags, f"--output={tmp_path / 'run'}"]) == 4
    err = capsys.readouterr().err
    assert "error: The index is 2 steps behind the encoder, more than 1" in err
    assert "the same command continues this run" in err and "Traceback" not in err
    assert (tmp_path / "run" / "checkpoints" / "retriever-0" / "2").is_dir()

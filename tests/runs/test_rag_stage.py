"""The end-to-end stage: what each option does to its batches, terms, steps and models."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import StopAfter

from ragjax.data import Question
from ragjax.index import SearchResult
from ragjax.models.testing import write_tiny_language_model
from ragjax.models.trainable import merge_trainable, split_trainable
from ragjax.runs.compare import results as results_module
from ragjax.runs.compare.dev import Side, evaluate_dev, marginal_nll
from ragjax.runs.forecast import estimate_rag_cost
from ragjax.runs.found import Findable, search_findable, source_rows
from ragjax.runs.indexes import build_bm25, build_towers
from ragjax.runs.options.end_to_end import (
    ObjectiveConfig,
    RagConfig,
    ReaderConfig,
    TowersConfig,
    TrainingConfig,
)
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.options.shared import DataConfig
from ragjax.runs.speed import Texts
from ragjax.runs.teachers.reading import score_candidates
from ragjax.runs.train import end_to_end as rag_stage
from ragjax.runs.train.batches import RagBatches
from ragjax.runs.train.end_to_end import (
    make_reader,
    make_terms,
    train_end_to_end,
)
from ragjax.runs.train.live import open_retrieval
from ragjax.runs.train.stages import stage_optimizer
from ragjax.runs.trainable import split_models
from ragjax.runs.workspace import FrozenLM, open_workspace, tower_params
from ragjax.training import end_to_end as e2e
from ragjax.training.live import StepDocuments
from ragjax.training.loop import Interrupted, MetricsLog, StopFlag
from ragjax.training.score_cache import ResultCache, Score

FROZEN = RefreshConfig(mode="frozen")


def make_config(inputs, output, **changes):
    options = {
        "data_options": DataConfig(train_questions=8, dev_questions=4, test_questions=4),
        "training": TrainingConfig(documents=3, batch_size=4),
        "language_model": ReaderConfig(train_layers=1),
        "refresh": FROZEN,
        "checkpoint_minutes": 0,
    } | changes
    return RagConfig(**inputs, output=str(output), **options)


def open_for(config, folder):
    folder.mkdir(exist_ok=True)
    return open_workspace(config, folder, stop=StopFlag(), log=lambda _: None)


@pytest.fixture(scope="module")
def opened(tiny_inputs, tmp_path_factory):
    """A config and its workspace; what a test changes, it changes in a copy of the config."""
    folder = tmp_path_factory.mktemp("stage")
    config = make_config(tiny_inputs, folder)
    return config, open_for(config, folder)


def retrieved(workspace, width=3, rows=4):
    doc_ids = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    found = SearchResult(doc_ids, np.ones(doc_ids.shape, np.float32), np.ones(doc_ids.shape, bool))
    return StepDocuments(0, np.arange(rows), found)


def batch_of(opened, **training):
    config, workspace = opened
    changes = {"training": dataclasses.replace(config.training, **training)}
    config = dataclasses.replace(config, **changes)
    return RagBatches(workspace, config).prepare(retrieved(workspace))


def test_a_batch_holds_what_was_retrieved(opened):
    config, workspace = opened
    batch, metrics = batch_of(opened)
    assert batch.doc_mask.shape == (4, 3) and bool(batch.doc_mask.all())
    np.testing.assert_array_equal(batch.doc_ids, np.arange(12).reshape(4, 3))
    tokenizer = workspace.lm.tokenizer
    text = tokenizer.decode(
        np.asarray(batch.context_ids[1, 2])[np.asarray(batch.context_mask[1, 2])]
    )
    assert workspace.dataset.corpus[5].text in text
    assert workspace.questions["train"][1].text in text
    answer = tokenizer.decode(np.asarray(batch.target_ids[1])[np.asarray(batch.target_mask[1])])
    assert answer.strip().startswith(workspace.questions["train"][1].answers[0])
    ids = workspace.doc_tokens[5]
    np.testing.assert_array_equal(batch.docs.ids[1, 2, : len(ids)], ids)
    gold = [next(iter(rows)) for rows in workspace.gold_rows("train")]
    hits = [gold[row] in range(3 * row, 3 * row + 3) for row in range(4)]
    assert metrics["retrieval/recall"] == np.mean(hits)


def test_null_document_adds_an_empty_one_that_the_model_answers_without(opened):
    _, workspace = opened
    batch, _ = batch_of(opened, null_document=True)
    assert batch.doc_mask.shape == (4, 4)
    np.testing.assert_array_equal(batch.doc_ids[:, 3], [e2e.NULL_DOC] * 4)
    question = workspace.questions["train"][2].text
    closed_book = workspace.prompts.context(question)
    read = np.asarray(batch.context_ids[2, 3])[np.asarray(batch.context_mask[2, 3])]
    assert read.tolist() == closed_book


def test_contrastive_weight_brings_a_judged_document_into_the_batch(opened):
    config, workspace = opened
    objective = ObjectiveConfig(contrastive_weight=1.0)
    batches = RagBatches(workspace, dataclasses.replace(config, objective=objective))
    gold = [next(iter(rows)) for rows in workspace.gold_rows("train")]
    given = retrieved(workspace)
    given.found.doc_ids[1, 2] = gold[1]  # question 1 found its own
    batch, _ = batches.prepare(given)
    assert batch.docs.ids.shape[:2] == (4, 4) and batch.doc_mask.shape == (4, 3)
    for row in range(4):
        assert int(batch.doc_ids[row, int(batch.positive[row])]) == gold[row]
    assert int(batch.positive[1]) == 2 and int(batch.doc_ids[1, 3]) == e2e.NO_SLOT
    flat = np.asarray(batch.doc_ids).reshape(-1)
    np.testing.assert_array_equal(batch.relevant, flat[None, :] == np.array(gold[:4])[:, None])


def test_what_a_question_was_made_from_is_no_negative_of_it(opened):
    config, workspace = opened
    assert batch_of(opened)[0].relevant is None
    sources = [frozenset()] * len(workspace.questions["train"])
    sources[0] = frozenset({4, 40})  # question 1 retrieved row 4
    batch, _ = RagBatches(workspace, config, sources=sources).prepare(retrieved(workspace))
    assert np.argwhere(np.asarray(batch.relevant)).tolist() == [[0, 4]]
    gold = next(iter(workspace.gold_rows("train")[0]))
    objective = ObjectiveConfig(contrastive_weight=1.0)
    judged = dataclasses.replace(config, objective=objective)
    batch, _ = RagBatches(workspace, judged, sources=sources).prepare(retrieved(workspace))
    flat = np.asarray(batch.doc_ids).reshape(-1)
    np.testing.assert_array_equal(batch.relevant[0], np.isin(flat, [4, 40, gold]))


def test_a_short_result_is_masked(opened):
    _, workspace = opened
    config, _ = opened
    given = retrieved(workspace)
    given.found.mask[2, 1:] = False
    batch, _ = RagBatches(workspace, config).prepare(given)
    np.testing.assert_array_equal(batch.doc_mask[2], [True, False, False])
    assert not np.asarray(batch.docs.mask[2, 1:]).any()
    assert np.asarray(batch.context_mask[2, 1]).any()  # no row of nothing but padding


def test_documents_and_doc_tokens_set_the_shapes(opened):
    config, workspace = opened
    more = dataclasses.replace(config, training=TrainingConfig(documents=500, batch_size=4))
    assert RagBatches(workspace, more).num_retrieved == len(workspace.doc_tokens)
    shorter = dataclasses.replace(config, retriever=TowersConfig(doc_tokens=9))
    lengths = [RagBatches(workspace, c).doc_tokens for c in (config, shorter)]
    assert lengths[0] > lengths[1]


def test_every_batch_has_the_same_shapes(opened):
    config, workspace = opened
    batches = RagBatches(workspace, config)
    first, _ = batches.prepare(retrieved(workspace))
    given = retrieved(workspace)
    other, _ = batches.prepare(given._replace(rows=np.arange(4, 8)))
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, other)


def test_the_terms_are_those_of_the_objective():
    both = make_terms(ObjectiveConfig(marginal_weight=0.5, lsr_weight=2.0), fusion=False)
    assert {name: weight for name, (weight, _) in both.items()} == {
        "marginal": 0.5, "lsr": 2.0, "negatives": 2.5,
    }  # fmt: skip
    plain = make_terms(
        ObjectiveConfig(negatives="none", lm_weight=1, contrastive_weight=3), fusion=False
    )
    assert {name: weight for name, (weight, _) in plain.items()} == {
        "marginal": 1.0, "lm": 1, "contrastive": 3,
    }  # fmt: skip
    for name, term in (
        ("sequence", e2e.sequence_term), ("token", e2e.token_term), ("emdr2", e2e.emdr2_term),
    ):  # fmt: skip
        assert make_terms(ObjectiveConfig(marginal=name), fusion=False)["marginal"][1] is term
    assert plain["lm"][1] is e2e.lm_term
    fused = make_terms(ObjectiveConfig(lm_weight=1, marginal="emdr2"), fusion=True)
    assert fused["lm"][1] is e2e.fused_lm_term


@pytest.mark.parametrize("change", [{"temperature": 3.0}, {"score": "log_prob"}])
def test_score_and_temperature_change_the_lsr_term(change):
    target_mask = jnp.ones((1, 3), bool)
    batch = e2e.RagBatch(None, None, None, jnp.ones((1, 2), bool), None, None, None, target_mask)
    log_probs = jnp.asarray([[[-1.0, -1, -1], [-2.0, -2, -2]]])
    outputs = e2e.Outputs(batch, jnp.zeros((1, 2)), None, lambda: log_probs, *[None] * 4)
    values = [
        float(make_terms(objective, fusion=False)["lsr"][1](outputs)[0])
        for objective in (ObjectiveConfig(lsr_weight=1), ObjectiveConfig(lsr_weight=1, **change))
    ]
    assert abs(values[0] - values[1]) > 1e-3


def terms_at(objective, scores=(0.0, 2.0), key=0):
    """The value of each term for two documents of log-probs -3 and -6."""
    target_mask = jnp.ones((1, 3), bool)
    batch = e2e.RagBatch(None, None, None, jnp.ones((1, 2), bool), None, None, None, target_mask)
    log_probs = jnp.asarray([[[-1.0, -1, -1], [-2.0, -2, -2]]])
    outputs = e2e.Outputs(
        batch, jnp.asarray([scores]), None, lambda: log_probs, None, None,
        lambda: jnp.asarray([[-6.0, -3.0]]), jax.random.key(key),
    )  # fmt: skip
    terms = make_terms(objective, fusion=False)
    return {name: float(term(outputs)[0]) for name, (_, term) in terms.items()}


def test_the_direction_is_that_of_the_divergence():
    options = {"lsr_weight": 1.0, "negatives": "none", "score": "log_prob", "temperature": 3.0}
    target, live = (np.exp(x) / np.exp(x).sum() for x in (np.array([-1.0, -2]), np.array([0.0, 2])))
    for direction, p, q in (("pdist", target, live), ("lsr", live, target)):
        found = terms_at(ObjectiveConfig(**options, direction=direction))["lsr"]
        np.testing.assert_allclose(found, (p * np.log(p / q)).sum(), rtol=1e-5)


def test_leave_one_out_is_a_score_of_its_own():
    options = {"lsr_weight": 1.0, "temperature": 1.0, "negatives": "none"}
    found = terms_at(ObjectiveConfig(**options, score="leave_one_out"), scores=(0.0, 0.0))["lsr"]
    target = np.exp([2.0, 1.0]) / np.exp([2.0, 1.0]).sum()  # 6 / 3 and 3 / 3 nats per token
    np.testing.assert_allclose(found, (target * np.log(target / 0.5)).sum(), rtol=1e-5)


def test_what_is_drawn_depends_on_samples_and_key():
    gumbel = ObjectiveConfig(marginal="gumbel", negatives="none", samples=1)
    values = {terms_at(gumbel, scores=(0.0, 0.0), key=key)["marginal"] for key in range(20)}
    assert values == {1.0, 2.0}  # minus the log-prob per token of the one that was drawn
    both = dataclasses.replace(gumbel, samples=2)
    np.testing.assert_allclose(terms_at(both)["marginal"], 1.5, rtol=1e-6)
    worth = dataclasses.replace(both, score="prob")
    np.testing.assert_allclose(
        terms_at(worth)["marginal"], -(np.exp(-3) + np.exp(-6)) / 2, rtol=1e-5
    )
    reinforce = dataclasses.replace(gumbel, marginal="reinforce", samples=4)
    assert len({terms_at(reinforce, key=key)["marginal"] for key in range(20)}) > 1


def test_epochs_and_batch_size_give_the_number_of_steps(opened):
    config, workspace = opened
    for epochs, size, steps in ((1, 4, 2), (3, 4, 6), (1, 8, 1)):
        training = TrainingConfig(epochs=epochs, batch_size=size)
        changed = dataclasses.replace(config, training=training)
        split = split_models(
            changed, workspace.lm.family, workspace.lm.params, tower_params(workspace)
        )
        assert rag_stage.end_to_end_stage(changed, split, 8).num_steps == steps


def optimizer_of(config, workspace):
    """The split models and the optimizer of a run of 10 steps of 4 questions."""
    split = split_models(config, workspace.lm.family, workspace.lm.params, tower_params(workspace))
    return split, stage_optimizer(rag_stage.end_to_end_stage(config, split, 40))


def update_size(opened, **training):
    """The size of the first update with a made-up gradient."""
    config, workspace = opened
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **training))
    split, optimizer = optimizer_of(config, workspace)
    grads = jax.tree.map(jnp.ones_like, split.trainable)
    updates, state = optimizer.update(grads, optimizer.init(split.trainable), split.trainable)
    del state
    return {
        name: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(part))
        / sum(leaf.size for leaf in jax.tree.leaves(part))
        for name, part in updates.items()
    }


@pytest.mark.slow
def test_learning_rates_warm_up_and_decay_reach_the_optimizer(opened):
    usual = update_size(opened)
    assert usual["lm"] / usual["shared"] == pytest.approx(3e-4 / 5e-5, rel=0.3)
    assert update_size(opened, warmup_fraction=0.5)["lm"] < 0.5 * usual["lm"]
    decayed = update_size(opened, weight_decay=100.0)
    assert any(abs(decayed[name] - usual[name]) > 0.1 * usual[name] for name in usual)


@pytest.mark.slow
def test_clip_norm_reaches_the_optimizer(opened):
    config, workspace = opened
    moments = []
    for norm in (1.0, 0.01):
        training = dataclasses.replace(config.training, clip_norm=norm)
        changed = dataclasses.replace(config, training=training)
        split, optimizer = optimizer_of(changed, workspace)
        grads = jax.tree.map(jnp.ones_like, split.trainable)
        _, state = optimizer.update(grads, optimizer.init(split.trainable), split.trainable)
        sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state)]
        moments.append(sorted(size for size in sizes if 0 < size < 0.5)[0])
    assert moments[1] < 0.1 * moments[0]


def test_what_does_not_learn_is_not_in_the_trainable_part(opened):
    config, workspace = opened
    towers = tower_params(workspace)

    def names(**changes):
        changed = dataclasses.replace(config, **changes)
        return set(
            split_models(changed, workspace.lm.family, workspace.lm.params, towers).trainable
        )

    assert names() == {"lm", "shared"}
    assert names(language_model=ReaderConfig(train=False)) == {"shared"}
    assert names(retriever=TowersConfig(train="none")) == {"lm"}


def test_a_fusion_reader_needs_an_encoder_decoder(opened):
    config, workspace = opened
    config = dataclasses.replace(
        config,
        language_model=ReaderConfig(reader="fusion"),
        objective=ObjectiveConfig(marginal="emdr2", lm_weight=1),
    )
    with pytest.raises(ValueError, match="causal decoder"):
        make_reader(workspace, config)


@pytest.fixture(scope="module")
def start(opened):
    """What the stage starts from."""
    _, workspace = opened
    bm25, towers = build_bm25(workspace), tower_params(workspace)
    return bm25, towers, build_towers(workspace, bm25, towers, 0)


def train(opened, start, folder, *, stop=None, **changes):
    """Runs the stage in a folder of its own; returns both models and the metrics of its steps."""
    config, workspace = opened
    config = dataclasses.replace(config, **changes)
    folder.mkdir(exist_ok=True)
    workspace = dataclasses.replace(
        workspace,
        config=config,
        folder=folder,
        metrics=MetricsLog(folder / "metrics.jsonl"),
        stop=stop or StopFlag(),
    )
    bm25, towers, before = start
    trained = train_end_to_end(workspace, config, bm25, before, towers)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return trained, lines


def changed_by(trained, opened):
    """The largest change of a parameter of the encoder and of the language model."""
    _, workspace = opened

    def largest(old, new):
        leaves = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        return max(float(jnp.abs(a - b).max()) for a, b in leaves)

    lm = workspace.lm
    whole = merge_trainable(*split_trainable(lm.params, lm.family.layout, 1))
    return (
        largest(workspace.encoder.params, trained.towers["shared"]),
        largest(whole, trained.lm_params) if trained.lm_params is not lm.params else 0.0,
    )


@pytest.fixture(scope="module")
def whole(opened, start, tmp_path_factory):
    return train(opened, start, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
def test_both_models_learn_and_the_metrics_tell_how(whole, opened):
    trained, lines = whole
    encoder, lm = changed_by(trained, opened)
    assert encoder > 1e-5 and lm > 1e-5
    assert [line["step"] for line in lines] == [0, 1]
    for name in (
        "loss", "grad_norm", "marginal", "negatives", "marginal_nll", "retriever_entropy",
        "posterior_entropy", "agreement", "retrieval/recall", "retrieval/wait_seconds",
        "index/staleness_steps",
    ):  # fmt: skip
        assert all(np.isfinite(line[name]) for line in lines), name


@pytest.mark.slow
def test_a_run_that_was_cut_ends_as_the_whole_one_to_the_bit(whole, opened, start, tmp_path):
    with pytest.raises(Interrupted):
        train(opened, start, tmp_path / "run", stop=StopAfter(1))
    trained, lines = train(opened, start, tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1]
    jax.tree.map(np.testing.assert_array_equal, trained, whole[0])


@pytest.mark.slow
def test_a_frozen_language_model_keeps_its_bits(opened, start, tmp_path):
    trained, _ = train(
        opened, start, tmp_path / "run", language_model=ReaderConfig(train=False),
        refresh=RefreshConfig(mode="async", every="1", adopt_after=1),
    )  # fmt: skip
    encoder, lm = changed_by(trained, opened)
    assert encoder > 1e-5 and lm == 0


@pytest.mark.slow
def test_a_frozen_retriever_keeps_its_bits_and_dense_candidates_are_others(
    whole, opened, start, tmp_path
):
    training = dataclasses.replace(opened[0].training, candidates="dense", overlap=False)
    trained, lines = train(
        opened, start, tmp_path / "run", retriever=TowersConfig(train="none"), training=training
    )
    encoder, lm = changed_by(trained, opened)
    assert encoder == 0 and lm > 1e-5
    # The tiny encoder is random: the words of BM25 find more than it alone.
    assert lines[0]["retrieval/recall"] < whole[1][0]["retrieval/recall"]


@pytest.fixture(scope="module")
def t5(tiny_inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    write_tiny_language_model(folder / "lm", family="t5")
    config = make_config(tiny_inputs | {"lm": str(folder / "lm")}, folder)
    return config, open_for(config, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(marginal="emdr2", lm_weight=1),
        ObjectiveConfig(marginal_weight=0, lm_weight=1, lsr_weight=1, score="attention"),
    ],
)
def test_a_fusion_reader_trains_with_the_retriever(t5, start, tmp_path, objective):
    trained, lines = train(
        t5, start, tmp_path / "run", objective=objective,
        language_model=ReaderConfig(reader="fusion", train_layers=1),
    )  # fmt: skip
    encoder, lm = changed_by(trained, t5)
    assert encoder > 1e-5 and lm > 1e-5 and all(np.isfinite(line["lm"]) for line in lines)


def question(id, source):
    return Question(id=id, text="?", answers=("a",), source=source)


def test_the_source_of_a_question_is_found_by_id_or_title(opened):
    corpus = opened[1].dataset.corpus
    rows = source_rows(
        corpus, [question("q", "red-cat"), question("r", "owl"), question("s", None)]
    )
    assert rows[0] == {corpus.row_of("red-cat")} and rows[2] == frozenset()
    assert rows[1] == {row for row, passage in enumerate(corpus) if passage.title == "owl"}


def test_sources_that_cannot_be_found_are_refused(opened):
    corpus = opened[1].dataset.corpus
    with pytest.raises(ValueError, match="no question names the document"):
        source_rows(corpus, [question("q", None)])
    with pytest.raises(ValueError, match="no passage has the id or title"):
        source_rows(corpus, [question("q", "nowhere")])


def test_dropped_rows_make_room_for_the_next_best():
    doc_ids = np.array([[4, 2, 7, 1], [3, 5, -1, -1]], np.int32)
    found = SearchResult(
        doc_ids, np.where(doc_ids >= 0, 1.0, -np.inf).astype(np.float32), doc_ids >= 0
    )
    findable = Findable([frozenset({2}), frozenset({3, 5})], [{}, {}])
    kept = search_findable(lambda depth: found, findable, 2, size=8)
    np.testing.assert_array_equal(kept.doc_ids, [[4, 7], [-1, -1]])
    np.testing.assert_array_equal(kept.mask, [[True, True], [False, False]])


def test_same_source_drop_leaves_out_the_source_and_raises_when_nothing_is_left(
    opened, start, tmp_path, monkeypatch
):
    config, workspace = opened
    drop = dataclasses.replace(config.training, same_source="drop")
    config = dataclasses.replace(config, training=drop)
    questions = workspace.questions["train"]
    ids = [next(iter(workspace.dataset.qrels["train"][q.id])) for q in questions]
    sourced = [dataclasses.replace(q, source=id) for q, id in zip(questions, ids, strict=True)]
    changed = dataclasses.replace(
        workspace, folder=tmp_path, questions=workspace.questions | {"train": tuple(sourced)}
    )
    bm25, towers, before = start
    split = split_models(config, workspace.lm.family, workspace.lm.params, towers)
    heard = []
    monkeypatch.setattr(rag_stage, "RagBatches", lambda *_, sources: heard.append(sources) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rag_stage.train_end_to_end(changed, config, bm25, before, towers)
    (sources,) = heard
    assert sources == [frozenset({workspace.dataset.corpus.row_of(id)}) for id in ids]
    retrieval = open_retrieval(
        changed, split.towers, before.store, k=3, batch_size=4, bm25=bm25,
        dense_weight=before.hybrid.dense_weight, sources=sources,
    )  # fmt: skip
    state = type("State", (), {"params": split.trainable})()
    with retrieval.refresher:
        retrieval.resume(0, state, None)
        found = retrieval.look_up(0, retrieval.advance(0, state))()
        gold = changed.gold_rows("train")
        assert found.found.mask.all()
        for row, docs in zip(found.rows, found.found.doc_ids, strict=True):
            assert not set(docs.tolist()) & set(gold[row])


def test_a_forecast_names_every_part_and_grows_with_the_documents(opened):
    config, workspace = opened
    few = estimate_rag_cost(workspace, config)
    more = dataclasses.replace(config, training=TrainingConfig(documents=6, batch_size=4))
    many = estimate_rag_cost(workspace, more)
    assert {"encoding", "reading", "retriever", "dev", "evaluation"} <= set(few.seconds)
    assert many.lm_forwards > few.lm_forwards and few.bytes_on_disk > 0
    assert few.refresh is None
    # The towers before training, after it, and three averages are measured on dev.
    last = estimate_rag_cost(workspace, dataclasses.replace(config, keep="last"))
    assert few.seconds["measuring on dev"] > 0 and "measuring on dev" not in last.seconds
    assert few.bytes_on_disk > last.bytes_on_disk
    refreshed = dataclasses.replace(config, refresh=RefreshConfig(mode="sync", every="1"))
    assert estimate_rag_cost(workspace, refreshed).refresh is not None


def test_reading_without_each_document_is_in_the_forecast(opened, monkeypatch):
    config, workspace = opened
    for rate in ("lm_rate", "encoder_rate"):
        monkeypatch.setattr(Texts, rate, 100.0)
    options = {"lsr_weight": 1.0, "marginal": "emdr2", "lm_weight": 1.0}

    def reading(score):
        changed = dataclasses.replace(
            config,
            objective=ObjectiveConfig(**options, score=score),
            language_model=ReaderConfig(reader="fusion", train_layers=1),
        )
        return estimate_rag_cost(workspace, changed).seconds["reading"]

    assert reading("leave_one_out") > 2 * reading("attention")


def test_the_marginal_likelihood_is_the_sum_over_documents_by_hand(opened, tmp_path):
    _, workspace = opened
    questions = workspace.questions["dev"][:2]
    given = retrieved(workspace, rows=2).found
    given.scores[:] = [[0.3, 0.1, 0.2], [0.0, 0.5, 0.1]]
    given.mask[1, 2] = False
    teacher = workspace.base_lm()
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    nll = marginal_nll(workspace, teacher, questions, given, cache)
    scores = score_candidates(workspace, teacher, questions, given, cache)
    assert len(cache) == 5
    for row in range(2):
        keep = given.mask[row]
        prior = np.exp(20 * given.scores[row][keep])
        prior /= prior.sum()
        found = scores.log_probs[row][keep]
        expected = -np.log((prior * np.exp(found)).sum()) / scores.lengths[row]
        np.testing.assert_allclose(nll[row], expected, rtol=1e-4)


@pytest.mark.slow
def test_dev_is_compared_and_written_down(opened, start, tmp_path):
    _, workspace = opened
    workspace = dataclasses.replace(workspace, folder=tmp_path)
    teacher = workspace.base_lm()
    side = Side("before", start[2], teacher)
    result = evaluate_dev(workspace, side, side._replace(name="after"))
    assert json.loads((tmp_path / "dev.json").read_text()) == result
    assert {d["metric"] for d in result["differences"]} >= {"recall@5", "marginal_nll"}
    assert all(d["value"] == 0 for d in result["differences"])
    assert result["systems"]["before"]["marginal_nll"]["value"] > 0
    nothing = dataclasses.replace(workspace, questions=workspace.questions | {"dev": ()})
    assert evaluate_dev(nothing, side, side) is None


def test_every_system_of_the_table_weighs_documents_by_the_dense_retriever(
    opened, start, monkeypatch
):
    _, workspace = opened
    bm25, _, before = start
    heard = []
    monkeypatch.setattr(
        results_module,
        "evaluate_systems",
        lambda _, columns, *__, **___: heard.extend(columns) or {},
    )
    monkeypatch.setattr(results_module, "write_results", lambda *_, **__: {})
    base, other = (FrozenLM(workspace.lm.params, name) for name in (workspace.lm.fingerprint, "b"))
    results_module.evaluate_run(workspace, bm25, before, before, other, served="hybrid_before")
    asked = workspace.encode_queries(before.query_params, workspace.questions["test"])
    read = {column.name: column for column in heard if column.lm and column.documents}
    found = {"bm25", "before", "after", "hybrid_before", "hybrid"}
    halves = {"lm_half", "hybrid_base_lm", "hybrid_lm_half", "after_base_lm", "bm25_lm_half"}
    assert set(read) == found | halves
    assert base.fingerprint == read["bm25"].lm.fingerprint
    for name, (_, _, (found, logits)) in read.items():
        for row, docs in enumerate(found.doc_ids):
            there = found.mask[row]
            cosines = before.embeddings[docs[there]] @ asked[row]
            expected = workspace.scale * cosines
            np.testing.assert_allclose(logits[row, there], expected, rtol=1e-4, err_msg=name)
            assert not logits[row, ~there].any()

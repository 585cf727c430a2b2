"""The best of a search ranked again: by the question's likelihood, or by a cross-encoder."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_script

from ragjax.data import Question, passage_text
from ragjax.index import SearchResult
from ragjax.models import LMBatch
from ragjax.models.testing import write_tiny_cross_encoder
from ragjax.runs import forecast, speed
from ragjax.runs.compare import rerank as rerank_module
from ragjax.runs.compare.rerank import (
    QUESTION,
    Chosen,
    Reranker,
    Scorer,
    check_reranker,
    chosen_name,
    fit_reranker,
    make_scorer,
    reranked,
)
from ragjax.runs.compare.systems import Documents
from ragjax.runs.inputs import run_inputs
from ragjax.runs.options.dual import AdaptConfig, LMConfig
from ragjax.runs.options.evaluate import EvaluateConfig, system_names
from ragjax.runs.system import by_hybrid, open_base_system, reranked_search, retrieve
from ragjax.runs.teachers import batches as batches_module
from ragjax.runs.teachers import cross_encoder as cross_module
from ragjax.runs.workspace import open_workspace
from ragjax.training.loop import StopFlag


@pytest.fixture(scope="module")
def workspace(tiny_inputs, tmp_path_factory):
    stage = LMConfig(train_layers=1)
    config = AdaptConfig(**tiny_inputs, language_model=stage, score_tokens=1024)
    folder = tmp_path_factory.mktemp("workspace")
    return open_workspace(config, folder, stop=StopFlag(), log=lambda _: None)


@pytest.fixture
def here(workspace, tmp_path):
    return dataclasses.replace(workspace, folder=tmp_path)


def some_result(rng, *, rows=4, columns=7, size=30):
    doc_ids = np.stack([rng.choice(size, columns, replace=False) for _ in range(rows)])
    counts = np.array([columns, columns - 2, 2, 0] * rows)[:rows]
    mask = np.arange(columns) < counts[:, None]
    scores = np.where(mask, -np.sort(-rng.normal(size=mask.shape), axis=1), -np.inf)
    return SearchResult(
        np.where(mask, doc_ids, -1).astype(np.int32), scores.astype(np.float32), mask
    )


@pytest.mark.parametrize("depth", [1, 3, 7, 9])
def test_the_same_documents_in_as_many_columns_best_first(rng, depth):
    found = some_result(rng)
    scores = rng.normal(size=(4, min(depth, 7))).astype(np.float32)
    new = reranked(found, scores, 2.0)
    for before, after in zip(found, new, strict=True):
        assert before.shape == after.shape and before.dtype == after.dtype
    np.testing.assert_array_equal(new.mask, found.mask)
    for row in range(4):
        assert set(new.doc_ids[row, :depth]) == set(found.doc_ids[row, :depth])
        np.testing.assert_array_equal(new.doc_ids[row, depth:], found.doc_ids[row, depth:])
        kept = new.scores[row][new.mask[row]]
        assert (np.diff(kept) <= 1e-6).all() and (new.scores[row][~new.mask[row]] == -np.inf).all()
        there = found.mask[row, :depth]
        value = found.scores[row, :depth][there] + 2 * scores[row][: len(there)][there]
        expected = found.doc_ids[row, :depth][there][np.argsort(-value, kind="stable")]
        np.testing.assert_array_equal(new.doc_ids[row, : len(expected)], expected)


def test_a_weight_of_zero_and_equal_scores_change_no_order(rng):
    found = some_result(rng)
    scores = rng.normal(size=(4, 5)).astype(np.float32)
    for changed in (reranked(found, scores, 0.0), reranked(found, 0 * scores, 3.0)):
        np.testing.assert_array_equal(changed.doc_ids, found.doc_ids)
        gaps, before = np.diff(changed.scores[0]), np.diff(found.scores[0])
        np.testing.assert_allclose(gaps, before, atol=1e-5)
    scaled = reranked(found, scores, 1.0, prior_scale=20.0)
    np.testing.assert_array_equal(scaled.doc_ids, reranked(found, scores, 1 / 20).doc_ids)


def placed_second(workspace):
    """For each dev question two documents, of which the second is the relevant one."""
    relevant = [min(rows) for rows in workspace.relevant_rows("dev")]
    doc_ids = np.array([[(row + 1) % 80, row, (row + 2) % 80] for row in relevant], np.int32)
    scores = np.tile(np.float32([2.0, 1.0, 0.0]), (len(relevant), 1))
    return SearchResult(doc_ids, scores, np.ones(doc_ids.shape, bool))


def scorer_of(function):
    return Scorer(name=QUESTION, fingerprint="f", scores=function, afresh=function)


def test_the_weight_is_chosen_on_dev_where_it_helps(here):
    found, lines = placed_second(here), []
    workspace = dataclasses.replace(here, log=lines.append)
    knows = scorer_of(lambda questions, top: np.float32(top.scores == 1))
    reranker = fit_reranker(workspace, knows, found, depth=3)
    assert reranker.weight == 2.0  # the first that makes up for the difference of 1
    again = reranker(workspace.questions["dev"], found)
    np.testing.assert_array_equal(again.doc_ids[:, 0], found.doc_ids[:, 1])
    written = json.loads((workspace.folder / "rerank.json").read_text())
    assert written["weight"] == 2.0 and written["depth"] == 3
    assert written["mrr"]["0"] == 0.5 and written["mrr"]["2"] == 1.0
    assert written["milliseconds"] >= 0 and "ms a question" in lines[-1]
    assert lines[-1].startswith(
        "note: re-ranked: the best 3 by the likelihood of the question, weight 2"
    )
    assert Chosen.read(workspace.folder) == Chosen(**written)
    # Beyond the depth nothing is seen.
    assert fit_reranker(workspace, knows, found, depth=1).weight == 0


def test_the_weight_stays_zero_where_it_does_not_help(here):
    found, lines = placed_second(here), []
    workspace = dataclasses.replace(here, log=lines.append)
    wrong = scorer_of(lambda questions, top: np.float32([[0, -1, 1]] * len(questions)))
    reranker = fit_reranker(workspace, wrong, found, depth=3)
    assert reranker.weight == 0 and lines[-1].startswith("note: not re-ranked: by the likelihood")
    assert reranker(workspace.questions["dev"], found) is found
    few = {**here.questions, "dev": here.questions["dev"][:9]}
    knows = scorer_of(lambda questions, top: np.float32([[0, 1, 0]] * len(questions)))
    short = SearchResult(*(part[:9] for part in found))
    workspace = dataclasses.replace(workspace, questions=few)
    assert fit_reranker(workspace, knows, short, depth=3).weight == 0
    assert "not re-ranked: 9 dev questions have a known truth and were not written by" in lines[-1]
    none = dataclasses.replace(workspace, questions={**few, "dev": ()})
    assert fit_reranker(none, knows, found.take(np.zeros(0, int)), depth=3).weight == 0


def test_where_it_was_asked_for_dev_must_speak_against_it(here):
    """One question of many gains: noise, for which nobody is made to wait who did not ask."""
    found = placed_second(here)
    count = len(found.doc_ids)

    def scorer(*, gains, loses):
        def scores(questions, top):
            first, last = np.float32([1, 0, 0]), np.float32([0, 1, 0])
            rows = [last] * gains + [first] * (count - gains)
            return np.stack(rows) if not loses else np.stack([np.float32([0, -1, 1])] * count)

        return scorer_of(scores)

    one = scorer(gains=1, loses=False)
    assert fit_reranker(here, one, found, depth=3).weight == 0
    assert fit_reranker(here, one, found, depth=3, asked=True).weight == 2.0
    most = scorer(gains=count, loses=False)
    assert fit_reranker(here, most, found, depth=3, asked=True).weight == 2.0
    wrong = scorer(gains=0, loses=True)
    assert fit_reranker(here, wrong, found, depth=3, asked=True).weight == 0
    idle = scorer_of(lambda questions, top: np.zeros((len(questions), 3), np.float32))
    assert fit_reranker(here, idle, found, depth=3, asked=True).weight == 0


def test_questions_that_a_language_model_wrote_do_not_judge_it(here):
    corpus, found = here.dataset.corpus, placed_second(here)
    written = tuple(
        dataclasses.replace(question, passage=corpus.id_of(min(rows)))
        for question, rows in zip(here.questions["dev"], here.relevant_rows("dev"), strict=True)
    )
    workspace = dataclasses.replace(here, questions={**here.questions, "dev": written})
    knows = scorer_of(lambda questions, top: np.float32(top.scores == 1))
    assert fit_reranker(workspace, knows, found, depth=3).weight == 0
    other = dataclasses.replace(knows, name="some/model")
    assert fit_reranker(workspace, other, found, depth=3).weight == 2


def test_the_question_is_scored_per_token_and_once(here, monkeypatch):
    questions, found = here.questions["dev"][:3], placed_second(here).take(np.arange(3))
    scorer = make_scorer(here, QUESTION, here.base_lm(), folder=here.folder)
    scores = scorer.scores(questions, found)
    np.testing.assert_allclose(scorer.afresh(questions, found), scores, atol=1e-4)
    assert (here.folder / "scores" / "rerank.jsonl").is_file()
    assert np.ptp(scores[0]) > 0
    prompts, passage = here.prompts, here.documents.get([found.doc_ids[0, 1]])[0]
    context = prompts.context(questions[0].text, [passage])
    start, end = prompts.question_place(questions[0].text, passage)
    packed = prompts.pack([context[:start]], [context[start:end]], target_length=64)
    log_probs = here.lm.token_log_probs(here.lm.params, LMBatch(*map(jnp.asarray, packed)))
    assert scores[0, 1] == pytest.approx(float(log_probs.sum()) / (end - start), abs=1e-4)

    def forbidden(*_):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(batches_module, "_score", forbidden)
    for folder, earlier in ((here.folder, ()), (here.folder / "other", (here.folder,))):
        again = make_scorer(here, QUESTION, here.base_lm(), folder=folder, earlier=earlier)
        np.testing.assert_array_equal(again.scores(questions, found), scores)


def test_a_cross_encoder_scores_pairs_once(here, tmp_path, monkeypatch):
    model = write_tiny_cross_encoder(tmp_path / "model")
    questions, found = here.questions["dev"][:3], placed_second(here).take(np.arange(3))
    found.mask[1, 2] = False
    scorer = make_scorer(here, str(model), here.base_lm(), folder=here.folder)
    scores = scorer.scores(questions, found)
    assert scores[1, 2] == 0 and np.ptp(scores[0]) > 0
    np.testing.assert_allclose(scorer.afresh(questions, found), scores, atol=1e-5)
    loaded = rerank_module.load_cross_encoder(str(model))
    pair = (questions[2].text, passage_text(here.dataset.corpus[int(found.doc_ids[2, 0])]))
    ids, types = cross_module.encode_pairs(loaded.tokenizer, [pair])
    tokens = cross_module.PairTokens(*(np.array(part) for part in (ids, np.ones_like(ids), types)))
    tokens = tokens._replace(mask=tokens.mask.astype(bool))
    logit = jax.jit(loaded.logits)(loaded.params, tokens)
    assert scores[2, 0] == pytest.approx(float(logit[0]), abs=1e-5)
    monkeypatch.setattr(cross_module, "pad_right", None)  # no batch is made again
    again = make_scorer(here, str(model), here.base_lm(), folder=here.folder)
    np.testing.assert_array_equal(again.scores(questions, found), scores)
    reranker = Reranker(scorer=again, depth=2, weight=1.0)
    assert reranker(questions, found).mask.shape == found.mask.shape


def test_what_cannot_re_rank_is_refused_with_its_flag(tmp_path, tiny_inputs):
    for name in ("none", "auto", QUESTION):
        check_reranker(name, "--rerank")
    with pytest.raises(FileNotFoundError, match=r"--rerank .*/nowhere: .* it takes none, question"):
        check_reranker(str(tmp_path / "nowhere"), "--rerank")
    with pytest.raises(ValueError, match=r"--rerank .*encoder: .*config.json: the head has 2"):
        check_reranker(tiny_inputs["encoder"], "--rerank")


def test_a_run_goes_on_with_the_cross_encoder_that_it_began_with(workspace, tmp_path):
    folders = [write_tiny_cross_encoder(tmp_path / str(seed), seed) for seed in (0, 1)]
    found = []
    for folder in folders:
        config = dataclasses.replace(workspace.config, rerank=str(folder))
        inputs = run_inputs(dataclasses.replace(workspace, config=config))
        found.append(inputs["re-ranking cross-encoder"])
    assert found[0] != found[1]
    assert "re-ranking cross-encoder" not in run_inputs(workspace)


def test_on_a_cpu_nothing_is_re_ranked_unless_asked_for(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert [chosen_name(name) for name in ("auto", "question", "x/y")] == [
        "none",
        "question",
        "x/y",
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen_name("auto") == QUESTION


# -- where it is asked for


@pytest.fixture(scope="module")
def system(tiny_inputs, tmp_path_factory):
    config = AdaptConfig(**tiny_inputs)
    return open_base_system(config, cache=tmp_path_factory.mktemp("ask"), log=lambda _: None)


def test_a_search_ranks_again_as_asked_or_as_the_run_chose(system, tmp_path):
    model, lines = str(write_tiny_cross_encoder(tmp_path / "model")), []
    found = retrieve(system, ["the red owl"], 3, by=by_hybrid).found
    for name in (None, "none", "auto"):
        assert reranked_search(system, by_hybrid, name, log=lines.append) is by_hybrid
    assert not lines
    by_model = reranked_search(system, by_hybrid, model, depth=20, log=lines.append)
    assert "the best 20 documents" in lines[0] and "weight 0.5 (not chosen on dev)" in lines[0]
    again = retrieve(system, ["the red owl"], 3, by=by_model).found
    assert again.mask.shape == (1, 3) == found.mask.shape
    best = retrieve(system, ["the red owl"], 20, by=by_hybrid).found
    scorer = make_scorer(system.workspace, model, system.workspace.base_lm(), folder=None)
    asked = [Question(id="", text="the red owl")]
    expected = reranked(best, scorer.scores(asked, best), 1.0)
    np.testing.assert_array_equal(again.doc_ids, expected.doc_ids[:, :3])
    # A run says by itself what it ships.
    workspace = dataclasses.replace(system.workspace, folder=tmp_path)
    run = dataclasses.replace(system, workspace=workspace)
    chosen = Chosen(model, "f", 12, 4e4, 30, {}, 1.5)
    (tmp_path / "rerank.json").write_text(json.dumps(chosen._asdict()))
    assert reranked_search(run, by_hybrid, "none") is by_hybrid
    shipped = reranked_search(run, by_hybrid, None, log=lines.append)
    assert "the best 12 documents" in lines[1] and "weight 40000 (chosen on 30 dev" in lines[1]
    first = retrieve(run, ["the red owl"], 12, by=by_hybrid).found
    expected = reranked(first, scorer.scores(asked, first), 4e4)
    new = retrieve(run, ["the red owl"], 9, by=shipped).found
    np.testing.assert_array_equal(new.doc_ids, expected.doc_ids[:, :9])
    assert new.doc_ids.tolist() != first.doc_ids[:, :9].tolist()


def test_the_logits_of_p_r_follow_their_documents(rng):
    found = some_result(rng)
    logits = np.where(found.mask, found.doc_ids, 0).astype(np.float32)
    scores = rng.normal(size=(4, 7)).astype(np.float32)
    reranker = Reranker(scorer=scorer_of(lambda *_: scores), depth=7, weight=3.0)
    new = reranker.documents([Question(id="", text="x")] * 4, Documents(found, logits))
    expected = np.where(new.found.mask, new.found.doc_ids, 0)
    np.testing.assert_array_equal(new.logits, expected)
    assert new.found.doc_ids.tolist() != found.doc_ids.tolist()


@pytest.mark.slow
def test_a_run_its_evaluation_and_its_questions_are_re_ranked(
    tiny_flags, tmp_path, monkeypatch, capsys
):
    adapt, evaluate, ask = (
        load_script(f"experiments/{name}.py").main for name in ("adapt", "evaluate", "ask")
    )
    # Random models help nobody: each weight that is tried counts as better than the one before.
    better = itertools.count()

    def figure(found, relevant):
        return np.full(len(relevant), next(better))

    monkeypatch.setattr(rerank_module, "ranking_figure", figure)
    run = tmp_path / "run"
    flags = [*tiny_flags, "--retriever.rounds=1", f"--output={run}"]
    assert adapt([*flags, "--rerank", "question", "--rerank_depth=4"]) == 0
    printed = capsys.readouterr().out
    assert "== re-rank\n" in printed and "reranked - hybrid " in printed
    metrics = json.loads((run / "metrics.json").read_text())
    served = json.loads((run / "served.json").read_text())["documents"]
    assert metrics["reranked"]["n"] == 10
    pairs = {
        (one["system"], one["baseline"])
        for one in json.loads((run / "differences.json").read_text())["differences"]
    }
    assert {("reranked", "hybrid"), ("reranked", "hybrid_before")} <= pairs
    assert json.loads((run / "rerank.json").read_text())["weight"] == 8
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        plain, again = (line["systems"][name]["doc_ids"] for name in (served, "reranked"))
        assert set(plain[:4]) == set(again[:4]) and plain[4:] == again[4:]
    assert any(
        line["systems"][served]["doc_ids"] != line["systems"]["reranked"]["doc_ids"]
        for line in lines
    )
    # A repeated run scores nothing again.
    (run / "metrics.json").unlink()
    monkeypatch.setattr(batches_module, "_score", None)
    assert adapt([*flags, "--rerank", "question", "--rerank_depth=4"]) == 0
    assert json.loads((run / "metrics.json").read_text()) == metrics
    monkeypatch.undo()
    monkeypatch.setattr(rerank_module, "ranking_figure", figure)
    small = ["--max_questions=6", "--answer_questions=2", "--resamples=20", "--no-robustness"]
    for more, named in (([], True), (["--rerank", "none"], False)):
        output = tmp_path / f"evaluated-{named}"
        assert evaluate([f"--run={run}", f"--output={output}", *small, *more]) == 0
        assert ("reranked" in json.loads((output / "metrics.json").read_text())) == named
    capsys.readouterr()
    asked = [
        f"--run={run}",
        "--no-warm_up",
        "--no-explain",
        "--json",
        "what does the red cat like?",
    ]
    found = {}
    for more in ("--rerank=question", "--rerank=none"):
        assert ask([*asked, more]) == 0
        captured = capsys.readouterr()
        found[more] = [source["id"] for source in json.loads(captured.out)["documents"]]
        assert ("ranked again: question, weight 8" in captured.err) == (more != "--rerank=none")
    assert set(found["--rerank=question"]) == set(found["--rerank=none"])


def test_the_forecast_counts_the_pairs_of_both_stages(workspace, monkeypatch):
    monkeypatch.setattr(speed.Texts, "lm_rate", 100.0)
    monkeypatch.setattr(speed.Texts, "encoder_rate", 1000.0)
    texts = speed.Texts(workspace, workspace.config)
    assert (
        forecast._reranked(texts, "none", 4, [10, 5])
        == forecast._reranked(texts, "auto", 4, [10, 5])
        == []
    )
    (work,) = forecast._reranked(texts, QUESTION, 4, [10, 5])
    assert work.tokens == texts.scored(40) + texts.scored(20) and work.rate == 100
    (work,) = forecast._reranked(texts, "some/model", 4, [10, 5])
    assert work.tokens > 60 * 16 and work.rate == 1000


def test_the_system_re_ranked_is_there_where_something_re_ranks():
    base = EvaluateConfig(rerank="question")
    assert "reranked" in system_names(base, adapts_lm=False, reranks=True)
    assert "reranked" not in system_names(EvaluateConfig(), adapts_lm=False)
    only = EvaluateConfig(rerank="question", systems=("reranked",))
    assert system_names(only, adapts_lm=False, reranks=True) == ("reranked",)
    with pytest.raises(ValueError, match="--systems reranked: nothing ranks the documents again"):
        system_names(EvaluateConfig(run="r", systems=("reranked",)), adapts_lm=False)
    with pytest.raises(ValueError, match="there are no adapted models"):
        EvaluateConfig(rerank="none", systems=("reranked",))
    with pytest.raises(ValueError, match="rerank_depth must be at least 1, got 0"):
        AdaptConfig(rerank_depth=0)
    with pytest.raises(ValueError, match="rerank must be auto, none, question or"):
        AdaptConfig(rerank="")

"""What a run ships: adapted where dev says so, and un-adapted where training made it worse."""

import dataclasses
import json

import numpy as np
import pytest
from programs import StopAfter

from ragjax.models.testing import write_tiny_encoder, write_tiny_language_model
from ragjax.runs.adapt import Candidates, _adapt_retriever
from ragjax.runs.compare.served import Served, choose_served
from ragjax.runs.indexes import build_bm25, build_towers
from ragjax.runs.options.dual import AdaptConfig, LMConfig, RetrieverConfig
from ragjax.runs.train import guard as guard_module
from ragjax.runs.train.guard import Guard
from ragjax.runs.workspace import open_workspace, tower_params
from ragjax.training.loop import Interrupted, StopFlag

# Passages have the first word of each pair, questions the second one: what BM25 cannot know.
COLOURS = {
    "red": "crimson", "green": "emerald", "blue": "azure", "white": "ivory", "black": "ebony",
    "brown": "chestnut", "pink": "rose", "grey": "ashen",
}  # fmt: skip
ANIMALS = ("cat", "dog", "owl", "fox", "hen", "cow", "pig", "bee", "ant", "elk")
SPLITS = ("train", "train", "dev", "test")
RETRIEVER = RetrieverConfig(
    objective="dpr", candidates=4, batch_size=8, epochs=12, learning_rate=0.01, negative_depth=10
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    write_tiny_encoder(folder / "encoder")
    write_tiny_language_model(folder / "lm")
    (folder / "data" / "qrels").mkdir(parents=True)
    corpus, queries, judged = [], [], {split: [] for split in SPLITS}
    pairs = [(colour, animal) for animal in ANIMALS for colour in COLOURS]
    order = np.random.default_rng(0).permutation(len(pairs))
    for number, (colour, animal) in enumerate(pairs):
        id = f"{colour}-{animal}"
        corpus.append({"_id": id, "title": "", "text": f"{colour} {animal} likes {number}"})
        text = f"{COLOURS[colour]} {animal}"
        answers = {"answers": [str(number)]}
        queries.append({"_id": f"q{number}", "text": text, "metadata": answers})
        judged[SPLITS[order[number] % len(SPLITS)]].append(f"q{number}\t{id}\t1")
    for name, rows in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text)
    for split, rows in judged.items():
        text = "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n"
        (folder / "data" / "qrels" / f"{split}.tsv").write_text(text)
    return {name: str(folder / name) for name in ("data", "encoder", "lm")}


def make_config(inputs, folder, *, keep="best", retriever=None):
    return AdaptConfig(
        **inputs, output=str(folder), keep=keep, stages=("retriever",), checkpoint_minutes=0,
        retriever=dataclasses.replace(RETRIEVER, **(retriever or {})),
        language_model=LMConfig(train_layers=1),
    )  # fmt: skip


def ship(inputs, folder, *, stop=None, keep="best", shuffled=False, **retriever):
    """Trains the retriever and chooses what is shipped; returns that and what was said."""
    config = make_config(inputs, folder, keep=keep, retriever=retriever)
    folder.mkdir(exist_ok=True)
    told = []
    workspace = open_workspace(config, folder, stop=StopFlag(), log=told.append)
    if shuffled:
        # What is to be found for a question is another one's passage.
        dev = [question.id for question in workspace.questions["dev"]]
        grades = workspace.dataset.qrels["dev"]
        moved = dict(zip(dev, [grades[id] for id in np.roll(dev, 7)], strict=True))
        dataset = dataclasses.replace(
            workspace.dataset, qrels={**workspace.dataset.qrels, "dev": {**grades, **moved}}
        )
        workspace = dataclasses.replace(workspace, dataset=dataset)
    params, bm25 = tower_params(workspace), build_bm25(workspace)
    before = build_towers(workspace, bm25, params, 0)
    guard = Guard(workspace, bm25, before, params)
    workspace = dataclasses.replace(workspace, stop=stop or workspace.stop)
    candidates = Candidates(workspace, before, 4)
    lm = workspace.base_lm()
    kept = _adapt_retriever(workspace, config, bm25, params, candidates, lm, guard)
    after = build_towers(workspace, bm25, kept.params, config.retriever.rounds)
    served = choose_served(workspace, bm25, before, after, lm, kept)
    assert Served.read(folder) == served
    return served, "\n".join(told)


@pytest.mark.slow
def test_a_gain_is_shipped_and_a_kill_in_the_middle_changes_no_byte(inputs, tmp_path):
    served, said = ship(inputs, tmp_path / "whole")
    assert served.documents in ("hybrid", "after") and served.retriever == "adapted"
    assert served.dev[served.documents]["mrr@10"] > served.dev["hybrid_before"]["mrr@10"] + 0.1
    assert "adaptation helped; shipped: adapted" in served.reason and served.reason in said
    assert served.questions == 20
    with pytest.raises(Interrupted):
        ship(inputs, tmp_path / "cut", stop=StopAfter(38))
    measured = (tmp_path / "cut" / "dev" / "retriever.jsonl").read_text().splitlines()
    assert len(measured) == 2, "it was not cut in the middle"
    ship(inputs, tmp_path / "cut")
    whole = (tmp_path / "whole" / "served.json").read_bytes()
    assert (tmp_path / "cut" / "served.json").read_bytes() == whole


class Measured:
    """What was measured of a training whose parameter is the mean of its figure."""

    def __init__(self, steps):
        self.count = 0
        self.figures = {f"retriever-0 {n}": self.figure(mean) for n, mean in enumerate(steps, 1)}
        self.steps = steps

    def figure(self, mean):
        self.count += 1  # noise of mean 0, another one each time
        return mean + 0.01 * np.cos(2 * np.pi * self.count * np.arange(40) / 40)

    def measure(self, name, params):
        return self.figures[name] if name in self.figures else self.figure(float(params["w"][0]))

    def restore(self, template):
        place = int(np.argmax([row.mean() for row in self.figures.values()]))
        return f"retriever-0 {place + 1}", {"w": np.float32([self.steps[place]])}


@pytest.mark.parametrize(
    ("base", "steps", "step", "factor"),
    [
        (0.5, [0.6, 0.7, 0.701, 0.7], 4, 1),  # the third is no better but by noise
        (0.5, [0.6, 0.8, 0.7, 0.6], 2, 1),
        (0.9, [0.6, 0.6, 0.6, 0.6], 4, 0.25),  # the nearer to what was there before, the better
    ],
)
def test_the_last_step_is_kept_unless_another_is_better_by_more_than_noise(
    base, steps, step, factor
):
    guard = object.__new__(Guard)
    guard._base = {"w": np.float32([base])}
    kept = guard._choose(Measured(steps), {"w": np.float32([steps[-1]])})
    assert (kept.step, kept.factor) == (f"retriever-0 {step}", factor)
    np.testing.assert_allclose(
        kept.params["w"], factor * steps[step - 1] + (1 - factor) * base, rtol=1e-5
    )
    # What was not chosen on the questions owes nothing to them.
    assert kept.optimism == 0 if (step, factor) == (4, 1) else 0 <= kept.optimism < 0.05


@pytest.mark.slow
def test_a_learning_rate_far_too_high_ships_what_was_there_before(inputs, tmp_path):
    served, _ = ship(inputs, tmp_path / "run", learning_rate=10.0, epochs=4)
    assert served.documents == "hybrid_before" and served.search == "hybrid"
    assert served.retriever == "base"
    assert "did not help here; shipped: un-adapted hybrid" in served.reason
    # What the adapted one scored is not hidden.
    assert f"adapted hybrid {served.dev['hybrid']['mrr@10']:.3f}" in served.reason
    last, _ = ship(inputs, tmp_path / "last", keep="last", learning_rate=10.0, epochs=4)
    assert last.documents == "hybrid" and last.factor == 1 and "keep last" in last.reason
    assert not (tmp_path / "last" / "dev").exists()


def test_dev_questions_whose_truth_is_nonsense_choose_nothing(inputs, tmp_path):
    served, said = ship(inputs, tmp_path / "run", shuffled=True, epochs=1)
    assert served.documents == "hybrid_before"
    assert "hardly better than chance" in served.reason and "cannot judge" in said


def test_the_pool_ranks_as_the_index_where_it_holds_all_passages(inputs, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(
        guard_module, "BestStep", lambda workspace, name, measure: heard.append(measure)
    )
    config = make_config(inputs, tmp_path)
    workspace = open_workspace(config, tmp_path, stop=StopFlag(), log=lambda line: None)
    params, bm25 = tower_params(workspace), build_bm25(workspace)
    before = build_towers(workspace, bm25, params, 0)
    Guard(workspace, bm25, before, params)
    both, alone = (
        guard_module.ranking_figure(found, workspace.relevant_rows("dev"))
        for found in guard_module.search(workspace, before, "dev", 10)[1::-1]
    )
    np.testing.assert_allclose(heard[0](params), both + 1e-3 * alone)
    # The towers are encoded again where they are other ones.
    other = {"shared": dict(params["shared"])}
    np.testing.assert_allclose(heard[0](other), both + 1e-3 * alone)
    monkeypatch.setattr(guard_module, "POOL_PASSAGES", 30)
    Guard(workspace, bm25, before, params)
    pool = heard[1].__self__
    assert len(pool.rows) == 30 and (np.diff(pool.rows) > 0).all()
    assert {min(rows) for rows in workspace.relevant_rows("dev")} <= set(pool.rows.tolist())
    assert heard[1](params).mean() >= both.mean()

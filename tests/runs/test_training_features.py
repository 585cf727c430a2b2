"""Precision, adapters, frozen layers and accumulation as options of a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import StopAfter

from ragjax.index import HybridIndex
from ragjax.models import Tokens, lora
from ragjax.models.testing import tiny_encoder, tiny_language_model
from ragjax.runs import forecast
from ragjax.runs.adapt import Candidates, adapt
from ragjax.runs.forecast import estimate_cost
from ragjax.runs.indexes import build_bm25, build_retriever, build_towers, search
from ragjax.runs.options.dual import AdaptConfig, LMConfig, RetrieverConfig
from ragjax.runs.options.shared import DataConfig, EvaluationConfig
from ragjax.runs.train.language_model import train_lm
from ragjax.runs.trainable import folded, split_lm, split_towers
from ragjax.runs.workspace import open_workspace, tower_params
from ragjax.training.loop import Interrupted, StopFlag
from ragjax.training.lsr import towers


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: LMConfig(batch_size=6, accumulate=4), "accumulate=4 does not divide batch_size=6"),
        (lambda: LMConfig(accumulate=0), "accumulate must be at least 1"),
        (lambda: LMConfig(lora_rank=-1), "lora_rank must be at least 0"),
        (lambda: LMConfig(lora_alpha=0.0), "lora_alpha must be greater than 0"),
        (lambda: RetrieverConfig(lora_rank=-1), "lora_rank must be at least 0"),
        (lambda: RetrieverConfig(train_layers=-1), "train_layers must be at least 0"),
    ],
)
def test_options_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_layers_than_an_encoder_has_are_refused(tiny_inputs, tmp_path):
    config = tiny_config(tiny_inputs, tmp_path, retriever=RetrieverConfig(train_layers=3))
    with pytest.raises(ValueError, match="--retriever.train_layers 3: .* has 2 layers; 0 trains"):
        open_workspace(config, tmp_path, stop=StopFlag(), log=lambda line: None)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("train_layers", [0, 1])
def test_the_parts_of_a_language_model_are_merged_to_the_whole(train_layers, lora_rank):
    model = tiny_language_model()
    config = LMConfig(train_layers=train_layers, lora_rank=lora_rank)
    split = split_lm(config, model.family, model.params, seed=0)
    layers = train_layers or 3
    if lora_rank:
        width, keys, inner = 32, 16, 48
        pairs = [(width, width), (width, keys), (width, keys), (width, width)]
        pairs += [(width, inner), (width, inner), (inner, width)]
        expected = layers * sum(lora_rank * (i + o) + 1 for i, o in pairs)
    else:
        rows = jax.tree.map(lambda leaf: leaf[:layers], model.params["layers"])
        expected = count(rows) + count(model.params["final_norm"])
        expected += 0 if train_layers else count(model.params["embed"])
    assert count(split.trainable) == expected
    ready = folded(split.joined(split.trainable))
    assert jax.tree.structure(ready) == jax.tree.structure(model.params)  # no stack of its own
    whole = model.family.save_params(model.config, lora.merge(split.merged(split.trainable)))
    for name, tensor in model.family.save_params(model.config, model.params).items():
        np.testing.assert_array_equal(whole[name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"train_layers": 1}, {"lora_rank": 2}])
@pytest.mark.parametrize("train", ["query", "both", "shared"])
def test_the_parts_of_the_towers_are_merged_to_the_towers(train, options):
    encoder = tiny_encoder()
    whole = {"shared": encoder.params}
    if train != "shared":
        whole = {"query": encoder.params, "doc": tiny_encoder(1).params}
    split = split_towers(RetrieverConfig(train=train, **options), whole, seed=0)
    assert list(split.trainable) == {"query": ["query"], "both": ["query", "doc"]}.get(
        train, ["shared"]
    )
    jax.tree.map(np.testing.assert_array_equal, split.merged(split.trainable), whole)
    # What learns reaches the tower of its own name.
    moved = jax.tree.map(lambda leaf: leaf + 0.1, split.trainable)
    query, doc = towers(moved, split.frozen, split.merge)
    served = towers(split.merged(moved), None)
    tokens = Tokens(jnp.full((1, 4), 7, jnp.int32), jnp.ones((1, 4), bool))
    encode = jax.jit(encoder.encode)
    for one, other in ((query, served[0]), (doc, served[1])):
        np.testing.assert_allclose(encode(one, tokens), encode(other, tokens), atol=1e-5)
    changed = encode(doc, tokens) - encode(whole.get("doc", encoder.params), tokens)
    assert bool(jnp.abs(changed).max() > 1e-3) is (train != "query")


def tiny_config(tiny_inputs, output, **changes):
    """A run with adapters in both models, in bfloat16, in parts and recomputing its layers."""
    options = {
        "data_options": DataConfig(train_questions=12, test_questions=4, answer_questions=1),
        "language_model": LMConfig(
            questions=8, batch_size=4, accumulate=2, train_layers=2, lora_rank=2, remat=True
        ),
        "retriever": RetrieverConfig(
            candidates=3, batch_size=4, train_layers=1, lora_rank=2, remat=True
        ),
        "evaluation": EvaluationConfig(max_new_tokens=2, resamples=20),
        "compute_dtype": "bfloat16",
        "checkpoint_minutes": 0,
    }
    return AdaptConfig(**tiny_inputs, output=str(output), **(options | changes))


def saved_arrays(folder):
    step = max(folder.iterdir(), key=lambda path: int(path.name))
    return json.loads((step / "ragjax.json").read_text())["arrays"]


@pytest.mark.slow
def test_a_run_with_everything_on_ends_with_metrics_and_saves_adapters_only(tiny_inputs, tmp_path):
    config = tiny_config(tiny_inputs, tmp_path / "run")
    metrics = adapt(config, log=lambda line: None).metrics
    assert set(metrics) >= {"before", "after"} and metrics["after"]["recall@5"]["value"] >= 0
    for stage in ("lm", "retriever-0"):
        names = saved_arrays(tmp_path / "run" / "checkpoints" / stage)
        params = [name for name in names if name.startswith(".params")]
        assert params and all("'lora'" in name for name in params)
        assert {names[name][0] for name in params} == {"float32"}


@pytest.mark.slow
def test_adapters_resume_bit_for_bit_and_leave_the_frozen_weights_alone(tiny_inputs, tmp_path):
    config = tiny_config(tiny_inputs, tmp_path / "run", compute_dtype="float32")
    workspace = open_workspace(config, tmp_path / "run", stop=StopFlag(), log=lambda line: None)
    lm = workspace.lm
    before = lm.family.save_params(lm.config, lm.params)
    params = workspace.encoder.params
    retriever = build_retriever(
        workspace, build_bm25(workspace), version=0, query_params=params, doc_params=params
    )
    found = search(workspace, retriever, "train", 1).hybrid
    adapted = train_lm(workspace, config.language_model, found)
    assert adapted["embed"]["embedding"] is lm.params["embed"]["embedding"]
    merged = lm.family.save_params(lm.config, lora.merge(adapted))
    names = {name for name, tensor in before.items() if not np.array_equal(tensor, merged[name])}
    # The linear layers of the two top layers have learnt, and nothing else.
    assert names and {name.split("layers.")[1][0] for name in names} == {"1", "2"}
    assert not any("norm" in name for name in names)
    cut = dataclasses.replace(workspace, folder=tmp_path / "cut", stop=StopAfter(1))
    with pytest.raises(Interrupted):
        train_lm(cut, config.language_model, found)
    cut = dataclasses.replace(cut, stop=StopFlag())
    resumed = train_lm(cut, config.language_model, found)
    jax.tree.map(np.testing.assert_array_equal, adapted, resumed)


def test_one_search_gives_the_candidates_of_both_stages(tiny_inputs, tmp_path, monkeypatch):
    config = tiny_config(tiny_inputs, tmp_path)
    workspace = open_workspace(config, tmp_path, stop=StopFlag(), log=lambda line: None)
    retriever = build_towers(workspace, build_bm25(workspace), tower_params(workspace), 0)
    # The corpus has 80 passages: from there on, scores depend on the number of candidates.
    expected = {k: search(workspace, retriever, "train", k) for k in (1, 3, 6, 81)}
    searched = []
    whole = HybridIndex.search
    monkeypatch.setattr(
        HybridIndex,
        "search",
        lambda self, queries, k: searched.append(k) or whole(self, queries, k),
    )
    candidates = Candidates(workspace, retriever, 6)
    for k in (1, 3, 6, 81):
        jax.tree.map(np.testing.assert_array_equal, candidates.hybrid(k), expected[k].hybrid)
    assert searched == [6, 81]
    jax.tree.map(np.testing.assert_array_equal, candidates.dense(4), candidates.dense(9).top(4))
    alone = Candidates(workspace, retriever, 6, dense=True)
    jax.tree.map(np.testing.assert_array_equal, alone.hybrid(6), candidates.dense(6))
    assert searched == [6, 81]


@pytest.mark.slow
def test_adapters_are_forecast_to_cost_less(tiny_inputs, tmp_path):
    def cost(**options):
        config = tiny_config(tiny_inputs, tmp_path, compute_dtype="float32", **options)
        workspace = open_workspace(config, tmp_path, stop=StopFlag(), log=lambda line: None)
        return estimate_cost(workspace, config)

    whole = cost(language_model=LMConfig(train_layers=0), retriever=RetrieverConfig())
    adapters = cost()
    assert adapters.bytes_on_disk < 0.7 * whole.bytes_on_disk


@pytest.mark.slow
def test_keyword_queries_are_forecast(tiny_inputs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(forecast, "_cost", lambda texts, work, **rest: seen.append((work, rest)))
    for count in (0, 8):
        retriever = RetrieverConfig(batch_size=8, documents=1, epochs=50, keyword_queries=count)
        config = tiny_config(tiny_inputs, tmp_path, retriever=retriever)
        workspace = open_workspace(config, tmp_path, stop=StopFlag(), log=lambda line: None)
        estimate_cost(workspace, config)
    (without, fewer), (beside, more) = seen
    assert fewer["steps"] == more["steps"] > 20

    def training(works):
        return next(work for work in works if work.stage == "retriever")[1]

    assert training(beside) == 2 * training(without)  # as many documents and queries again

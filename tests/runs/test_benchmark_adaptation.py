"""The comparison of adaptation with its peers, on a tiny domain."""

import importlib.util
import json

import numpy as np
import pytest
from programs import load_script

from ragjax.data import read_beir

TINY = """
checkpoint_minutes = 0
[data_options]
answer_questions = 6
[language_model]
questions = 8
train_layers = 1
[retriever]
candidates = 3
learning_rate = 0.01
[evaluation]
documents = 2
max_new_tokens = 3
resamples = 50
"""


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/adaptation.py")


def _cell(system, recall, *, data="a", seed=0, dev=0.5, bm25=(0.0, 0.0), **more):
    metrics = ("dense recall@5", "dense ndcg@10", "hybrid recall@5", "hybrid ndcg@10")
    questions = dict.fromkeys(metrics, list(recall)) | {"bm25 recall@5": list(bm25)} | more
    return {
        "data": data, "size": 240, "seed": seed, "system": system, "seconds": 1.0,
        "questions": questions, "dev": {"dense mrr@10": dev}, "weight": 0.5, "note": "",
    }  # fmt: skip


def _rows(script, cells):
    table = script.sys.modules["_adaptation_table"]
    return {(r.data, r.system): r for r in table.make_rows([table.Cell(**c) for c in cells])}


def test_a_peer_counts_with_the_learning_rate_that_dev_likes_best(script):
    cells = [
        _cell("un-adapted", (0, 0)),
        _cell("mnrl 2e-05", (1, 0), dev=0.6),
        _cell("mnrl 5e-05", (1, 1), dev=0.4),
        _cell("mnrl 2e-05", (0, 0), seed=1, dev=0.1),
        _cell("mnrl 5e-05", (0, 1), seed=1, dev=0.2),
    ]
    row = _rows(script, cells)["a", "mnrl"]
    assert row.runs == 2
    np.testing.assert_array_equal(row.values["dense recall@5"], [0.5, 0.5])
    assert row.differences["un-adapted"][0] == 0.5


def test_what_a_run_ships_is_compared_and_sets_are_pooled(script):
    shipped = {"shipped recall@5": [0.0, 1.0]}
    cells = [
        _cell("un-adapted", (0, 0), bm25=(1, 0)),
        _cell("un-adapted", (1, 1), data="b"),
        _cell("ragjax answers", (1, 1), bm25=(1, 0), **shipped),
        _cell("ragjax answers", (1, 1), data="b"),
        _cell("ragjax documents", (1, 1)),
    ]
    rows = _rows(script, cells)
    assert rows["a", "ragjax answers"].differences["un-adapted"][0] == 0.5
    assert rows["a", "ragjax answers"].differences["BM25"][0] == 0.0
    assert rows["pooled", "ragjax answers"].differences["un-adapted"][0] == 0.25
    assert ("pooled", "ragjax documents") not in rows  # not measured on every set


def test_training_answers_are_dealt_out_and_those_of_other_splits_kept(
    script, write_domain, tmp_path
):
    source = write_domain(tmp_path / "data")
    script.write_other_answers(source, source, tmp_path / "other", 0)
    before = read_beir(source, cache=tmp_path / "one")
    after = read_beir(tmp_path / "other", cache=tmp_path / "two")
    old, new = ([q.answers for q in d.questions["train"]] for d in (before, after))
    assert sorted(old) == sorted(new) and sum(a == b for a, b in zip(old, new, strict=True)) < 5
    assert before.questions["test"] == after.questions["test"]
    assert before.qrels == after.qrels


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "x/a", "y/x/a"], "x/a twice"),
        (["--data", "a", "--seeds", "0"], "--seeds must be at least 1"),
        (["--data", "a", "--learning_rates"], "--learning_rates names nothing"),
    ],
)
def test_flags_that_cannot_be_are_named(script, flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([*flags, "--output", str(tmp_path)])
    assert words in " ".join(
        capsys.readouterr().err.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split()
    )


def _flags(tiny_inputs, tmp_path, *more):
    (tmp_path / "tiny.toml").write_text(TINY)
    return [
        "--data", tiny_inputs["data"], "--encoder", tiny_inputs["encoder"], "--lm",
        tiny_inputs["lm"], "--output", str(tmp_path / "out"), "--config",
        str(tmp_path / "tiny.toml"), "--questions", "12", "--seeds", "1", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_kinds_are_run_once_and_a_table_is_written(script, tiny_inputs, tmp_path, capsys):
    flags = _flags(
        tiny_inputs, tmp_path, "--peers", "--kinds", "answers", "judgements", "--stages",
        "retriever", "--rows", str(tmp_path / "rows.rst"),
    )  # fmt: skip
    assert script.main(flags) == 0
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    cells = [json.loads(line) for line in lines]
    assert [c["system"] for c in cells] == ["un-adapted", "ragjax answers", "ragjax judgements"]
    assert all(len(c["questions"]["hybrid recall@5"]) == 26 for c in cells)
    assert "shipped recall@5" in cells[1]["questions"] and cells[1]["note"]
    assert "| ragjax answers | 1 |" in capsys.readouterr().out
    assert (tmp_path / "rows.rst").read_text().startswith("   * - set\n     - system\n")
    assert script.main(flags) == 0  # nothing is repeated
    assert (tmp_path / "out" / "cells.jsonl").read_text().splitlines() == lines


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("sentence_transformers", "datasets")),
    reason="needs sentence-transformers[train]",
)
def test_a_peer_is_trained_on_gold_pairs(script, tiny_inputs, tmp_path):
    flags = _flags(
        tiny_inputs, tmp_path, "--kinds", "--peers", "mnrl", "mnrl_hard", "--learning_rates",
        "1e-2",
    )  # fmt: skip
    assert script.main(flags) == 0
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    base, mnrl, hard = (json.loads(line) for line in lines)
    assert (mnrl["system"], hard["system"]) == ("mnrl 0.01", "mnrl_hard 0.01")
    assert mnrl["note"] == "12 rows of anchor, positive"
    assert mnrl["dev"] != base["dev"]

"""The recipes: each is read, runs, and computes what its paper prints."""

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_script

from ragjax.index import SearchResult
from ragjax.models.testing import write_tiny_language_model
from ragjax.runs.options.dual import AdaptConfig, RetrieverConfig
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.program import parse_flags
from ragjax.runs.teachers.reading import TeacherScores
from ragjax.runs.teachers.target import target_log_probs, teacher_parts
from ragjax.runs.train import retriever as retriever_stage
from ragjax.runs.train.end_to_end import make_terms
from ragjax.runs.train.retriever import OBJECTIVES
from ragjax.training import end_to_end as e2e

FOLDER = Path(__file__).parents[2] / "experiments" / "recipes"
DUAL = sorted(FOLDER.glob("*.toml"))
END_TO_END = sorted((FOLDER / "end_to_end").glob("*.toml"))
# Sizes of a run that takes seconds.
SMALL = (
    "--data_options.train_questions=4", "--data_options.dev_questions=2",
    "--data_options.test_questions=3", "--data_options.answer_questions=2",
    "--language_model.train_layers=1", "--evaluation.documents=2",
    "--evaluation.max_new_tokens=3", "--evaluation.resamples=20", "--score_tokens=512",
)  # fmt: skip
SMALL_DUAL = ("--language_model.batch_size=4", "--retriever.candidates=3",
              "--retriever.batch_size=4")  # fmt: skip
SMALL_RAG = ("--training.documents=2", "--training.batch_size=4")


def options_of(path, *more):
    base = RagConfig() if path in END_TO_END else AdaptConfig()
    return parse_flags(base, None, [f"--config={path}", *more]).options


@pytest.mark.parametrize("path", [*DUAL, *END_TO_END], ids=lambda path: path.stem)
def test_each_recipe_is_read_and_takes_what_it_says(path):
    config = options_of(path)
    for section, options in tomllib.loads(path.read_text("utf-8")).items():
        if isinstance(options, dict):
            for name, value in options.items():
                found = getattr(getattr(config, section), name)
                assert (list(found) if isinstance(found, tuple) else found) == value
    assert config.keep == "last"
    assert "section" in path.read_text("utf-8")  # each names its source
    # No paper compares a question with the candidates of others.
    part = config.objective if path in END_TO_END else config.retriever
    assert part.negatives == "none"
    # ... nor finds them by anything but p_R.
    assert (config.training.candidates if path in END_TO_END else part.search) == "dense"
    assert path in END_TO_END or (config.rerank == "none" and part.known_share == 0)
    if path in DUAL and config.trains_lm:
        stage = config.language_model
        assert (stage.question_weight, stage.distractors) == (0, 0)


def kl(p, q):
    return float((p * np.log(p / q)).sum())


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum()


LOG_PROBS, LENGTH = np.array([-0.5, -3.0, -2.0]), 2  # of an answer given three documents
ASKED = np.array([-7.0, -4.0, -5.5])  # of the question, of as many tokens
DOC_SCORES = np.array([1.0, 0.5, -1.0])
# Recipe -> g of the target, its temperature, and whether p_R comes first in the divergence.
PRINTED = {
    "dual": (np.exp(LOG_PROBS), 0.01, True),
    "ra_dit": (np.exp(LOG_PROBS), 0.01, True),
    "replug": (np.exp(LOG_PROBS), 0.1, True),
    "atlas_pdist": (LOG_PROBS / LENGTH, 0.01, False),
    "art": (ASKED / LENGTH, 1.0, False),
}


def divergence_of(name):
    """Returns the printed divergence of a recipe, computed in float64."""
    scores, temperature, retriever_first = PRINTED[name]
    target, live = softmax(scores / temperature), softmax(DOC_SCORES)
    return kl(live, target) if retriever_first else kl(target, live)


@pytest.mark.parametrize("name", PRINTED)
def test_the_retriever_of_a_recipe_learns_by_the_printed_divergence(name):
    config = options_of(FOLDER / f"{name}.toml").retriever
    doc_ids = np.arange(3, dtype=np.int32)[None]
    # The prior that is ours alone would change the target.
    found = SearchResult(doc_ids, np.array([[9.0, 0, 4]], np.float32), doc_ids >= 0)
    read, asked = (log_probs[None].astype(np.float32) for log_probs in (LOG_PROBS, ASKED))
    length = np.array([LENGTH], np.int32)
    parts = teacher_parts(config.score, TeacherScores(read, length, asked, length), found)
    target = config.target._replace(weights=config.weights)
    target = target_log_probs(target, parts, found)
    loss = OBJECTIVES[config.objective](DOC_SCORES[None].astype(np.float32), target)
    np.testing.assert_allclose(loss[0], divergence_of(name), rtol=1e-3)


def outputs():
    """What the terms see of one question with the three documents."""
    target_mask = jnp.ones((1, LENGTH), bool)
    batch = e2e.RagBatch(None, None, None, jnp.ones((1, 3), bool), None, None, None, target_mask)
    each = jnp.asarray(LOG_PROBS[None, :, None] / LENGTH, jnp.float32)
    log_probs = jnp.broadcast_to(each, (1, 3, LENGTH))
    scores = jnp.asarray(DOC_SCORES[None], jnp.float32)
    attention = jnp.asarray([[0.5, 0.3, 0.2]])
    return e2e.Outputs(
        batch, scores, None, lambda: log_probs, lambda: log_probs[:, 0], lambda: attention,
        None, None,
    )  # fmt: skip


def marginal_by_sequence():
    return -np.log((softmax(DOC_SCORES) * np.exp(LOG_PROBS)).sum())


def marginal_by_token():
    return -LENGTH * np.log((softmax(DOC_SCORES) * np.exp(LOG_PROBS / LENGTH)).sum())


def attention_divergence():
    return kl(softmax(np.array([0.5, 0.3, 0.2]) / 0.01), softmax(DOC_SCORES))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rag", {"marginal": marginal_by_sequence()}),
        ("realm", {"marginal": marginal_by_token()}),
        ("rag_end2end", {"marginal": marginal_by_token()}),
        ("emdr2", {"marginal": marginal_by_token(), "lm": -LOG_PROBS[0]}),
        ("atlas", {"lsr": attention_divergence(), "lm": -LOG_PROBS[0]}),
        ("dual", {"lsr": divergence_of("dual"), "lm": -LOG_PROBS.mean()}),
    ],
)
def test_an_end_to_end_recipe_minimises_what_its_paper_prints(name, expected):
    config = options_of(FOLDER / "end_to_end" / f"{name}.toml")
    terms = make_terms(config.objective, fusion=config.language_model.reader == "fusion")
    found = {name: (weight, float(term(outputs())[0])) for name, (weight, term) in terms.items()}
    assert {name: weight for name, (weight, _) in found.items()} == dict.fromkeys(expected, 1.0)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][1], value, rtol=2e-3, err_msg=name)


@pytest.mark.parametrize(("search", "words"), [("hybrid", True), ("dense", False)])
def test_dense_search_leaves_bm25_out_of_both_stages(search, words, monkeypatch):
    heard = []
    options = RetrieverConfig(search=search)
    before = SimpleNamespace(hybrid=SimpleNamespace(dense_weight=0.5), store=None)
    workspace = SimpleNamespace(questions={"train": ()}, config=SimpleNamespace(seed=0))
    monkeypatch.setattr(retriever_stage, "split_towers", lambda *_, **__: None)
    monkeypatch.setattr(
        retriever_stage, "open_retrieval", lambda *_, bm25, **__: heard.append(bm25) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        retriever_stage.train_live(workspace, options, "words", before, {}, None, None)
    assert heard == ["words" if words else None]


def test_every_recipe_is_compared_with_its_paper():
    assert {path.stem for path in DUAL} >= set(PRINTED)
    assert len(END_TO_END) >= 6


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5") / "lm"
    write_tiny_language_model(folder, family="t5")
    return str(folder)


def run_flags(path, inputs, t5):
    """Returns the script of a recipe and the flags of a small run with it."""
    config = options_of(path)
    needs_encoder = path in END_TO_END and config.language_model.reader == "fusion"
    small = SMALL_RAG if path in END_TO_END else SMALL_DUAL
    # Stale from the second step on, and new once.
    mode = [] if config.refresh.mode in ("off", "query_only") else ["--refresh.every=1"]
    models = inputs | ({"lm": t5} if needs_encoder else {})
    flags = [*(f"--{name}={value}" for name, value in models.items()), *SMALL, *small, *mode]
    if path in END_TO_END and config.training.statements:
        flags.append("--training.statements=4")
    elif path in END_TO_END and config.training.same_source == "drop":
        flags.append("--training.same_source=keep")  # the questions here name no source
    script = "train_rag" if path in END_TO_END else "adapt"
    return load_script(f"experiments/{script}.py"), [f"--config={path}", *flags]


@pytest.mark.slow
@pytest.mark.parametrize("path", [*DUAL, *END_TO_END], ids=lambda path: path.stem)
def test_each_recipe_runs(path, tiny_inputs, t5, tmp_path, capsys):
    script, flags = run_flags(path, tiny_inputs, t5)
    flags.append(f"--output={tmp_path / 'run'}")
    assert script.main([*flags, "--dry_run"]) == 0
    assert "forecast" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert script.main(flags) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert np.isfinite(metrics["after"]["recall@5"]["value"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines and all(np.isfinite(json.loads(line)["loss"]) for line in lines)

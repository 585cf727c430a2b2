"""The same command goes on with a run only if it reads the same."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from ragjax.models.testing import write_tiny_language_model
from ragjax.runs import AdaptConfig
from ragjax.runs.adapt import open_adapt
from ragjax.runs.compare.answers import Request, ScoredAnswer, answer_requests
from ragjax.runs.inputs import begin, run_inputs
from ragjax.runs.saved import Models
from ragjax.training.loop import StopFlag
from ragjax.training.score_cache import ResultCache


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def set_pooling(folder: Path) -> None:
    edit_json(
        folder / "encoder/1_Pooling/config.json",
        pooling_mode_mean_tokens=False,
        pooling_mode_cls_token=True,
    )


CHANGES = {
    "other weights": (
        lambda folder: write_tiny_language_model(folder / "lm", seed=3),
        "language model: other weights",
    ),
    "other end of text": (
        lambda folder: edit_json(folder / "lm/config.json", eos_token_id=[5, 256]),
        r"language model: other eos_ids \(\(256,\) there, \(5, 256\) here\)",
    ),
    "other pooling": (set_pooling, "encoder: other pooling .'mean' there, 'cls' here"),
    "other tokenizer": (
        lambda folder: edit_json(folder / "encoder/tokenizer.json", normalizer=None),
        "encoder: other tokenizer",
    ),
    "other passage": (
        lambda folder: edit_text(folder / "data/corpus.jsonl", "likes 79", "likes 97"),
        "corpus: other passages",
    ),
    "other question": (
        lambda folder: edit_text(folder / "data/queries.jsonl", "the red owl", "the owl"),
        "test split: other questions",
    ),
    "other answer": (
        lambda folder: edit_text(folder / "data/queries.jsonl", '["2"]', '["3"]'),
        "test split: other answers",
    ),
    "other judgement": (
        lambda folder: edit_text(folder / "data/qrels/train.tsv", "\tred-cat\t1", "\tred-dog\t1"),
        "train split: other relevance judgements",
    ),
}


@pytest.fixture
def folder(tiny_inputs, tmp_path):
    for name, source in tiny_inputs.items():
        shutil.copytree(source, tmp_path / name)
    return tmp_path


def config_of(folder: Path) -> AdaptConfig:
    models = {name: str(folder / name) for name in ("data", "encoder", "lm", "run")}
    models["output"] = models.pop("run")
    return AdaptConfig.from_dict(models | {"language_model": {"train_layers": 1}})


def opened(folder: Path):
    quiet = {"stop": StopFlag(), "log": lambda _: None}
    return open_adapt(config_of(folder), folder / "run", **quiet)


def start(folder: Path, log=print):
    begin(folder / "run", {"config": {}}, run_inputs(opened(folder)), kind="run", log=log)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_inputs_are_refused_by_name(folder, change):
    do, message = CHANGES[change]
    start(folder)
    start(folder)  # the same inputs
    do(folder)
    with pytest.raises(ValueError, match=f"has changed since: {message}"):
        start(folder)


def test_another_file_of_scores_is_another_input(folder):
    path = folder / "scores.jsonl"
    line = '{"query-id": "q0", "corpus-id": "red-cat", "score": %d}\n'
    digests = []
    for score in (1, 2):
        path.write_text(line % score)
        base = config_of(folder)
        retriever = dataclasses.replace(base.retriever, scores_file=str(path))
        config = dataclasses.replace(base, retriever=retriever)
        workspace = open_adapt(config, folder / "run", stop=StopFlag(), log=lambda _: None)
        digests.append(run_inputs(workspace)["scores file"])
    assert digests[0] != digests[1]
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="scores.jsonl:1: needs one of the fields"):
        open_adapt(config, folder / "run", stop=StopFlag(), log=lambda _: None)


def test_models_of_a_run_are_those_that_it_began_with(folder):
    start(folder)
    inputs = json.loads((folder / "run/config.json").read_text())["inputs"]
    models = Models(config_of(folder), folder / "run", inputs)
    assert models.base_encoder.fingerprint and models.base_language_model.fingerprint
    write_tiny_language_model(folder / "lm", seed=3)
    set_pooling(folder)
    models = Models(config_of(folder), folder / "run", inputs)
    with pytest.raises(ValueError, match="lm has changed since .*: language model: other weights"):
        _ = models.base_language_model
    with pytest.raises(ValueError, match="encoder has changed since .*: encoder: other pooling"):
        _ = models.base_encoder


def test_a_run_that_did_not_record_its_inputs_goes_on_with_a_note(folder):
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text('{"config": {}}')
    notes = []
    start(folder, notes.append)
    assert "inputs are not compared" in notes[0]


def test_answers_are_kept_for_a_text_not_for_its_id(folder):
    cache = ResultCache(folder / "answers.jsonl", ScoredAnswer)

    def answer() -> int:
        workspace = opened(folder)
        request = Request(workspace.questions["test"][0], (79,), (0.0,))
        answer_requests(workspace, workspace.base_lm(), [request], cache)
        return len(cache)

    assert answer() == 1
    edit_text(folder / "data/corpus.jsonl", "likes 79", "likes 97")
    assert answer() == 2

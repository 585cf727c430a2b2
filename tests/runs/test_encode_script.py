"""The script that encodes a corpus on many machines."""

import json
import shutil

import numpy as np
import pytest
from programs import load_script

from ragjax.data import Corpus
from ragjax.index import EmbeddingStore
from ragjax.models.encoder import load_encoder
from ragjax.refresh import encode_corpus
from ragjax.runs.tokens import corpus_task


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"_id": str(n), "text": f"the {n} cats"}) for n in range(40)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(data, tiny_inputs, tmp_path):
    main = load_script("experiments/encode.py").main
    base = ("--output", str(tmp_path / "store"), "--rows_per_shard", "8")

    def run(*flags, data=data):
        return main(["--encoder", tiny_inputs["encoder"], "--data", str(data), *base, *flags])

    return run


def test_processes_of_an_array_make_one_store(
    run, tmp_path, data, tiny_inputs, monkeypatch, capsys
):
    for rank in ("2", "1"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", rank)
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
        assert run() == 0
    told = capsys.readouterr().out
    assert "process 1 of 2 has done its part; 3 of 5 shards are missing, first 0" in told
    assert f"{tmp_path / 'store'}: 40 embeddings of " in told
    store = EmbeddingStore.open(tmp_path / "store")
    loaded = load_encoder(tiny_inputs["encoder"])
    corpus = Corpus.open(data, cache=tmp_path / "cache")
    expected = encode_corpus(corpus_task(loaded, corpus, encode_tokens=1024), loaded.params)
    np.testing.assert_allclose(store.read(), expected, atol=1e-5)


def test_a_wrong_one_leaves_with_code_2_and_the_others_go_on(run, tmp_path, data, capsys):
    assert run("--rank", "0", "--world", "2") == 0
    other = tmp_path / "other"
    shutil.copytree(data, other)
    with (other / "corpus.jsonl").open("a") as file:
        file.write('\n{"_id": "40", "text": "a dog"}')
    assert run("--rank", "1", "--world", "2", data=other) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "was started for other embeddings (size 40, ex" in said
    assert run("--rank", "1", "--world", "2") == 0
    assert EmbeddingStore.open(tmp_path / "store").spec.size == 40


@pytest.mark.slow
def test_the_trained_encoder_of_a_run_encodes_its_corpus(tiny_run, tmp_path):
    folder, main = tiny_run("adapt").folder, load_script("experiments/encode.py").main
    flags = [f"--run={folder}", f"--output={tmp_path / 'store'}", f"--cache={tmp_path / 'cache'}"]
    assert main(flags) == 0
    store = EmbeddingStore.open(tmp_path / "store")
    of_run = EmbeddingStore.open(max((folder / "index").iterdir()))
    names = ("size", "dim", "model_fingerprint", "corpus_fingerprint", "settings")
    assert store.spec.differences({name: getattr(of_run.spec, name) for name in names}) == ""
    np.testing.assert_allclose(store.read(), of_run.read(), atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--run", "runs/x"], "give one of --run FOLDER and --encoder MODEL"),
        (["--encoder", "", "--run", "x", "--doc_prefix", "p"], "--doc_prefix is as the run has it"),
        (["--encoder", "", "--run", "runs/none"], "runs/none: no run there"),
        (["--rank", "2", "--world", "2"], "rank 2 of world 2"),
        (["--rows_per_shard", "0"], "--rows_per_shard must be at least 1"),
    ],
)
def test_flags_at_odds_are_refused_at_once(run, flags, said, capsys):
    assert run(*flags) == 2
    assert said in capsys.readouterr().err

"""The export script's other formats: GGUF, ONNX, the hub and files of an index, by their flags."""

import json
import sys
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from programs import load_script

from ragjax.models import load_language_model
from ragjax.runs.saved import doc_embeddings, open_run
from ragjax.runs.system import by_dense, open_system, retrieve


@pytest.fixture(scope="module")
def main():
    return load_script("experiments/export.py").main


@pytest.fixture
def export(main, capsys):
    """Runs the script; returns its exit code and what it printed, errors in one line."""

    def run(*flags):
        try:
            code = main([str(flag) for flag in flags])
        except SystemExit as stopped:  # where tyro makes the flags
            code = stopped.code
        out, err = capsys.readouterr()
        return code, out, " ".join(err.replace("│", " ").split())

    return run


def test_formats_chooses_the_files_of_a_language_model(export, tiny_inputs, tmp_path):
    flags = [f"--source={tiny_inputs['lm']}", "--what=language_model", "--formats", "gguf-q8_0"]
    flags += ["gguf-f16", f"--output={tmp_path / 'out'}"]
    code, planned, _ = export(*flags, "--dry_run")
    assert code == 0 and not (tmp_path / "out").exists()
    code, shown, error = export(*flags)
    assert code == 0, error
    for path in (tmp_path / "out").iterdir():
        line = f"{path.stat().st_size:>15,} bytes  {path.name}"
        assert line in planned and line in shown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "model-F16.gguf", "model-Q8_0.gguf",
    ]  # fmt: skip
    assert "tensors as gguf-q8_0, gguf-f16, every bit equal" in shown
    assert f"llama-server -m {tmp_path / 'out' / 'model-F16.gguf'}" in shown
    assert "from_pretrained" not in shown
    again = load_language_model(str(tmp_path / "out" / "model-F16.gguf"))
    base = load_language_model(tiny_inputs["lm"])
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6),
        again.params, base.params,
    )  # fmt: skip


def test_formats_chooses_the_files_of_an_encoder(export, tiny_inputs, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the [onnx] extra")
    flags = [f"--source={tiny_inputs['encoder']}", "--what=encoder"]
    flags += ["--formats", "safetensors", "onnx-int8", f"--output={tmp_path / 'out'}"]
    code, shown, error = export(*flags)
    assert code == 0, error
    path = tmp_path / "out" / "onnx" / "model_qint8.onnx"
    assert f"{path.stat().st_size:>15,} bytes  onnx/model_qint8.onnx" in shown
    assert not path.with_name("model.onnx").exists()
    assert f"InferenceSession('{path}')" in shown and "SentenceTransformer(" in shown


def test_without_the_packages_of_a_format_nothing_is_loaded(export, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    flags = ["--source=none", "--what=encoder", f"--output={tmp_path / 'out'}", "--formats", "onnx"]
    code, _, error = export(*flags)
    assert code == 2 and "pip install 'ragjax[onnx]'" in error


class FakeHub:
    calls: list = []

    def whoami(self, token):
        return {"name": "someone"}

    def create_repo(self, repo, **options):
        self.calls.append(repo)

    def upload_folder(self, *, folder_path, **options):
        FakeHub.sent = {path.name: path.stat().st_size for path in folder_path.iterdir()}
        return SimpleNamespace(oid="c0ffee", commit_url="https://hub/commit/c0ffee")

    def model_info(self, repo, **options):
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in self.sent.items()]
        return SimpleNamespace(siblings=files)


def test_a_push_shows_the_card_and_sends_nothing_before_it_is_told_to(
    export, tiny_inputs, tmp_path, monkeypatch
):
    FakeHub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    push = [f"--output={tmp_path / 'out'}", "--push_to_hub=org/name"]
    model = [f"--source={tiny_inputs['lm']}", "--what=language_model", "--formats", "gguf-f16"]
    code, shown, _ = export(*push, *model, "--dry_run")
    assert code == 0 and "library_name: gguf" in shown and not (tmp_path / "out").exists()
    code, shown, error = export(*push, *model)
    assert code == 0, error
    assert "library_name: gguf" in shown and "https://huggingface.co/org/name" in shown
    command = f"--output {tmp_path / 'out'} --push_to_hub org/name --upload"
    assert "nothing was uploaded" in shown and command in shown and not FakeHub.calls
    code, shown, error = export(*command.split())
    assert code == 2 and "HF_TOKEN" in error and not FakeHub.calls
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_abcdefghijklmnopqrstuvwx")
    code, shown, error = export(*command.split())
    assert code == 0, error
    assert "uploading as someone (token hf_a...uvwx)" in shown and "nothing was" not in shown
    assert "uploaded: https://hub/commit/c0ffee" in shown and FakeHub.calls == ["org/name"]
    assert set(FakeHub.sent) == {"README.md", "model-F16.gguf"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "faiss"])
def test_the_index_of_a_run_is_written_as_files(export, tiny_run, tmp_path, kind):
    faiss = pytest.importorskip("faiss", reason="needs the [faiss] extra")
    run, output = tiny_run("adapt").folder, tmp_path / "index"
    flags = [f"--run={run}", f"--index={kind}", f"--output={output}", "--models=adapted"]
    code, shown, error = export(*flags, "--dry_run")
    assert code == 0 and "would hold 80 documents" in shown and not output.exists(), error
    code, shown, error = export(*flags)
    assert code == 0, error
    assert "read back: 80 documents" in shown and "embeddings.npy" in shown
    embeddings = np.load(output / "embeddings.npy")
    np.testing.assert_array_equal(embeddings, doc_embeddings(open_run(run), "adapted").read())
    ids = [json.loads(line)["_id"] for line in (output / "ids.jsonl").read_text().splitlines()]
    system = open_system(run, models="adapted", log=lambda _: None)
    corpus = system.workspace.dataset.corpus
    assert ids == [passage.id for passage in corpus]
    assert (output / "index.faiss").is_file() == (kind == "faiss")
    if kind == "faiss":
        found = retrieve(system, ["what does the red cat like?"], 5, by=by_dense).found
        rows = np.asarray(found.doc_ids[0])
        index = faiss.read_index(str(output / "index.faiss"))
        query = embeddings[rows[:1]]  # the best document finds itself
        assert index.search(query, 1)[1][0, 0] == rows[0] and index.ntotal == 80
    code, shown, error = export(*flags)
    assert code == 2 and "is not empty" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--upload", "--output=o"], "--upload goes with --push_to_hub ORG/NAME"),
        (["--push_to_hub=name", "--output=o"], "a repository on the hub is ORG/NAME"),
        (["--push_to_hub=a/b", "--output=none-there"], "no exported model there"),
        (["--index=npy", "--run=r"], "--index npy and faiss with --output FOLDER"),
        (["--index=faiss", "--output=o"], "--index faiss goes with --run FOLDER"),
        (["--index=npy", "--run=r", "--output=o", "--push_to_hub=a/b"], "--index is of the"),
        (
            ["--what=encoder", "--source=s", "--output=o", "--formats", "gguf-f16"],
            "formats gguf-f16: a text encoder is written as safetensors, onnx, onnx-int8",
        ),
    ],
)
def test_flags_at_odds_are_refused(export, flags, message):
    code, _, error = export(*flags)
    assert code == 2 and message in error

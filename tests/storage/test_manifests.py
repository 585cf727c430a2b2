"""Folders with sub-folders: exactly what the manifest lists, nothing reached through a link."""

import json
import os
import shutil

import pytest

from ragjax.storage import manifests

NAMES = ("a.npy", "embeddings/shard-000000.npy", "embeddings/deep/er.npy", "index/ragjax.json")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "folder"


@pytest.fixture
def digests(folder):
    return manifests.walk_digests(folder, known={})


def test_a_sealed_object_comes_back_and_no_flipped_bit_changes_it(tmp_path):
    path, value = tmp_path / "m.json", {"format": 1, "é": [1.5, None], "b": {"2": True}}
    manifests.write_sealed(path, value)
    assert manifests.read_sealed(path, what="thing", version=1) == value
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert manifests.read_sealed(path, what="thing", version=1) == value
        except ValueError as error:
            assert str(path) in str(error)
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="its checksum is missing.*make the thing again"):
        manifests.read_sealed(path, what="thing")


def test_digests_of_every_file_below(folder, digests):
    assert digests == {name: manifests.sha256(folder / name) for name in NAMES}


def test_a_known_digest_is_not_computed_again(folder, digests, monkeypatch):
    read = []
    compute = manifests.sha256
    monkeypatch.setattr(
        manifests, "sha256", lambda path: (read.append(path.name), compute(path))[1]
    )
    known = {name: digests[name] for name in NAMES[1:3]}
    assert manifests.walk_digests(folder, known=known) == digests
    assert sorted(read) == ["a.npy", "ragjax.json"]
    with pytest.raises(ValueError, match="holds no file 'shard-000000.npy' though its digest"):
        manifests.walk_digests(folder, known={"shard-000000.npy": "0"})


def test_an_unchanged_folder_passes_also_with_files_that_have_no_checksum(folder, digests):
    manifests.verify_folder(folder, digests, also=())
    del digests["index/ragjax.json"]
    manifests.verify_folder(folder, digests, also=("index/ragjax.json",))
    with pytest.raises(ValueError, match=r"folder/index is not in the manifest"):
        manifests.verify_folder(folder, digests, also=("ragjax.json",))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../a.npy",
        "embeddings/../a.npy",
        "embeddings/..",
        "..",
        ".",
        "./a.npy",
        "embeddings/./x",
        "embeddings//x",
        "embeddings/",
        "",
        "embeddings\\x",
        "C:/a.npy",
        "//server/share/a.npy",
        3,
    ],
)
def test_names_that_lead_elsewhere_or_are_spelled_twice_are_refused(folder, digests, name):
    # The file exists, so nothing but its name is wrong.
    with pytest.raises(ValueError, match="which is no plain file name"):
        manifests.verify_folder(folder, digests | {name: digests["a.npy"]}, also=())


@pytest.mark.parametrize("value", [None, [], {}, "a.npy"])
def test_a_manifest_without_files_is_refused(folder, value):
    with pytest.raises(ValueError, match="lists no files with checksums"):
        manifests.check_listing(folder, value, also=())


@pytest.mark.parametrize("name", ["x.pkl", "embeddings/x.pkl", "embeddings/deep/x.pkl"])
def test_an_unlisted_file_is_refused(folder, digests, name):
    (folder / name).write_text("")
    for check in (manifests.verify_folder, manifests.check_listing):
        with pytest.raises(ValueError, match=rf"{name} is not in the manifest"):
            check(folder, digests, also=())


@pytest.mark.parametrize("name", ["x", "embeddings/x"])
def test_an_unlisted_empty_folder_is_refused(folder, digests, name):
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} is not in the manifest"):
        manifests.check_listing(folder, digests, also=())


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder, digests, name):
    (folder / name).unlink()
    for check in (manifests.verify_folder, manifests.check_listing):
        with pytest.raises(ValueError, match=rf"{name} is missing; build this folder again"):
            check(folder, digests, also=())


def test_a_missing_folder_is_named_by_its_file(folder, digests):
    shutil.rmtree(folder / "embeddings")
    with pytest.raises(ValueError, match=r"shard-000000.npy is missing|er.npy is missing"):
        manifests.check_listing(folder, digests, also=())


def test_a_changed_file_shows_both_digests_and_only_the_listing_accepts_it(folder, digests):
    path = folder / "embeddings/deep/er.npy"
    path.write_text("changed")
    expected = digests["embeddings/deep/er.npy"]
    with pytest.raises(
        ValueError,
        match=rf"er.npy is damaged: expected SHA-256 {expected}, got {manifests.sha256(path)}",
    ):
        manifests.verify_folder(folder, digests, also=())
    manifests.check_listing(folder, digests, also=())


@pytest.mark.parametrize("name", ["a.npy", "embeddings/deep/er.npy", "embeddings/deep", "index"])
def test_links_to_the_right_contents_are_refused_everywhere(folder, digests, tmp_path, name):
    path = folder / name
    os.replace(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    for call in (
        lambda: manifests.verify_folder(folder, digests, also=()),
        lambda: manifests.walk_digests(folder, known={}),
        lambda: manifests.publish(folder, tmp_path / "published"),
    ):
        with pytest.raises(ValueError, match=rf"{name} is no plain file"):
            call()
    assert not (tmp_path / "published").exists()


def test_a_dangling_link_and_a_pipe_are_refused(folder, digests):
    (folder / "x").symlink_to("nowhere")
    with pytest.raises(ValueError, match="x is no plain file"):
        manifests.check_listing(folder, digests, also=("x",))
    (folder / "x").unlink()
    os.mkfifo(folder / "x")
    with pytest.raises(ValueError, match="x is no plain file"):
        manifests.check_listing(folder, digests, also=("x",))


def test_a_folder_in_the_place_of_a_file_is_refused(folder, digests):
    (folder / "a.npy").unlink()
    (folder / "a.npy").mkdir()
    with pytest.raises(ValueError, match=r"a.npy is not in the manifest"):
        manifests.verify_folder(folder, digests, also=())


def test_everything_is_on_disk_before_the_rename(folder, tmp_path, monkeypatch):
    synced = []
    target = tmp_path / "published"

    def record(path):
        synced.append((path.relative_to(tmp_path).as_posix(), target.exists()))

    monkeypatch.setattr(manifests, "sync_file", record)
    monkeypatch.setattr(manifests, "sync_folder", record)
    manifests.publish(folder, target)
    before = [path for path, renamed in synced if not renamed]
    assert sorted(before) == sorted(
        [f"folder/{name}" for name in (*NAMES, "embeddings", "embeddings/deep", "index")]
        + ["folder"]
    )
    assert synced[-1] == (".", True)
    assert manifests.walk_digests(target, known={}).keys() == set(NAMES)


def test_a_kept_folder_is_made_once_and_again_where_it_is_damaged(tmp_path, caplog):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(str(len(made)))

    def kept(version=1):
        folder = manifests.kept_folder(tmp_path / "kept", make, what="thing", version=version)
        return (folder / "deep" / "file").read_text()

    assert [kept(), kept()] == ["1", "1"] and not caplog.records
    (tmp_path / "kept" / "deep" / "file").write_text("2")
    assert kept() == "2" and "The thing is made again: " in caplog.text
    assert [kept(version=2), kept(version=2)] == ["3", "3"]
    (tmp_path / "kept" / "manifest.json").unlink()
    assert kept(version=2) == "4"


def test_what_cannot_be_made_leaves_nothing_and_the_first_of_two_stays(tmp_path):
    with pytest.raises(ZeroDivisionError):
        manifests.kept_folder(tmp_path / "kept", lambda _: 1 / 0, what="thing", version=1)
    assert not list(tmp_path.iterdir())

    def first(folder):
        (folder / "file").write_text("first")

    def second(folder):
        manifests.kept_folder(tmp_path / "kept", first, what="thing", version=1)
        (folder / "file").write_text("second")

    folder = manifests.kept_folder(tmp_path / "kept", second, what="thing", version=1)
    assert (folder / "file").read_text() == "first"

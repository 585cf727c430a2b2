import json
import logging
import sys
from pathlib import Path

import pytest

from ragjax.data import Corpus, DataError
from ragjax.data.tables import UnreachableError, hub
from ragjax.data.tables.hub import is_hub_id


def test_only_what_leads_nowhere_is_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "runs" / "one").mkdir(parents=True)
    names = ("org/name", "org/name:sub", "org/na.me-2:sub:split", "data/none", "runs/one", "name",
             "a/b/c", "/org/name", "../name", "./name", "org/name:a:b:c", "org/")  # fmt: skip
    assert [name for name in names if is_hub_id(Path(name))] == list(names[:3])


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError) as error:
        Corpus.open("org/name", cache=tmp_path / "cache")
    said = str(error.value)
    assert said.startswith("org/name: there is no such file or folder, and as a data set of the Hu")
    assert "check the name and the network" in said and "save_to_disk(FOLDER)" in said


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """A folder that `datasets` reads as it reads one of the hub."""
    datasets = pytest.importorskip("datasets", reason="needs the [datasets] extra")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    rows = {"corpus": [{"_id": "a", "text": "one"}, {"_id": "b", "text": "two"}],
            "queries": [{"_id": "q", "text": "ask"}]}  # fmt: skip
    folder = tmp_path / "hub"
    for name, content in rows.items():
        (folder / name).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / name / "part.jsonl").write_text(text)
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/*.jsonl\n" for n in rows)
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")

    def as_local(real):
        def local(id, *arguments, revision, **options):
            assert (id, revision) == ("org/name", "abc")
            return real(str(folder), *arguments, **options)

        return local

    for name in ("get_dataset_config_names", "get_dataset_split_names", "load_dataset"):
        monkeypatch.setattr(datasets, name, as_local(getattr(datasets, name)))
    monkeypatch.setattr(hub, "_revision", lambda id: "abc")


def test_the_subset_called_corpus_is_read_once_for_a_revision(
    on_the_hub, tmp_path, monkeypatch, caplog
):
    corpus = Corpus.open("org/name", cache=tmp_path / "cache")
    assert [(p.id, p.text) for p in corpus] == [("a", "one"), ("b", "two")]
    assert corpus.report.notes() == (
        "org/name: subset corpus, split train, revision abc, with the columns _id, text",
    )
    named = Corpus.open("org/name:queries", cache=tmp_path / "cache")
    assert [passage.text for passage in named] == ["ask"]
    with pytest.raises(
        DataError, match="no split 'dev'; there are train; name one, as org/name:SUB"
    ):
        Corpus.open("org/name:queries:dev", cache=tmp_path / "cache")
    with pytest.raises(DataError, match="no subset 'more'; there are corpus, queries; name one"):
        Corpus.open("org/name:more", cache=tmp_path / "cache")

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert Corpus.open("org/name", cache=tmp_path / "cache").fingerprint == corpus.fingerprint

    def unreachable(id):
        raise UnreachableError("no network")

    monkeypatch.setattr(hub, "_revision", unreachable)
    with caplog.at_level(logging.WARNING):
        assert Corpus.open("org/name", cache=tmp_path / "cache").fingerprint == corpus.fingerprint
    assert "read as it was prepared before: no network" in caplog.text
    with pytest.raises(UnreachableError):
        Corpus.open("org/name", cache=tmp_path / "other")


def test_without_datasets_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_revision", lambda id: "abc")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'org/name: .*pip install "ragjax\[datasets\]"'):
        Corpus.open("org/name", cache=tmp_path / "cache")

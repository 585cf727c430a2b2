"""The name that was meant: the nearest one, or none."""

from pathlib import Path

from ragjax.storage import nearest_name, nearest_path


def test_the_nearest_name_or_none():
    assert nearest_name("epoch", ("seed", "epochs")) == "epochs"
    assert nearest_name("zzz", ("seed", "epochs")) is None
    assert nearest_name("epoch", ()) is None


def test_the_first_missing_part_of_a_path_is_compared(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.jsonl").touch()
    assert nearest_path(tmp_path / "data" / "corpus.json") == tmp_path / "data" / "corpus.jsonl"
    assert nearest_path(tmp_path / "dato" / "corpus.jsonl") == tmp_path / "data"
    assert nearest_path(tmp_path / "zzz") is None
    (tmp_path / "data" / "queries.jsonl").touch()
    (tmp_path / "data" / "copora.jsonl.gz").touch()
    for name, near in {"questions": "queries.jsonl", "corpora": "copora.jsonl.gz"}.items():
        found = nearest_path(tmp_path / "data" / f"{name}.jsonl", having=".jsonl")
        assert found == tmp_path / "data" / near
    (tmp_path / "data" / "corpus.jsonl").unlink()
    (tmp_path / "data" / "copora.jsonl.gz").unlink()
    assert nearest_path(tmp_path / "data" / "corpus.jsonl", having=".jsonl") is None
    monkeypatch.chdir(tmp_path)
    assert nearest_path(Path("dat")) == Path("data")

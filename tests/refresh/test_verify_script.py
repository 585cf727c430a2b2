import pytest
from programs import load_script
from test_generations import publish

from ragjax.refresh import GenerationStore


@pytest.fixture
def main():
    return load_script("experiments/verify_index.py").main


def test_damage_is_listed_with_the_file_and_both_digests(main, tmp_path, capsys):
    store = GenerationStore(tmp_path)
    for step in (0, 4):
        publish(store, step)
    assert main(["--root", str(tmp_path)]) == 0
    assert "generation 1: good, 40 documents of step 4, exact index" in capsys.readouterr().out
    path = store.path(1) / "embeddings" / "shard-000000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert main(["--root", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "generation 0: good" in out and "2 generations, 1 damaged" in out
    assert "generation 1: DAMAGED" in out and "shard-000000.npy" in out and "expected SHA" in out


def test_a_folder_without_generations_is_bad_input(main, tmp_path, capsys):
    assert main(["--root", str(tmp_path / "none")]) == 2
    assert "holds no generations" in capsys.readouterr().err

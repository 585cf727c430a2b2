"""The generation benchmark, on a tiny model and without PyTorch unless it is there."""

import json

import numpy as np
import pytest
import tyro
from programs import load_script

from ragjax.models.testing.language_model import write_tiny_language_model

SIZES = ["--questions=2", "--documents=2", "--context_tokens=9", "--new_tokens=3", "--rounds=1"]


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/generation.py")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    write_tiny_language_model(folder)
    return f"--lm={folder}"


@pytest.mark.slow
def test_the_sizes_are_those_of_the_flags(script, lm, capsys):
    assert script.main([lm, *SIZES, "--no-torch", "--dtype=bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "4 prompts of 9 tokens, 3 new tokens, bfloat16" in printed
    assert "ragjax" in printed and "transformers" not in printed


@pytest.mark.slow
def test_transformers_gives_the_same_tokens(script, lm, capsys):
    pytest.importorskip("torch", reason="needs the [parity] extra")
    assert script.main([lm, *SIZES]) == 0
    printed = capsys.readouterr().out
    assert "over 1 rounds" in printed and "equal outputs: 4 of 4 rows" in printed


def write_data(folder):
    (folder / "qrels").mkdir()
    passages = [{"_id": f"p{n}", "title": "", "text": f"Passage {n}."} for n in range(3)]
    questions = [{"_id": f"q{n}", "text": f"Question {n}?"} for n in range(2)]
    for name, records in (("corpus", passages), ("queries", questions)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = "".join(f"q{n}\tp{n}\t1\n" for n in range(2))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)


def test_data_makes_the_prompts(script, lm, tmp_path):
    write_data(tmp_path)
    flags = tyro.cli(
        script.Flags,
        args=[lm, f"--data={tmp_path}", *SIZES, "--context_tokens=80"],
    )
    model = script.load_language_model(flags.lm)
    prompts = script.make_prompts(model, flags)
    texts = [
        model.tokenizer.decode(row[there].tolist())
        for row, there in zip(prompts.ids, prompts.mask, strict=True)
    ]
    assert texts[1] == "Passage 1.\n\nQuestion: Question 0?\nAnswer:"
    assert texts[2] == "Passage 2.\n\nQuestion: Question 1?\nAnswer:"
    assert len(texts) == 4 and prompts.mask[:, -1].all()
    assert np.array_equal(prompts.mask, np.sort(prompts.mask, axis=1))  # padded on the left


def test_bad_input_ends_in_one_line(script, lm, tmp_path, capsys):
    write_data(tmp_path)
    few = [lm, f"--data={tmp_path}", *SIZES, "--questions=3", "--no-torch"]
    few[few.index("--questions=2")] = "--rounds=1"
    assert script.main(few) == 2
    error = capsys.readouterr().err
    assert "3 questions and 2 passages are needed, it has 2 and 3" in error
    assert script.main([lm, "--rounds=0"]) == 2
    assert "error: --rounds must be at least 1, got 0" in capsys.readouterr().err
    assert script.main(["--lm=/nowhere"]) == 2

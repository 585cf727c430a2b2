"""The benchmark against transformers: same weights, same loss; each flag does something."""

import re

import pytest
from programs import load_script

SMALL = (
    "--batch_size=2", "--documents=2", "--query_tokens=5", "--doc_tokens=6", "--context_tokens=7",
    "--answer_tokens=3", "--width=16", "--layers=1", "--vocabulary=260", "--rounds=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/end_to_end.py")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PyTorch and transformers, which this only times
@pytest.mark.parametrize("form", ["sequence", "token"])
def test_both_sides_compute_the_same_loss(script, capsys, form):
    pytest.importorskip("torch", reason="needs the [parity] extra")
    assert script.main([*SMALL, f"--form={form}"]) == 0
    out = capsys.readouterr().out
    assert f"2 questions x 2 documents, RAG-{form}, float32" in out
    ours, theirs = re.search(r"first losses (\S+) and (\S+) nats", out).groups()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


def test_the_flags_set_the_shapes(script):
    flags = script.Flags(
        batch_size=3, documents=4, query_tokens=5, doc_tokens=6, context_tokens=7, answer_tokens=8,
        vocabulary=300,
    )  # fmt: skip
    example = script.make_example(flags)
    assert [field.shape for field in example] == [(3, 5), (3, 4, 6), (3, 4, 7), (3, 8)]
    assert max(int(field.max()) for field in example) < 300


@pytest.mark.parametrize(
    ("change", "words"),
    [({"rounds": 0}, "rounds"), ({"width": 10}, "multiple of 4"), ({"vocabulary": 9}, "259")],
)
def test_sizes_that_cannot_be_are_refused(script, change, words):
    with pytest.raises(ValueError, match=words):
        script.Flags(**change)

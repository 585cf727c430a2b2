"""A tiny domain in the BEIR layout and tiny models, so that a whole run takes seconds."""

import json

import pytest

from ragjax.models.testing import write_tiny_encoder, write_tiny_language_model

_COLOURS = ("red", "green", "blue", "white", "black", "brown", "pink", "grey")
_ANIMALS = ("cat", "dog", "owl", "fox", "hen", "cow", "pig", "bee", "ant", "elk")


def _write_domain(folder, *, splits=("train", "dev", "test")):
    """Writes 80 passages such as 'the red cat likes 7' and a question on each to `folder`."""
    (folder / "qrels").mkdir(parents=True)
    passages, questions, judged = [], [], {split: [] for split in splits}
    for number, (colour, animal) in enumerate((c, a) for c in _COLOURS for a in _ANIMALS):
        id = f"{colour}-{animal}"
        passages.append(
            {"_id": id, "title": animal, "text": f"the {colour} {animal} likes {number}"}
        )
        question = {"_id": f"q{number}", "text": f"what does the {colour} {animal} like?"}
        questions.append(question | {"metadata": {"answers": [str(number)]}})
        judged[splits[number % len(splits)]].append(f"q{number}\t{id}\t1")
    for name, rows in (("corpus", passages), ("queries", questions)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    for split, rows in judged.items():
        text = "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    return folder


# A run that takes a few seconds, with two rounds and every stage.
FLAGS = (
    "--data_options.train_questions=12",
    "--data_options.test_questions=10",
    "--data_options.answer_questions=6",
    "--language_model.questions=8",
    "--language_model.batch_size=4",
    "--language_model.train_layers=1",
    "--retriever.candidates=3",
    "--retriever.batch_size=4",
    "--retriever.rounds=2",
    "--evaluation.max_new_tokens=3",
    "--evaluation.resamples=50",
    "--checkpoint_every=1",
)


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory):
    """Folders of a domain, an encoder and a language model."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_encoder(folder / "encoder")
    write_tiny_language_model(folder / "lm")
    _write_domain(folder / "data")
    return {name: str(folder / name) for name in ("data", "encoder", "lm")}


@pytest.fixture(scope="session")
def tiny_flags(tiny_inputs):
    """Flags of a whole run on them."""
    return [*(f"--{name}={value}" for name, value in tiny_inputs.items()), *FLAGS]


@pytest.fixture(scope="session")
def write_domain():
    """A function that writes the tiny domain to a folder and returns it."""
    return _write_domain

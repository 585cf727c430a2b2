"""A tiny domain in the BEIR layout and tiny models, so that a whole run takes seconds."""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from programs import load_script

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


# A run that takes a few seconds, with two rounds and every stage, whose training shows.
FLAGS = (
    "--data_options.train_questions=12",
    "--data_options.test_questions=10",
    "--data_options.answer_questions=6",
    "--language_model.questions=8",
    "--language_model.batch_size=4",
    "--language_model.train_layers=1",
    "--language_model.learning_rate=0.01",
    "--retriever.candidates=3",
    "--retriever.batch_size=4",
    "--retriever.rounds=2",
    "--retriever.learning_rate=0.01",
    "--retriever.keyword_queries=0",  # which cost 20 steps a round
    "--evaluation.documents=2",
    "--evaluation.answers=all",
    "--evaluation.max_new_tokens=3",
    "--evaluation.resamples=50",
    "--checkpoint_minutes=0",
)
RAG_FLAGS = (
    "--data_options.train_questions=8",
    "--data_options.dev_questions=4",
    "--data_options.test_questions=6",
    "--data_options.answer_questions=3",
    "--language_model.train_layers=1",
    "--training.documents=2",
    "--training.batch_size=4",
    "--evaluation.documents=2",
    "--evaluation.max_new_tokens=3",
    "--evaluation.resamples=50",
    "--checkpoint_minutes=0",
)
LORA = ("--retriever.lora_rank=2", "--language_model.lora_rank=2")
# Kind of run -> its program and its flags.
RUNS = {
    "adapt": ("adapt", FLAGS),
    # Two encoders; each round's adapters are relative to what the round before made.
    "adapt-lora": (
        "adapt",
        (
            *FLAGS,
            "--retriever.train=both",
            "--retriever.lora_rank=2",
            "--language_model.lora_rank=2",
        ),
    ),
    "lm-only": ("adapt", (*FLAGS, "--stages", "lm")),
    "train_rag": ("train_rag", (*RAG_FLAGS, "--refresh.every=1")),
}


class TinyRun(NamedTuple):
    """A finished run that others read too: change a copy."""

    folder: Path
    flags: list[str]  # all but --output
    printed: str


@pytest.fixture(scope="session", autouse=True)
def one_device():
    """Lets runs use the first of the eight devices; `test_devices.py` is about the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragjax.runs.models.visible_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture
def all_devices(monkeypatch):
    """Lets the runs of a test use all eight devices."""
    monkeypatch.setattr("ragjax.runs.models.visible_devices", jax.devices)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Returns a folder that the workers share, and makes what belongs there once.

    `shared(name, write)` calls `write(folder)` unless a worker has done so, and returns the folder.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name, write):
        folder, complete = base / name, base / f"{name}.complete"
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                write(folder)
                complete.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_inputs(shared):
    """Folders of a domain, an encoder and a language model."""

    def write(folder):
        write_tiny_encoder(folder / "encoder")
        write_tiny_language_model(folder / "lm")
        _write_domain(folder / "data")

    folder = shared("inputs", write)
    return {name: str(folder / name) for name in ("data", "encoder", "lm")}


@pytest.fixture(scope="session")
def tiny_flags(tiny_inputs):
    """Flags of a whole run on them."""
    return [*(f"--{name}={value}" for name, value in tiny_inputs.items()), *FLAGS]


@pytest.fixture(scope="session")
def tiny_rag_flags(tiny_inputs):
    """Flags of a whole end-to-end run on them."""
    return [*(f"--{name}={value}" for name, value in tiny_inputs.items()), *RAG_FLAGS]


@pytest.fixture(scope="session")
def tiny_run(shared, tiny_inputs):
    """A function that returns a finished run of a kind in `RUNS`."""

    def run(kind):
        program, flags = RUNS[kind]
        flags = [*(f"--{name}={value}" for name, value in tiny_inputs.items()), *flags]

        def write(folder):
            folder.mkdir()
            with open(folder / "printed.txt", "w") as file, contextlib.redirect_stdout(file):
                script = load_script(f"experiments/{program}.py")
                assert script.main([*flags, f"--output={folder / 'run'}"]) == 0

        folder = shared(kind, write)
        return TinyRun(folder / "run", flags, (folder / "printed.txt").read_text())

    return run


@pytest.fixture(scope="session")
def write_domain():
    """A function that writes the tiny domain to a folder and returns it."""
    return _write_domain

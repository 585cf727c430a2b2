"""A folder of documents as the data of a run, and its places beside answers."""

import importlib.util
import json

import pytest
from pdf_files import make_pdf
from programs import load_script

from ragjax.models.encoder import load_encoder
from ragjax.runs import DataConfig, EvaluateConfig, RunConfig
from ragjax.runs.data import read_data
from ragjax.runs.options.evaluate import run_options

needs_pdf = pytest.mark.skipif(
    not importlib.util.find_spec("pypdfium2"), reason="needs the [documents] extra"
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "manual"
    (folder / "part").mkdir(parents=True)
    (folder / "cats.md").write_text("# Cats\n\nthe red cat likes fish\n")
    (folder / "part" / "notes.doc").touch()
    return folder


@pytest.fixture
def read(folder, tmp_path, tiny_inputs):
    def read(told=None, **options):
        config = RunConfig(
            data=str(folder), encoder=tiny_inputs["encoder"], data_options=DataConfig(**options)
        )
        return read_data(config, tmp_path / "run", [].append if told is None else told.append)

    return read


@needs_pdf
def test_a_run_reads_documents_and_says_what_it_left_out(read, folder):
    (folder / "part" / "dogs.pdf").write_bytes(make_pdf([["a dog"], ["likes bones"]]))
    told = []
    dataset = read(told)
    assert dataset.name == "manual"
    assert [(p.id, p.source) for p in dataset.corpus] == [
        ("cats.md#0", "cats.md"),
        ("part/dogs.pdf#0", "part/dogs.pdf, page 1"),
        ("part/dogs.pdf#1", "part/dogs.pdf, page 2"),
    ]
    assert told[0] == f"reading 2 documents of {folder}"
    assert told[1] == f"note: {folder}: 3 passages of 2 documents"
    assert told[2].startswith("note: not read: .doc: 1 (part/notes.doc); documents are read from")
    again = []
    assert read(again).corpus.fingerprint == dataset.corpus.fingerprint
    assert again == told[1:]
    assert dataset.notes[:2] == tuple(line.removeprefix("note: ") for line in told[1:3])


def test_questions_and_judgements_beside_documents_are_read(read, folder):
    (folder / "questions.csv").write_text("id,question,answer\nq1,what?,fish\nq2,who?,the cat\n")
    told = []
    dataset = read(told)
    assert dataset.supervision == "answers"
    assert not any("questions.csv" in line for line in told if "not read" in line)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "README.md").write_text("how these were made")
    (folder / "qrels" / "test.tsv").write_text("q\td\tscore\nq2\tcats.md#0\t1\n")
    dataset = read()
    assert [p.id for p in dataset.corpus] == ["cats.md#0"]
    assert dataset.qrels == {"test": {"q2": {"cats.md#0": 1}}}
    assert {split: len(asked) for split, asked in dataset.questions.items()} == {
        "train": 1, "test": 1,
    }  # fmt: skip
    (folder / "queries.tsv").write_text("question\tanswer\n")
    with pytest.raises(ValueError, match="queries.tsv and questions.csv, and each could be"):
        read()


def test_questions_in_folders_of_documents_are_documents(read, folder):
    (folder / "questions").mkdir()
    (folder / "questions" / "faq.md").write_text("Who likes fish?")
    assert [p.id for p in read().corpus] == ["cats.md#0", "questions/faq.md#0"]


def test_judgements_beside_documents_need_questions(folder, tmp_path, tiny_inputs):
    config = RunConfig(
        data=str(folder), qrels=str(tmp_path / "test.tsv"), encoder=tiny_inputs["encoder"]
    )
    with pytest.raises(ValueError, match=r"test.tsv judges questions, and .* with queries=FILE"):
        read_data(config, tmp_path / "run", [].append)


def test_one_document_is_data_too(read, folder, tiny_inputs, tmp_path):
    config = RunConfig(data=str(folder / "cats.md"), encoder=tiny_inputs["encoder"])
    dataset = read_data(config, tmp_path / "run", [].append)
    assert [p.id for p in dataset.corpus] == ["cats.md#0"]


def test_passages_have_as_many_tokens_of_the_encoder_as_asked(read, folder, tiny_inputs):
    words = [f"word{number}" for number in range(300)]
    (folder / "cats.md").write_text(" ".join(words))
    tokenizer = load_encoder(tiny_inputs["encoder"]).tokenizer

    def lengths(**options):
        texts = [passage.text for passage in read(**options).corpus]
        return [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts], texts

    by_default, texts = lengths()
    short, _ = lengths(passage_tokens=40)
    again, repeated = lengths(passage_tokens=40, passage_overlap=20)
    assert " ".join(texts).split() == words
    assert 100 < by_default[0] <= 128 and 30 < short[0] <= 40 and 30 < again[0] <= 40
    assert len(again) > len(short) > len(by_default)
    assert repeated[1].split()[0] in repeated[0].split()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"passage_tokens": 9}, "passage_tokens must be at least 10, got 9"),
        ({"passage_overlap": -1}, "passage_overlap must be at least 0, got -1"),
        (
            {"passage_tokens": 20, "passage_overlap": 11},
            "passage_overlap must be at most half of passage_tokens=20, got 11",
        ),
    ],
)
def test_lengths_that_cut_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**options).check()


def test_an_evaluation_of_documents_cuts_them_as_its_run_did(tmp_path):
    run = RunConfig(data_options=DataConfig(passage_tokens=50, passage_overlap=5))
    options = run_options(EvaluateConfig(run=str(tmp_path)), run).data_options
    assert (options.passage_tokens, options.passage_overlap) == (50, 5)


@needs_pdf
def test_ask_shows_file_and_page(folder, tiny_inputs, tmp_path, capsys):
    (folder / "cats.md").unlink()
    (folder / "dogs.pdf").write_bytes(make_pdf([[], ["the brown dog likes bones"]]))
    flags = [f"--{name}={tiny_inputs[name]}" for name in ("encoder", "lm")]
    flags += [f"--data={folder}", f"--cache={tmp_path / 'cache'}", "--max_new_tokens=3"]
    ask = load_script("experiments/ask.py").main
    question = "what does the brown dog like?"
    assert ask([*flags, "--document_tokens=40", question]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].startswith("from 1. dogs.pdf#0  dogs  [dogs.pdf, page 2] (posterior")
    assert "1. dogs.pdf#0  dogs  [dogs.pdf, page 2]" in shown
    assert ask([*flags, "--document_tokens=40", "--json", question]) == 0
    (document,) = json.loads(capsys.readouterr().out)["documents"]
    assert document["source"] == "dogs.pdf, page 2"


def test_documents_are_encoded_for_a_run_where_their_passages_may_be_kept(
    folder, tiny_inputs, tmp_path, capsys
):
    encode = load_script("experiments/encode.py").main
    flags = [
        f"--encoder={tiny_inputs['encoder']}",
        f"--data={folder}",
        f"--output={tmp_path / 's'}",
    ]
    assert encode(flags) == 2
    assert f"{folder} holds documents: --cache FOLDER says" in capsys.readouterr().err
    assert encode([*flags, f"--cache={tmp_path / 'cache'}"]) == 0
    told = capsys.readouterr().out
    assert "1 passages of 1 documents" in told and "1 embeddings of" in told
    assert sorted(path.name for path in folder.iterdir()) == ["cats.md", "part"]

"""The script that answers questions: every flag, the loop, JSON, colour and bad input."""

import io
import json
import os
import re

import pytest
from programs import load_script

pytestmark = pytest.mark.slow

QUESTION = "what does the red cat like?"


@pytest.fixture(scope="module")
def ask():
    """The script's `main`, on a list of flags."""
    return load_script("experiments/ask.py").main


@pytest.fixture(scope="module")
def flags(tiny_inputs, tmp_path_factory):
    return [
        *(f"--{name}={value}" for name, value in tiny_inputs.items()),
        f"--cache={tmp_path_factory.mktemp('ask')}",
        "--document_tokens=40",
        "--max_new_tokens=4",
        "--documents=3",
        "--no-warm_up",
    ]


@pytest.fixture
def ask_json(ask, flags, capsys):
    """Asks with `--json` and returns the objects on stdout."""

    def run(*more, code=0):
        assert ask([*flags, "--json", *more]) == code
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_words_and_question_are_the_question(ask_json):
    assert ask_json("what", "likes", "7?")[0]["question"] == "what likes 7?"
    assert ask_json("--question", "what likes 7?")[0]["question"] == "what likes 7?"
    assert ask_json("--question=None")[0]["question"] == "None"


def test_json_reads_questions_from_stdin_and_writes_nothing_else(ask_json, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("red cat\n\n  green cat \nelk"))
    objects = ask_json()
    assert [value["question"] for value in objects] == ["red cat", "green cat", "elk"]


def test_a_byte_order_mark_is_no_part_of_a_question(ask_json, monkeypatch):
    text = b"\xef\xbb\xbf red cat\r\n\xef\xbb\xbf\r\nelk\r\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
    assert [value["question"] for value in ask_json()] == ["red cat", "elk"]


def test_the_number_of_documents_of_documents(ask_json):
    assert len(ask_json(QUESTION)[0]["documents"]) == 3
    assert len(ask_json(QUESTION, "--documents=1")[0]["documents"]) == 1
    closed = ask_json(QUESTION, "--documents=0")[0]
    assert closed["documents"] == []
    assert closed["notes"][0].startswith("answered without documents")


def test_more_documents_than_the_corpus_has_reads_all_of_it(ask_json, tmp_path):
    lines = [{"_id": str(n), "title": "", "text": f"the cat likes {n}"} for n in range(2)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    value = ask_json(
        QUESTION, "--documents=9", f"--data={tmp_path}", f"--cache={tmp_path / 'cache'}"
    )[0]
    assert len(value["documents"]) == 2
    assert any("fewer than the 9 asked" in note for note in value["notes"])


def test_a_folder_of_text_files_is_read_again_at_every_start(ask_json, tmp_path, capsys):
    folder = tmp_path / "manual"
    (folder / "part").mkdir(parents=True)
    (folder / "cats.md").write_text("# Cats\n\nthe red cat likes fish\n")
    (folder / "part" / "dogs.txt").write_text("the blue dog likes bones\n")
    flags = (f"--data={folder}", f"--cache={tmp_path / 'cache'}")
    found = ask_json(QUESTION, *flags)[0]["documents"]
    assert sorted(document["id"] for document in found) == ["cats.md#0", "part/dogs.txt#0"]
    (folder / "cats.md").write_text("# Cats\n\nthe red cat likes milk\n")
    found = ask_json(QUESTION, *flags)[0]["documents"]
    assert "the red cat likes milk" in {document["text"] for document in found}
    assert sorted(path.name for path in folder.iterdir()) == ["cats.md", "part"]


def test_what_is_left_out_of_a_folder_is_said(ask, flags, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"man\xfcal")
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.md")).write_text("the red cat likes fish")
    (folder / "a.doc").touch()
    assert ask([*flags, f"--data={folder}", f"--cache={tmp_path}", "--json", QUESTION]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["documents"][0]["id"] == "caf\\xe9.md#0"
    assert "note: not read: .doc: 1 (a.doc); documents are read from .md" in told.err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.doc", "no text to read (not read: .doc: 1 (a.doc); documents are read from .md,"),
        ("deep/empty.txt", "no text to read (1 files have no text: deep/empty.txt)"),
        (None, "no text to read (the folder is empty; documents are read from .md,"),
    ],
)
def test_a_folder_without_text_is_refused_in_one_sentence(
    ask, flags, tmp_path, capsys, name, words
):
    if name:
        (tmp_path / "docs" / name).parent.mkdir(parents=True)
        (tmp_path / "docs" / name).touch()
    else:
        (tmp_path / "docs").mkdir()
    assert ask([*flags, f"--data={tmp_path / 'docs'}", "why?"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'docs'}: {words}")


def test_one_text_file_is_read_and_another_format_refused(ask, ask_json, flags, tmp_path, capsys):
    (tmp_path / "cats.md").write_text("# Cats\n\nthe red cat likes fish\n")
    found = ask_json(QUESTION, f"--data={tmp_path / 'cats.md'}")[0]["documents"]
    assert [document["id"] for document in found] == ["cats.md#0"]
    (tmp_path / "corpus.doc").write_text("id,text\n")
    assert ask([*flags, f"--data={tmp_path / 'corpus.doc'}", "why?"]) == 2
    assert "not read: .doc: 1 (corpus.doc); documents are read from" in capsys.readouterr().err


def test_passages_with_a_title_alone_are_found_and_empty_ones_counted(ask, flags, tmp_path, capsys):
    rows = [{"_id": "t", "title": "the red cat likes fish", "text": ""}, {"_id": "e", "text": ""}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = ("--answer=fish", "--json", QUESTION)
    assert ask([*flags, f"--data={tmp_path}", f"--cache={tmp_path}", *answers]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [document["id"] for document in found["documents"]] == ["t"]
    assert "note: 1 passages without text or title are skipped" in told.err


def test_a_data_set_without_its_corpus_is_no_folder_of_text(ask, flags, tmp_path, capsys):
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "queries.jsonl").write_text("")
    assert ask([*flags, f"--data={tmp_path}", "why?"]) == 2
    assert "corpus.jsonl" in capsys.readouterr().err


def test_the_retriever_chooses_what_is_found(ask_json):
    bm25 = ask_json("elk", "--retriever=bm25")[0]
    assert {document["title"] for document in bm25["documents"]} == {"elk"}
    dense = ask_json("elk", "--retriever=dense")[0]
    hybrid = ask_json("elk", "--retriever=hybrid")[0]
    ids = [[d["id"] for d in value["documents"]] for value in (bm25, dense, hybrid)]
    assert ids[0] != ids[1]
    assert hybrid["answer"] is not None
    nothing = ask_json("zzz", "--retriever=bm25")[0]
    assert "no document shares a word" in nothing["notes"][0]


def test_decode_chooses_how_the_answer_is_written(ask_json):
    apart = ask_json(QUESTION)[0]
    together = ask_json(QUESTION, "--decode=concat")[0]
    assert apart["answer"] != together["answer"]
    assert apart["documents"][0]["p_r"] == pytest.approx(together["documents"][0]["p_r"])


def test_max_new_tokens_limits_the_answer(ask_json):
    value = ask_json(QUESTION, "--max_new_tokens=2")[0]
    assert value["num_tokens"] <= 2


def test_document_tokens_change_what_is_read(ask_json):
    most, few = ask_json(QUESTION)[0], ask_json(QUESTION, "--document_tokens=5")[0]
    assert most["documents"][0]["log_prob"] != few["documents"][0]["log_prob"]


def test_explain_is_the_span(ask_json):
    assert ask_json(QUESTION, "--answer=likes")[0]["span"]["text"] == "likes"
    assert ask_json(QUESTION, "--answer=likes", "--no-explain")[0]["span"] is None


def test_answer_is_explained_instead_of_written(ask_json):
    value = ask_json(QUESTION, "--answer=30")[0]
    assert value["answer"] == "30"
    long = ask_json(QUESTION, "--answer=much longer than that")[0]
    assert "only the first 4 tokens" in long["notes"][0]


def test_embeddings_are_kept_in_the_cache(ask_json, tmp_path, monkeypatch):
    ask_json("a", f"--cache={tmp_path}")
    monkeypatch.setattr("ragjax.runs.indexes.encode_to_store", None)
    assert ask_json("a", f"--cache={tmp_path}")


def test_warm_up_compiles_before_the_first_question_of_several(ask, flags, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    for asked, warm in (([], "--warm_up"), ([], "--no-warm_up"), ([QUESTION], "--warm_up")):
        assert ask([*flags, warm, "--json", *asked]) == 0
        captured = capsys.readouterr()
        assert ("compiling" in captured.err) == (not asked and warm == "--warm_up")
        assert len(captured.out.splitlines()) == 1
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_is_for_terminals_that_want_it(ask, flags, monkeypatch):
    shown = {}
    for name, no_color in (("colour", ""), ("plain", "1")):
        monkeypatch.setenv("NO_COLOR", no_color)
        shown[name] = Terminal()
        monkeypatch.setattr("sys.stdout", shown[name])
        assert ask([*flags, QUESTION]) == 0
    assert "\033[" in shown["colour"].getvalue()
    assert "\033[" not in shown["plain"].getvalue()


def test_a_pipe_gets_no_colour_and_the_answer_first(ask, flags, capsys):
    assert ask([*flags, QUESTION, "--answer=likes"]) == 0
    out = capsys.readouterr().out
    answer, source, figures, *_ = out.splitlines()
    assert answer == "likes"
    assert re.fullmatch(r"from 1\. red-cat  cat \(posterior 0\.\d\d\)", source)
    assert figures.startswith("probability")
    assert "[[likes]]" in out


def test_the_loop_goes_on_after_bad_input_and_ends_at_an_empty_line(
    ask, flags, capsys, monkeypatch
):
    said = iter(["red cat", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "elk \ud800", ""])

    def read(prompt):
        line = next(said)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert ask(flags) == 0
    captured = capsys.readouterr()
    assert captured.out.count("probability") >= 1
    assert "that was no UTF-8 text" in captured.err
    with pytest.raises(StopIteration):
        next(said)


def test_the_loop_ends_with_the_input(ask, flags, capsys, monkeypatch):
    def read(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    assert ask(flags) == 0
    assert "80 documents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run=x"], "give one of --run FOLDER"),
        (["word", "--question=word"], "give the question once"),
        (["--documents=-1"], "--documents must be at least 0, got -1"),
        (["--max_new_tokens=0"], "--max_new_tokens must be at least 1, got 0"),
        (["--document_tokens=-2"], "--document_tokens must be at least 0, got -2"),
        (["--models=adapted", "a"], "--models adapted goes with --run"),
        (["--answer=x"], "--answer explains the answer to one question"),
        (["--data=/nowhere", "a"], "/nowhere"),
        (["--encoder=/nowhere", "a"], "/nowhere"),
        (["--lm=/nowhere", "a"], "/nowhere"),
        (["--question= "], "the question is empty"),
        (["--question="], "the question is empty"),
        ([""], "the question is empty"),
    ],
)
def test_bad_input_is_one_line_and_code_2(ask, flags, capsys, more, message):
    assert ask([*flags, *more]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_run_has_its_own_models(ask, capsys, tmp_path):
    assert ask([f"--run={tmp_path}", "--lm=other", "a"]) == 2
    assert "--lm goes with --data" in capsys.readouterr().err
    assert ask([f"--run={tmp_path}", "a"]) == 2
    assert "no run there" in capsys.readouterr().err


def test_debug_shows_the_traceback(ask, flags):
    with pytest.raises(ValueError, match="--documents must be"):
        ask([*flags, "--documents=-1", "--debug"])

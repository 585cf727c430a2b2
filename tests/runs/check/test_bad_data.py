"""Each fault in a user's files is one sentence with file, line and remedy, and code 2."""

import importlib
import json
import shutil

import pytest
from programs import load_script

SQUAD = {"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": []}]}]}
# Name -> files of the domain (None: removed; with "+": more lines), flags, and what is said.
CORPUS = {
    "b1 folder": ({}, ("--data={folder}x",), ("does not exist; did you mean",)),
    "b1 file": ({"corpus.jsonl": None}, (), ("corpus.jsonl does not exist",)),
    "b2 empty": ({"corpus.jsonl": ""}, (), ("corpus.jsonl: 0 passages", "empty")),
    "b2 nothing": (
        {"corpus.jsonl": None, "queries.jsonl": None, "qrels": None},
        (),
        ("no text to read (the folder is empty", "passages from corpus.jsonl"),
    ),
    "b3 broken": (
        {"corpus.jsonl": '+{"_id": "x", "text": '},
        (),
        ("corpus.jsonl:81: broken JSON",),
    ),
    "b3 NaN": ({"corpus.jsonl": '+{"_id": "x", "text": NaN}'}, (), ("jsonl:81:", "write null")),
    "b3 UTF-16": (
        {"corpus.jsonl": '{"_id": "x"}'.encode("utf-16")},
        (),
        ("corpus.jsonl:1: UTF-16", "iconv -f utf-16 -t utf-8"),
    ),
    "b3 latin 1": (
        {"corpus.jsonl": '+{"_id": "x", "text": "\xe9"}'.encode("latin1")},
        (),
        ("corpus.jsonl:81:", "is not UTF-8; convert the file"),
    ),
    "b3 array in a line": (
        {"corpus.jsonl": "+[1, 2]"},
        (),
        ("corpus.jsonl:81: expected a JSON obj",),
    ),
    "b3 two objects": ({"corpus.jsonl": '+{"_id": "x"} {}'}, (), ("corpus.jsonl:81: broken JSON",)),
    "b3 cut gzip": (
        {"corpus.jsonl": None, "corpus.jsonl.gz": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03ab"},
        (),
        ("damaged gzip file", "copy it again"),
    ),
    "b4 names": (
        {"corpus.jsonl": '{"key": "x", "words": "y"}\n'},
        (),
        (
            "corpus.jsonl:1:",
            "fields found: 'key', 'words'",
            "--data_options.fields='id=NAME,text=NAME'",
        ),
    ),
    "b4 flag": ({}, ("--data_options.fields=txt=body",), ("unknown name 'txt'", "mean 'text'")),
    "b4 form": ({}, ("--data_options.fields=text",), ("expected id=docid,text=contents",)),
    "b5 ids": (
        {"corpus.jsonl": '+{"_id": "red-cat", "text": "again"}'},
        (),
        ("the id 'red-cat' stands in line 1 and again in line 81", "make them unique"),
    ),
    "b6 types": (
        {"corpus.jsonl": '+{"_id": 7, "text": "a"}\n{"_id": "7", "text": "b"}'},
        (),
        ("line 81 and again in line 82", 'the number 1 equals "1"'),
    ),
    "b6 null": ({"corpus.jsonl": '+{"_id": null, "text": "a"}'}, (), ("jsonl:81:", "non-empty")),
    "b7 blank": (
        {"corpus.jsonl": '{"_id": "x", "text": " \\u200b"}\n'},
        (),
        ("0 passages (1 passages",),
    ),
    "b8 long": (
        {"corpus.jsonl": '+{"_id": "x", "text": "' + "long " * 200_001 + '"}'},
        (),
        ("corpus.jsonl:81: the text has 1000005 characters", "cut it into passages"),
    ),
    "b34 surrogate": (
        {"corpus.jsonl": '+{"_id": "x", "text": "\\ud800"}'},
        (),
        ("corpus.jsonl:81:", "half of a surrogate pair", "write the whole character"),
    ),
    "text number": (
        {"corpus.jsonl": '+{"_id": "x", "text": 5}'},
        (),
        ("jsonl:81:", "expected a string"),
    ),
    "title list": (
        {"corpus.jsonl": '+{"_id": "x", "text": "a", "title": [1]}'},
        (),
        ("corpus.jsonl:81: field 'title' is list", "expected a string"),
    ),
    "two corpora": (
        {"corpus.jsonl": None, "corpus.csv": "id,text\na,b\n", "corpus.tsv": "id\ttext\na\tb\n"},
        (),
        ("corpus.csv", "corpus.tsv"),
    ),
    "b9 quotes": (
        {"corpus.jsonl": None, "corpus.csv": 'id,text\na,"b"c\nd,"e"\nf,"g"\n'},
        (),
        ("corpus.csv:2: broken row", "double the quotes"),
    ),
    "b9 cells": (
        {"corpus.jsonl": None, "corpus.csv": "id,text\na,b\nc,d,e\nf,g\n"},
        (),
        ("corpus.csv:3: 3 cells, but 2 columns", "has to stand in quotes"),
    ),
    "b9 prose": (
        {"corpus.jsonl": None, "corpus.csv": "just one line of words\nand one more\n"},
        (),
        ("corpus.csv is neither JSON nor a table", "no separator of tabs, commas"),
    ),
    "b30 pickle": (
        {"corpus.jsonl": None, "corpus.csv": b"\x80\x04\x95abc"},
        (),
        ("corpus.csv is a Python pickle", "write JSON lines or Parquet"),
    ),
    "b33 pdf": (
        {"doc.csv": "%PDF-1.7\n"},
        ("--data={folder}/doc.csv",),
        ("doc.csv is a PDF document",),
    ),
    "parquet": (
        {"corpus.jsonl": None, "corpus.parquet": b"PAR1 not really PAR1"},
        (),
        ("corpus.parquet: damaged", "write or copy it again"),
    ),
}
QUESTIONS = {
    "b3 broken": ({"queries.jsonl": "+{"}, (), ("queries.jsonl:81: broken JSON",)),
    "b4 names": (
        {"queries.jsonl": '{"_id": "q1", "words": "y"}\n'},
        (),
        ("queries.jsonl:1:", "--data_options.fields='query=NAME'"),
    ),
    "b4 two names": (
        {"q.csv": "question,query\na,b\n", "qrels": None},
        ("--queries={folder}/q.csv",),
        ("q.csv:2: no field 'text' (the query)", "--data_options.fields='query=question'"),
    ),
    "b5 ids": (
        {"queries.jsonl": '+{"_id": "q1", "text": "again?"}'},
        (),
        ("the id 'q1' stands in line 2 and again in line 81", "make them unique"),
    ),
    "b7 blank": (
        {"queries.jsonl": '+{"_id": "x", "text": " "}'},
        (),
        ("jsonl:81: the question in field",),
    ),
    "b32 string": (
        {"queries.jsonl": '+{"_id": "x", "text": "a?", "answers": "b"}'},
        (),
        ("queries.jsonl:81: answers is a str", 'for example {"answers": ["31 kb"]}'),
    ),
    "b32 nested": (
        {"queries.jsonl": '+{"_id": "x", "text": "a?", "answers": [["b"]]}'},
        (),
        ("queries.jsonl:81: answers[0] is a list; expected a flat list",),
    ),
    "b32 empty": (
        {"queries.jsonl": '+{"_id": "x", "text": "a?", "answers": [""]}'},
        (),
        ("queries.jsonl:81: answers[0] is empty",),
    ),
    "metadata": (
        {"queries.jsonl": '+{"_id": "x", "text": "a?", "metadata": 1}'},
        (),
        ("queries.jsonl:81: metadata is a int; expected an object",),
    ),
    "b2 none": ({"queries.jsonl": ""}, (), ("queries.jsonl: 0 questions (the file is empty)",)),
    "b1 file": ({}, ("--queries={folder}/querys.jsonl",), ("did you mean", "queries.jsonl")),
    "no passages": (
        {"q.csv": "question,answer\na,b\n"},
        ("--data=", "--queries={folder}/q.csv"),
        ("q.csv is about documents, and none are given; name them with --data=FOLDER",),
    ),
    "squad cut": (
        {"q.json": json.dumps(SQUAD)[:-9]},
        ("--queries={folder}/q.json",),
        ("q.json:1: the list 'data' ends in the middle", "copy it again"),
    ),
    "squad article": (
        {"q.json": '{"data": [{"title": "t"}]}'},
        ("--queries={folder}/q.json",),
        ("q.json:1: data[0]: no field 'paragraphs'; fields found: 'title'",),
    ),
    "squad context": (
        {"q.json": json.dumps(SQUAD).replace('"c"', "5")},
        ("--queries={folder}/q.json",),
        ("q.json:1: data[0].paragraphs[0]: field 'context' is int 5; expected a string",),
    ),
    "dpr passage": (
        {"q.json": '[{"question": "a?", "answers": [], "positive_ctxs": [{"title": "t"}]}]'},
        ("--queries={folder}/q.json",),
        ("q.json:1: positive_ctxs[0]: no field 'text'; fields found: 'title'",),
    ),
    "two files": (
        {"queries.jsonl": None, "queries.csv": "question\na\n", "questions.csv": "question\na\n"},
        (),
        ("queries.csv and questions.csv", "name one with --queries="),
    ),
    "b10 unknown": (
        {"qrels/test.tsv": "+q2\tnowhere\t1"},
        (),
        ("test.tsv: 1 of ", "(passage 'nowhere'), more than 1%", "--data_options.on_unknown=skip"),
    ),
    "b11 no positives": (
        {"qrels/test.tsv": "query-id\tcorpus-id\tscore\nq2\tred-owl\t0\n"},
        (),
        ("test.tsv: no question has a relevant passage (a score above 0)",),
    ),
    "qrels columns": (
        {"qrels/test.tsv": "+q2 red-owl 1"},
        (),
        ("test.tsv:28: 1 columns; expected 3, with tabs: query-id, corpus-id, score",),
    ),
    "qrels score": (
        {"qrels/test.tsv": "+q2\tred-owl\tyes"},
        (),
        ("test.tsv:28: the score is 'yes'",),
    ),
    "qrels twice": (
        {"qrels/test.tsv": "+q2\tred-owl\t2"},
        (),
        ("test.tsv:28:", "1 and 2; keep one"),
    ),
    "qrels empty": ({"qrels/test.tsv": ""}, (), ("test.tsv: 0 rows (expected query-id",)),
    "qrels trec": (
        {"judged.txt": "q2 0 red-owl 1\nq5 red-cow 1\n"},
        ("--qrels={folder}/judged.txt",),
        ("judged.txt:2: 3 columns; expected 4, as in the first line",),
    ),
    "supervision": (
        {"qrels/train.tsv": None, "qrels/dev.tsv": None},
        ("--data_options.supervision=judgements",),
        ("has answers only for train and dev; add qrels/train.tsv",),
    ),
    "leaks": (
        {
            "queries.jsonl": "".join(
                json.dumps({"_id": f"q{n}", "text": "why?", "metadata": {"answers": ["5"]}}) + "\n"
                for n in range(80)
            )
        },
        (),
        ("so none is left to train on; use other questions", "--data_options.leaks keep"),
    ),
}
FAULTS = {f"corpus {k}": v for k, v in CORPUS.items()} | {
    f"questions {k}": v for k, v in QUESTIONS.items()
}


@pytest.fixture
def faulty(tiny_inputs, tmp_path):
    """Makes a domain with a fault; returns the flags of a run on it."""

    def make(files, flags):
        folder = tmp_path / "domain"
        shutil.copytree(tiny_inputs["data"], folder)
        for name, content in files.items():
            path = folder / name
            if content is None:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                continue
            raw = content if isinstance(content, bytes) else content.encode()
            more = raw.startswith(b"+")
            path.write_bytes(path.read_bytes() + raw[1:] + b"\n" if more else raw)
        inputs = tiny_inputs | {"data": str(folder)}
        given = [f"--{name}={value}" for name, value in inputs.items()]
        return [*given, *(flag.format(folder=folder) for flag in flags)]

    return make


@pytest.mark.parametrize(("files", "flags", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_sentence_and_leaves_nothing(
    faulty, tmp_path, capsys, monkeypatch, files, flags, said
):
    def expensive(*_args, **_kwargs):
        raise AssertionError("the run went on to its expensive part")

    if "corpus.parquet" in files:
        pytest.importorskip("pyarrow", reason="needs the [parquet] extra")
    adapt = importlib.import_module("ragjax.runs.adapt")  # its name in the package is a function
    monkeypatch.setattr(adapt, "estimate_cost", expensive)
    given, output = faulty(files, flags), tmp_path / "out"
    script = load_script("experiments/adapt.py")
    fitting = "--language_model.train_layers=1"
    code = script.main([*given, f"--output={output}", fitting])
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert code == 2 and error.startswith("error: ")
    for part in said:
        assert part in error, error
    left = {path.name for path in output.rglob("*")} if output.exists() else set()
    assert not any(name.endswith(".tmp") or "building" in name for name in left)
    assert "config.json" not in left and "metrics.jsonl" not in left
    # A check says the same, and goes on.
    code = load_script("experiments/check.py").main([*given, "--json", "--no-cost", fitting])
    printed = capsys.readouterr()
    if printed.err.startswith("error: "):  # of the flags, before anything is read
        assert code == 2 and all(part in printed.err for part in said) and not printed.out
        return
    found = json.loads(printed.out)
    assert code == found["code"] == 2
    listed = [
        f"{each['file']}:{each['line']}: {each['reason']}" if each["file"] else each["reason"]
        for each in found["problems"]["listed"]
        if each["refused"]
    ]
    assert any(all(part in sentence for part in said) for sentence in listed), listed

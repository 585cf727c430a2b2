"""The default domain exists under the installed versions, and its questions can be answered."""

import csv
import functools
import json
import logging
import sys
import types
from collections import Counter

import numpy as np
import pytest

from ragjax.data import python_docs
from ragjax.data.docstrings import clean_docstring, cut_text


@pytest.fixture(scope="module")
def corpus():
    return python_docs.read_python_docs()


@pytest.fixture(scope="module")
def questions():
    return python_docs.read_questions()


def _package(doc):
    root = doc.split(".")[0]
    return root if root in {"jax", "numpy", "optax", "flax"} else "stdlib"


def test_corpus_is_large_distinct_and_short(corpus):
    assert 2000 <= len(corpus) <= 3000
    assert len({passage.id for passage in corpus}) == len(corpus)
    assert len({passage.text for passage in corpus}) == len(corpus)
    for passage in corpus:
        assert passage.title.startswith(passage.id)
        assert len(passage.title) <= max(python_docs.MAX_TITLE, len(f"{passage.id}(...)"))
        words = passage.text.split(" ")
        assert python_docs.MIN_WORDS <= len(words) <= python_docs.MAX_WORDS
        assert all(words), f"{passage.id} has more than single spaces"


def test_corpus_covers_every_package(corpus):
    counts = Counter(_package(passage.id) for passage in corpus)
    assert all(counts[name] >= 100 for name in ("stdlib", "jax", "numpy", "optax", "flax")), counts


def test_reading_twice_gives_the_same_passages(corpus):
    assert python_docs.read_python_docs() == corpus


@pytest.mark.parametrize(
    ("name", "aliases"),
    [
        ("jax.Array", ["jax.numpy.ndarray", "jax.Array.transpose"]),  # refers to another object
        ("str.find", ["bytes.find", "bytearray.find"]),
        ("numpy.random.Generator.shuffle", ["numpy.random.shuffle"]),
        ("jax.tree.map", []),
        ("jax.numpy.where", ["numpy.where"]),
        ("optax.adam", ["optax.transforms.adam"]),
        ("os.path.join", ["posixpath.join", "os.join"]),
    ],
)
def test_an_object_has_one_name(corpus, name, aliases):
    ids = {passage.id for passage in corpus}
    assert name in ids
    assert ids.isdisjoint(aliases)


def test_only_public_documented_callables_of_a_module_are_read(monkeypatch):
    module = types.ModuleType("made_up")

    def function():
        """function() -> int

        Says one.
        """

    def _private():
        """Says two."""

    def foreign():
        """Says three."""

    class Thing:
        """Says four."""

        @staticmethod
        def static():
            """Says five."""

        @classmethod
        def of_class(cls):
            """Says six."""

        @property
        def value(self):
            """Says seven."""

        def _hidden(self):
            """Says eight."""

    class Heir(Thing):
        def own(self):
            """Says nine."""

    foreign.__module__ = "elsewhere"
    for member in (function, _private, Thing, Heir):
        member.__module__ = "made_up"
    number, instance = 3, functools.partial(function)
    for member in (function, _private, foreign, Thing, Heir):
        setattr(module, member.__name__, member)
    vars(module).update(number=number, instance=instance, zalias=function)
    monkeypatch.setitem(sys.modules, "made_up", module)
    for name, value in {"MODULES": ("made_up",), "MIN_PASSAGES": 1, "MIN_WORDS": 2}.items():
        monkeypatch.setattr(python_docs, name, value)

    expected = {
        "made_up.function()": "Says one.",
        "made_up.Thing()": "Says four.",
        "made_up.Thing.static()": "Says five.",
        "made_up.Thing.of_class(cls)": "Says six.",
        "made_up.Thing.value": "Says seven.",
        "made_up.Heir.own()": "Says nine.",
    }
    assert {p.title: p.text for p in python_docs.read_python_docs()} == expected
    module.__all__ = ["foreign", "instance", "missing"]  # instance: the docstring of its class
    assert [p.id for p in python_docs.read_python_docs()] == ["made_up.foreign"]


def test_warnings_of_read_modules_are_not_passed_on(tmp_path, monkeypatch):
    source = 'import warnings\nwarnings.warn("old")\ndef f():\n    """Says one."""\n'
    (tmp_path / "made_up_noisy.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in {"MODULES": ("made_up_noisy",), "MIN_PASSAGES": 1, "MIN_WORDS": 2}.items():
        monkeypatch.setattr(python_docs, name, value)
    assert [p.id for p in python_docs.read_python_docs()] == ["made_up_noisy.f"]


def test_text_is_the_start_of_the_docstring(corpus):
    text = {passage.id: passage.text for passage in corpus}["numpy.get_include"]
    assert np.get_include.__doc__ is not None
    first = np.get_include.__doc__.strip().splitlines()[0]
    assert text.startswith(first)


def test_every_gold_passage_exists_and_contains_its_answer(corpus, questions):
    missing = python_docs.questions_without_gold(corpus)
    names = "\n".join(f"{question}: {reason}" for question, reason in missing)
    assert len(questions) - len(missing) >= 240, names
    # The shipped questions fit every supported version; a new one must not lose more than a few.
    assert len(missing) <= 0.05 * len(questions), names


def test_questions_are_well_formed(questions):
    assert len({question["id"] for question in questions}) == len(questions)
    for question in questions:
        assert set(question) == {"id", "question", "answers", "doc", "split"}
        assert question["question"].endswith("?")
        assert question["answers"]
        assert all(1 <= len(answer.split()) <= 6 for answer in question["answers"]), question


def test_halves_are_equal_and_about_different_objects(questions):
    docs = {
        split: [question["doc"] for question in questions if question["split"] == split]
        for split in ("train", "test")
    }
    assert abs(len(docs["train"]) - len(docs["test"])) <= 1
    assert len(docs["train"]) + len(docs["test"]) == len(questions) >= 264
    assert len(set(docs["train"] + docs["test"])) == len(questions)
    per_package = {split: Counter(map(_package, names)) for split, names in docs.items()}
    for package, count in per_package["train"].items():
        assert abs(count - per_package["test"][package]) <= 1


def test_most_questions_do_not_name_their_object(questions):
    naming = [q for q in questions if q["doc"].split(".")[-1].lower() in q["question"].lower()]
    assert len(naming) <= 0.25 * len(questions)


def test_unanswerable_questions_are_named_with_their_reason(monkeypatch):
    corpus = [python_docs.Passage("a.b", "a.b()", "It returns the Lowest index, or -1.")]
    rows = [
        {"id": "q1", "doc": "a.b", "answers": ["nothing", "lowest INDEX"]},
        {"id": "q2", "doc": "a.b", "answers": ["-1"]},
        {"id": "q3", "doc": "a.b", "answers": ["owes"]},
        {"id": "q4", "doc": "a.c", "answers": ["-1"]},
    ]
    monkeypatch.setattr(python_docs, "read_questions", lambda: rows)
    missing = dict(python_docs.questions_without_gold(corpus))
    assert set(missing) == {"q3", "q4"}
    assert "owes" in missing["q3"]
    assert "a.c" in missing["q4"]


def test_folder_has_the_beir_layout(tmp_path, corpus, questions, monkeypatch):
    monkeypatch.setattr(python_docs, "read_python_docs", lambda: corpus)
    folder = tmp_path / "new" / "docs"
    python_docs.write_python_docs(folder)
    with open(folder / "corpus.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    written = [(row["_id"], row["title"], row["text"]) for row in rows]
    assert written == [(passage.id, passage.title, passage.text) for passage in corpus]
    with open(folder / "queries.jsonl", encoding="utf-8") as file:
        queries = {row["_id"]: row for row in map(json.loads, file)}
    by_id = {question["id"]: question for question in questions}
    relevant = {}
    for split in ("train", "test"):
        with open(folder / "qrels" / f"{split}.tsv", encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                assert row["score"] == "1"
                assert by_id[row["query-id"]]["split"] == split
                relevant[row["query-id"]] = row["corpus-id"]
    assert set(relevant) == set(queries)
    for name, row in queries.items():
        assert row["text"] == by_id[name]["question"]
        assert row["metadata"]["answers"] == by_id[name]["answers"]
        assert row["metadata"]["doc"] == relevant[name] == by_id[name]["doc"]
    assert [path.name for path in folder.parent.iterdir()] == ["docs"]
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.fixture
def small_domain(monkeypatch):
    corpus = [python_docs.Passage("a.b", "a.b()", "It returns -1.")]
    row = {"id": "pydocs-001", "question": "?", "answers": ["-1"], "doc": "a.b", "split": "test"}
    rows = [row, row | {"id": "pydocs-002", "doc": "gone"}]
    monkeypatch.setattr(python_docs, "read_python_docs", lambda: corpus)
    monkeypatch.setattr(python_docs, "read_questions", lambda: rows)


def test_questions_without_gold_are_left_out_and_counted(tmp_path, small_domain, caplog):
    with caplog.at_level(logging.INFO):
        python_docs.write_python_docs(tmp_path / "docs")
    assert "1 questions" in caplog.text
    assert "pydocs-002" not in (tmp_path / "docs" / "queries.jsonl").read_text()
    assert (tmp_path / "docs" / "qrels" / "test.tsv").read_text().splitlines() == [
        "query-id\tcorpus-id\tscore",
        "pydocs-001\ta.b\t1",
    ]


def test_own_folder_is_replaced_and_other_files_are_kept(tmp_path, small_domain):
    python_docs.write_python_docs(tmp_path / "docs")
    (tmp_path / "docs" / "corpus.jsonl").write_text("damaged")
    python_docs.write_python_docs(tmp_path / "docs")
    assert "a.b()" in (tmp_path / "docs" / "corpus.jsonl").read_text()

    other = tmp_path / "mine"
    other.mkdir()
    for name in ("notes.txt", "queries.jsonl"):
        (other / name).write_text('{"_id": "1"}\n')
        with pytest.raises(ValueError, match="mine already holds other files"):
            python_docs.write_python_docs(other)
        assert (other / name).read_text() == '{"_id": "1"}\n'


def test_failed_writing_leaves_nothing_behind(tmp_path, small_domain, monkeypatch):
    def fail(path, records):
        raise OSError("disk full")

    monkeypatch.setattr(python_docs, "write_jsonl", fail)
    with pytest.raises(OSError, match="disk full"):
        python_docs.write_python_docs(tmp_path / "docs")
    assert list(tmp_path.iterdir()) == []


def test_too_few_docstrings_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(python_docs, "MODULES", ("json", "no_such_module"))
    with pytest.raises(ValueError, match=r"have \d+ docstrings .* expected .* without -OO"):
        python_docs.read_python_docs()


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        ("f(x) -> int\n\nSays ``x``.", "Says x."),
        (
            "Uses :func:`~jax.numpy.where` and `this page <http://a>`_.",
            "Uses jax.numpy.where and this page.",
        ),
        ("Does it.\n\n>>> f(1)\n2\n\nThen more.", "Does it. Then more."),
        ("Does it::\n\n    f(1)\n\nThen more.", "Does it: Then more."),
        (".. note:: Slow.\n\nDoes it.", "Note: Slow. Does it."),
        ("Does it.\n\n.. math::\n\n    x^2\n\nThen more.", "Does it. Then more."),
        (
            "Does it\n\nParameters\n----------\nx : int\n    A number.\n\nExamples\n--------\nOne.",
            "Does it. Parameters: x (int): A number.",
        ),
        (
            "Does it.\n\nExample:\n  One.\n\nReturns:\n  It.\n\nReferences:\n  Me.",
            "Does it. Returns: It.",
        ),
        ("Does it.\n\n.. _a: b\n   c\n\nThen more.", "Does it. Then more."),
        ("Does it.\n\nExample::\n\n    f(1)\n\nThen more.", "Does it. Then more."),
        ("Does it.\n\nReturns:\n", "Does it."),
        ("+----+----+\n| a  | b  |\n+====+====+", "| a | b |"),
        (
            "A **bold** and *slanted* word, but 2**3 and *args.",
            "A bold and slanted word, but 2**3 and *args.",
        ),
        ("- one\n- two\n\n``", "one two. ``"),
        ("-- g(a, b=()) -- h(1). A thing.", "g(a, b=()) -- h(1). A thing."),
        ("-- g(a) -- h(1). A thing.", "A thing."),
    ],
)
def test_markup_becomes_prose(docstring, text):
    assert clean_docstring(docstring, name="f") == text


@pytest.mark.parametrize(
    ("max_words", "kept"),
    [
        (20, "One two. See e.g. Three four. Then: five six."),
        (8, "One two. See e.g. Three four."),
        (7, "One two. See e.g. Three four."),
        (5, "One two."),
        (1, "One"),
    ],
)
def test_text_is_cut_at_a_sentence(max_words, kept):
    text = "One two. See e.g. Three four. Then: five six."
    assert cut_text(text, max_words=max_words) == kept

"""Damaged files of questions and judgements: an error that names the file, or what is left."""

import gzip
import json
import random

import pytest

from ragjax.data import DataError
from ragjax.data.jsonl import RejectedRows, SourceFile
from ragjax.data.qrels import Unknown, read_qrels
from ragjax.data.questions import holds_contexts, read_questions
from ragjax.data.questions.json_items import array_items

CASES = 10_000
SEEDS = {
    "squad.json": '{"version": "2", "data": [{"title": "T\\u00e9", "paragraphs": [{"context": "c",'
    ' "qas": [{"id": "1", "question": "q?", "answers": [{"text": "c"}]}, {"question": "r"}]}]},\n'
    '{"title": null, "paragraphs": []}]}',
    "dpr.json": '[{"question": "q", "answers": ["a"], "positive_ctxs": [{"title": "t", "text": "x",'
    ' "passage_id": 3}], "hard_negative_ctxs": []}, {"question": "r", "answers": []}]',
    "q.jsonl": '{"id": 1, "question": "q", "golden_answers": ["a", "b"], "metadata": {}}\n'
    '{"id": 2, "question": "r", "output": [{"answer": "z"}]}\n',
    "q.csv": 'question,answer,context\n"a, b",x,"c ""d"""\nr,"[""y""]",\n',
}
PIECES = (
    '"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\\",
    "\n",
    "\x00",
    "null",
    "1e999",
    "é",
    "\ud800",
    "\t",
)


def damaged(text, rng):
    """The bytes of a text with some pieces changed, put in, left out or cut off."""
    for _ in range(rng.randrange(1, 4)):
        place, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        middle = rng.choice((rng.choice(PIECES), "", text[:place]))
        text = text[:place] + middle + text[rng.choice((place, end, len(text))) :]
    raw = text.encode("utf-8", rng.choice(("surrogatepass", "replace")))
    if rng.random() < 0.1:
        raw = gzip.compress(raw)[: rng.randrange(5, 200)]
    return raw


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_any_bytes_are_questions_or_an_error_with_the_file(tmp_path, name):
    rng, path, fine = random.Random(0), tmp_path / name, 0
    for _ in range(CASES):
        path.write_bytes(damaged(SEEDS[name], rng))
        kept = []
        try:
            keep = kept.append if holds_contexts([path]) else None
            with RejectedRows(tmp_path / "rejected.jsonl", rng.choice(("stop", "skip"))) as bad:
                options = {"fields": None, "need_ids": False, "keep": keep}
                asked = read_questions({path: None}, bad, [], **options)
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error).strip()
        else:
            fine += 1
            assert all(id == one.question.id and one.question.text for id, one in asked.items())
    assert fine > CASES / 100


@pytest.mark.slow
def test_any_judgements_are_read_or_an_error_with_the_file(tmp_path):
    rng, path, fine = random.Random(0), tmp_path / "judged", 0
    trec = "q0 0 d0 1\nq1 0 d1 0.5\nq2 0 d2 2\n"
    beir = "query-id\tcorpus-id\tscore\n" + trec.replace(" 0 ", "\t").replace(" ", "\t")
    docs, questions = ({f"{kind}{n}" for n in range(3)} for kind in "dq")
    for _ in range(CASES):
        path.write_bytes(damaged(rng.choice((trec, beir)), rng))
        policies = [rng.choice(("stop", "skip")) for _ in range(2)]
        try:
            with RejectedRows(tmp_path / "rejected.jsonl", policies[0]) as rejected:
                policy = Unknown(policies[1], {})
                judged = read_qrels(path, docs, questions, rejected, [], policy)
        except DataError as error:
            assert str(path) in str(error)
        else:
            fine += 1
            assert judged and all(max(grades.values()) > 0 for grades in judged.values())
            assert questions >= judged.keys()
            assert docs >= {doc for grades in judged.values() for doc in grades}
    assert fine > CASES / 20


def _value(rng, depth):
    kind = rng.randrange(6 if depth else 3)
    if kind == 0:
        return "".join(rng.choice('"\\[]{},:\n é\u4e00x') for _ in range(rng.randrange(8)))
    if kind < 3:
        return rng.choice((rng.randrange(100), None, True, -1.5e3))
    if kind == 3:
        return [_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    return {f"k{n}": _value(rng, depth - 1) for n in range(rng.randrange(3))}


@pytest.mark.parametrize("block", [1, 7, 64])
def test_elements_of_an_array_are_those_of_the_whole_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr("ragjax.data.questions.json_items._BLOCK_BYTES", block)
    rng, path = random.Random(block), tmp_path / "whole.json"
    for _ in range(300):
        rows = [{"n": n, "value": _value(rng, 3)} for n in range(rng.randrange(4))]
        whole = {"a": _value(rng, 2), "data": rows, "b": _value(rng, 2)}
        indent = rng.choice((None, 1))
        text = json.dumps(whole, ensure_ascii=rng.random() < 0.5, indent=indent)
        path.write_text(text, "utf-8")
        items = list(array_items(SourceFile(path), "data"))
        assert [json.loads(item.raw) for item in items] == rows
        lines = path.read_bytes().split(b"\n")
        assert all(b"{" in lines[item.number - 1] for item in items)


def test_an_element_that_is_too_large_is_counted_and_not_kept(tmp_path):
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"data": [{"a": "x" * 5000}, {"b": 1}]}))
    first, second = array_items(SourceFile(path), "data", max_bytes=2000)
    assert first.size == len('{"a": ""}') + 5000 and len(first.raw) <= 1000
    assert json.loads(second.raw) == {"b": 1} and second.size == len(second.raw)

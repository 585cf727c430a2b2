"""What the tests of BEIR folders share: small folders of questions and judgements."""

import json

HEADER = "query-id\tcorpus-id\tscore\n"
DOCS = ("d1", "d2", "d3")


def write_folder(folder, queries, qrels, *, docs=DOCS, header=HEADER):
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": id, "title": "", "text": f"text of {id}"} for id in docs]
    for name, content in (("corpus", rows), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    for split, lines in qrels.items():
        text = "".join("\t".join(map(str, line)) + "\n" for line in lines)
        (folder / "qrels" / f"{split}.tsv").write_text(header + text)
    return folder


def question(id, text=None, **extra):
    return {"_id": id, "text": text or f"question {id}?", **extra}


SPLITS = {"train": [("q1", "d1", 1)], "dev": [("q2", "d2", 2)], "test": [("q3", "d3", 1)]}
QUERIES = [question("q3"), question("q1"), question("q2"), question("q9")]


def many(count):
    docs = [f"d{n}" for n in range(count)]
    return (
        docs,
        [question(f"q{n}") for n in range(count)],
        [(f"q{n}", f"d{n}", 1) for n in range(count)],
    )

"""What the tests of the report share: a reader of pages, hostile text, figures, questions."""

import html.parser

HOSTILE = (
    "<script>alert(1)</script>",
    "a & b \" c ' d",
    "</style></title><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "nul\x00bell\x07del\x7fc1\x85",
    "lone \ud800 surrogate \udfff",
    "x" * 500,
    "\u202edesrever\u2066 isolate",
    "\ufffe\uffff nonchar",
    "العربية 漢字 👩🏽‍🔬 e\u0301",
    "&lt;b&gt; &amp; already",
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(html.parser.HTMLParser):
    """Checks the nesting of a page and collects its text, tags and attributes."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.errors = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def read(source):
    reader = Reader()
    reader.feed(source)
    reader.close()
    assert not reader.errors and not reader.open
    return reader


def cell(value, low=None, high=None):
    return {
        "value": value,
        "low": value - 0.1 if low is None else low,
        "high": value + 0.1 if high is None else high,
    }


def difference(metric, value, low, high, system="after", baseline="before", p=0.01):
    return {
        "metric": metric, "system": system, "baseline": baseline,
        "value": value, "low": low, "high": high, "p_value": p, "n": 40,
    }  # fmt: skip


METRICS = {
    "before": {"recall@5": cell(0.564), "f1": cell(0.3), "answer_nll": cell(3.1), "n": 40},
    "after": {"recall@5": cell(0.708), "f1": cell(0.31), "answer_nll": cell(2.4), "n": 40},
}
DIFFERENCES = [
    difference("recall@5", 0.144, 0.108, 0.182),
    difference("f1", 0.01, -0.02, 0.04, p=0.5),
    difference("answer_nll", -0.7, -0.9, -0.5, p=0.0001),
]


def line(id, before, after, *, f1=(0.0, 0.0), question="who?"):
    """A line of predictions.jsonl; `before` and `after` are lists of documents."""
    systems = {
        name: {
            "prediction": "x",
            "doc_ids": docs,
            "doc_scores": [1.0 - 0.1 * place for place in range(len(docs))],
            "metrics": {"f1": value, "mrr@10": 0.0},
        }
        for name, docs, value in (("before", before, f1[0]), ("after", after, f1[1]))
    }
    return {"id": id, "question": question, "answers": ["Paris"], "systems": systems}


def explained(**changed):
    candidates = [
        {"doc_id": "g", "relevant": True, "target": 0.75, "before": 0.25, "after": 0.5,
         "posterior": 0.9},
        {"doc_id": "<d>", "relevant": False, "target": 0.25, "before": 0.75, "after": 0.5,
         "posterior": 0.1},
    ]  # fmt: skip
    return {
        "questions": [{"question": "q?", "answers": ["a"], "candidates": candidates}],
        **changed,
    }

"""The report of a whole run: its files, what it repeats, and how a browser shows it."""

import dataclasses
import html
import html.parser
import json
import os
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from ragjax.data import read_beir
from ragjax.evaluation.report.html import number
from ragjax.evaluation.report.questions import PassageText
from ragjax.runs.adapt import adapt
from ragjax.runs.folder import add_seconds, read_cost
from ragjax.runs.report.page import corpus_lookup, data_name, write_report
from ragjax.runs.saved import open_run
from ragjax.training.loop import StopFlag

VIEWS = ("target", "before", "after", "posterior")
# What a corpus may hold that a page must survive.
HOSTILE = (
    "<script>document.title='broken'</script></style></textarea>\" onload=\"x' & \u202edesrever"
    " \x00\x07 \ud800 " + "W" * 400 + " العربية مرحبا 漢字かな 👩🏽‍🔬"
)
CHROMIUM = next(
    filter(
        None,
        map(
            shutil.which,
            ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome"),
        ),
    ),
    None,
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """The folder of a run."""
    return Path(shutil.copytree(tiny_run("adapt").folder, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def config(finished):
    """Options of the run."""
    return dataclasses.replace(open_run(finished).config, output=str(finished))


class Reader(html.parser.HTMLParser):
    """Checks that tags are balanced and keeps text and attributes."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.attributes, self.text = [], [], ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.mark.slow
def test_the_report_holds_every_number_and_refers_to_nothing(finished):
    shown = Reader((finished / "report.html").read_text("utf-8"))
    metrics = json.loads((finished / "metrics.json").read_text())
    others = json.loads((finished / "differences.json").read_text())["other_systems"]
    for system, summary in (metrics | others).items():
        assert system in shown.text
        for name, cell in summary.items():
            if name not in ("n", "applicable"):
                assert name in shown.text
                low, high = number(cell["low"]), number(cell["high"])
                assert f"{number(cell['value'])}[{low}, {high}]" in shown.text
    assert not [value for name, value in shown.attributes if name in ("src", "action", "style")]
    assert all(value.startswith("#") for name, value in shown.attributes if name == "href")
    for title in ("What changed", "Questions won and lost", "Retriever and language model",
                  "Training curves", "Cost", "Options"):  # fmt: skip
        assert title in shown.text
    assert "documents in the corpus80" in shown.text
    assert "documents encoded for the indexes before and after240" in shown.text
    assert re.search("Better|Worse|No measurable change", shown.text)
    reason = json.loads((finished / "served.json").read_text())["reason"]
    assert reason[1:] in shown.text
    assert re.search(r"[1-9]\d* of 10 questions won|[1-9]\d* lost", shown.text)


@pytest.mark.slow
def test_what_is_explained_adds_up(finished, config):
    explained = json.loads((finished / "explained.json").read_text())
    questions = explained["questions"]
    assert 4 <= len(questions) <= 6
    changed = 0.0
    for question in questions:
        columns = {
            name: np.array([one[name] for one in question["candidates"]])
            for name in (*VIEWS, "log_prob")
        }
        for name in VIEWS:
            assert columns[name].sum() == pytest.approx(1, abs=1e-3)
        # The target follows the language model; the posterior is p_R times p_LM, normalised.
        assert (np.argsort(columns["target"]) == np.argsort(columns["log_prob"])).all()
        joint = columns["after"] * np.exp(columns["log_prob"])
        assert columns["posterior"] == pytest.approx(joint / joint.sum(), abs=2e-3)
        changed += np.abs(columns["after"] - columns["before"]).sum()
        relevant = {c["doc_id"] for c in question["candidates"] if c["relevant"]}
        assert relevant <= set(explained["gold"][question["id"]])
        assert {c["doc_id"] for c in question["candidates"]} <= set(explained["passages"])
    assert changed > 0.01
    assert explained["settings"]["temperature"] == config.retriever.temperature


@pytest.mark.slow
def test_p_of_the_retriever_is_the_softmax_of_the_scores_that_were_written(finished, config):
    explained = json.loads((finished / "explained.json").read_text())
    lines = map(json.loads, (finished / "predictions.jsonl").read_text().splitlines())
    systems = {line["id"]: line["systems"] for line in lines}
    checked = 0
    for question in explained["questions"]:
        for name in ("before", "after"):
            system = systems[question["id"]][name]
            scores = dict(zip(system["doc_ids"], system["doc_scores"], strict=True))
            listed = [c for c in question["candidates"] if c["doc_id"] in scores]
            logits = 20.0 * np.array([scores[c["doc_id"]] for c in listed])
            shares = np.exp(logits - logits.max())
            given = np.array([c[name] for c in listed])
            assert given / given.sum() == pytest.approx(shares / shares.sum(), abs=1e-3)
            checked += len(listed) > 1
    assert checked


@pytest.mark.slow
def test_cut_while_explaining_and_repeated_the_run_ends_with_the_same_bytes(finished, config):
    names = ("report.html", "explained.json", "cost.json", "metrics.json")
    before = {name: (finished / name).read_bytes() for name in names}
    scores = finished / "scores" / "explained.jsonl"
    known = scores.read_bytes()
    scores.write_bytes(known[: len(known) // 2])  # with a torn line in the middle
    (finished / "explained.json").unlink()
    adapt(config, stop=StopFlag(), log=lambda line: None)
    assert {name: (finished / name).read_bytes() for name in names} == before


@pytest.mark.slow
def test_the_report_can_be_drawn_again_from_the_folder_alone(finished, config, tmp_path):
    before = (finished / "report.html").read_bytes()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in os.listdir(finished):
        if (finished / name).is_file() and name not in ("report.html", "run.lock"):
            shutil.copy(finished / name, copy)
    path = write_report(copy, title=f"Adaptation to {data_name(config.data)}")
    assert path.read_bytes() == before


def test_a_folder_with_nothing_or_with_damaged_files_still_gives_a_page(tmp_path):
    shown = Reader(write_report(tmp_path, title="nothing").read_text())
    assert "nothing to say" in shown.text and "cannot be read" not in shown.text
    (tmp_path / "metrics.json").write_text("{torn")
    (tmp_path / "config.json").write_text("[1]")
    (tmp_path / "differences.json").write_text('{"differences": [1, null, {}]}')
    (tmp_path / "explained.json").write_text('{"questions": [{}], "passages": {"a": 1}}')
    (tmp_path / "metrics.jsonl").write_text('{"stage": "lm", "step": 0, "loss": 1.5}\nbroken\n{"to')
    (tmp_path / "predictions.jsonl").write_bytes(b"\xff\xfe\n")
    (tmp_path / "cost.json").write_text("null")
    shown = Reader(write_report(tmp_path, title="damaged").read_text())
    for part in (
        "metrics.json cannot be read", "config.json holds no JSON object",
        "metrics.jsonl: 1 lines cannot be read", "predictions.jsonl: 1 lines cannot be read",
        "Language model: 1 steps",
    ):  # fmt: skip
        assert part in shown.text


def test_other_evaluations_are_shown_where_their_files_lie(tmp_path):
    cell = {"value": 0.421, "low": 0.3, "high": 0.5}
    row = {"low": 0, "high": 1, "confidence": 0.5, "accuracy": 0.4, "count": 11}
    files = {
        "calibration": {"after": {"confidence": {"n": 11, "ece": cell, "reliability": [row]}}},
        "robustness": {"n": 1, "conditions": {"gold only": {"f1": cell}},
                       "same_as_closed_book": {"value": 0.1, "low": 0.0, "high": 0.2}},
        "support": {"after": {"supported": cell}},
        "dev": {"systems": {"after": {"marginal_nll": cell}}, "differences": []},
        "config": {
            "config": {
                "data": "/a/b/c", "encoder": "pip:some==1", "lm": "/models/big/one", "output": "no",
                "objective": {"marginal": "token", "marginal_weight": 1.0, "lsr_weight": 0.5,
                              "lm_weight": 0.0},
            }
        },
    }  # fmt: skip
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    text = Reader(write_report(tmp_path, title="t").read_text()).text
    for part in (
        "Calibration", "11 answers", "Robustness", "gold only", "supported", "Dev questions",
        "marginal_nll", "data b/c", "encoder some==1", "language model big/one",
        "objective 1 × marginal likelihood (token) + 0.5 × LSR",
    ):  # fmt: skip
        assert part in text
    assert text.count(".421") == 4 and "output" not in text


def test_texts_and_judgements_may_come_from_the_caller(tmp_path, tiny_inputs):
    data = Path(tiny_inputs["data"])
    corpus = read_beir(data, cache=tmp_path / "cache").corpus
    lookup = corpus_lookup(corpus)
    assert lookup("red-cat") == PassageText("cat", "the red cat likes 0")
    assert lookup("no such id") is None
    systems = {
        name: {"prediction": said, "doc_ids": docs, "doc_scores": [0.9, 0.1], "metrics": {"f1": f1}}
        for name, said, docs, f1 in (
            ("before", "9", ["red-dog", "red-cat"], 0.0),
            ("after", "0", ["red-cat", "red-dog"], 1.0),
        )
    }
    line = {"id": "q0", "question": "what?", "answers": ["0"], "systems": systems}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "metrics.json").write_text('{"before": {}, "after": {}}')
    source = write_report(tmp_path, title="t", lookup=lookup, gold={"q0": ["red-cat"]}).read_text()
    assert "the red cat likes <mark>0</mark>" in source and "rank 2 → 1" in source


def test_the_data_are_named_by_their_last_folders():
    assert data_name("/home/me/data/covid-qa/tiny") == "covid-qa/tiny"
    assert data_name("../squad") == "squad"
    assert data_name("") == "the Python documentation"


def test_seconds_add_up_over_the_calls_until_the_report_is_written(tmp_path):
    add_seconds(tmp_path, "lm", 1.5)
    add_seconds(tmp_path, "lm", 2.0)
    add_seconds(tmp_path, "<b>", 1.0)
    cost = read_cost(tmp_path)
    assert cost["seconds"] == {"lm": 3.5, "<b>": 1.0}
    assert 2**20 < cost["peak_memory_bytes"] < 2**45
    text = Reader(write_report(tmp_path, title="t").read_text()).text
    assert "4.5 s" in text and "78 %" in text and "<b>" in text
    add_seconds(tmp_path, "lm", 9.0)
    assert read_cost(tmp_path) == cost


@pytest.fixture(scope="module")
def hostile_page(finished, tmp_path_factory):
    """A report of the run whose every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("metrics.json", "differences.json", "metrics.jsonl", "config.json"):
        shutil.copy(finished / name, folder)
    lines = []
    for text in (finished / "predictions.jsonl").read_text("utf-8").splitlines():
        line = json.loads(text)
        line |= {"question": HOSTILE, "answers": [HOSTILE]}
        for system in line["systems"].values():
            system["prediction"] = HOSTILE
        lines.append(json.dumps(line))
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    explained = json.loads((finished / "explained.json").read_text("utf-8"))
    for question in explained["questions"]:
        question |= {"question": HOSTILE, "answers": [HOSTILE]}
    for passage in explained["passages"].values():
        passage |= {"title": HOSTILE, "text": HOSTILE}
    (folder / "explained.json").write_text(json.dumps(explained))
    return write_report(folder, title=HOSTILE)


def browse(tmp_path, target, *flags):
    """Runs headless Chromium on a file; returns what it printed on stdout and on its console."""
    result = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--allow-file-access-from-files", "--enable-logging=stderr", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", *flags, target.as_uri(),
        ],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    logged = result.stderr.decode("utf-8", "replace").splitlines()
    return result.stdout.decode("utf-8"), [line for line in logged if "CONSOLE" in line]


PROBE = """<!DOCTYPE html><meta charset="utf-8"><iframe src="{page}" width="{width}" height="800">
</iframe><pre id="found"></pre><script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement
  const opened = [...page.querySelectorAll("details")]
  opened.forEach(one => one.open = true)
  const style = page.defaultView.getComputedStyle(page.body)
  const wide = [...page.querySelectorAll("body *")].filter(one =>
    !one.closest(".scroll") && one.getBoundingClientRect().right > {width} + 1)
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.scrollWidth, height: root.scrollHeight, color: style.backgroundColor,
    title: page.title, wide: wide.map(one => one.tagName + "." + one.className),
    scripts: page.scripts.length,
    small: [...page.querySelectorAll("svg text")].filter(
      one => one.getBoundingClientRect().height < 9).length,
  }})
}}
</script>"""


def probe(tmp_path, page, *, width, dark=False):
    wrapper = tmp_path / "probe.html"
    wrapper.write_text(PROBE.format(page=page.as_uri(), width=width), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    printed, console = browse(tmp_path, wrapper, "--dump-dom", "--virtual-time-budget=5000", scheme)
    assert console == []
    found = re.search(r'<pre id="found">(.*?)</pre>', printed, re.DOTALL)
    return json.loads(html.unescape(found[1]))


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_without_errors_or_sideways_scrolling(
    finished, hostile_page, tmp_path, width
):
    for page in (finished / "report.html", hostile_page):
        found = probe(tmp_path, page, width=width)
        assert found["wide"] == [] and found["width"] <= width
        assert found["height"] > 1500 and found["scripts"] == 0 and found["small"] == 0
        assert "broken" != found["title"]


@needs_chromium
@pytest.mark.slow
def test_dark_and_light_follow_the_system(finished, tmp_path):
    page = finished / "report.html"
    colors = [probe(tmp_path, page, width=360, dark=dark)["color"] for dark in (False, True)]
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors]
    assert brightness[0] > 3 * 200 and brightness[1] < 3 * 60


@needs_chromium
@pytest.mark.slow
def test_the_page_is_not_blank(finished, tmp_path):
    shot = tmp_path / "shot.png"
    _, console = browse(
        tmp_path, finished / "report.html", f"--screenshot={shot}", "--window-size=800,1000"
    )
    assert console == []
    content = shot.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[place : place + 4], "big") for place in (16, 20))
    assert (width, height) == (800, 1000)
    chunks, place = b"", 8
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] == b"IDAT":
            chunks += content[place + 8 : place + 8 + size]
        place += size + 12
    pixels = zlib.decompress(chunks)
    stride = len(pixels) // height
    rows = {pixels[start : start + stride] for start in range(0, len(pixels), stride)}
    assert len(rows) > 200  # a blank page has two: the first, and all below it
